"""What every stage trains with: networks, AdamW and gradients that are global over processes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from .config import OptimConfig, UserError, require
from .models import Networks

T = TypeVar("T")


def rate_factor(config: OptimConfig, step: int) -> float:
    """Share of the peak learning rate at a step: a linear rise, then the schedule."""
    done = step / config.total_steps
    fade = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.lr_schedule]
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * fade


class Learner:
    """Networks under accelerate, and their optimizer.

    Args:
        accelerator: the distributed engine.
        networks: name -> network.
        rates: name -> peak learning rate.
        config: steps and optimizer.
        joint_clip: one gradient norm over all networks instead of one each.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: Mapping[str, nn.Module],
        rates: Mapping[str, float],
        config: OptimConfig,
        *,
        joint_clip: bool = False,
    ) -> None:
        self.accelerator, self.config, self.joint_clip = accelerator, config, joint_clip
        processes, size = accelerator.num_processes, config.batch_size
        require(size % processes == 0, "batch_size", f"a multiple of {processes} processes", size)
        self.rates = list(rates.values())
        module = Networks(**networks)
        groups = [
            {"params": [p for p in networks[n].parameters() if p.requires_grad], "lr": rate}
            for n, rate in rates.items()
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        # FSDP2's weights.
        self.sharded = any(isinstance(p, DTensor) for p in self.module.parameters())

    @property
    def networks(self) -> Networks:
        """The networks without the engine's wrapper: for saving, not for forward passes."""
        return self.accelerator.unwrap_model(self.module)

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes

    def share(self, rows: Tensor | Sequence[T]) -> Tensor | Sequence[T]:
        """This process's part of rows that all processes hold."""
        size = len(rows) // self.processes
        return rows[self.accelerator.process_index * size :][:size]

    def micro(self, rows: Tensor) -> Sequence[Tensor]:
        """Rows of this process in micro-batches."""
        return rows.split(self.config.micro_batch_size or max(1, len(rows)))

    def collect(self, own: Tensor, rows: Tensor, count: int) -> Tensor:
        """All `count` rows, on every process, from those `rows` that each has."""
        dtype = torch.uint8 if own.dtype is torch.bool else own.dtype
        everyone = own.new_zeros((count, *own.shape[1:]), dtype=dtype)
        everyone[rows] = own.detach().to(dtype)
        return self.total(everyone).to(own.dtype)

    def forward(self, function: Callable[[Networks], T]) -> T:
        """`function` of the networks, their weights gathered, without gradients."""
        with torch.no_grad():
            return self.module(function)

    def total(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return self.accelerator.reduce(x, "sum")

    def means(self, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Mean of each name's values, of all processes; a process may have names of its own."""
        everyone = gather_object([dict(values)]) if self.processes > 1 else [values]
        names = dict.fromkeys(name for own in everyone for name in own)
        lists = {n: [x for own in everyone for x in own.get(n, ())] for n in names}
        return {name: sum(found) / len(found) for name, found in lists.items()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """A UserError of any process is raised on all: the first one's, which names its process.

        Nothing inside may wait for another process.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        if self.processes == 1:
            if error is not None:
                raise error
            return
        texts = gather_object([None if error is None else str(error)])
        for rank, text in enumerate(texts):
            if text is not None:
                shared = UserError(f"{text} (process {rank})")
                shared.shared = True
                raise shared from error

    def any_alive(self, alive: Tensor) -> bool:
        """Whether a row is left; of any process where decoding gathers weights from all."""
        alive = alive.any()
        if self.sharded:
            alive = self.total(alive.int())
        return bool(alive)

    def accumulate(self, functions: Sequence[Callable[[Networks], tuple[Tensor, T]]]) -> list[T]:
        """Adds up the gradients of losses whose normalisers are those of the whole batch.

        Args:
            functions: of the networks; each gives a loss and what to return of it. The last one
                has to reach every trained weight: with it the processes exchange gradients.
        """
        found = []
        for i, function in enumerate(functions):
            last = i == len(functions) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, result = self.module(function)
                # The engines take the mean over processes, of losses that add up to the whole.
                self.accelerator.backward(loss * self.processes)
            found.append(result)
        return found

    def step(self, step: int, *, frozen: Sequence[str] = ()) -> Tensor:
        """One optimizer step with the rates of `step`.

        Args:
            step: finished steps.
            frozen: networks that stay as they are.

        Returns:
            The gradient norm before clipping, of the networks in turn.
        """
        for name in frozen:
            getattr(self.networks, name).zero_grad(set_to_none=True)
        parts = [g["params"] for g in self.optimizer.param_groups]
        if self.joint_clip:
            parts = [[p for part in parts for p in part]]
        limit = self.config.max_grad_norm
        norms = [self.accelerator.clip_grad_norm_(part, limit) for part in parts]
        norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_factor(self.config, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(norms)

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole, on the main process at least; every process has to call it."""
        if self.sharded:
            return get_model_state_dict(self.module, options=self._sharded())
        return self.accelerator.get_state_dict(self.module)

    def state_dict(self) -> dict[str, Any]:
        """Trained weights and optimizer state, whole; every process has to call it."""
        if self.sharded:
            weights, optimizer = get_state_dict(
                self.module, self.optimizer.optimizer, options=self._sharded()
            )
            return {"weights": weights, "optimizer": optimizer}
        return {"weights": dict(self._trained()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: naming a weight that is missing, left over or of another shape.
        """
        weights = state["weights"]
        if self.sharded:
            set_state_dict(
                self.module,
                self.optimizer.optimizer,
                model_state_dict=weights,
                optim_state_dict=state["optimizer"],
                options=self._sharded(),
            )
            return
        trained = dict(self._trained())
        for name in trained.keys() ^ weights.keys():
            where = "the checkpoint" if name in trained else "the model"
            raise UserError(f"{name}: expected in both checkpoint and model, not in {where}")
        with torch.no_grad():
            for name, weight in trained.items():
                shape = tuple(weights[name].shape)
                require(shape == tuple(weight.shape), name, f"shape {tuple(weight.shape)}", shape)
                weight.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, p) for n, p in self.networks.named_parameters() if p.requires_grad)

    @staticmethod
    def _sharded() -> StateDictOptions:
        return StateDictOptions(full_state_dict=True, cpu_offload=True)
