"""The subcommands: from settings to a trained, evaluated and reported model."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

import rlhf_kernels as rk

from . import report
from .config import DataConfig, ModelConfig, PPOConfig, RunConfig, SFTConfig, parse_config
from .data import Problem, Task, load_task
from .models import build_policy
from .ppo import PPOTrainer, sample_completions
from .sft import sft_steps


def evaluate(
    policy: PreTrainedModel,
    task: Task,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[dict[str, float], list[str]]:
    """Greedy completions of the problems, and the mean of every reward function over them."""
    totals: dict[str, float] = {}
    texts: list[str] = []
    for start in range(0, len(problems), batch_size):
        part = problems[start : start + batch_size]
        rollout = sample_completions(
            policy, task, part, max_new_tokens=max_new_tokens, temperature=0
        )
        texts += rollout.completions
        for name, mean in rollout.scores.means.items():
            totals[name] = totals.get(name, 0.0) + mean * len(part) / len(problems)
    return totals, texts


def train_ppo(argv: Sequence[str]) -> dict[str, Any]:
    """`rlhf-kernels train ppo`: supervised phase, PPO, evaluation before and after, report.

    Returns:
        The summary that `summary.json` in the output folder holds.
    """
    classes = (RunConfig, ModelConfig, DataConfig, SFTConfig, PPOConfig)
    run, model, data, sft, ppo = parse_config(classes, argv, prog="rlhf-kernels train ppo")
    started = time.perf_counter()
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if run.threads:
        torch.set_num_threads(run.threads)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if run.device == "auto" else run.device)
    transformers.set_seed(run.seed)

    task = load_task(data, seed=run.seed, model=model.model)
    limit = data.max_prompt_tokens + data.max_new_tokens
    policy = build_policy(model, task.tokenizer, max_length=limit).to(device)
    weights = sum(p.numel() for p in policy.parameters())
    print(
        f"{task.name}: {len(task.train)} training and {len(task.held_out)} held-out problems; "
        f"policy of {weights:,} weights, vocabulary {len(task.tokenizer)}, on {device}; "
        f"kernels: {', '.join(map(str, rk.available_backends()))}"
    )

    with tqdm(total=sft.sft_steps, desc="supervised", disable=not sft.sft_steps) as bar:
        for loss in sft_steps(policy, task, sft, seed=run.seed, max_grad_norm=ppo.max_grad_norm):
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
    greedy = {"max_new_tokens": data.max_new_tokens, "batch_size": ppo.batch_size}
    before, texts_before = evaluate(policy, task, task.held_out, **greedy)
    sft_seconds = time.perf_counter() - started

    trainer = PPOTrainer(policy, task, ppo, max_new_tokens=data.max_new_tokens, seed=run.seed)
    # Steps spread over the run, the first and the last excluded.
    spread = ppo.total_steps / (ppo.replay_steps + 1)
    replayed = {int(spread * (i + 1)) for i in range(min(ppo.replay_steps, ppo.total_steps))}
    log = report.MetricsLog(out / "metrics.jsonl")
    with tqdm(total=ppo.total_steps, desc="ppo") as bar:
        while trainer.steps_done < ppo.total_steps:
            trainer.kernel.active = trainer.steps_done in replayed
            row = trainer.step()
            log.write(row)
            shown = ("reward", "kl", "entropy")
            bar.set_postfix_str(", ".join(f"{k} {row[k]:.3f}" for k in shown), refresh=False)
            bar.update()
    log.close()
    after, texts_after = evaluate(policy, task, task.held_out, **greedy)
    ppo_seconds = time.perf_counter() - started - sft_seconds

    report.plot_curves(log.rows, out / "curves.png")
    samples = [
        {"prompt": p.prompt, "answer": p.completion, "before PPO": b, "after PPO": a}
        for p, b, a in zip(task.held_out, texts_before, texts_after, strict=True)
    ][: ppo.num_samples]
    print("\n" + report.table(list(samples[0]), [list(s.values()) for s in samples]))
    timing = report.time_kernels(trainer.kernel.calls, steps=len(replayed), device=device)
    seconds = [value for row in log.rows for key, value in row.items() if key.startswith("time/")]
    step_ms = 1e3 * sum(seconds) / len(log.rows)
    if timing:
        print("\n" + report.timing_table(timing, step_ms))
    scores = [(name, f"{before[name]:.1%}", f"{after[name]:.1%}") for name in before]
    print("\n" + report.table(("held-out problems, greedy", "before PPO", "after PPO"), scores))
    if run.save_model:
        policy.save_pretrained(out / "policy")
        trainer.critic.save_pretrained(out / "critic")
        task.tokenizer.save_pretrained(out / "policy")
    groups = (run, model, data, sft, ppo)
    settings = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
    summary = {
        "task": task.name,
        "held_out_before": before,
        "held_out_after": after,
        "supervised_seconds": sft_seconds,
        "ppo_seconds": ppo_seconds,
        "total_seconds": time.perf_counter() - started,
        "kernel_timing": timing,
        "step_ms": step_ms,
        "samples": samples,
        "config": settings,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{summary['total_seconds']:.0f} s in all; curves, samples and metrics in {out}/")
    return summary
