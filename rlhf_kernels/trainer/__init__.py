"""A minimal trainer on top of the kernels; needs the extra `rlhf_kernels[trainer]`."""
