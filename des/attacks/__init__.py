"""Attacks on a protected pipeline: objectives, judging of candidates, records, and the driver of the scripts in scripts/attacks/."""
