"""The command line `rlhf-kernels` and its error messages."""

import difflib
import errno
import importlib
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence

from .trainer.errors import UserError, out_of_memory

# Subcommand of `train` -> one line of help.
TRAINERS = {
    "sft": "supervised: imitate completions",
    "reward": "pairwise reward model of preferences",
    "dpo": "preference optimisation without a reward model: DPO, IPO, SimPO, ORPO and others",
    "kto": "completions that are desirable or not, without pairs",
    "ppo": "PPO with a critic and a KL penalty; PPO-penalty and PPO-max by settings",
    "grpo": "group-relative advantages, KL in the loss",
    "dr_grpo": "GRPO without its deviation and length biases",
    "dapo": "GRPO with clip-higher, token mean and dynamic sampling",
    "gspo": "GRPO with the ratio of whole sequences",
    "gmpo": "GRPO with the geometric mean of clipped ratios",
    "cispo": "clipped importance weights, no token dropped",
    "rloo": "REINFORCE with the leave-one-out baseline",
    "reinforce": "REINFORCE with a running baseline",
    "reinforce++": "REINFORCE++: PPO-clip, whitened return to go",
    "reinforce++_baseline": "REINFORCE++ with the group's mean as baseline",
    "remax": "REINFORCE with the greedy completion as baseline",
    "distill": "on-policy distillation: reverse KL per token to a teacher, no reward",
}
MODULE = "rlhf_kernels.trainer.run"

_MEMORY = (
    "out of memory; try a smaller micro_batch_size or generation_batch_size, "
    "gradient_checkpointing, lora_rank, shorter max_prompt_tokens and max_new_tokens, or a smaller "
    "model"
)
# Errors of a disk that is full, broken or not writable, or that does not support a name.
_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENAMETOOLONG,
)  # fmt: skip


_STATUS = """Exit status: 0 done, 2 an error that you can mend (one line; --traceback shows more),
130 interrupted, 1 anything else."""


def _stages() -> str:
    return "\n".join(f"  {name:<22}{text}" for name, text in TRAINERS.items())


def usage() -> str:
    return f"""usage: rlhf-kernels COMMAND ... [--traceback]

commands:
  train STAGE           train a model (train STAGE [--config FILE.yaml] [--flag value ...])
  doctor                what is installed, which kernels run here, and whether they are right
                        (--json; --integrations: what of TRL, verl and OpenRLHF is replaced)

stages (settings: rlhf-kernels train STAGE --help):
{_stages()}

benchmarks: make bench, in a checkout of the repository.

{_STATUS}"""


def _train_usage() -> str:
    return f"""usage: rlhf-kernels train STAGE [--config FILE.yaml] [--flag value ...] [--traceback]

stages (settings: rlhf-kernels train STAGE --help):
{_stages()}

{_STATUS}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    shown = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Data may hold characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(args)
    except KeyboardInterrupt:
        # The signal arrived before a run installed its own handlers.
        print("rlhf-kernels: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _tell(error, shown)


def _run(args: list[str]) -> int:
    if not args:
        print(usage(), file=sys.stderr)
        return 2
    if args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "doctor":
        # It imports every backend, which training does not need.
        return int(importlib.import_module(f"{__package__}.__main__").main(args[1:]))
    if args[0] != "train":
        known = ["train", "doctor"]
        hint = f"did you mean 'train {args[0]}'?" if args[0] in TRAINERS else _hint(args[0], known)
        raise UserError(f"unknown command {args[0]!r}; {hint}")
    if args[1:2] in (["-h"], ["--help"]):
        print(_train_usage())
        return 0
    if len(args) < 2 or args[1] not in TRAINERS:
        found = repr(args[1]) if len(args) > 1 else "none"
        raise UserError(f"train: expected a stage, found {found}; {_hint(found, list(TRAINERS))}")
    # Without this, MKL's GEMMs round by the addresses of their operands, which differ between runs.
    # MKL reads the variable at the first GEMM, so it may be set after torch's import.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    try:
        trainer = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rlhf_kernels":
            raise
        needed = f"train needs {error.name!r}: pip install 'rlhf_kernels[trainer]'"
        raise UserError(needed) from error
    trainer.train(args[1], args[2:])
    trainer.close()
    return 0


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.strip("'"), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(known)}"


def _tell(error: Exception, shown: bool) -> int:
    """Prints the error on standard error, once for all processes; returns the exit status."""
    message = _mendable(error)
    if message is None:
        traceback.print_exception(error)
        text = "an unexpected error, perhaps ours: please report it with these lines"
        print(f"rlhf-kernels: {text}", file=sys.stderr)
        return 1
    if shown:
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # The main process reports what all processes raised, and its launcher ends the others. An
        # error of this process alone has to be reported by this process.
        if getattr(error, "shared", False):
            return 2
        time.sleep(30)
        message = f"process {rank}: {message}"
    print(f"rlhf-kernels: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _mendable(error: Exception) -> str | None:
    """One line about an error that the user can correct; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        return _MEMORY
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return "standard output: nobody reads it any more; what the output folder has is whole"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        # Only an error of the current folder has no file name.
        return "the current folder: it was deleted; change to another one"
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{error.filename or 'the disk'}: {error.strerror}"
    return None


if __name__ == "__main__":
    sys.exit(main())
