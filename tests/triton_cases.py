"""Calls of every operation that between them reach every Triton kernel and code variant."""

import itertools
import mmap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import _checks, _warmup

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = _checks.FLOATING


class Case(NamedTuple):
    """One call; `outputs` picks what of its result the backward starts from."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    outputs: Callable[[Any], Any] = lambda result: result


def label(values: dict[str, Any]) -> str:
    def text(v: Any) -> str:
        return str(v).removeprefix("torch.")

    return ",".join(f"{k}={text(v)}" for k, v in values.items())


def products(**axes: tuple) -> Iterator[dict[str, Any]]:
    """Every combination of one value per axis."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def one_by_one(**axes: tuple) -> Iterator[dict[str, Any]]:
    """The first value of every axis, then each other value with the rest at its first."""
    first = {k: v[0] for k, v in axes.items()}
    yield first
    for axis, values in axes.items():
        yield from (first | {axis: v} for v in values[1:])


def logits(dtype: torch.dtype, layout: str, rows: int = 3) -> Tensor:
    """[rows, V]; "odd": V is no multiple of 16 bytes; "shifted": it is, the address is not."""
    vocab = 251 if layout == "odd" else 256
    flat = torch.zeros(rows * vocab + 1, dtype=dtype)
    start = 1 if layout == "shifted" else 0
    return flat[start : start + rows * vocab].view(rows, vocab).requires_grad_()


def far(dtype: torch.dtype) -> Tensor:
    """Logits [2, 2, 256] whose rows are more than 2^31 elements apart; nothing is allocated."""
    stride = (1 << 31) + 264
    bytes_ = (3 * stride + 256) * dtype.itemsize
    # Private memory that nobody touches takes no pages.
    memory = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided((2, 2, 256), (2 * stride, stride, 1)).requires_grad_()


def examples() -> Iterator[Case]:
    """What `warmup` runs."""
    for function, example in _warmup.EXAMPLES.items():
        for dtype in DTYPES:
            x = _warmup.Inputs(4, 64, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
            args, options = example(x)
            yield Case(f"example/{function.__name__}/{label({'dtype': dtype})}",
                       function, args, options)  # fmt: skip


def token_logprobs(full: bool) -> Iterator[Case]:
    combine = products if full else one_by_one
    axes = {
        "dtype": DTYPES,
        "layout": ("even", "odd", "shifted"),
        "softcap": (None, 30.0),
        "temperature": ("number", "tensor"),
        "labels": (torch.int64, torch.int32),
        "wants": ("both", "logprobs", "entropy", "no entropy"),
    }
    variants = list(combine(**axes))
    # Together they need the most registers.
    variants += [dict(variants[0], dtype=d, softcap=30.0, layout=a)
                 for d in DTYPES for a in ("even", "odd")]  # fmt: skip
    for v in {label(v): v for v in variants}.values():
        x = logits(v["dtype"], v["layout"])
        y = torch.zeros(x.shape[0], dtype=v["labels"])
        t = torch.ones(x.shape[0]) if v["temperature"] == "tensor" else 0.7
        wants = v["wants"]
        options = {"softcap": v["softcap"], "temperature": t, "entropy": wants != "no entropy"}
        chosen = {"logprobs": lambda r: r.logprobs, "entropy": lambda r: r.entropy}
        yield Case(f"token_logprobs/{label(v)}", rk.token_logprobs, (x, y), options,
                   chosen.get(wants, lambda r: r))  # fmt: skip
    x = logits(BF16, "even")
    y = torch.zeros(x.shape[0], dtype=torch.int64)

    def inplace(x: Tensor, *args: Tensor, **options: Any) -> Any:
        return rk.token_logprobs(x * 1, *args, **options)

    yield Case("token_logprobs/inplace", inplace, (x, y), {"inplace_backward": True})
    y = torch.zeros((2, 2), dtype=torch.int64)
    yield Case("token_logprobs/far", rk.token_logprobs, (far(BF16), y), {"entropy": True})


def kl(full: bool) -> Iterator[Case]:
    combine = products if full else one_by_one
    for v in combine(
        dtype=DTYPES, layout=("even", "odd", "shifted"), direction=("reverse", "forward")
    ):
        x, ref = logits(v["dtype"], v["layout"]), logits(v["dtype"], v["layout"])
        options = {"direction": v["direction"]}
        yield Case(f"kl_divergence/{label(v)}", rk.kl_divergence, (x, ref), options)
    # One tensor at an address that is a multiple of 16, the other not.
    x, ref = logits(BF16, "even"), logits(BF16, "shifted")
    yield Case("kl_divergence/ref shifted", rk.kl_divergence, (x, ref), {})
    yield Case("kl_divergence/logits shifted", rk.kl_divergence, (ref, x), {})
    yield Case("kl_divergence/far", rk.kl_divergence, (far(BF16), far(BF16)), {})
    for v in combine(
        estimator=("k3", "k1", "k2", "abs", "k1+", "k3+", "abs+"), dtype=DTYPES, ref=DTYPES
    ):
        x = torch.zeros(5, 7, dtype=v["dtype"], requires_grad=True)
        ref, options = torch.zeros(5, 7, dtype=v["ref"]), {"estimator": v["estimator"]}
        yield Case(f"kl_penalty/{label(v)}", rk.kl_penalty, (x, ref), options)


def sweeps() -> Iterator[Case]:
    """Calls of one kind, by the name before the last slash, that must not compile anything anew."""
    for n, (rows, vocab, temperature, softcap, ignored) in enumerate(
        (
            (1, 8, 1.0, 30.0, -100),
            (1, 256, 0.7, 50.0, 0),
            # Whole numbers, and those that a JIT likes to build in.
            (2, 256, 1, 1, 1),
            (16, 1024, 2, 16, 16),
            (17, 8 * 1021, 1e-3, 30.5, -1),
            (3, 152064, 3.0, 10.0, 2),
        )
    ):
        options = {"temperature": temperature, "softcap": softcap, "ignore_index": ignored}
        x = torch.zeros(rows, vocab, dtype=BF16, requires_grad=True)
        y = torch.zeros(rows, dtype=torch.int64)
        options["entropy"] = True
        yield Case(f"sweep/token_logprobs/{n}", rk.token_logprobs, (x, y), options)
        # Another rank, gaps between rows, labels of one stride or another.
        x = torch.zeros(rows, 5, vocab + 8, dtype=BF16)[:, :-1, :vocab].requires_grad_()
        y = torch.zeros(4, rows, dtype=torch.int64).t()
        yield Case(f"sweep/token_logprobs/strided {n}", rk.token_logprobs, (x, y), options)
        options = {"temperature": temperature}
        ref = torch.zeros(rows + 1, 5, vocab + 16, dtype=BF16)[1:, 1:, 8 : vocab + 8]
        yield Case(f"sweep/kl_divergence/{n}", rk.kl_divergence, (x, ref), options)
        yield Case(f"sweep/kl_penalty/{n}", rk.kl_penalty, (x[..., 1], ref[..., 3]), {})


def cases(full: bool) -> Iterator[Case]:
    """All calls; `full` for the cross product of options where there are many."""
    yield from examples()
    yield from token_logprobs(full)
    yield from kl(full)
    yield from sweeps()
