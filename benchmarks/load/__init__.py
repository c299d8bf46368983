"""What the daemon takes: simulated agents on the real protocol, and the same streams without a daemon beside them."""
