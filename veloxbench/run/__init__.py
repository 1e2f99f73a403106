"""Carrying a grid out: from a profile to a plan, from a plan to records, with one loop for the command line and for
pytest, an estimate, progress, and every record safe on disk the moment it ends. ``use`` stands beside
that: a model as people use it, through mlx-lm's own commands.
"""
