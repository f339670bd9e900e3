"""The built-in demo model's files."""
