"""Formatting for people and machines."""
