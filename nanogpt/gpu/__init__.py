"""GPU features: CUDA graphs, automatic batch size, attention kernels."""
