"""The state of each run."""
