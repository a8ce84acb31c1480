"""Planners, variants of plans, and the memory that a training takes."""
