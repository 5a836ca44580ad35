"""`rlhf-kernels`: the command line."""

import importlib
import os
import sys
from collections.abc import Sequence

# subcommand of `train` -> one line of help
TRAINERS = {
    "sft": "supervised: imitate completions",
    "reward": "pairwise reward model of preferences",
    "dpo": "direct preference optimisation: sigmoid, ipo, robust, hinge",
    "ppo": "PPO with a critic and a KL penalty; PPO-penalty and PPO-max by settings",
    "grpo": "group-relative advantages, KL in the loss",
    "dr_grpo": "GRPO without its deviation and length biases",
    "dapo": "GRPO with clip-higher, token mean and dynamic sampling",
    "gspo": "GRPO with the ratio of whole sequences",
    "cispo": "clipped importance weights, no token dropped",
    "rloo": "REINFORCE with the leave-one-out baseline",
    "reinforce": "REINFORCE with a running baseline",
    "reinforce++": "REINFORCE++: PPO-clip, whitened return to go",
    "reinforce++_baseline": "REINFORCE++ with the group's mean as baseline",
    "remax": "REINFORCE with the greedy completion as baseline",
}
MODULE = "rlhf_kernels.trainer.run"


def usage() -> str:
    lines = [f"  {name:<22}{text}" for name, text in TRAINERS.items()]
    return "\n".join(
        [
            "usage: rlhf-kernels train STAGE [--config FILE.yaml] [--flag value ...]",
            "",
            "stages (settings: rlhf-kernels train STAGE --help):",
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
    try:
        trainer = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rlhf_kernels":
            raise
        print(
            f"rlhf-kernels train needs {error.name!r}: pip install 'rlhf_kernels[trainer]'",
            file=sys.stderr,
        )
        return 1
    trainer.train(args[1], args[2:])
    trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
