"""Finetuning: parameter freezing and LoRA adapters."""
