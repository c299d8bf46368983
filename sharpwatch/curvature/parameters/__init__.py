"""A model's parameters as shards, as norms and as vectors."""
