"""Commands: learning-rate multipliers and rollbacks."""
