"""Estimates before a run: memory, training time, and communication volume over many GPUs."""
