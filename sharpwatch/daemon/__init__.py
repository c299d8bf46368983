"""The daemon: ingest, estimate, detect, decide, command."""
