"""From alerts to decisions and commands."""
