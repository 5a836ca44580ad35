"""Trains with every online algorithm on the arithmetic task; writes docs/algorithms.md.

    python -m benchmarks.studies.trainer_algorithms [--steps 80] [NAME ...]

All start from one supervised model, with fixed seeds. A repeated NAME replaces its row. The figures
are in benchmarks/results/trainer-algorithms.json, the models in --out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tools.tables import table

from rlhf_kernels.trainer.algorithms import ALGORITHMS
from rlhf_kernels.trainer.run import train

from .. import RESULTS, ROOT

FIGURES = RESULTS / "trainer-algorithms.json"
PAGE = ROOT / "docs" / "algorithms.md"
TASK = "--max_operand 19 --operators + --eval_size 80 --max_new_tokens 4 --device cpu --threads 1"
SUPERVISED = "--total_steps 150 --batch_size 128 --learning_rate 2e-3 --warmup_steps 20"
ONLINE = "--batch_size 256 --mini_batch_size 128 --learning_rate 5e-4 --lr_schedule linear"
# Settings that differ from the algorithm's defaults; the page explains them.
OWN: dict[str, str] = {
    "ppo": "--epochs 1 --lam 1.0 --critic_learning_rate 1e-3 --kl_coef 0.005",
    "reinforce++": "--kl_coef 0.005",
    "reinforce++_baseline": "--kl_coef 0.005",
}
PAGE_HEAD = """# Every online algorithm on one task

Written by `python -m benchmarks.studies.trainer_algorithms`. The task: sums of two numbers from 0 to 19, 80 of
the 400 held out; the reward is 1 for the exact answer, else 0. All start from one two-layer Llama of 64
units ({weights}) after 150 supervised steps, which solves {start:.0%} of the held-out problems greedily.
Then {steps} steps of 256 completions in two updates each, learning rate 5e-4 falling to 0, seed 0, one
thread. Settings: the algorithm's defaults but for those in the last column. One seed on a task this
small says that an algorithm works, not which is better.

"""  # noqa: E501 - a page's lines
HEAD = ("algorithm", "reward, first 5 steps", "last 5", "held out, greedy, before", "after")
HEAD += ("step, ms", "generation", "our kernels", "forward, backward, optimizer", "settings")
PAGE_END = """
Reward is that of sampled completions, the algorithm's own training reward without its KL part.
Kernels are all calls of our operations in a step, the products of the LM head included (they
belong to `linear_policy_loss` and `linear_token_logprobs`). Generation is decoding and rewards: for
`remax` the greedy completions too, for `dapo` up to four rounds. Shares are within a run; compare
milliseconds only if nothing else ran meanwhile (it did in the run above).
"""


def run(name: str, start: Path, out: Path, steps: int) -> dict[str, Any]:
    """Trains with one algorithm from the supervised model; returns its row."""
    own = OWN.get(name, "")
    flags = f"{TASK} {ONLINE} {own} --total_steps {steps} --model {start} --output_dir {out / name}"
    summary = train(name, flags.split())
    lines = (out / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    return {
        "first": sum(rewards[:5]) / 5,
        "last": sum(rewards[-5:]) / 5,
        "before": summary["held_out_before"]["exact_match"],
        "after": summary["held_out_after"]["exact_match"],
        "seconds": summary["seconds_per_step"],
        "settings": own,
        "steps": steps,
    }


def page(results: dict[str, Any]) -> str:
    """The text of docs/algorithms.md."""
    found = {name: results["rows"][name] for name in ALGORITHMS if name in results["rows"]}
    first = next(iter(found.values()))
    text = PAGE_HEAD.format(weights=results["model"], start=first["before"], steps=first["steps"])
    rows = []
    for name, row in found.items():
        step, kernels, generation = (row["seconds"][key] for key in ("step", "kernels", "generate"))
        cells = [f"`{name}`", *(f"{row[key]:.2f}" for key in ("first", "last", "before", "after"))]
        cells += [f"{1e3 * step:.0f}"]
        cells += [f"{x / step:.0%}" for x in (generation, kernels, step - generation - kernels)]
        rows.append([*cells, f"`{row['settings']}`" if row["settings"] else ""])
    return text + "\n".join([*table(HEAD, rows, right=1), PAGE_END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="algorithms; none: all with a reward")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    options = parser.parse_args()
    start = options.out / "sft" / "policy"
    if not start.exists():
        flags = f"{TASK} {SUPERVISED} --hidden_size 64 --output_dir {options.out / 'sft'}"
        train("sft", flags.split())
    results = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"rows": {}}
    weights = (start / "model.safetensors").stat().st_size // 4
    results["model"] = f"{weights / 1e6:.2f} million weights"
    rewarded = [name for name, algorithm in ALGORITHMS.items() if not algorithm.teacher]
    for name in options.names or rewarded:
        results["rows"][name] = run(name, start, options.out, options.steps)
        FIGURES.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
