"""sharpwatch in other people's training loops; each module needs its framework, and is imported by name."""
