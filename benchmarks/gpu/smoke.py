"""Is every kernel right at all? Each operation on each backend, against its definition in fp64.

    python -m benchmarks.gpu.smoke --device cuda --backends cuda,triton --out smoke.jsonl

The doctor's check with the backend named: 5 rows of 1031, forward and gradient, in fp32 and bf16.
A line of JSON for each as it ends, so that a crash of one leaves those before it.
"""

import json
import sys
from pathlib import Path

import torch

from rlhf_kernels.__main__ import check
from rlhf_kernels.kernels import backends
from rlhf_kernels.ops._examples import EXAMPLES

from .. import make_parser

DTYPES = (torch.float32, torch.bfloat16)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", required=True, help="comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON")
    parser.add_argument("--only", help="comma-separated names of operations")
    options = parser.parse_args()
    device = torch.device(options.device)
    only = options.only and options.only.split(",")
    functions = [f for f in EXAMPLES if not only or f.__name__ in only]
    bad = 0
    with options.out.open("w") as out:
        # The kinds in the outer loop: a slow backend takes no time from the other's first dtype.
        for dtype in DTYPES:
            for backend in options.backends.split(","):
                for function in functions:
                    with backends.use_backend(backend):
                        found = check(function, device, dtype)
                    found["backend"] = backend
                    print(json.dumps(found), file=out, flush=True)
                    bad += not found["ok"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
