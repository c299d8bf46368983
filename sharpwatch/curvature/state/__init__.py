"""Keeping a probe from changing the model: isolation, and snapshots of its state."""
