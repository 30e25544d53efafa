"""Detectors: one file each, all with the interface of `des.scoring.Detector`."""
