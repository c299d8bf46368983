"""What agents send: checked, decoded and queued."""
