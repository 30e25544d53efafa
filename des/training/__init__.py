"""DES training: losses, codebook, targets, and the training loop."""
