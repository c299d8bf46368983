"""The commands, and the group that they are in."""
