"""How vectors become codes: one module a method, a quantizer and its options class, found by being here.

A new method is a new module. What all share is ``base`` (what a quantizer is), ``mixed`` and ``per_head`` (several in
one layer) and ``lloyd_max`` (codebooks); the arithmetic and the byte formats are ``veloxquant_kernels``'s. A quantizer
knows neither caches nor observers. What one writes stands in saved caches and in the exact baselines.
"""
