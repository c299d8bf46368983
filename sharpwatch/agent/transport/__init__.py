"""Carries samples from the trainer to the daemon, and commands back, by way of a courier process."""
