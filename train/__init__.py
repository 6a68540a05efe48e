"""Train, search and order: commands that make or choose weights."""
