"""Text generation: batched decoding with a KV cache, sampling, and CPU kernels."""
