"""A KV cache of one byte per value and one scale per row."""
