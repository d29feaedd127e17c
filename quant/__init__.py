"""Linears in fewer bits, and the methods that choose their codes; `linears.py` is where to start."""
