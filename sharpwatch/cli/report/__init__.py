"""`sharpwatch report`: what happened in a run, as one HTML file."""
