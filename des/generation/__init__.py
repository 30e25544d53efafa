"""Drawing images with a pipeline, with or without a defence."""
