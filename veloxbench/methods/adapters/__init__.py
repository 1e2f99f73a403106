"""Adapters: how the caches of other projects are built, one module a distribution, named as it is.

A module imports nothing of its peer at the top: its factories do, in the peer's own environment.
"""
