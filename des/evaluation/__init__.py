"""Detectors and metrics, and the loop that applies them to images."""
