"""Runs Python code in a process of its own, for what must not happen in the test process."""

import os
import subprocess
import sys

# Makes the import of the native extension fail as if it had never been built.
BLOCK_EXTENSION = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "rlhf_kernels._cpu":
            raise ImportError("blocked for this test")
sys.meta_path.insert(0, Block())
"""


def run_python(
    *arguments: str, check: bool = True, **variables: str
) -> subprocess.CompletedProcess:
    """Runs `python *arguments` with `variables` added to an environment without such switches."""
    ours = ("RLHF_KERNELS", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=1800,  # of a hang, not of a slow machine
    )
    if check and done.returncode != 0:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
