"""`rlhf-kernels`: the command line."""

import importlib
import os
import sys
from collections.abc import Sequence

# subcommand of `train` -> (module, function, one line of help)
TRAINERS = {
    "ppo": ("rlhf_kernels.trainer.run", "train_ppo", "PPO-clip with a critic and a KL penalty"),
}


def usage() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, _, text) in TRAINERS.items()]
    return "\n".join(
        [
            "usage: rlhf-kernels train ALGORITHM [--config FILE.yaml] [--flag value ...]",
            "",
            "algorithms (settings: rlhf-kernels train ALGORITHM --help):",
            *lines,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if len(args) < 2 or args[0] != "train" or args[1] not in TRAINERS:
        print(usage(), file=sys.stderr)
        return 2
    # MKL's GEMMs otherwise round by the addresses of their operands, which differ between runs.
    # It is read at the first GEMM, so that setting it after torch's import is in time.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    module, function, _ = TRAINERS[args[1]]
    try:
        trainer = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rlhf_kernels":
            raise
        print(
            f"rlhf-kernels train needs {error.name!r}: pip install 'rlhf_kernels[trainer]'",
            file=sys.stderr,
        )
        return 1
    getattr(trainer, function)(args[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
