"""Everything optional about a training run, one file each."""
