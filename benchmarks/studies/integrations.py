"""The table of the integrations: each trainer's own code with and without our patch.

    python -m benchmarks.studies.integrations [--only NAME ...] [--date 2026-01-31]

runs the rows whose name begins with a NAME, keeps them in results/integrations.json beside those of
other calls, and writes results/integrations.md from all. A row is measured in one process, theirs
and ours by turns, so that only its ratios mean anything.
"""

# ruff: noqa: B023, E402 - a row is measured before its loop goes on; imports need the path first.
import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from rlhf_kernels.integrations import openrlhf, trl, verl
from rlhf_kernels.testing import random_mask

RESULTS = ROOT / "benchmarks/results"
ROUNDS, SECONDS = 9, 3.0
# A peak below this is the allocator's noise.
LEAST_BYTES = 8 * 2**20


class Result(NamedTuple):
    """What a run gives: the loss or estimates, and the gradient's tensors (or its norm alone)."""

    values: Sequence[Tensor]
    gradients: Sequence[Tensor]


class Row(NamedTuple):
    name: str
    values: float
    gradients: float | None
    time: float
    memory: float | None
    note: str = ""


class Peak:
    """The most memory in use above what it was at the start: the device's, else the process's."""

    def __enter__(self) -> "Peak":
        self.bytes = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        # What earlier runs freed and the allocator kept would hide what this one takes.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        self._start = self._resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self._start
            return
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, self._resident() - self._start)

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def difference(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], floor: float = 0.0, kept: Tensor | None = None
) -> float:
    """The largest difference, relative to the largest element of each (or to floor)."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        if kept is not None:
            a, b = a[kept], b[kept]
        scale = max(float(b.abs().max()), floor)
        worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())


def compare(
    name: str,
    run: Callable[[], Result],
    patched: Callable[[], Any],
    *,
    floor: float = 0.0,
    kept: Tensor | None = None,
) -> Row:
    """A row of a function: differences, then the medians of both by turns, then both peaks."""
    theirs = run()
    with patched():
        ours = run()
    values = difference(ours.values, theirs.values, floor, kept)
    gradients = None
    if theirs.gradients:
        expected = norm(theirs.gradients)
        gradients = abs(norm(ours.gradients) - expected) / expected
    del theirs, ours
    times: dict[bool, list[float]] = {False: [], True: []}
    begun = time.perf_counter()
    while len(times[True]) < ROUNDS and (
        len(times[True]) < 3 or time.perf_counter() - begun < SECONDS
    ):
        for ours in (False, True):
            with patched() if ours else contextlib.nullcontext():
                synchronize()
                start = time.perf_counter()
                run()
                synchronize()
                times[ours].append(time.perf_counter() - start)
    peaks = {}
    for ours in (False, True):
        with patched() if ours else contextlib.nullcontext(), Peak() as peak:
            run()
            synchronize()
        peaks[ours] = peak.bytes
    memory = None
    if peaks[False] > LEAST_BYTES:
        memory = peaks[False] / max(peaks[True], LEAST_BYTES)
    ratio = statistics.median(times[False]) / statistics.median(times[True])
    return Row(name, values, gradients, ratio, memory)


def trl_rows(wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Whole trainers; time and memory of loss and backward, without the generation."""
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed")
        return
    from benchmarks.studies import trl_runs

    sizes = trl_runs.Sizes(
        vocab=32768, hidden=256, layers=1, prompt=16, completion=112, batch=4, steps=4
    )
    names = [n for n in trl_runs.RUNS if wanted(f"TRL {n}")]
    if not names:
        return
    with tempfile.TemporaryDirectory() as folder:
        trl_runs.save_models(Path(folder), sizes)
        for name in names:
            runs = {}
            for ours in (False, True):
                with trl.patched() if ours else contextlib.nullcontext():
                    runs[ours] = trl_runs.run(
                        name, Path(folder), sizes, watch=Watch(), learning_rate=1e-4
                    )
            theirs, ours = runs[False], runs[True]
            # A loss that is a difference of terms may be 0: relative to 1 at least.
            loss = max(
                abs(a - b) / max(abs(b), 1.0)
                for a, b in zip(ours.losses, theirs.losses, strict=True)
            )
            gradient = max(
                abs(a - b) / max(b, 1e-6)
                for a, b in zip(ours.grad_norms, theirs.grad_norms, strict=True)
            )
            a, b = theirs.watch, ours.watch
            memory = a.peak / max(b.peak, LEAST_BYTES) if a.peak > LEAST_BYTES else None
            yield Row(f"TRL {name}", loss, gradient, a.seconds() / b.seconds(), memory)


