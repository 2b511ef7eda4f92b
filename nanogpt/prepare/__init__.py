"""Prepare datasets from text: readers, encoding, shards. Used by the programs in data/."""
