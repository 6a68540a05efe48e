"""A corpus becomes the batches of any step: documents, tokenizer, tokens on disk, rows, loader."""
