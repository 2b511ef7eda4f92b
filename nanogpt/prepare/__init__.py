"""Text to a dataset: readers, tokens, shards. The programs of data/ are made of it."""
