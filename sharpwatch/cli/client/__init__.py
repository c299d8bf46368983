"""The operator's connection to the daemon."""
