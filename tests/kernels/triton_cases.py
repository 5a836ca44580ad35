"""Calls of every operation that between them reach every Triton kernel and code variant."""

import itertools
import mmap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels import PolicyLossConfig
from rlhf_kernels.config import policy as policy_config
from rlhf_kernels.core import checks
from rlhf_kernels.ops import _examples

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = checks.FLOATING


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


def pairs(**axes: tuple) -> Iterator[dict[str, Any]]:
    """Few combinations among which any two values of two axes meet."""

    def pair(a: str, v: int, b: str, w: int) -> tuple:
        return (a, v, b, w) if a < b else (b, w, a, v)

    missing = {pair(a, v, b, w) for a, b in itertools.combinations(axes, 2)
               for v in range(len(axes[a])) for w in range(len(axes[b]))}  # fmt: skip
    while missing:
        a, v, b, w = min(missing)
        chosen = {a: v, b: w}
        for axis in sorted(axes.keys() - chosen.keys()):
            gains = [
                sum(pair(axis, i, other, j) in missing for other, j in chosen.items())
                for i in range(len(axes[axis]))
            ]
            chosen[axis] = gains.index(max(gains))
        missing -= {pair(*x, *y) for x, y in itertools.combinations(chosen.items(), 2)}
        yield {axis: axes[axis][chosen[axis]] for axis in axes}


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
    calls = [(f.__name__, f, example) for f, example in _examples.EXAMPLES.items()]
    calls += [(f"{f.__name__}_support", f, e) for f, es in _examples.VARIANTS.items() for e in es]
    for name, function, example in calls:
        for dtype in DTYPES:
            x = _examples.Inputs(
                4, 64, dtype, torch.device("cpu"), torch.Generator().manual_seed(0)
            )
            args, options = example(x)
            yield Case(f"example/{name}/{label({'dtype': dtype})}",
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


def support(full: bool) -> Iterator[Case]:
    """Log-probabilities over the words that a sampler kept, of logits and of the fused head."""
    combine = products if full else one_by_one
    axes = {
        "form": ("logits", "head", "head odd"),
        "dtype": DTYPES,
        "softcap": (None, 30.0),
        "temperature": ("number", "tensor"),
        "labels": (torch.int64, torch.int32),
        "support": (torch.int64, torch.int32),
        "wants": ("both", "logprobs", "entropy", "no entropy"),
        "bias": (True, False),
    }
    variants = list(combine(**axes))
    variants += [dict(variants[0], form=f, dtype=d) for f in axes["form"] for d in DTYPES]
    variants += [dict(variants[0], form=f, bias=False) for f in axes["form"][1:]]
    chosen = {"logprobs": lambda r: r.logprobs, "entropy": lambda r: r.entropy}
    for v in {label(v): v for v in variants}.values():
        dtype, wants = v["dtype"], v["wants"]
        y = torch.zeros(3, dtype=v["labels"])
        t = torch.ones(3) if v["temperature"] == "tensor" else 0.7
        kept = (torch.arange(4) * 2).to(v["support"]), torch.tensor([0, 1] * 3).to(v["support"])
        options = {"support": kept, "softcap": v["softcap"], "temperature": t}
        options["entropy"] = wants != "no entropy"
        op = "token_logprobs" if v["form"] == "logits" else "linear_token_logprobs"
        name, last = f"{op}_support/{label(v)}", chosen.get(wants, lambda r: r)
        if v["form"] == "logits":
            yield Case(name, rk.token_logprobs, (logits(dtype, "even"), y), options, last)
            continue
        width = 64 if v["form"] == "head" else 61
        hidden, weight = (torch.zeros(n, width, dtype=dtype, requires_grad=True) for n in (3, 9))
        if v["bias"]:
            options["bias"] = torch.zeros(9, dtype=dtype, requires_grad=True)
        yield Case(name, rk.linear_token_logprobs, (hidden, weight, y), options, last)


#: Sequences as the token kernels see them: one tile each, several, rows with gaps, packed.
LAYOUTS = ("padded", "long", "strided", "packed", "packed64")


class Tokens(NamedTuple):
    """Makes token tensors of one layout."""

    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 10000) if self.layout == "long" else (3, 70) if self.padded else (210,)

    @property
    def padded(self) -> bool:
        return not self.layout.startswith("packed")

    def __call__(self, dtype: torch.dtype, *, grad: bool = False) -> Tensor:
        if self.layout == "strided":
            return torch.zeros(70, 3, dtype=dtype).t().requires_grad_(grad)
        return torch.zeros(self.shape, dtype=dtype).requires_grad_(grad)

    def options(self) -> dict[str, Tensor]:
        if self.padded:
            return {}
        dtype = torch.int64 if self.layout == "packed64" else torch.int32
        return {"cu_seqlens": torch.tensor([0, 70, 140, 210], dtype=dtype)}


