"""Every operation with every option: one table of tiny calls for the tests of tracing and types."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tests.cases.combinations import covering, products

import rlhf_kernels as rk
from rlhf_kernels.config.enums import PREFERENCE_LOSSES
from rlhf_kernels.config.preference import REFERENCE_FREE, SORTED

B, T, V, H = 2, 3, 7, 4
N = B * T
#: Compositions of torch's own operations, which no kernel serves.
PLAIN = ("kto_loss", "preference_loss", "reward_model_loss", "sequence_logprobs")
Config = rk.PolicyLossConfig


class Call(NamedTuple):
    """An operation, its tensors and its options; `differentiable` tensors by name."""

    op: str
    label: str
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    differentiable: tuple[str, ...]

    def run(self, tensors: dict[str, torch.Tensor]) -> Any:
        tensors = dict(tensors)
        parts = [tensors.pop(k) for k in ("indptr", "indices") if k in tensors]
        support = {"support": tuple(parts)} if parts else {}
        return getattr(rk, self.op)(**tensors, **support, **self.options)


Options = dict[str, tuple[Any, ...]]
_ABSENT = object()


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _per_token(packed: bool) -> tuple[int, ...]:
    return (N,) if packed else (B, T)


def _mask(packed: bool = False) -> torch.Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, -1] = False
    return mask.reshape(_per_token(packed))


def _build(op: str, base: dict, choices: Options, grads: tuple, full: bool) -> Iterator[Call]:
    """Calls of `op`: option values that are functions make tensors, pairs of them a support."""
    for every in (products if full else covering)(**choices):
        chosen = {name: value for name, value in every.items() if value is not _ABSENT}
        tensors = {k: make() for k, make in base.items()}
        options, label = {}, []
        for name, value in chosen.items():
            if callable(value):
                tensors[name] = value()
            elif name == "support":
                tensors["indptr"] = torch.arange(N + 1) * 2
                tensors["indices"] = torch.tensor([1, 3]).repeat(N)
            elif name != "_":
                options[name] = value
            label.append(f"{name}={'tensor' if callable(value) else value}")
        yield Call(op, " ".join(label), tensors, options, tuple(g for g in grads if g in tensors))


def _token_logprobs(full: bool) -> Iterator[Call]:
    base = {"logits": lambda: _floats(B, T, V), "labels": lambda: torch.tensor([[1, 3, 1]] * B)}
    choices = {
        "mask": (_ABSENT, _mask),
        "entropy": (False, True),
        "temperature": (1.0, lambda: torch.full((B, T), 0.7)),
        "softcap": (None, 5.0),
        "ignore_index": (-100, 3),
        "support": (_ABSENT, True, _ABSENT),
    }
    yield from _build("token_logprobs", base, choices, ("logits",), full)


_HEAD = {"hidden": lambda: _floats(B, T, H), "weight": lambda: _floats(V, H)}
_OPERANDS = ("hidden", "weight", "bias")


def _linear_token_logprobs(full: bool) -> Iterator[Call]:
    base = {**_HEAD, "labels": lambda: torch.tensor([[1, 3, 1]] * B)}
    choices = {
        "mask": (_mask, _ABSENT),
        "entropy": (False, True),
        "bias": (_ABSENT, lambda: _floats(V)),
        "temperature": (lambda: torch.tensor(0.7), 1.0),
        "softcap": (None, 5.0),
        "logit_scale": (1.0, 0.5),
        "support": (_ABSENT, _ABSENT, True, True),
        "chunk_tokens": (None, 2),
    }
    yield from _build("linear_token_logprobs", base, choices, _OPERANDS, full)


def _linear_kl_divergence(full: bool) -> Iterator[Call]:
    base = {**_HEAD, "ref_hidden": lambda: _floats(B, T, H), "ref_weight": lambda: _floats(V, H)}
    choices = {
        "bias": (_ABSENT, lambda: _floats(V)),
        "ref_bias": (_ABSENT, lambda: _floats(V)),
        "mask": (_ABSENT, _mask, lambda: _mask().float()),
        "direction": ("reverse", "forward"),
        "logit_scale": (1.0, 0.5),
    }
    yield from _build("linear_kl_divergence", base, choices, _OPERANDS, full)


_CONFIGS = (
    Config(),
    Config(objective="penalty", penalty_coef=0.5, aggregation="seq-mean-token-mean"),
    Config.reinforce(aggregation="seq-mean-token-sum"),
    Config.cispo(),
    Config.sapo(),
    Config.gspo(),
    Config(ratio_level="sequence-token", dual_clip=3.0),
    Config(correction_level="sequence", correction_max=2.0, delta=4.0),
    Config(correction_level="token", correction_mode="mask", correction_max=2.0),
    Config(kl_coef=0.1, kl_estimator="k3+", kl_importance_weighted=True),
    Config(entropy_coef=0.1, aggregation="constant", normalizer=5.0),
)


def _policies(op: str, full: bool, base: Callable[[bool], dict], choices: Options, grads: tuple):
    for packed in (False, True):
        shape = _per_token(packed)
        tokens = {
            "old_logprobs": lambda s=shape: _floats(*s) * 0.1 - 2,
            "advantages": lambda s=shape: _floats(*s),
            "mask": lambda p=packed: _mask(p),
        }
        if packed:
            tokens["cu_seqlens"] = lambda: torch.tensor([0, T, N], dtype=torch.int32)
        more = {
            "config": _CONFIGS,
            "ref_logprobs": (lambda s=shape: _floats(*s) * 0.1 - 2,),
            "rollout_logprobs": (lambda s=shape: _floats(*s) * 0.1 - 2,),
            "normalizer": (_ABSENT, 4.0, lambda: torch.tensor(3.0)),
            **choices,
        }
        yield from _build(op, {**base(packed), **tokens}, more, grads, full)


def _policy_loss(full: bool) -> Iterator[Call]:
    entropy = {"entropy": (lambda: _floats(B, T).abs(),)}
    for call in _policies(
        "policy_loss", full, lambda p: {"logprobs": lambda: _floats(*_per_token(p)) * 0.1 - 2},
        entropy, ("logprobs", "entropy"),
    ):  # fmt: skip
        tensors = dict(call.tensors)
        tensors["entropy"] = tensors["entropy"].reshape(tensors["logprobs"].shape)
        grads = call.differentiable[: 2 if call.options["config"].entropy_coef else 1]
        yield call._replace(tensors=tensors, differentiable=grads)


def _linear_policy_loss(full: bool) -> Iterator[Call]:
    def base(packed: bool) -> dict:
        shape = _per_token(packed)
        return {
            "hidden": lambda: _floats(*shape, H),
            "weight": lambda: _floats(V, H),
            "labels": lambda: torch.randint(V, shape),
        }

    choices = {
        "bias": (_ABSENT, lambda: _floats(V)),
        "temperature": (1.0, lambda: torch.tensor(0.7)),
        "softcap": (None, 5.0),
    }
    for i, call in enumerate(_policies("linear_policy_loss", full, base, choices, _OPERANDS)):
        if i % 3 == 2:
            tensors = {k: t for k, t in call.tensors.items() if k != "ref_logprobs"}
            tensors |= {"ref_hidden": _floats(*tensors["labels"].shape, H)}
            call = call._replace(tensors=tensors | {"ref_weight": _floats(V, H)})
        yield call


def _kl_divergence(full: bool) -> Iterator[Call]:
    base = {"logits": lambda: _floats(B, T, V), "ref_logits": lambda: _floats(B, T, V)}
    choices = {"mask": (_ABSENT, _mask), "direction": ("reverse", "forward")}
    choices["temperature"] = (1.0, 0.7)
    yield from _build("kl_divergence", base, choices, ("logits",), full)


def _kl_penalty(full: bool) -> Iterator[Call]:
    base = {"logprobs": lambda: _floats(B, T), "ref_logprobs": lambda: _floats(B, T)}
    choices = {"mask": (_mask, _ABSENT), "estimator": ("k1", "k2", "k3", "abs", "k1+", "k3+")}
    yield from _build("kl_penalty", base, choices, ("logprobs",), full)


def _value_loss(full: bool) -> Iterator[Call]:
    for packed in (False, True):
        base = {k: lambda p=packed: _floats(*_per_token(p)) for k in ("values", "old_values")}
        base |= {"returns": base["values"], "mask": lambda p=packed: _mask(p)}
        if packed:
            base["cu_seqlens"] = lambda: torch.tensor([0, T, N])
        choices = {
            "clip_range": (None, 0.2),
            "aggregation": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"),
            "normalizer": (_ABSENT, 4.0, lambda: torch.tensor(3.0)),
        }
        yield from _build("value_loss", base, choices, ("values",), full)


def _scans(op: str, full: bool) -> Iterator[Call]:
    for packed in (False, True):
        shape = _per_token(packed)
        base = {"rewards": lambda s=shape: _floats(*s)}
        if op == "gae":
            base["values"] = base["rewards"]
        if packed:
            base["cu_seqlens"] = lambda: torch.tensor([0, T, N])
        choices = {
            "mask": (_ABSENT, lambda p=packed: _mask(p), lambda p=packed: _mask(p).float()),
            "dones": (_ABSENT, lambda p=packed: ~_mask(p)),
            "bootstrap_values": (_ABSENT, lambda: _floats(B)),
            "gamma": (0.9,),
            "masked": ("carry", "zero"),
        }
        if op == "gae":
            choices["whiten"] = (False, True)
        yield from _build(op, base, choices, (), full)


def _ppo_advantages(full: bool) -> Iterator[Call]:
    for packed in (False, True):
        names = ("logprobs", "ref_logprobs", "values")
        base = {k: lambda p=packed: _floats(*_per_token(p)) for k in names}
        base |= {"scores": lambda: _floats(B), "mask": lambda p=packed: _mask(p)}
        if packed:
            base["cu_seqlens"] = lambda: torch.tensor([0, T, N])
        choices = {
            "kl_coef": (0.1,),
            "kl_estimator": ("k1", "k2", "k3", "abs"),
            "whiten": (True, False),
            "reward_clip": (None, 1.0),
        }
        yield from _build("ppo_advantages", base, choices, (), full)


def _group_advantages(full: bool) -> Iterator[Call]:
    base = {"rewards": lambda: _floats(N)}
    choices = {
        "groups": (2, lambda: torch.tensor([5, 1, 5, 5, 1, 9])),
        "baseline": ("mean", "leave-one-out", "none"),
        "scale": ("group", "batch", "none"),
    }
    yield from _build("group_advantages", base, choices, (), full)
    greedy = {"groups": (2,), "baseline": ("greedy",), "greedy_rewards": (lambda: _floats(N),)}
    yield from _build("group_advantages", base, greedy, (), full)


def _whiten(full: bool) -> Iterator[Call]:
    choices = {"mask": (_ABSENT, _mask), "shift_mean": (True, False), "unbiased": (True, False)}
    yield from _build("whiten", {"x": lambda: _floats(B, T)}, choices, (), full)


def _sequence_logprobs(full: bool) -> Iterator[Call]:
    for packed in (False, True):
        base = {"logprobs": lambda p=packed: _floats(*_per_token(p))}
        base |= {"mask": lambda p=packed: _mask(p)}
        if packed:
            base["cu_seqlens"] = lambda: torch.tensor([0, T, N])
        shared = lambda: torch.tensor([2, 1])  # noqa: E731
        choices = {"average": (False, True), "shared_lengths": (None, shared)}
        yield from _build("sequence_logprobs", base, choices, ("logprobs",), full)


def _preference_loss(full: bool) -> Iterator[Call]:
    names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    lengths = {k: lambda: torch.randint(1, 9, (B,)) for k in ("chosen_lengths", "rejected_lengths")}
    base = {name: lambda: _floats(B) for name in names}
    for loss in PREFERENCE_LOSSES:
        smoothing = (0.1 if loss == "exo_pair" else 0.0,)
        reference = dict.fromkeys(names[2:]) if loss in REFERENCE_FREE else {}
        options = {"loss": (loss,), "label_smoothing": smoothing, "beta": (0.1,)}
        options["weights"] = (None,) if loss in SORTED else (None, lambda: torch.rand(B))
        given = {k: v for k, v in base.items() if k not in reference} | lengths
        grads = names[:1] if loss == "sft" else names
        yield from _build("preference_loss", given, options, grads, full)


def _kto_loss(full: bool) -> Iterator[Call]:
    base = {name: lambda: _floats(B) for name in ("logprobs", "ref_logprobs")}
    given = base | {"desirable": lambda: torch.tensor([True, False])}
    choices = {"kl": (0.1, lambda: torch.tensor(0.2)), "desirable_weight": (1.0, 1.5)}
    yield from _build("kto_loss", given, choices, tuple(base), full)


def _reward_model_loss(full: bool) -> Iterator[Call]:
    base = {name: lambda: _floats(B) for name in ("chosen_rewards", "rejected_rewards")}
    choices = {"margin": (None, 0.5, lambda: _floats(B).abs()), "center_coef": (0.0, 0.1)}
    yield from _build("reward_model_loss", base, choices, tuple(base), full)


_MAKERS: dict[str, Callable[[bool], Iterator[Call]]] = {
    "discounted_returns": lambda full: _scans("discounted_returns", full),
    "gae": lambda full: _scans("gae", full),
    "group_advantages": _group_advantages,
    "kl_divergence": _kl_divergence,
    "kl_penalty": _kl_penalty,
    "kto_loss": _kto_loss,
    "linear_kl_divergence": _linear_kl_divergence,
    "linear_policy_loss": _linear_policy_loss,
    "linear_token_logprobs": _linear_token_logprobs,
    "policy_loss": _policy_loss,
    "ppo_advantages": _ppo_advantages,
    "preference_loss": _preference_loss,
    "reward_model_loss": _reward_model_loss,
    "sequence_logprobs": _sequence_logprobs,
    "token_logprobs": _token_logprobs,
    "value_loss": _value_loss,
    "whiten": _whiten,
}
OPERATIONS = tuple(_MAKERS)


def calls(op: str, *, full: bool = False) -> list[Call]:
    """Calls of an operation: all combinations of options, or a few that hold each value once."""
    return list(_MAKERS[op](full))


def wanted(call: Call, *, full: bool = True) -> list[tuple[str, ...]]:
    """Which inputs need gradients: every choice of them, or none, each alone and all."""
    names = call.differentiable
    sizes = range(len(names) + 1) if full else {0, 1, len(names)}
    return [c for n in sizes for c in itertools.combinations(names, n)]


def leaves(call: Call, needs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The call's tensors, those of `needs` as leaves that need a gradient."""
    return {k: t.clone().requires_grad_(k in needs) for k, t in call.tensors.items()}


def outputs(result: Any) -> list[torch.Tensor]:
    """The tensors of a result."""
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
