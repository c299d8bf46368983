"""`sharpwatch.measure`: measures the sharpness of a model once, without a daemon."""
