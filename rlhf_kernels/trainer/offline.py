"""The trainer of the stages that learn from a dataset."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import models
from .config import OptimConfig, UserError
from .data import Row, Sampler
from .finite import ADVICE, Micro, NonFinite, listed, row_name
from .learner import Learner
from .objectives import DPO, KTO, SFT, Loss, Objective, RewardModelling
from .probe import check_length
from .timing import timed

__all__ = ["DPO", "KTO", "SFT", "OfflineTrainer", "RewardModelling", "wilson_interval"]


class OfflineTrainer:
    """The state of an offline run; `step()` is one optimizer step."""

    def __init__(
        self,
        learner: Learner,
        objective: Objective,
        train: Sequence[Row],
        held_out: Sequence[Row],
        optim: OptimConfig,
        *,
        seed: int,
    ) -> None:
        self.learner, self.objective, self.optim = learner, objective, optim
        self.reference = getattr(objective, "reference", None)
        # Each item with its row, for messages.
        self._rows: list[tuple[Any, Row, str]] = []
        self.train = self._encode(train, "training")
        self.held_out = self._encode(held_out, "held-out")
        self.dropped = len(train) + len(held_out) - len(self.train) - len(self.held_out)
        for name, given, kept in (
            ("training", train, self.train),
            ("held-out", held_out, self.held_out),
        ):
            if given and not kept:
                found = f"the completions of all {len(given)} {name} rows are longer; raise it"
                raise UserError(f"max_new_tokens: expected rows whose completions fit: {found}")
        for network in learner.networks.children():
            check_length(network, objective.lengths([*self.train, *self.held_out]))
        self.sampler = Sampler(len(self.train), optim.batch_size, seed)
        self.steps_done = 0

    def _encode(self, rows: Sequence[Row], part: str) -> list[Any]:
        items = [(self.objective.encode(row), row, part) for row in rows]
        kept = [item for item in items if item[0] is not None]
        self._rows += kept
        return [item for item, _, _ in kept]

    def _name(self, wanted: Any) -> str:
        """The name of an item in messages."""
        for number, (item, row, part) in enumerate(self._rows):
            if item is wanted:
                return row_name(
                    row, number if part == "training" else number - len(self.train), part
                )
        return "a row"

    def state_dict(self) -> dict[str, Any]:
        return {"steps_done": self.steps_done, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_done = state["steps_done"]
        self.sampler.load_state_dict(state["sampler"])

    def next_items(self) -> list[Any]:
        """The next batch, for all processes together."""
        return [self.train[i] for i in next(self.sampler)]

    def losses(
        self, items: Sequence[Any], *, size: float | None = None, weight: float = 1.0
    ) -> list[Micro]:
        """Loss functions of this process's micro-batches; they add up to `weight` times the loss.

        `size` is the divisor if these items are part of a larger batch; by default it is theirs.
        """
        whole = size or self.objective.size(items, self.learner)

        def function(networks: models.Networks, part: Sequence[Any]) -> Loss:
            loss, metrics = self.objective.loss(networks, part, whole)
            return weight * loss, metrics

        own = self.learner.share(items)
        parts = self.learner.micro(torch.arange(len(own)))
        return [Micro(function, [own[i] for i in part], self._name) for part in parts]

    def step(self) -> dict[str, float]:
        """Takes one optimizer step; returns its metrics."""
        started = time.perf_counter()
        timed.seconds()
        items = self.next_items()
        found = self._sum(self.learner.accumulate(self.losses(items)))
        norms = self.learner.step(self.steps_done)
        row = {
            "step": self.steps_done,
            **found,
            "grad_norm": norms[0].item(),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            "time/kernels": timed.seconds(),
            "time/step": time.perf_counter() - started,
        }
        if self.optim.skip_nonfinite:
            row["skipped"] = float(self.learner.skipped > 0)
        self.steps_done += 1
        return row

    def _sum(self, metrics: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        table = torch.stack([torch.stack(list(m.values())) for m in metrics])
        return dict(zip(metrics[0], self.learner.total(table.sum(0)).tolist(), strict=True))

    def evaluate(self) -> dict[str, Any]:
        """`scores`: metrics over the held-out rows, cut to a multiple of the processes."""
        processes, step = self.learner.processes, self.optim.batch_size
        items = self.held_out[: len(self.held_out) // processes * processes]
        size = self.objective.size(items, self.learner)
        parts = [items[start : start + step] for start in range(0, len(items), step)]
        functions = [f for part in parts for f in self.losses(part, size=size)]
        losses, metrics = zip(*map(self.learner.forward, functions), strict=True)
        number, bad = self.learner.first_bad(functions, torch.stack(losses))
        if number is not None:
            told = listed(bad) or "no row alone has it"
            raise NonFinite(f"evaluation: loss is not finite: {told}; {ADVICE}")
        found = self._sum(metrics)
        found["rows"] = float(len(items))
        if "accuracy" in found:
            low, high = wilson_interval(found["accuracy"], size)
            found |= {"accuracy_low": low, "accuracy_high": high}
        return {"scores": found, "texts": []}


def wilson_interval(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion of `count` trials (Wilson 1927).

    Shares of weighted rows are no whole numbers of trials, which libraries require.
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - z * spread / (1 + z * z / count), middle + z * spread / (1 + z * z / count)
