"""What makes or chooses weights."""
