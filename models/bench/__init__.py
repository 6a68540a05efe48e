"""Engines side by side on the same weights, in one process; see run.py."""
