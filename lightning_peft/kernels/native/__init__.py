"""Code in C++ and its compilation where it runs: kernels for AVX-512 with bf16 or AVX2, and a heap for tensors."""