def scans(full: bool) -> Iterator[Case]:
    axes = {
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "mask": (None, torch.bool, torch.int64),
        "dones": (None, torch.bool),
        "bootstrap": (False, True),
        "masked": ("carry", "zero"),
    }
    whitening = {"whiten": (False, True)}
    penalties = {"kl_estimator": ("k1", "k2", "k3", "abs", "none"), "reward_clip": (None, 5.0)}
    combine = pairs if full else one_by_one
    for op, extra in (("gae", whitening), ("discounted_returns", {}), ("ppo_advantages", None)):
        if extra is None:
            extra = whitening | penalties
            axes = {k: v for k, v in axes.items() if k not in ("dones", "bootstrap")}
        variants = list(combine(**axes, **extra))
        # Much at once: masked, packed, cut and continued.
        variants.append({k: v[-1] for k, v in (axes | extra).items()})
        variants.append(variants[-1] | {"layout": "long", "masked": "carry"})
        for v in {label(v): v for v in variants}.values():
            tokens, dtype = Tokens(v["layout"]), v["dtype"]
            x = [tokens(dtype) for _ in range(3)]
            mask = None if v["mask"] is None else tokens(v["mask"])
            options = tokens.options() | {k: v[k] for k in ("whiten", "masked") if k in v}
            if op == "ppo_advantages":
                ref = None if v["kl_estimator"] == "none" else x[1]
                options["reward_clip"] = v["reward_clip"]
                if ref is not None:
                    options |= {"kl_coef": 0.1, "kl_estimator": v["kl_estimator"]}
                args: tuple = (torch.zeros(3, dtype=dtype), x[0], ref, x[2], mask)
            else:
                args = tuple(x[:2]) if op == "gae" else tuple(x[:1])
                options["mask"] = mask
                options["dones"] = None if v["dones"] is None else tokens(v["dones"])
                options["bootstrap_values"] = (
                    torch.zeros(3, dtype=dtype) if v["bootstrap"] else None
                )
            yield Case(f"{op}/{label(v)}", getattr(rk, op), args, options)


def statistics(full: bool) -> Iterator[Case]:
    combine = products if full else one_by_one
    for v in combine(
        dtype=DTYPES, layout=("padded", "strided"), mask=(torch.bool, None, torch.int64),
        shift_mean=(True, False),
    ):  # fmt: skip
        tokens = Tokens(v["layout"])
        mask = None if v["mask"] is None else torch.zeros(3, 70, dtype=v["mask"])
        options = {"mask": mask, "shift_mean": v["shift_mean"]}
        yield Case(f"whiten/{label(v)}", rk.whiten, (tokens(v["dtype"]),), options)
    for v in combine(
        dtype=(*DTYPES, torch.float64), groups=(4, "ids"),
        baseline=("mean", "leave-one-out", "greedy", "none"), scale=("group", "batch", "none"),
    ):  # fmt: skip
        rewards = torch.zeros(12, dtype=v["dtype"])
        options = {"baseline": v["baseline"], "scale": v["scale"]}
        if v["baseline"] == "greedy":
            options["greedy_rewards"] = rewards.clone()
        groups = torch.arange(12) // 3 if v["groups"] == "ids" else v["groups"]
        yield Case(f"group_advantages/{label(v)}", rk.group_advantages, (rewards, groups), options)


