"""Finetuning: which parameters are trained, and low-rank adapters."""
