"""Learning rates from measured curvature against rates that are tuned by hand."""
