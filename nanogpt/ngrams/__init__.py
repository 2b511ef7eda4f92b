"""n-gram embeddings: hashed tables beside the token embedding, and their training."""
