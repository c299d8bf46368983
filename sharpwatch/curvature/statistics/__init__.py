"""Estimates with standard errors, pooling of draws, and sketches."""
