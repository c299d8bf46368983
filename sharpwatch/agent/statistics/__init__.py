"""The tap: statistics read at every step."""
