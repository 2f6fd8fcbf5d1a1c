"""Weight perturbations around the outer loss and the optimiser's step. One file a perturbation."""