def normalizers(kind: str | None) -> float | Tensor | None:
    return {None: None, "number": 7.0, "tensor": torch.tensor(7.0)}[kind]


def presets() -> Iterator[tuple[str, PolicyLossConfig]]:
    """Every classmethod of PolicyLossConfig, with its own defaults."""
    for name, value in vars(PolicyLossConfig).items():
        if isinstance(value, classmethod):
            yield name, getattr(PolicyLossConfig, name)()


def policy_options(v: dict[str, Any]) -> dict[str, Any]:
    """Options of PolicyLossConfig from the axes of `policy`."""
    options = {k: v[k] for k in ("objective", "aggregation")}
    # The others would be refused together.
    if v["objective"] != "reinforce":
        options["ratio_level"] = v["ratio_level"]
    if v["objective"] == "clip":
        options |= {"dual_clip": 3.0, "delta": 2.0}
    if v["kl"] is not None:
        estimator, _, weighted = v["kl"].partition(" ")
        options |= {"kl_coef": 0.1, "kl_estimator": estimator}
        options["kl_importance_weighted"] = bool(weighted)
    if v["correction"] is not None:
        level, mode = v["correction"]
        options |= {"correction_level": level, "correction_mode": mode, "correction_max": 2.0}
    if v["entropy"] in ("bonus", "constant bonus"):
        options["entropy_coef"] = 0.01
    return options


def policy(full: bool) -> Iterator[Case]:
    levels, modes = policy_config.CORRECTION_LEVELS, policy_config.CORRECTION_MODES
    estimators = policy_config.KL_ESTIMATORS
    axes = {
        "objective": policy_config.OBJECTIVES,
        "ratio_level": policy_config.RATIO_LEVELS,
        "aggregation": policy_config.AGGREGATIONS,
        "kl": (None, *estimators, "k3 weighted", "k3+ weighted"),
        "correction": (None, *itertools.product(levels, modes)),
        "entropy": (None, "metric", "bonus", "constant bonus"),
        "given": ("what is needed", "all"),
        "layout": LAYOUTS,
        "advantages": ("tokens", "sequences"),
        "normalizer": (None, "number", "tensor"),
        "grad": (True, False),
        "mask": (torch.bool, torch.int64),
        "dtype": DTYPES,
    }
    variants = list((pairs if full else one_by_one)(**axes))
    first = {k: v[0] for k, v in axes.items()}
    # Everything that needs registers, at every level.
    most = {"kl": "k3+ weighted", "correction": ("sequence", "mask"), "entropy": "bonus"}
    variants += [first | most | {"ratio_level": level, "objective": objective, "layout": layout}
                 for level in policy_config.RATIO_LEVELS
                 for objective, layout in (("clip", "padded"), ("sapo", "packed"))]  # fmt: skip
    calls = [(label(v), v, PolicyLossConfig(**policy_options(v))) for v in variants]
    calls += [(name, first, config) for name, config in presets()]
    for name, v, config in {name: (name, v, c) for name, v, c in calls}.values():
        tokens, dtype, all_given = Tokens(v["layout"]), v["dtype"], v["given"] == "all"
        advantages = tokens(dtype) if v["advantages"] == "tokens" else torch.zeros(3, dtype=dtype)
        options = tokens.options() | {"config": config}
        kind = v["normalizer"]
        if config.aggregation == "constant" and kind is None:
            kind = "number"
        options["normalizer"] = normalizers(kind)
        if all_given or config.kl_coef:
            options["ref_logprobs"] = tokens(dtype)
        if all_given or config.correction_level:
            options["rollout_logprobs"] = tokens(dtype)
        if all_given or v["entropy"] or config.entropy_coef:
            options["entropy"] = tokens(dtype, grad=v["entropy"] == "bonus")
        args = (tokens(dtype, grad=v["grad"]), tokens(dtype), advantages)
        options["mask"] = tokens(v["mask"])
        yield Case(f"policy_loss/{name}", rk.policy_loss, args, options)


