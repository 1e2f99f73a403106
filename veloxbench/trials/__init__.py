"""The gate's own experiments: series of timings of the same code, error rates, damages of known size, and their pages.
They stand behind ``veloxbench trial``; no other room imports them.
"""
