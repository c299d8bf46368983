"""When probes run, how, and what they may cost."""
