"""GRPO on a real model: SmolLM2-135M-Instruct learns arithmetic, on two CPU cores or a GPU.

    pip install gguf && python examples/smollm2/run.py

Fetches the model, writes the problems, trains, and prints what was right before and after on
problems that were held out. Flags that are not its own go to the trainer: `--total_steps 80`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import arithmetic
import model

from rlhf_kernels.trainer.offline import wilson_interval

HERE = Path(__file__).resolve().parent


def train(task: str, start: Path, folder: Path, flags: list[str]) -> Mapping[str, Any]:
    """Runs the trainer on a task from the model in `start`; its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in arithmetic.rows(task)), "utf-8")
    # By whole paths: the trainer looks for reward functions in the current folder.
    rewards = [f"{HERE / 'arithmetic.py'}:{name}" for name in ("right", "ended")]
    settings = {"config": HERE / "grpo.yaml", "model": start, "data": data, "output_dir": folder}
    command = [sys.executable, "-m", "rlhf_kernels.trainer", "grpo"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    subprocess.run([*command, "--reward_funcs", *rewards, *flags], check=True)
    summary: Mapping[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return summary


def report(summary: Mapping[str, Any]) -> str:
    """What was right and what ended before and after, with 95 % Wilson intervals, and the time."""
    count = summary["config"]["eval_size"]
    lines = [f"{count} held-out problems, greedy answers; 95 % Wilson intervals"]
    for name in ("right", "ended"):
        shares = []
        for when in ("held_out_before", "held_out_after"):
            share = summary[when][name]
            low, high = wilson_interval(share, count)
            shares.append(f"{share:.0%} ({low:.0%} to {high:.0%})")
        lines.append(f"{name:>6}: {' -> '.join(shares)}")
    seconds = summary["seconds_per_step"]
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if name != "step")
    lines.append(f"seconds per step: {seconds['step']:.2f}, of it {parts}")
    lines.append(f"whole run: {summary['total_seconds']:.0f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--task", choices=arithmetic.TASKS, default="tables")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="folder of the run")
    parser.add_argument("--model", type=Path, help="folder of another model, or of an earlier run")
    given, flags = parser.parse_known_args()
    start = model.fetch(given.out / "model") if given.model is None else given.model
    folder = given.out / given.task
    summary = train(given.task, start, folder, flags)
    print(report(summary))
    print(f"curves: {folder / 'curves.png'}; the trained model: {folder / 'policy'}")


if __name__ == "__main__":
    main()
