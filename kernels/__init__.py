"""Triton kernels for decoding on a GPU, each beside a plain-torch twin of the same signature.

`decoder.py` runs a model through them: it is where to start. Triton comes with torch's CUDA builds; this package can be
imported without it, and its twins run.
"""
