"""Baselines, detectors and alerts."""
