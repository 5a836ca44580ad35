"""The learner of every stage: networks, AdamW, and gradients summed over all processes."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, overload

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
        # FSDP2 stores weights as DTensors.
        self.sharded = any(isinstance(p, DTensor) for p in self.module.parameters())
        # The loss functions and losses since the last optimizer step.
        self._pending: list[tuple[Callable[[Networks], Any], Tensor]] = []
        #: How many updates in a row were skipped because they were not finite.
        self.skipped = 0
        #: How many updates this process has made.
        self.updates = 0

    @property
    def networks(self) -> Networks:
        """The networks without accelerate's wrapper: for saving, not for forward passes."""
        networks: Networks = self.accelerator.unwrap_model(self.module)
        return networks

    @property
    def processes(self) -> int:
        return int(self.accelerator.num_processes)

    @overload
    def share(self, rows: Tensor) -> Tensor: ...

    @overload
    def share(self, rows: Sequence[T]) -> Sequence[T]: ...

    def share(self, rows: Tensor | Sequence[T]) -> Tensor | Sequence[T]:
        """This process's share of rows that all processes hold."""
        size = len(rows) // self.processes
        return rows[self.accelerator.process_index * size :][:size]

    def micro(self, rows: Tensor) -> Sequence[Tensor]:
        """Splits rows of this process into micro-batches."""
        parts: Sequence[Tensor] = rows.split(self.config.micro_batch_size or max(1, len(rows)))
        return parts

    def collect(self, own: Tensor, rows: Tensor, count: int) -> Tensor:
        """All `count` rows, on every process, assembled from the `rows` that each process has."""
        dtype = torch.uint8 if own.dtype is torch.bool else own.dtype
        everyone = own.new_zeros((count, *own.shape[1:]), dtype=dtype)
        everyone[rows] = own.detach().to(dtype)
        return self.total(everyone).to(own.dtype)

    def forward(self, function: Callable[[Networks], T]) -> T:
        """Calls `function` with the networks, weights gathered, without gradients."""
        with torch.no_grad():
            result: T = self.module(function)
        return result

    def total(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        found: Tensor = self.accelerator.reduce(x, "sum")
        return found

    def means(self, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The mean of each name's values over all processes; processes may have other names."""
        everyone = gather_object([dict(values)]) if self.processes > 1 else [values]
        names = dict.fromkeys(name for own in everyone for name in own)
        lists = {n: [x for own in everyone for x in own.get(n, ())] for n in names}
        return {name: sum(found) / len(found) for name, found in lists.items()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises a UserError of any process on all: the first process's, with its number.

        The code inside must not wait for another process.
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
        """Whether a row is unfinished, on any process if decoding gathers weights from all."""
        alive = alive.any()
        if self.sharded:
            alive = self.total(alive.int())
        return bool(alive)

    def accumulate(self, functions: Sequence[Callable[[Networks], tuple[Tensor, T]]]) -> list[T]:
        """Adds up the gradients of losses that are normalised by the whole batch.

        Args:
            functions: map the networks to a loss and a result to return. The last one has to
                reach every trained weight, because its backward pass exchanges gradients.
        """
        found, self._pending = [], []
        for i, function in enumerate(functions):
            last = i == len(functions) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, result = self.module(function)
                # The engines average over processes, but these losses add up to the whole.
                self.accelerator.backward(loss * self.processes)
            self._pending.append((function, loss.detach()))
            found.append(result)
        return found

    def step(self, step: int, *, frozen: Sequence[str] = ()) -> Tensor:
        """One optimizer step with the rates of `step`, skipped if a loss or norm is not finite.

        Args:
            step: finished steps.
            frozen: names of networks that this step does not update.

        Returns:
            The gradient norm of each network before clipping. It is NaN if the update was skipped,
            which leaves weights and moments unchanged.

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
        self.updates += 1
        try:
            self.optimizer.step()
        except RuntimeError as error:
            # AdamW raises "value cannot be converted to type float without overflow".
            if "overflow" not in str(error):
                raise
            raise self._broken(step) from error
        self.optimizer.zero_grad()
        self.skipped = 0
        self._check_stepped(step)
        return norms

    def pass_over(self, message: str) -> None:
        """Counts an update that is skipped because it is not finite.

        Raises:
            NonFinite: `skip_nonfinite` updates in a row have been skipped before.
        """
        if self.skipped >= self.config.skip_nonfinite:
            raise NonFinite(message)
        self.skipped += 1
        if self.accelerator.is_main_process:
            text = f"warning: passed over, {self.skipped} in a row: {message}"
            tqdm.write(text, file=sys.stderr)

    def _clip(self) -> Tensor:
        """Clips the gradients; returns their norms before clipping."""
        parts = [g["params"] for g in self.optimizer.param_groups]
        if self.joint_clip:
            parts = [[p for part in parts for p in part]]
        clip: Callable[..., Tensor] = self.accelerator.clip_grad_norm_
        if self.accelerator.scaler is not None:
            # accelerate's clipping unscales the gradients at every call, which works only once.
            self.accelerator.unscale_gradients()
            clip = nn.utils.clip_grad_norm_
        norms = [clip(part, self.config.max_grad_norm) for part in parts]
        return torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])

    def _not_finite(self, norms: Tensor) -> str:
        """What is not finite on any process: "loss", "gradient norm" or ""."""
        losses = torch.stack([norms.new_zeros(()), *(loss.float() for _, loss in self._pending)])
        bad = torch.stack([~losses.isfinite().all(), ~norms.isfinite().all()])
        loss, norm = self.total(bad.int()).tolist()
        if loss:
            return "loss"
        # The scaler itself handles infinite gradients: it skips the step and lowers the scale.
        return "gradient norm" if norm and self.accelerator.scaler is None else ""

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        scaler = self.accelerator.scaler
        if scaler is not None:
            # The scaler forgets the infinities of these gradients and keeps its scale.
            scaler.update(scaler.get_scale())

    def _check_stepped(self, step: int) -> None:
        """Requires finite weights, and a loss scale of at least 1."""
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
        """Whether `bad` holds on any process."""
        return bool(self.total(torch.tensor(int(bad), device=self.accelerator.device)))

    def _broken(self, step: int) -> NonFinite:
        rates = ", ".join(f"{group['lr']:g}" for group in self.optimizer.param_groups)
        message = f"step {step}: weights are not finite after the update with learning_rate {rates}"
        return NonFinite(f"{message}; try a lower one", broken=True)

    # --- the source of values that are not finite --------------------------------------------

    def _explain(self, what: str) -> str:
        """Describes the micro-batch and the rows whose loss or gradient is not finite.

        Every process has to call it.
        """
        functions = [function for function, _ in self._pending]
        if what == "loss":
            losses = torch.stack([loss.float() for _, loss in self._pending])
            number, rows = self.first_bad(functions, losses)
        elif self.sharded:
            # The gradient of one row would need an exchange between the processes.
            number, rows = None, []
        else:
            number, rows = self._bad_gradients(functions)
        micro = "" if number is None else f"micro-batch {number + 1} of {len(functions)}, "
        told = listed(rows) or "no row alone has it"
        return f"{micro}{what} is not finite: {told}; weights stay as they were; {ADVICE}"

    def first_bad(
        self, functions: Sequence[Callable[[Networks], Any]], losses: Tensor
    ) -> tuple[int | None, list[str]]:
        """The first micro-batch, on any process, whose loss is not finite, and its bad rows.

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
        """Like `first_bad`, for the gradients of each process's own losses."""
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
        """All weights, unsharded, at least on the main process; every process has to call it."""
        weights: dict[str, Any] = (
            get_model_state_dict(self.module, options=self._sharded())
            if self.sharded
            else self.accelerator.get_state_dict(self.module)
        )
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Trained weights and optimizer state, unsharded; every process has to call it."""
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
        """Restores the result of `state_dict`.

        Raises:
            ValueError: a weight is missing, unexpected, of another shape or not finite.
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
        """Restores the counters, and requires that the restored weights are finite."""
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
