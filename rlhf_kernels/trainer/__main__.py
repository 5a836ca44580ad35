"""`python -m rlhf_kernels.trainer ppo ...`, the form that launchers start."""

import sys

from rlhf_kernels.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
