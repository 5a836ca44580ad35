"""Kernels by backend, and the choice of a backend for a call."""
