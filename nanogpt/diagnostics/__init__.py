"""Diagnostics: network health, reference runs, races, overlap of samples with the training text."""
