"""One file a version of the schema, from the ninth on."""
