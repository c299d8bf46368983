"""`sharpwatch measure`."""
