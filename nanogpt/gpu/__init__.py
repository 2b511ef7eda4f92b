"""What a GPU is given: recorded steps, as much as fits, and its attention kernels."""
