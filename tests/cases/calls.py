"""Every operation with every option: small calls for the tests of tracing, masks and types."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.cases.combinations import covering

import rlhf_kernels as rk
from rlhf_kernels.config.enums import PREFERENCE_LOSSES
from rlhf_kernels.config.preference import REFERENCE_FREE, SORTED
from rlhf_kernels.ops import _calls
from rlhf_kernels.ops._calls import ARGUMENTS, GIVEN, Inputs
from rlhf_kernels.testing import generator

B, T, V, H = 2, 3, 7, 4
N = B * T
#: Compositions of torch's own operations, which no kernel serves.
PLAIN = (
    "kto_loss",
    "optimal_token_baseline",
    "preference_loss",
    "reward_model_loss",
    "sequence_logprobs",
    "topk_divergence",
)
FUNCTIONS = {function.__name__: function for function in _calls.OPERATIONS}
OPERATIONS = tuple(FUNCTIONS)
Config = rk.PolicyLossConfig


class Call(_calls.Call):
    """A call with a name for messages. Its tensors require no gradient."""

    @property
    def label(self) -> str:
        tensors = (f"{k}={str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
                   for k, t in self.tensors.items())  # fmt: skip
        return " ".join([*tensors, *(f"{k}={v}" for k, v in self.options.items())])


def _mask(x: Inputs) -> torch.Tensor:
    """Masks one token."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, -1] = False
    return mask.view(x.shape)


#: Argument -> what makes it here. Advantages have both signs, labels and supports few token ids.
_MAKERS = {
    "advantages": Inputs.tokens,
    "mask": _mask,
    **dict.fromkeys(("dones", "terminated", "truncated"), lambda x: ~_mask(x)),
    "desirable": lambda _: torch.tensor([True, False]),
    "groups": lambda _: torch.tensor([5, 1, 5, 5, 1, 9, 9, 9]),
    "shared_lengths": lambda _: torch.tensor([2, 1]),
    "labels": lambda x: torch.tensor([1, 3, 1] * B).view(x.shape),
    "support": lambda _: (torch.arange(N + 1) * 2, torch.tensor([1, 3]).repeat(N)),
}
ABSENT = object()
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
    Config(kl_coef=0.1, kl_estimator="k3+", kl_weight="ratio"),
    Config(entropy_coef=0.1, aggregation="constant", normalizer=5.0),
    Config(
        gate="tv", gate_low=0.1, gate_high=0.2, correction_level="geometric", correction_max=2.0
    ),
    Config(gate="binary_kl", gate_high=0.2, kl_coef=0.1, kl_weight="detached-ratio"),
    Config(gate="ratio", gate_high=2.0, gate_against="rollout", kl_coef=0.1, kl_weight="one"),
)
_STEPS = {
    "mask": (ABSENT, GIVEN, lambda x: _mask(x).float()),
    "dones": (ABSENT, GIVEN),
    "bootstrap_values": (ABSENT, GIVEN),
    "gamma": (0.9,),
    "masked": ("carry", "zero"),
}
_per_step = lambda x: x.tokens().sigmoid()  # noqa: E731
_RATES = {
    "mask": (GIVEN,),
    "terminated": (GIVEN,),
    "truncated": (GIVEN,),
    "bootstrap_values": (Inputs.tokens,),
    "gamma": (GIVEN, _per_step),
    "lam": (_per_step, GIVEN),
    "value_lam": (GIVEN, 1.0),
    "masked": ("carry", "zero"),
}
_POLICY = {
    "config": _CONFIGS,
    "ref_logprobs": (GIVEN,),
    "rollout_logprobs": (GIVEN,),
    "weights": (ABSENT, GIVEN),
    "normalizer": (ABSENT, 4.0, GIVEN),
}
_number = ARGUMENTS["normalizer"]
_HEAD = {"bias": (ABSENT, GIVEN), "temperature": (1.0, _number), "softcap": (None, 5.0)}


