"""One estimator of curvature per module."""
