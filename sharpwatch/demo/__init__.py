"""A real run to look at: small transformers on real text, with faults to inject."""
