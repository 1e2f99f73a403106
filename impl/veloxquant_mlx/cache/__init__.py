"""Where codes live: the caches that mlx-lm uses, whatever the method.

``base`` configures and builds them; ``spec`` says how a layer is stored, ``storage`` and ``outliers`` hold its arrays,
``sequence`` stores, decodes, takes back and counts its tokens, ``batch`` aligns several sequences, ``packed`` is both
for mlx-lm, ``fused`` reads packed arrays in attention, ``persistence`` saves, ``attach`` hands a
configuration to mlx-lm. No class here is made for one method:
what a method needs goes through ``Quantizer``. Import from ``base``; a saved state's order may grow, never change.
"""
