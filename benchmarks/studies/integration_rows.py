"""The rows of `integrations`: what is measured of each trainer, with and without our patch."""

# ruff: noqa: B023 - a row is measured within its loop iteration.
import contextlib
import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.integrations import openrlhf, trl, verl
from rlhf_kernels.testing import random_mask

from ..harness.clocks import synchronize
from ..harness.memory import peak_extra_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, SECONDS = 9, 3.0
# Smaller peaks are noise of the allocator.
LEAST_BYTES = 8 * 2**20


class Row(NamedTuple):
    name: str
    values: float
    gradients: float | None
    time: float
    memory: float | None
    note: str = ""


#: The name of a row, and the function that measures it.
Rows = Iterator[tuple[str, Callable[[], Row]]]


def seconds_of(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call, and the time until its queued work is done."""
    synchronize(DEVICE)
    start = time.perf_counter()
    result = call()
    synchronize(DEVICE)
    return result, time.perf_counter() - start


def memory_ratio(theirs: int, ours: int) -> float | None:
    """The ratio of two peaks in bytes; None if theirs is noise."""
    return theirs / max(ours, LEAST_BYTES) if theirs > LEAST_BYTES else None


def difference(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], floor: float = 0.0, kept: Tensor | None = None
) -> float:
    """The largest difference, relative to the largest element of each tensor, or to `floor`."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = (x.detach().double()[... if kept is None else kept] for x in (a, b))
        worst = max(worst, float((a - b).abs().max()) / max(float(b.abs().max()), floor))
    return worst


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([t.detach().double() for t in tensors]))


def compare(
    name: str,
    function: Callable[[], Sequence[Tensor]],
    patched: Callable[[], Any],
    leaves: Sequence[Tensor] = (),
    *,
    floor: float = 0.0,
    kept: Tensor | None = None,
) -> Row:
    """Measures a function: differences, then medians of both in turn, then both peaks.

    Compares its results (a loss or estimates), and the gradient of their sum w.r.t. `leaves`.
    """

    def run(is_patched: bool) -> tuple[Any, float]:
        with patched() if is_patched else contextlib.nullcontext():
            return seconds_of(both)

    def both() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        found = function()
        total = sum(t.float().sum() for t in found)
        return found, torch.autograd.grad(total, leaves) if leaves else ()

    def peak(is_patched: bool) -> int:
        with patched() if is_patched else contextlib.nullcontext():
            return peak_extra_bytes(both, DEVICE) or 0

    theirs, ours = (run(p)[0] for p in (False, True))
    values = difference(ours[0], theirs[0], floor, kept)
    gradients = None
    if leaves:
        expected = norm(theirs[1])
        gradients = abs(norm(ours[1]) - expected) / expected
    del theirs, ours
    times: list[list[float]] = []
    begun = time.perf_counter()
    while len(times) < 3 or (len(times) < ROUNDS and time.perf_counter() - begun < SECONDS):
        times.append([run(p)[1] for p in (False, True)])
    before, after = map(statistics.median, zip(*times, strict=True))
    return Row(name, values, gradients, before / after, memory_ratio(peak(False), peak(True)))


def measured(name: str, *args: Any, **options: Any) -> tuple[str, Callable[[], Row]]:
    """A row that runs `compare` with these arguments."""
    return name, functools.partial(compare, name, *args, **options)


def trl_rows() -> Rows:
    """Rows of whole trainers; time and memory are of loss and backward, without generation."""
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed")
        return
    from . import trl_runs

    sizes = trl_runs.Sizes(
        vocab=32768, hidden=256, layers=1, prompt=16, completion=112, batch=4, steps=4
    )

    def worst(a: list[float], b: list[float], floor: float) -> float:
        return max(abs(x - y) / max(abs(y), floor) for x, y in zip(a, b, strict=True))

    def row(run: str, folder: Path) -> Row:
        theirs = trl_runs.run(run, folder, sizes, watch=Watch(), learning_rate=1e-4)
        with trl.patched():
            ours = trl_runs.run(run, folder, sizes, watch=Watch(), learning_rate=1e-4)
        # A loss that is a difference of terms may be 0, so the scale is at least 1.
        loss = worst(ours.losses, theirs.losses, 1.0)
        gradient = worst(ours.grad_norms, theirs.grad_norms, 1e-6)
        a, b = theirs.watch, ours.watch
        time_ratio, memory = a.seconds() / b.seconds(), memory_ratio(a.peak, b.peak)
        return Row(f"TRL {run}", loss, gradient, time_ratio, memory)

    with tempfile.TemporaryDirectory() as folder:
        trl_runs.save_models(Path(folder), sizes)
        for name in trl_runs.RUNS:
            yield f"TRL {name}", functools.partial(row, name, Path(folder))