def _preferences() -> Iterator[dict[str, tuple[Any, ...]]]:
    for loss in PREFERENCE_LOSSES:
        names = ["chosen_lengths", "rejected_lengths"]
        if loss not in REFERENCE_FREE:
            names += ["ref_chosen_logprobs", "ref_rejected_logprobs"]
        yield {
            "loss": (loss,),
            "label_smoothing": (0.1 if loss == "exo_pair" else 0.0,),
            "beta": (0.1,),
            "weights": (None,) if loss in SORTED else (None, GIVEN),
        } | dict.fromkeys(names, (GIVEN,))


#: Operation -> tables of options. The values in one table are combined with each other. A function
#: makes a tensor from the inputs.
CHOICES: dict[str, tuple[dict[str, tuple[Any, ...]], ...]] = {
    "discounted_returns": (_STEPS,),
    "gae": ({**_STEPS, "whiten": (False, True)}, _RATES),
    "group_advantages": (
        {
            "groups": (2, GIVEN),
            "baseline": ("mean", "leave-one-out", "none"),
            "scale": ("group", "batch", "none"),
        },
        {"groups": (2,), "baseline": ("greedy",), "greedy_rewards": (GIVEN,)},
        {
            "groups": (2, GIVEN),
            "baseline": ("log-mean-exp", "pass@k", "batch-mean"),
            "scale": ("leave-one-out", "mean", "none"),
        },
        {
            "groups": (GIVEN,),
            "rewards": (lambda x: x.floats(4 * x.rows, 2),),
            "baseline": ("length-mean",),
            "lengths": (GIVEN,),
            "component_weights": (GIVEN,),
        },
    ),
    "kl_divergence": (
        {"mask": (ABSENT, GIVEN), "direction": ("reverse", "forward"), "temperature": (1.0, 0.7)},
        {
            "direction": ("jsd", "forward", "reverse"),
            "softcap": (None, 5.0),
            "ref_softcap": (None, 4.0),
            "ref_temperature": ("same", 0.8),
            "entropy": (True, False),
            "mask": (GIVEN, ABSENT),
        },
    ),
    "kl_penalty": (
        {"mask": (GIVEN, ABSENT), "estimator": ("k1", "k2", "k3", "abs", "k1+", "k3+")},
    ),
    "kto_loss": ({"kl": (0.1, GIVEN), "desirable_weight": (1.0, 1.5)},),
    "linear_kl_divergence": (
        {
            "bias": (ABSENT, GIVEN),
            "ref_bias": (ABSENT, GIVEN),
            "mask": (ABSENT, GIVEN, lambda x: _mask(x).float()),
            "direction": ("reverse", "forward"),
            "logit_scale": (1.0, 0.5),
        },
        {
            "direction": ("jsd", "forward"),
            "beta": (None,),
            "softcap": (None, 5.0),
            "ref_logit_scale": ("same", 0.8),
            "entropy": (True, False),
            "chunk_tokens": (None, 2),
        },
    ),
    "linear_policy_loss": (
        {**_POLICY, **_HEAD},
        {**_POLICY, **_HEAD, "support": (GIVEN,), "empty_support": ("nan", "whole")},
    ),
    "linear_token_logprobs": (
        {
            **_HEAD,
            "mask": (GIVEN, ABSENT),
            "entropy": (False, True),
            "temperature": (_number, 1.0),
            "logit_scale": (1.0, 0.5),
            "support": (ABSENT, ABSENT, GIVEN, GIVEN),
            "chunk_tokens": (None, 2),
        },
        {
            "lse": (True, False),
            "collision": (False, True),
            "argmax": (True, False),
            "entropy": (False, True),
            "temperature": (1.0, GIVEN),
            "kept_tokens": (None, N),
        },
    ),
    "mismatch_weights": (
        {
            "mask": (GIVEN, lambda x: _mask(x).float()),
            "level": ("token", "sequence", "geometric", "sequence-mean", "sequence-max"),
            "mode": ("truncate", "mask"),
            "high": (None, 1.5),
            "normalize": (False, True),
            "missing": ("raise", "one", "drop"),
        },
        {
            "preset": ("verl-k3-rs", "seq-mask-tis"),
            "veto": (None, 0.9),
            "reject": (None, {"token_k2": 0.02, "seq_sum_ratio": 2.0}),
            "missing": ("one",),
        },
    ),
    "optimal_token_baseline": (
        {
            "groups": (1, lambda x: torch.tensor([3, 3])),
            "mask": (ABSENT, GIVEN),
            "importance_weights": (ABSENT, GIVEN),
            "zero_tail": (True, False),
        },
    ),
    "policy_loss": ({**_POLICY, "entropy": (GIVEN,)},),
    "ppo_advantages": (
        {
            "mask": (GIVEN,),
            "kl_coef": (0.1,),
            "kl_estimator": ("k1", "k2", "k3", "abs"),
            "whiten": (True, False),
            "reward_clip": (None, 1.0),
        },
        _RATES,
    ),
    "preference_loss": tuple(_preferences()),
    "reward_model_loss": ({"margin": (None, 0.5, GIVEN), "center_coef": (0.0, 0.1)},),
    "sequence_logprobs": ({"average": (False, True), "shared_lengths": (None, GIVEN)},),
    "token_logprobs": (
        {
            "mask": (ABSENT, GIVEN),
            "entropy": (False, True),
            "temperature": (1.0, GIVEN),
            "softcap": (None, 5.0),
            "ignore_index": (-100, 3),
            "support": (ABSENT, GIVEN, ABSENT),
        },
        {
            "lse": (True, False),
            "collision": (False, True),
            "argmax": (True, False),
            "entropy": (False, True),
            "temperature": (GIVEN, 1.0),
        },
    ),
    "topk_divergence": ({"mask": (ABSENT, GIVEN), "direction": ("forward", "reverse", "jsd")},),
    "value_loss": (
        {
            "clip_range": (None, 0.2),
            "aggregation": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"),
            "normalizer": (ABSENT, 4.0, GIVEN),
        },
    ),
    "whiten": ({"mask": (ABSENT, GIVEN), "shift_mean": (True, False), "unbiased": (True, False)},),
}


