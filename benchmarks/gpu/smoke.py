"""Compares each operation on each backend with its fp64 definition, on small inputs.

    python -m benchmarks.gpu.smoke --device cuda --backends cuda,triton --out smoke.jsonl

This is the doctor's check for a named backend: 5 rows of 1031, forward and gradient, in fp32 and
bf16; and again with a larger vocabulary where another kernel serves it. Each result is written
immediately as a line of JSON, so that a crash loses only one.
"""

import json
import sys
from pathlib import Path

import torch

from rlhf_kernels.kernels import backends
from rlhf_kernels.ops._calls import OPERATIONS
from rlhf_kernels.testing import check_operation

from .. import make_parser

DTYPES = (torch.float32, torch.bfloat16)
SIZE = 1031
#: Sizes that a further kernel serves, by operation: CUDA's policy_rows takes large vocabularies.
FURTHER_SIZES = {"linear_policy_loss": (20_011,)}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", required=True, help="comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON")
    parser.add_argument("--only", help="comma-separated names of operations")
    options = parser.parse_args()
    device = torch.device(options.device)
    only = options.only and options.only.split(",")
    functions = [f for f in OPERATIONS if not only or f.__name__ in only]
    bad = 0
    with options.out.open("w") as out:
        # dtype is the outer loop, so that a slow backend does not delay the first dtype of others.
        for dtype in DTYPES:
            for backend in options.backends.split(","):
                for function in functions:
                    for size in (SIZE, *FURTHER_SIZES.get(function.__name__, ())):
                        with backends.use_backend(backend):
                            found = check_operation(function, device, dtype, size=size)
                        found |= {"backend": backend, "size": size}
                        print(json.dumps(found), file=out, flush=True)
                        bad += not found["ok"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
