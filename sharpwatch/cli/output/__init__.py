"""How the commands print: numbers, tables, and JSON."""
