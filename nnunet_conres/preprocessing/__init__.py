"""Preprocessed data: from which raw files and settings they were made, checked, shared and completed."""
