"""Detectors: one file each, all with the interface of `base.Detector`."""
