"""From draws to estimates with standard errors; sketches."""
