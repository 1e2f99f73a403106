"""Codes under a transform: what turns coefficients into resident bytes.

``deadzone`` turns coefficients into integers of one step, ``entropy`` integers into words by static
tables; ``fixed`` codes coefficients at widths of their own, each token apart. The native path compiles ``codes.cpp``.
"""
