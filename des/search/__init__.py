"""Search for token sequences and input embeddings; adversarial training and attacks use it."""
