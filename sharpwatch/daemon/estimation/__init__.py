"""From samples to estimates with standard errors."""
