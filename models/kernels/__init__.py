"""Decoding's own compiled code: step.c, built where it runs, and weights laid out as it reads them."""
