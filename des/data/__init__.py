"""Prompts, prompt sets, images, and the records of image folders."""
