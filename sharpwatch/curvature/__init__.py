"""Curvature estimators: probes, sketches and the statistics on them. Pure torch, no I/O."""
