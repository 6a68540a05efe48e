"""Decoding's own compiled code: decode_step.c, built where it runs, and weights laid out as it reads them."""
