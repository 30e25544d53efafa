"""Drawing images with a pipeline, original or defended."""
