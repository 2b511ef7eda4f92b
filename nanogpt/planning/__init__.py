"""What a run needs before it begins, on paper: memory, hours, and what many GPUs send."""
