"""Modules of scripts/benchmark.py: one per subcommand, and shared ones."""
