"""The checks of `sharpwatch doctor`."""
