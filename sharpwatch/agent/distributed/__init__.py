"""Several ranks: rendezvous, topology, aggregation and two-phase commit."""
