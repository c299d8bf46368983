"""Generated from protos/sharpwatch/v1 by `make proto`."""
