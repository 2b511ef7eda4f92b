"""Token files, samplers and batches."""
