"""Many users of one model: continuous batching over a paged cache; `engine.py` is where to start."""