class Watch:
    """Measures time and peak memory of a trainer's compute_loss and backward in every step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.peak = 0

    def attach(self, trainer: Any) -> None:
        loss, backward = trainer.compute_loss, trainer.accelerator.backward

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            result = self.step(backward, *args, **kwargs)
            # Add the backward pass to the time of its loss.
            self.steps[-2:] = [sum(self.steps[-2:])]
            return result

        trainer.compute_loss = functools.partial(self.step, loss)
        trainer.accelerator.backward = run_backward

    def step(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []

        def call() -> None:
            result, seconds = seconds_of(lambda: function(*args, **kwargs))
            found.append(result)
            self.steps.append(seconds)

        self.peak = max(self.peak, peak_extra_bytes(call, DEVICE) or 0)
        return found[0]

    def seconds(self) -> float:
        """The median without the first step, which allocates."""
        return statistics.median(self.steps[1:])


def verl_rows() -> Rows:
    if importlib.util.find_spec("verl") is None:
        print("verl is not installed")
        return
    import numpy as np
    import verl.utils.torch_functional as verl_F
    from verl.trainer.ppo import core_algos
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils import losses

    from tools.policy_batches import make_batch

    of_losses = functools.partial(verl.patched, losses=True)
    of_tensors = functools.partial(verl.patched, losses=False)
    torch.manual_seed(0)
    rows, cols = 256, 2048
    mask = random_mask(rows, cols).long()
    rewards, values = torch.randn(2, rows, cols)
    index = np.array([f"prompt-{i // 8}" for i in range(rows)], dtype=object)

    def gae() -> Sequence[Tensor]:
        return core_algos.compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)

    yield measured("verl gae, 256×2048", gae, of_tensors, kept=mask.bool())
    config = core_algos.AlgoConfig(gamma=0.99)
    for name in ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        extra = {"config": config} if name == "reinforce_plus_plus" else {}

        def estimate() -> Sequence[Tensor]:
            function = core_algos.get_adv_estimator_fn(name)
            return function(token_level_rewards=rewards, response_mask=mask, index=index, **extra)

        yield measured(f"verl {name}, 256×2048", estimate, of_tensors, kept=mask.bool())
    for mode in ("vanilla", "gspo", "sapo", "cispo", "gpg"):
        batch = make_batch(64, 2048)
        wanted = PolicyLossConfig(loss_mode=mode)
        actor = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=wanted)
        kept = batch.mask.long()

        def policy() -> Sequence[Tensor]:
            function = core_algos.get_policy_loss_fn(mode)
            tensors = (batch.old, batch.logprobs, batch.advantages, kept)
            return function(*tensors, config=actor)[:1]

        leaves = [batch.logprobs]
        yield measured(f"verl {mode} loss, 64×2048", policy, of_losses, leaves, floor=0.1)
    old, returns = torch.randn(2, 64, 2048)
    predicted = (old + torch.randn(64, 2048)).requires_grad_()
    kept_mask = random_mask(64, 2048).long()

    def value() -> Sequence[Tensor]:
        return losses.compute_value_loss(predicted, returns, old, kept_mask, 0.5)[:1]

    yield measured("verl value loss, 64×2048", value, of_losses, [predicted])
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(512, 32768).to(dtype).requires_grad_()
        labels = torch.randint(32768, (512,))
        short = str(dtype).removeprefix("torch.")

        def logprobs() -> Sequence[Tensor]:
            return verl_F.logprobs_from_logits(logits, labels), verl_F.entropy_from_logits(logits)

        name = f"verl logprobs, entropy, {short} 512×32768"
        yield measured(name, logprobs, of_tensors, [logits])
        hidden = torch.randn(512, 512).to(dtype).requires_grad_()
        weight = (0.05 * torch.randn(32768, 512)).to(dtype).requires_grad_()

        def fused() -> Sequence[Tensor]:
            return FusedLinearForPPO()(hidden, weight, labels)

        name = f"verl FusedLinearForPPO, {short} 512×512×32768"
        yield measured(name, fused, of_tensors, [hidden, weight])


def openrlhf_rows() -> Rows:
    from tools import openrlhf_stubs

    theirs = openrlhf_stubs.load()
    if theirs is None:
        print("OpenRLHF is not installed")
        return
    torch.manual_seed(0)
    yield from _openrlhf_actor(theirs)
    yield from _openrlhf_losses(theirs)
    yield from _openrlhf_advantages(theirs)


def _openrlhf_actor(theirs: Any) -> Rows:
    """Of a step of the actor: its forward, a loss and an entropy bonus."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for dtype in (torch.float32, torch.bfloat16):
        config = LlamaConfig(
            vocab_size=32768, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
            initializer_range=0.1,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(dtype)
        actor = theirs.actor.Actor(model)
        actor.packing_samples, actor.is_vlm = False, False
        sequences = torch.randint(32768, (4, 160))
        attention = torch.ones_like(sequences)
        action = random_mask(4, 128)
        loss_function = theirs.loss.PolicyLoss()
        advantages = torch.randn(4, 128)
        with torch.no_grad():
            start = actor(sequences, action, attention) + 0.1 * torch.randn(4, 128)

        def step() -> Sequence[Tensor]:
            wanted = {"return_output": True, "return_entropy": True}
            lp, output = actor(sequences, action, attention, **wanted)
            loss = loss_function(lp, start, advantages, action)[0]
            return [loss - 0.01 * output.entropy[:, -128:][action].mean()]

        # OpenRLHF compiles its entropy.
        with torch.compiler.set_stance("force_eager"):
            name = f"OpenRLHF Actor and ppo, {str(dtype).removeprefix('torch.')} 4×160"
            yield measured(name, step, openrlhf.patched, tuple(model.parameters()))


def _openrlhf_losses(theirs: Any) -> Rows:
    """Of losses and KL estimates."""
    from tools.policy_batches import make_batch

    patched = openrlhf.patched
    batch = make_batch(64, 2048)
    mask = batch.mask.clone()
    mask[:, 0] = True
    for name, options in (
        ("ppo", {}),
        ("ppo, dual clip", {"dual_clip": 3.0}),
        ("ppo, corrected", {"is_correction_level": "token"}),
        ("gspo", {"policy_loss_type": "gspo"}),
    ):
        function = theirs.loss.PolicyLoss(**options)

        def policy() -> Sequence[Tensor]:
            return function(batch.logprobs, batch.old, batch.advantages, mask, batch.rollout)[:1]

        leaves = [batch.logprobs]
        yield measured(f"OpenRLHF {name} loss, 64×2048", policy, patched, leaves, floor=0.1)
    values, returns = torch.randn(2, 64, 2048)
    predicted = (values + torch.randn(64, 2048)).requires_grad_()
    value_function = theirs.loss.ValueLoss(0.5)

    def value() -> Sequence[Tensor]:
        return [value_function(predicted, values, returns, mask)]

    yield measured("OpenRLHF value loss, 64×2048", value, patched, [predicted])
    for estimator in ("k1", "k2", "k3"):

        def kl() -> Sequence[Tensor]:
            function = theirs.maker.compute_approx_kl
            return [function(batch.logprobs, batch.ref, kl_estimator=estimator)]

        yield measured(f"OpenRLHF KL {estimator}, 64×2048", kl, patched, [batch.logprobs])


def _openrlhf_advantages(theirs: Any) -> Rows:
    maker = theirs.maker.RemoteExperienceMaker.__new__(theirs.maker.RemoteExperienceMaker)
    rewards, values = torch.randn(2, 256, 2048)
    wide = random_mask(256, 2048)

    def advantage() -> Sequence[Tensor]:
        return maker.get_advantages_and_returns(values, rewards, wide, 0.99, 0.95)

    def cumulative() -> Sequence[Tensor]:
        return [maker.get_cumulative_returns(rewards, wide, 0.99)]

    yield measured("OpenRLHF gae, 256×2048", advantage, openrlhf.patched, kept=wide)
    yield measured("OpenRLHF returns, 256×2048", cumulative, openrlhf.patched, kept=wide)
