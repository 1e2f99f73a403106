"""What is measured: the registry of caches under test and the factories that enter it. A method of this project's own
implementation is derived from ``veloxquant_mlx``'s list; a foreign one is a file here or an entry point.
"""
