"""The shared code of DES, Distorting Embedding Space (arXiv 2501.18877)."""
