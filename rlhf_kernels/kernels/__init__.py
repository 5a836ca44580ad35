"""Row kernels by backend, and which backend serves a call."""
