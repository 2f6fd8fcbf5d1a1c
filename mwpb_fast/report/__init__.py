"""One run, or several beside one another, as one HTML file that needs nothing else to be read."""
