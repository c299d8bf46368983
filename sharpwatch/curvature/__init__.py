"""The mathematics: probes, sketches, estimates. Pure torch, no I/O."""
