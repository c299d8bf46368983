"""The fault laboratory: small trainings with a known fault, and healthy ones, for detectors to be judged on."""
