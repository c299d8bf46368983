"""What the daemon does under load."""
