"""n-gram embeddings: hashed tables beside the token embedding, and the optimizer of their rows."""
