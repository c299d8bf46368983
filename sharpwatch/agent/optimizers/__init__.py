"""What the agent must know about each kind of optimizer."""
