"""`sharpwatch doctor`."""
