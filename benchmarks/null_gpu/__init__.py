"""A stand-in for the CUDA runtime, cuBLAS and NCCL: torch's CUDA build runs on it without a GPU."""
