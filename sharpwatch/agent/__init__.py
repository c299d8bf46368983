"""What runs in the trainer, and the courier beside it."""
