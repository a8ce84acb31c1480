"""Planners, variants of plans, and estimates of training memory."""
