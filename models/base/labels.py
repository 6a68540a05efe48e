"""Labels of next-token prediction."""

IGNORE_INDEX = -100
"""The label of a position without a next token: torch's and Hugging Face's losses leave it out too."""
