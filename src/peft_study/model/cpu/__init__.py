"""Kernels of ours for the CPU."""
