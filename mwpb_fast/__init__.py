"""Adversarial training with margin-weighted perturbation budgets, at full speed."""
