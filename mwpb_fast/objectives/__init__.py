"""Training objectives: an inner loss for the attack, an outer loss for the weights. One file an objective."""
