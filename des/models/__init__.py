"""Model families, loading, text encoders, checkpoints and pipelines."""
