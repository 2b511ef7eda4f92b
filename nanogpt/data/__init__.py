"""Token files, the order in which they are read, and batches."""
