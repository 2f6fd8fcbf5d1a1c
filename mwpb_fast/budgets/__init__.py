"""Radius of every sample's ball, from the logits of its natural image. One file a budget."""
