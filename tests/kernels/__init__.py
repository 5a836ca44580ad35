"""The backends: what their kernels read, write and survive."""
