"""Decoding: plain and speculative, with the nested draft."""
