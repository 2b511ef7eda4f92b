"""Weights of other programs, in and out: Hugging Face's folders, nanoGPT's ckpt.pt."""
