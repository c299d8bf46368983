"""What keeps the agent from harming the training run."""
