"""Isolation of a probe from the model it runs on, and snapshots of the model's state."""
