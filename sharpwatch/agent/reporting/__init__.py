"""From a step's record to messages for the daemon."""
