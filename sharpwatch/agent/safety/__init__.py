"""Keeps the agent from harming the training run: exceptions, signals and time."""
