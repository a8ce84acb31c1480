"""Preprocessed data: record and check their raw files and settings, share them between plans, and complete them."""
