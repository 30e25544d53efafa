"""The shared utils module: what every script and room uses. It imports nothing else of `des`."""
