"""Text from a model: batched generation with a KV cache, sampling, and kernels for CPUs."""
