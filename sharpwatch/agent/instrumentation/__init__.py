"""Hooks on the model and its optimizers."""
