"""`python -m rlhf_kernels.trainer ppo ...`, for launchers that start a module."""

import sys

from rlhf_kernels.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
