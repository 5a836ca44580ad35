"""Compares a step of PPO and GRPO with kernels to the same step on the reference backend.

    python -m benchmarks.studies.trainer_step [--rounds 5] [--quick] [ppo grpo]

The rollout is sampled once and used in every step, so that both backends do the same work:
log-probabilities of policy and reference, advantages, losses, backward and optimizer. The backends
take turns. The table has median times, and the peak memory of a step above the memory before it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.tables import table

import rlhf_kernels as rk
from rlhf_kernels.trainer.rewards import Rewards
from rlhf_kernels.trainer.run import make_trainer
from rlhf_kernels.trainer.stage import Stage
from rlhf_kernels.trainer.tokenizers import character_tokenizer

from ..harness.memory import peak_extra_bytes

WIDTH, LAYERS, VOCAB, ROWS, TOKENS = 256, 2, 32768, 16, 128


def save_model(folder: Path, vocab: int) -> None:
    """Saves a Llama with random weights and a vocabulary far larger than its tokenizer's."""
    tokenizer = character_tokenizer("0123456789+-=")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(name: str, model: Path, rounds: int, tokens: int) -> dict[str, tuple[float, float]]:
    """The median seconds and the peak MiB of a step, by backend."""
    flags = f"--model {model} --batch_size {ROWS} --max_new_tokens {tokens} --device cpu"
    flags += f" --output_dir {model}/{name} --epochs 1 --kl_coef 0.05"
    if name == "grpo":
        flags += " --num_generations 8"
    trainer = make_trainer(Stage(name, flags.split()), fresh=True)
    # A random policy would earn nothing; rewards that differ give nonzero advantages.
    trainer.sample.rewards = Rewards([lambda prompts, **_: list(range(len(prompts)))], [1.0])
    rollout = trainer.rollout()
    trainer.rollout = lambda: rollout
    seconds: dict[str, list[float]] = {"kernels": [], "reference": []}
    peaks: dict[str, float] = {}
    for round_ in range(rounds + 1):
        for backend, times in seconds.items():
            with rk.use_backend("reference" if backend == "reference" else "auto"):
                start = time.perf_counter()
                if round_:
                    trainer.step()
                    times.append(time.perf_counter() - start)
                else:
                    # The first step creates the optimizer's state.
                    trainer.step()
                    extra = peak_extra_bytes(trainer.step, torch.device("cpu"))
                    peaks[backend] = (extra or 0) / 2**20
    return {name: (statistics.median(times), peaks[name]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=["ppo", "grpo"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    vocab, tokens = (256, 8) if options.quick else (VOCAB, TOKENS)
    print(f"{ROWS} completions of up to {tokens} tokens, vocabulary {vocab}, width {WIDTH}")
    head = ["step", "kernels, s", "reference, s", "ratio", "kernels, MiB", "reference, MiB"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), vocab)
        for name in options.names:
            found = measure(name, Path(folder), options.rounds, tokens)
            (ours, peak), (theirs, their_peak) = found["kernels"], found["reference"]
            cells = [f"`{name}`", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}×"]
            rows.append([*cells, f"{peak:.0f}", f"{their_peak:.0f}"])
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    main()
