"""Short runs of TRL's trainers on a local model, for the tests and the integrations' table.

Needs trl, but no network. Each trainer starts from the same saved weights and the same seed.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# This must be set before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from transformers.utils import logging

GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
DPO_LOSSES = ("sigmoid", "ipo", "hinge")
RUNS = (
    *(f"GRPO {name}" for name in GRPO_LOSSES),
    "GRPO sequence",
    "RLOO",
    *(f"DPO {name}" for name in DPO_LOSSES),
    "KTO",
    "SFT",
    "Reward",
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


class Sizes(NamedTuple):
    """Sizes of the model and the run. Texts use `words`; the vocabulary may be larger."""

    vocab: int = 193
    hidden: int = 32
    layers: int = 1
    words: int = 60
    prompt: int = 6
    completion: int = 10
    batch: int = 4
    steps: int = 3


class Run(NamedTuple):
    """Loss and gradient norm of each step, and TRL's own metrics of the last step."""

    losses: list[float]
    grad_norms: list[float]
    metrics: dict[str, float]
    watch: Any = None


def save_models(folder: Path, sizes: Sizes) -> None:
    """Writes folder/policy and folder/reward, with their tokenizer."""
    words = [*SPECIAL, *(f"w{i}" for i in range(sizes.words))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # With the usual 0.02 logits are so small that every distribution is uniform.
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )
    torch.manual_seed(0)
    for name, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        model = kind(config)
        if name == "policy":
            # A likelier end token makes some completions end early.
            with torch.no_grad():
                model.lm_head.weight[config.eos_token_id] *= 3
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _texts(sizes: Sizes, rows: int, length: int, seed: int) -> list[str]:
    """Random texts with lengths from half of `length` to all of it, so that batches are padded."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint((length + 1) // 2, length + 1, (rows,), generator=g)
    return [
        " ".join(f"w{int(i)}" for i in torch.randint(sizes.words, (int(n),), generator=g))
        for n in lengths
    ]


def _dataset(kind: str, sizes: Sizes) -> Dataset:
    rows = 16
    columns: dict[str, list] = {"prompt": _texts(sizes, rows, sizes.prompt, 1)}
    texts = [[" " + t for t in _texts(sizes, rows, sizes.completion, s)] for s in (2, 3)]
    if kind in ("DPO", "Reward"):
        columns |= {"chosen": texts[0], "rejected": texts[1]}
    elif kind == "KTO":
        columns |= {"completion": texts[0], "label": [i % 2 == 0 for i in range(rows)]}
    elif kind == "SFT":
        columns |= {"completion": texts[0]}
    return Dataset.from_dict(columns)


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def _options(kind: str, variant: str, sizes: Sizes) -> dict[str, Any]:
    if kind == "GRPO":
        options: dict[str, Any] = {
            "num_generations": sizes.batch,
            "max_completion_length": sizes.completion,
            # In the second update of a batch the ratios differ from 1.
            "num_iterations": 2,
            "beta": 0.04,
            "entropy_coef": 0.01,
        }
        if variant == "sequence":
            return options | {"importance_sampling_level": "sequence"}
        if variant == "cispo":
            options["epsilon_high"] = 5.0
        return options | {"loss_type": variant}
    if kind == "RLOO":
        return {"num_generations": sizes.batch, "max_completion_length": sizes.completion}
    if kind == "DPO":
        return {"loss_type": [variant]}
    return {}


def run(
    name: str, folder: Path, sizes: Sizes, *, bf16: bool = False, watch: Any = None, **more: Any
) -> Run:
    """Trains `name` of RUNS for sizes.steps, with the models of `save_models(folder)`.

    Before training it calls `watch.attach(trainer)`, if a watch is given.
    """
    kind, _, variant = name.partition(" ")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {
            "output_dir": out,
            "max_steps": sizes.steps,
            "per_device_train_batch_size": sizes.batch,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": not torch.cuda.is_available(),
            "bf16": bf16,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 7,
        }
        options |= _options(kind, variant, sizes) | more
        args = getattr(trl, f"{kind}Config")(**options)
        rewards = {"reward_funcs": _reward} if kind in ("GRPO", "RLOO") else {}
        trainer = getattr(trl, f"{kind}Trainer")(
            model=str(folder / ("reward" if kind == "Reward" else "policy")),
            args=args,
            train_dataset=_dataset(kind, sizes),
            **rewards,
        )
        losses = _record(trainer)
        if watch is not None:
            watch.attach(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Run(losses, [entry["grad_norm"] for entry in steps], steps[-1], watch)


def _record(trainer: Any) -> list[float]:
    """A list that will receive the exact losses, which the trainer's log rounds."""
    losses: list[float] = []
    step: Callable[..., torch.Tensor] = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = training_step
    return losses
