"""Recorded runs and logs of other trainers, and what the detectors find in them."""
