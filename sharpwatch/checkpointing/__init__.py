"""Checkpoints, and data loaders that resume."""
