"""Measuring: loss, and how close each member is to the full model."""
