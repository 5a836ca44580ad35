"""The learner of every stage: networks, AdamW, and gradients summed over all processes."""

import math
import sys
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
from tqdm import tqdm

from .config import OptimConfig, UserError, require
from .finite import ADVICE, Micro, NonFinite, check_weights, finite, listed, require_trainable
from .models import Networks
from .optimizer import load_adamw, rate_factor

T = TypeVar("T")


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
        for name, network in networks.items():
            require_trainable(name, network)
            check_weights(name, network)
        module = Networks(**networks)
        groups = [
            {"params": [p for p in networks[n].parameters() if p.requires_grad], "lr": rate}
            for n, rate in rates.items()
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        # FSDP2's weights.
        self.sharded = any(isinstance(p, DTensor) for p in self.module.parameters())
        # Micro-batches and losses of the gradients that wait for an optimizer step.
        self._pending: list[tuple[Callable[[Networks], Any], Tensor]] = []
        #: Updates in a row that were not finite and passed over.
        self.skipped = 0

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
        found, self._pending = [], []
        for i, function in enumerate(functions):
            last = i == len(functions) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, result = self.module(function)
                # The engines take the mean over processes, of losses that add up to the whole.
                self.accelerator.backward(loss * self.processes)
            self._pending.append((function, loss.detach()))
            found.append(result)
        return found

    def step(self, step: int, *, frozen: Sequence[str] = ()) -> Tensor:
        """One optimizer step with the rates of `step`; none where a loss or norm is not finite.

        Args:
            step: finished steps.
            frozen: networks that stay as they are.

        Returns:
            The gradient norm before clipping, of the networks in turn; NaN where the update was
            passed over, which leaves weights and moments as they were.

        Raises:
            NonFinite: more than `skip_nonfinite` updates in a row were not finite, the loss scale
                fell below 1, or weights are not finite after the step.
        """
        for name in frozen:
            getattr(self.networks, name).zero_grad(set_to_none=True)
        norms = self._clip()
        what = self._not_finite(norms)
        if what:
            self._drop_gradients()
            self.pass_over(f"step {step}, {self._explain(what)}")
            return torch.full_like(norms, math.nan)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_factor(self.config, step)
        try:
            self.optimizer.step()
        except RuntimeError as error:
            # "value cannot be converted to type float without overflow"
            if "overflow" not in str(error):
                raise
            raise self._broken(step) from error
        self.optimizer.zero_grad()
        self.skipped = 0
        self._check_stepped(step)
        return norms

    def pass_over(self, message: str) -> None:
        """Counts an update that is not finite.

        Raises:
            NonFinite: it is one too many in a row.
        """
        if self.skipped >= self.config.skip_nonfinite:
            raise NonFinite(message)
        self.skipped += 1
        if self.accelerator.is_main_process:
            text = f"warning: passed over, {self.skipped} in a row: {message}"
            tqdm.write(text, file=sys.stderr)

    def _clip(self) -> Tensor:
        """Clips the gradients; their norms before."""
        parts = [g["params"] for g in self.optimizer.param_groups]
        if self.joint_clip:
            parts = [[p for part in parts for p in part]]
        clip: Callable[..., Tensor] = self.accelerator.clip_grad_norm_
        if self.accelerator.scaler is not None:
            # accelerate's divides by the loss scale at every call, which works once.
            self.accelerator.unscale_gradients()
            clip = nn.utils.clip_grad_norm_
        norms = [clip(part, self.config.max_grad_norm) for part in parts]
        return torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])

    def _not_finite(self, norms: Tensor) -> str:
        """The part of an update that is not finite anywhere: "loss", "gradient norm" or ""."""
        losses = torch.stack([norms.new_zeros(()), *(loss.float() for _, loss in self._pending)])
        bad = torch.stack([~losses.isfinite().all(), ~norms.isfinite().all()])
        loss, norm = self.total(bad.int()).tolist()
        if loss:
            return "loss"
        # Infinite gradients under a loss scale are the scaler's: it skips the step, and lowers it.
        return "gradient norm" if norm and self.accelerator.scaler is None else ""

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        scaler = self.accelerator.scaler
        if scaler is not None:
            # Forgets what it found in these gradients, and stays as it is.
            scaler.update(scaler.get_scale())

    def _check_stepped(self, step: int) -> None:
        """Requires finite weights, and a loss scale that gradients can live with."""
        weights = [p for g in self.optimizer.param_groups for p in g["params"]]
        if self._anywhere(not finite(weights)):
            raise self._broken(step)
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < 1.0:
            raise NonFinite(
                f"step {step}: the loss scale of mixed_precision fp16 fell to "
                f"{scaler.get_scale():g}, gradients are infinite at any scale; try bf16 or a lower "
                "learning_rate"
            )

    def _anywhere(self, bad: bool) -> bool:
        """Whether `bad` holds in any process."""
        return bool(self.total(torch.tensor(int(bad), device=self.accelerator.device)))

    def _broken(self, step: int) -> NonFinite:
        rates = ", ".join(f"{group['lr']:g}" for group in self.optimizer.param_groups)
        message = f"step {step}: weights are not finite after the update with learning_rate {rates}"
        return NonFinite(f"{message}; try a lower one", broken=True)

    # --- where it came from ------------------------------------------------------------------

    def _explain(self, what: str) -> str:
        """The micro-batch and the rows of losses or gradients that are not finite.

        Every process has to call it.
        """
        functions = [function for function, _ in self._pending]
        if what == "loss":
            losses = torch.stack([loss.float() for _, loss in self._pending])
            number, rows = self.first_bad(functions, losses)
        elif self.sharded:
            # A row's gradient would need an exchange between the processes.
            number, rows = None, []
        else:
            number, rows = self._bad_gradients(functions)
        micro = "" if number is None else f"micro-batch {number + 1} of {len(functions)}, "
        told = listed(rows) or "no row alone has it"
        return f"{micro}{what} is not finite: {told}; weights stay as they were; {ADVICE}"

    def first_bad(
        self, functions: Sequence[Callable[[Networks], Any]], losses: Tensor
    ) -> tuple[int | None, list[str]]:
        """Number of the first micro-batch, of any process, whose loss is not finite, and its rows.

        Every process has to call it.
        """
        bad = self.total((~losses.isfinite()).int()).nonzero()
        if not len(bad):
            return None, []
        number = int(bad[0])
        rows = self._alone(functions[number])
        call = self.module if self.sharded else self.networks
        with torch.no_grad():
            found = [str(row) for row in rows if not bool(call(row)[0].isfinite().all())]
        return number, gather_object(found)

    def _bad_gradients(
        self, functions: Sequence[Callable[[Networks], Any]]
    ) -> tuple[int | None, list[str]]:
        """`first_bad` for the gradients of each process's own losses."""
        number = next((i for i, f in enumerate(functions) if not self._finite_gradients(f)), None)
        rows = [] if number is None else self._alone(functions[number])
        found = gather_object(
            [(number, str(row)) for row in rows if not self._finite_gradients(row)]
        )
        return min((n for n, _ in found), default=number), [name for _, name in found]

    def _finite_gradients(self, function: Callable[[Networks], Any]) -> bool:
        """Whether the gradients of a loss are finite."""
        weights = [p for _, p in self._trained()]
        found = torch.autograd.grad(function(self.networks)[0], weights, allow_unused=True)
        return finite([g for g in found if g is not None])

    @staticmethod
    def _alone(function: Callable[[Networks], Any]) -> list[Micro]:
        return function.each() if isinstance(function, Micro) else []

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
            return {"weights": weights, "optimizer": optimizer, **self._counters()}
        return {
            "weights": dict(self._trained()),
            "optimizer": self.optimizer.state_dict(),
            **self._counters(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: naming a weight that is missing, left over, of another shape or not finite.
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
            self._load_counters(state)
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
        load_adamw(self.optimizer, state["optimizer"])
        self._load_counters(state)

    def _load_counters(self, state: Mapping[str, Any]) -> None:
        """Restores the counters; then requires that the restored weights are finite."""
        self.skipped = state["skipped"]
        require(type(self.skipped) is int, "skipped", "a number of updates", self.skipped)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        bad = self._anywhere(not finite(p for _, p in self._trained()))
        require(not bad, "checkpoint", "finite weights", "NaN or infinity")

    def _counters(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        scale = {} if scaler is None else {"scaler": scaler.state_dict()}
        return {"skipped": self.skipped, **scale}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, p) for n, p in self.networks.named_parameters() if p.requires_grad)

    @staticmethod
    def _sharded() -> StateDictOptions:
        return StateDictOptions(full_state_dict=True, cpu_offload=True)
