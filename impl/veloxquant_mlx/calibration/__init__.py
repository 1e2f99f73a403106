"""What a method learns from a model and a text, once, and keeps in a file.

``gradients`` measures how the loss minds errors of old tokens, ``vectors`` collects what is cached, ``fit`` makes a
layer's transform of both, ``klt`` runs them over a model and holds the result: :func:`~veloxquant_mlx.calibration.klt.
calibrate_klt` is the one entry. Nothing here is read while a cache serves.
"""
