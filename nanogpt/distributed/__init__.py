"""Distributed training: rendezvous, process group, parameter layouts, FSDP/DDP, hang detection."""
