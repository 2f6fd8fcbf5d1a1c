"""The paper's tables and figures: what is in them, what has to be run for them, and how ours stands beside."""