class Watch:
    """Seconds and bytes of a trainer's compute_loss and backward, step by step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.peak = 0

    def attach(self, trainer: Any) -> None:
        loss, backward = trainer.compute_loss, trainer.accelerator.backward

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            with self.step():
                return loss(*args, **kwargs)

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            with self.step():
                result = backward(*args, **kwargs)
            # Belongs to the loss before it.
            self.steps[-2:] = [sum(self.steps[-2:])]
            return result

        trainer.compute_loss, trainer.accelerator.backward = compute_loss, run_backward

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        synchronize()
        with Peak() as peak:
            start = time.perf_counter()
            yield
            synchronize()
            self.steps.append(time.perf_counter() - start)
        self.peak = max(self.peak, peak.bytes)

    def seconds(self) -> float:
        """Median without the first step, which allocates."""
        return statistics.median(self.steps[1:])


def verl_rows(wanted: Callable[[str], bool]) -> Iterator[Row | None]:
    if not wanted("verl"):
        return
    if importlib.util.find_spec("verl") is None:
        print("verl is not installed")
        return
    import numpy as np
    import verl.utils.torch_functional as verl_F
    from verl.trainer.ppo import core_algos
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils import losses

    from tests.parity.comparison import make_batch

    def both(losses: bool = False) -> Callable[[], Any]:
        return lambda: verl.patched(losses=losses)

    def row(name: str, *args: Any, **options: Any) -> Row | None:
        return compare(name, *args, **options) if wanted(name) else None

    torch.manual_seed(0)
    rows, cols = 256, 2048
    mask = random_mask(rows, cols).long()
    rewards, values = torch.randn(2, rows, cols)
    index = np.array([f"prompt-{i // 8}" for i in range(rows)], dtype=object)

    yield row(
        "verl gae, 256×2048",
        lambda: Result(
            core_algos.compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95), []
        ),
        both(),
        kept=mask.bool(),
    )
    config = core_algos.AlgoConfig(gamma=0.99)
    for name in (
        "grpo",
        "rloo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
    ):
        extra = {"config": config} if name == "reinforce_plus_plus" else {}

        def estimate() -> Result:
            function = core_algos.get_adv_estimator_fn(name)
            found = function(token_level_rewards=rewards, response_mask=mask, index=index, **extra)
            return Result(found, [])

        yield row(f"verl {name}, 256×2048", estimate, both(), kept=mask.bool())
    for mode in ("vanilla", "gspo", "sapo", "cispo", "gpg"):
        batch = make_batch(64, 2048)

        actor = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            policy_loss=PolicyLossConfig(loss_mode=mode),
        )
        kept = batch.mask.long()

        def policy() -> Result:
            loss, _ = core_algos.get_policy_loss_fn(mode)(
                old_log_prob=batch.old,
                log_prob=batch.logprobs,
                advantages=batch.advantages,
                response_mask=kept,
                config=actor,
            )
            return Result([loss], torch.autograd.grad(loss, [batch.logprobs]))

        yield row(f"verl {mode} loss, 64×2048", policy, both(losses=True), floor=0.1)
    old, returns = torch.randn(2, 64, 2048)
    predicted = (old + torch.randn(64, 2048)).requires_grad_()
    kept_mask = random_mask(64, 2048).long()

    def value() -> Result:
        loss, _ = losses.compute_value_loss(predicted, returns, old, kept_mask, 0.5)
        return Result([loss], torch.autograd.grad(loss, predicted))

    yield row("verl value loss, 64×2048", value, both(losses=True))
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(512, 32768).to(dtype).requires_grad_()
        labels = torch.randint(32768, (512,))
        short = str(dtype).removeprefix("torch.")

        def logprobs() -> Result:
            lp = verl_F.logprobs_from_logits(logits, labels)
            h = verl_F.entropy_from_logits(logits)
            gradients = torch.autograd.grad(lp.float().sum() + h.float().sum(), logits)
            return Result([lp, h], gradients)

        yield row(f"verl logprobs, entropy, {short} 512×32768", logprobs, both())
        hidden = torch.randn(512, 512).to(dtype).requires_grad_()
        weight = (0.05 * torch.randn(32768, 512)).to(dtype).requires_grad_()

        def fused() -> Result:
            lp, h = FusedLinearForPPO()(hidden, weight, labels)
            gradients = torch.autograd.grad(lp.sum() + h.float().sum(), (hidden, weight))
            return Result([lp, h], gradients)

        yield row(f"verl FusedLinearForPPO, {short} 512×512×32768", fused, both())


def openrlhf_rows(wanted: Callable[[str], bool]) -> Iterator[Row | None]:
    if not wanted("OpenRLHF"):
        return
    from tests.parity import openrlhf_stubs
    from tests.parity.comparison import make_batch

    theirs = openrlhf_stubs.load()
    if theirs is None:
        print("OpenRLHF is not installed")
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    def row(name: str, *args: Any, **options: Any) -> Row | None:
        return compare(name, *args, **options) if wanted(name) else None

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32768,
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=4,
                tie_word_embeddings=False,
                initializer_range=0.1,
            )
        ).to(dtype)
        actor = theirs.actor.Actor(model)
        actor.packing_samples, actor.is_vlm = False, False
        sequences = torch.randint(32768, (4, 160))
        attention = torch.ones_like(sequences)
        action = random_mask(4, 128)
        loss_function = theirs.loss.PolicyLoss()
        advantages = torch.randn(4, 128)
        with torch.no_grad():
            start = actor(sequences, action, attention) + 0.1 * torch.randn(4, 128)

        def step() -> Result:
            lp, output = actor(
                sequences, action, attention, return_output=True, return_entropy=True
            )
            loss = loss_function(lp, start, advantages, action)[0]
            loss = loss - 0.01 * output.entropy[:, -128:][action].mean()
            return Result([loss], torch.autograd.grad(loss, tuple(model.parameters())))

        # OpenRLHF compiles its entropy.
        with torch.compiler.set_stance("force_eager"):
            short = str(dtype).removeprefix("torch.")
            yield row(f"OpenRLHF Actor and ppo, {short} 4×160", step, openrlhf.patched)
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

        def policy() -> Result:
            loss = function(batch.logprobs, batch.old, batch.advantages, mask, batch.rollout)[0]
            return Result([loss], torch.autograd.grad(loss, batch.logprobs))

        yield row(f"OpenRLHF {name} loss, 64×2048", policy, openrlhf.patched, floor=0.1)
    values, returns = torch.randn(2, 64, 2048)
    predicted = (values + torch.randn(64, 2048)).requires_grad_()
    value_function = theirs.loss.ValueLoss(0.5)

    def value() -> Result:
        loss = value_function(predicted, values, returns, mask)
        return Result([loss], torch.autograd.grad(loss, predicted))

    yield row("OpenRLHF value loss, 64×2048", value, openrlhf.patched)
    for estimator in ("k1", "k2", "k3"):

        def kl() -> Result:
            found = theirs.maker.compute_approx_kl(
                batch.logprobs, batch.ref, kl_estimator=estimator
            )
            return Result([found], torch.autograd.grad(found.sum(), batch.logprobs))

        yield row(f"OpenRLHF KL {estimator}, 64×2048", kl, openrlhf.patched)
    maker = theirs.maker.RemoteExperienceMaker.__new__(theirs.maker.RemoteExperienceMaker)
    rewards, values = torch.randn(2, 256, 2048)
    wide = random_mask(256, 2048)

    def advantage() -> Result:
        return Result(maker.get_advantages_and_returns(values, rewards, wide, 0.99, 0.95), [])

    def cumulative() -> Result:
        return Result([maker.get_cumulative_returns(rewards, wide, 0.99)], [])

    yield row("OpenRLHF gae, 256×2048", advantage, openrlhf.patched, kept=wide)
    yield row("OpenRLHF returns, 256×2048", cumulative, openrlhf.patched, kept=wide)


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = match[1] if match else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads"


def number(x: float | None, unit: str = "") -> str:
    if x is None:
        return "–"
    if x == 0:
        return "0"
    return f"{x:.1e}" if not unit else f"{x:.2g}{unit}" if x < 10 else f"{x:.0f}{unit}"


def render(store: dict[str, Any]) -> str:
    """The table of results/integrations.json."""
    lines = [
        "# Trainers with and without the patch",
        "",
        f"{store['machine']}; {store['date']}; {store['versions']}.",
        "Written by `python -m benchmarks.studies.integrations`.",
        "",
        "Differences are relative to the unpatched run: of the loss (at least to 1, or of the",
        "estimates, to their largest) and of the norm of its gradient; for TRL the largest over",
        "4 steps of training, whose rounding the optimizer carries on. Time and memory are theirs",
        "÷ ours, for loss and backward of TRL's trainers without generation, and for the whole",
        "call elsewhere; memory is the peak above the start, – where that is below 8 MiB.",
        "",
        "| trainer, loss or estimator | loss | gradient norm | time | memory |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in (Row(*r) for r in store["rows"].values()):
        cells = (number(row.values), number(row.gradients), number(row.time, "×"))
        lines.append(f"| {row.name} | {' | '.join(cells)} | {number(row.memory, '×')} |")
    return "\n".join([*lines, "", *store["notes"], ""])


NOTES = (
    "- In bfloat16 theirs rounds logits or log-probabilities to 8 bits; the differences are its.",
    "- Reward is a classifier without a head: nothing of it is replaced.",
    "- OpenRLHF's KL estimates are a pass or two; ours has its clamp as a pass of its own.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="how the rows' names begin")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--out", type=Path, default=RESULTS / "integrations.json")
    parser.add_argument("--render", action="store_true", help="write the table again, run nothing")
    options = parser.parse_args()
    store = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    names = ("torch", "transformers", "trl", "verl", "openrlhf")
    found = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    store |= {"machine": machine(), "date": options.date, "notes": NOTES}
    store["versions"] = ", ".join(found)

    def wanted(name: str) -> bool:
        return any(name.startswith(only) or only.startswith(name) for only in options.only)

    for make in () if options.render else (trl_rows, verl_rows, openrlhf_rows):
        for row in filter(None, make(wanted)):
            store["rows"][row.name] = row
            print(row, flush=True)
            options.out.write_text(json.dumps(store, indent=1, ensure_ascii=False) + "\n")
    options.out.with_suffix(".md").write_text(render(json.loads(json.dumps(store))))


if __name__ == "__main__":
    main()
