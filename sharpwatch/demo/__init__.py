"""A real run to watch: small transformers on real text, with faults to inject."""
