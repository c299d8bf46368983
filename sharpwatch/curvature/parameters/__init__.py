"""Parameters as shards, blocks and vectors."""
