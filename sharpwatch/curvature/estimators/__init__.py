"""One curvature estimator per module."""
