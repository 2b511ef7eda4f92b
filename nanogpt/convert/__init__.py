"""Import and export of weights: Hugging Face folders, nanoGPT's ckpt.pt."""