def value(full: bool) -> Iterator[Case]:
    for v in (pairs if full else one_by_one)(
        clip_range=(0.2, None), aggregation=policy_config.AGGREGATIONS, layout=LAYOUTS,
        normalizer=(None, "number", "tensor"), grad=(True, False), mask=(torch.bool, torch.int64),
        dtype=DTYPES,
    ):  # fmt: skip
        tokens, kind = Tokens(v["layout"]), v["normalizer"]
        if v["aggregation"] == "constant" and kind is None:
            kind = "number"
        options = {k: v[k] for k in ("clip_range", "aggregation")} | tokens.options()
        options["normalizer"] = normalizers(kind)
        x = [tokens(v["dtype"], grad=v["grad"] and i == 0) for i in range(3)]
        options["mask"] = tokens(v["mask"])
        yield Case(f"value_loss/{label(v)}", rk.value_loss, tuple(x), options)


def row_sweeps() -> Iterator[Case]:
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
        yield Case(f"sweep/token_logprobs/all/{n}", rk.token_logprobs, (x, y), options)
        # Another rank, gaps between rows, labels of one stride or another.
        x = torch.zeros(rows, 5, vocab + 8, dtype=BF16)[:, :-1, :vocab].requires_grad_()
        y = torch.zeros(4, rows, dtype=torch.int64).t()
        yield Case(f"sweep/token_logprobs/all/strided {n}", rk.token_logprobs, (x, y), options)
        options = {"temperature": temperature}
        ref = torch.zeros(rows + 1, 5, vocab + 16, dtype=BF16)[1:, 1:, 8 : vocab + 8]
        yield Case(f"sweep/kl_divergence/all/{n}", rk.kl_divergence, (x, ref), options)
        yield Case(f"sweep/kl_penalty/all/{n}", rk.kl_penalty, (x[..., 1], ref[..., 3]), {})


def support_sweeps() -> Iterator[Case]:
    sizes = ((1, 1, 24), (16, 3, 64), (5, 1001, 4096), (7, 16, 100))
    for n, (tokens, kept, vocab) in enumerate(sizes):
        y = torch.zeros(tokens, dtype=torch.int64)
        words = torch.arange(kept).repeat(tokens) % vocab
        options = {"support": (torch.arange(tokens + 1) * kept, words), "entropy": True}
        options |= {"temperature": (0.7, 1, 16, 2)[n], "softcap": (30.0, 1, 16, 2)[n]}
        x = torch.zeros(tokens, vocab, requires_grad=True)
        yield Case(f"sweep/token_logprobs_support/all/{n}", rk.token_logprobs, (x, y), options)
        hidden, weight = (torch.zeros(r, 64, requires_grad=True) for r in (tokens, vocab))
        yield Case(f"sweep/linear_token_logprobs_support/all/{n}", rk.linear_token_logprobs,
                   (hidden, weight, y), options)  # fmt: skip


