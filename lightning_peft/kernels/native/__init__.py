"""Kernels in C++ for processors with AVX-512 and bf16 or with AVX2, and their compilation where they run."""
