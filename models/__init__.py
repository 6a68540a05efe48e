"""What you can do with weights that you have."""
