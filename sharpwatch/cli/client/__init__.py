"""The operator's channel to the daemon."""
