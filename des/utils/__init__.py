"""Utilities for all scripts and packages; they import nothing else of `des`."""