def token_sweeps() -> Iterator[Case]:
    # Lengths of one tile and of several: the second kind may need another kernel.
    lengths = {"short": (1, 16, 1000, 1024), "long": (10000, 16384, 40001)}
    coefficients = ((1.0, 0.95), (1, 1), (0.5, 0), (0, 0.25))
    for kind, many in lengths.items():
        for n, (length, (gamma, lam)) in enumerate(zip(many, coefficients, strict=False)):
            rows = (1, 2, 16, 17)[n]

            def x(rows: int = rows, length: int = length, **options: Any) -> Tensor:
                return torch.zeros(rows + 1, length + 3, **options)[1:, 2:-1]

            mask, name = x(dtype=torch.bool), f"{kind}/{n}"
            rates: dict[str, Any] = {"gamma": gamma, "lam": lam}
            yield Case(f"sweep/gae/{name}", rk.gae, (x(), x()), {"mask": mask} | rates)
            yield Case(f"sweep/discounted_returns/{name}", rk.discounted_returns, (x(),),
                       {"mask": mask, "gamma": gamma})  # fmt: skip
            yield Case(f"sweep/ppo_advantages/{name}", rk.ppo_advantages,
                       (x()[:, 0], x(), x(), x()),
                       {"mask": mask, "kl_coef": (0.1, 1, 2, 3.5)[n],
                        "reward_clip": (1, 16, 2.5, 3)[n]} | rates)  # fmt: skip
            yield Case(f"sweep/whiten/{name}", rk.whiten, (x(),),
                       {"mask": mask, "eps": (1e-8, 0, 1, 16)[n], "unbiased": n > 1})  # fmt: skip
            rewards, size = torch.zeros(rows * length), (1, rows, length, 1)[n]
            options = {"eps": (1e-6, 0, 1, 16)[n]}
            yield Case(f"sweep/group_advantages/{name}", rk.group_advantages, (rewards, size),
                       options)  # fmt: skip
            ids = torch.zeros(rows * length, dtype=(torch.int64, torch.int32)[n % 2])
            yield Case(f"sweep/group_advantages/{kind} ids/{n}", rk.group_advantages,
                       (rewards, ids), options)  # fmt: skip
            numbers = (0.2, 1, 0, 0.5)
            config = PolicyLossConfig.ppo(
                clip_low=numbers[n], clip_high=(0.28, 1, 16, 2)[n], dual_clip=(3, 2.0, 16, 4)[n],
                kl_coef=(0.1, 1, 16, 0.5)[n], entropy_coef=(0.01, 1, 2, 16)[n],
            )  # fmt: skip
            inputs = {
                "mask": mask,
                "ref_logprobs": x(),
                "entropy": x().requires_grad_(),
                "config": config,
            }
            args = (x().requires_grad_(), x(), x())
            yield Case(f"sweep/policy_loss/{name}", rk.policy_loss, args, inputs)
            inputs = inputs | {"normalizer": (3.0, 1, 16, 2.5)[n]}
            yield Case(f"sweep/policy_loss/{kind} normalizer/{n}", rk.policy_loss, args, inputs)
            yield Case(f"sweep/value_loss/{name}", rk.value_loss, args,
                       {"mask": mask, "clip_range": (0.2, 1, 16, 2)[n]})  # fmt: skip


def packed_sweeps() -> Iterator[Case]:
    for n, (sequences, tokens) in enumerate(((1, 1), (2, 1000), (16, 40001), (1025, 16384))):
        x = torch.zeros(tokens + 3)[2:-1]
        scores, mask = torch.zeros(sequences), torch.ones(tokens, dtype=torch.bool)
        options = {"cu_seqlens": torch.zeros(sequences + 1, dtype=torch.int64), "mask": mask}
        options |= {"gamma": (1, 0.5, 1.0, 0)[n]}
        name = f"packed/{n}"
        yield Case(f"sweep/gae/{name}", rk.gae, (x, x), options)
        yield Case(f"sweep/discounted_returns/{name}", rk.discounted_returns, (x,), options)
        yield Case(f"sweep/ppo_advantages/{name}", rk.ppo_advantages, (scores, x, x, x),
                   options | {"kl_coef": 0.1})  # fmt: skip


def cases(full: bool) -> Iterator[Case]:
    """All calls: options one at a time, or with `full` any two of them together.

    Calls named sweep/operation/kind/... of one kind must not compile anything anew.
    """
    yield from examples()
    yield from token_logprobs(full)
    yield from kl(full)
    yield from support(full)
    yield from scans(full)
    yield from statistics(full)
    yield from policy(full)
    yield from value(full)
    yield from row_sweeps()
    yield from support_sweeps()
    yield from token_sweeps()
    yield from packed_sweeps()
