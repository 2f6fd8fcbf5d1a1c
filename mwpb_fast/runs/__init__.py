"""A run's folder: its checkpoints, its records, its pictures, and how it is gone on with."""
