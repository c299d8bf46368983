"""From the trainer to the daemon: pipe, courier process, spool, stream."""
