"""Attacks: pure functions from images to adversarial images. One file an attack."""
