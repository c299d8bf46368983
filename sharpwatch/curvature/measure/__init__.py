"""`sharpwatch.measure`: one look at a checkpoint."""