def _call(op: str, x: Inputs, options: dict[str, Any]) -> Call:
    values = {k: v(x) if callable(v) else v for k, v in options.items() if v is not ABSENT}
    call = Call(*_calls.call(FUNCTIONS[op], x, **values))
    tensors = call.tensors
    if op == "ppo_advantages":
        # First in every call is the tensor whose device the others must have.
        tensors = {"logprobs": tensors["logprobs"], **tensors}
    # Other tensors do not change this loss.
    moving = call.differentiable
    if (op == "policy_loss" and not values["config"].entropy_coef) or values.get("loss") == "sft":
        moving = moving[:1]
    return call._replace(tensors=tensors, differentiable=moving)


def calls(op: str, combine: Callable[..., Iterator[dict[str, Any]]] = covering) -> list[Call]:
    """Calls of an operation with combinations of its options: a few that hold each value once."""
    may_pack = "cu_seqlens" in inspect.signature(FUNCTIONS[op]).parameters
    found, g = [], generator(0)
    for choices, packed in itertools.product(CHOICES[op], (False, True)[: 1 + may_pack]):
        x = Inputs(B, T, torch.float32, g.device, g, packed, V, H, _MAKERS)
        for options in combine(**choices):
            if packed and "config" in choices:
                options["cu_seqlens"] = lambda x: ARGUMENTS["cu_seqlens"](x).int()
            if op == "linear_policy_loss" and len(found) % 3 == 2:
                del options["ref_logprobs"]
                names = ("ref_hidden", "ref_weight", "ref_bias")[: 2 + len(found) % 2]
                options |= dict.fromkeys(names, GIVEN)
            found.append(_call(op, x, options))
    return found


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
