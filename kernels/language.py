"""Triton, or what stands in its place where torch came without it: then the kernels cannot run, but their twins can."""

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = None

    class tl:
        """Stands for `triton.language` in the kernels' annotations."""

        constexpr = None

    def jit(function=None, **options):
        return function or jit


__all__ = ["jit", "tl", "triton"]
