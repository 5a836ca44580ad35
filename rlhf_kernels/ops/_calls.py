"""A call of every operation: `warmup`, the doctor and the tests take theirs from here."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.policy import PolicyLossConfig
from ..core import checks
from ..kernels.backends import REFERENCE
from ._metrics import Metrics
from ._operator import select
from .advantages import discounted_returns, gae, whiten
from .advantages_groups import group_advantages, optimal_token_baseline
from .advantages_shaped import ppo_advantages
from .kl import kl_divergence, kl_penalty
from .kl_topk import topk_divergence
from .linear_kl import linear_kl_divergence
from .linear_logprobs import linear_token_logprobs
from .linear_policy import linear_policy_loss
from .logprobs import token_logprobs
from .mismatch import mismatch_weights
from .policy import policy_loss
from .preference import kto_loss, preference_loss, reward_model_loss, sequence_logprobs
from .value import value_loss


@dataclass(frozen=True)
class Inputs:
    """Makes random tensors for the arguments of an operation, of one size, dtype and device.

    Values per token have the shape [rows, size], or [rows * size] if packed. An operation on logits
    takes `size` as the size of its vocabulary, unless `vocabulary` is given.
    """

    rows: int
    size: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator
    packed: bool = False
    vocabulary: int = 0
    width: int = 16
    #: Argument -> what makes it instead of what ARGUMENTS names.
    others: Mapping[str, "Maker"] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of values per token."""
        return (self.rows * self.size,) if self.packed else (self.rows, self.size)

    def over_vocabulary(self, length: int) -> "Inputs":
        """The inputs with `size` as the vocabulary and `length` tokens per sequence."""
        return self if self.vocabulary else replace(self, size=length, vocabulary=self.size)

    def _seeded(self) -> dict[str, Any]:
        # The default device may differ from the generator's.
        return {"generator": self.generator, "device": self.generator.device}

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, **self._seeded()) * scale).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, **self._seeded()).to(self.device)

    def tokens(self) -> Tensor:
        return self.floats(*self.shape)

    def logprobs(self) -> Tensor:
        """Values per token around those of an even distribution, within most clip ranges."""
        values = self.floats(*self.shape, scale=0.2)
        return values - math.log(self.vocabulary) if self.vocabulary else values

    def mask(self) -> Tensor:
        """A bool mask with gaps and one wholly masked row."""
        mask = torch.rand(self.rows, self.size, **self._seeded()) < 0.8
        mask[-1] = False
        return mask.to(self.device).view(self.shape)

    def labels(self) -> Tensor:
        """Token ids. Every call makes the same ones, so that `support` can hold them."""
        seed = self.generator.initial_seed() + 1
        g = torch.Generator(self.generator.device).manual_seed(seed)
        return replace(self, generator=g).integers(self.vocabulary, *self.shape)

    def support(self) -> tuple[Tensor, Tensor]:
        """(indptr, token ids): each token keeps its label and the next two ids."""
        ids = self.labels().view(-1, 1) + torch.arange(3, device=self.device)
        indptr = torch.arange(len(ids) + 1, device=self.device) * 3
        return indptr, ids.view(-1) % self.vocabulary

    def sequences(self) -> Tensor:
        return self.floats(self.rows)

    def samples(self) -> Tensor:
        """Values of four samples per row."""
        return self.floats(4 * self.rows)


Maker = Callable[[Inputs], Any]
_PAIRS = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
_REWARDS = ("chosen_rewards", "rejected_rewards")
_LENGTHS = ("chosen_lengths", "rejected_lengths", "shared_lengths")


def _all(make: Maker, *names: str) -> dict[str, Maker]:
    return dict.fromkeys(names, make)


#: Argument that is a tensor, or may be one -> what makes it.
ARGUMENTS: dict[str, Maker] = {
    **_all(Inputs.tokens, "rewards", "values", "old_values", "returns", "x", "entropy"),
    **_all(Inputs.logprobs, "logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs"),
    # One sign only: terms of both signs would cancel and hide errors.
    "advantages": lambda x: x.tokens().abs(),
    "mask": Inputs.mask,
    **_all(lambda x: ~x.mask(), "dones", "terminated", "truncated"),
    **_all(lambda x: x.sequences().sigmoid(), "gamma", "lam", "value_lam"),
    "cu_seqlens": lambda x: x.size * torch.arange(x.rows + 1, device=x.device),
    **_all(Inputs.sequences, "scores", "bootstrap_values", *_PAIRS, *_REWARDS),
    **_all(lambda x: x.sequences().abs(), "weights", "margin"),
    **_all(lambda x: 1 + x.integers(8, x.rows), *_LENGTHS),
    "desirable": lambda x: x.integers(2, x.rows),
    "greedy_rewards": Inputs.samples,
    "lengths": lambda x: 1 + x.integers(8, 4 * x.rows),
    "component_weights": lambda x: x.floats(2),
    **_all(lambda x: x.tokens().sigmoid(), "collision", "importance_weights"),
    "groups": lambda x: torch.arange(4 * x.rows, device=x.device) // 4,
    **_all(lambda x: x.floats(*x.shape, x.vocabulary, scale=4.0), "logits", "ref_logits"),
    "labels": Inputs.labels,
    "support": Inputs.support,
    "temperature": lambda x: torch.full(x.shape, 0.7, device=x.device),
    **_all(lambda x: x.floats(*x.shape, x.width), "hidden", "ref_hidden"),
    **_all(lambda x: x.floats(x.vocabulary, x.width, scale=0.5), "weight", "ref_weight"),
    **_all(lambda x: x.floats(x.vocabulary), "bias", "ref_bias"),
    **_all(lambda x: torch.tensor(0.7, device=x.device), "normalizer", "kl"),
}


@dataclass(frozen=True)
class _Given:
    make: Maker | None = None

    def __repr__(self) -> str:
        return "given" if self.make is None else "several"


#: An option with this value becomes the tensor that ARGUMENTS makes for it.
GIVEN: Any = _Given()
#: Labels [..., 3], two of them equal.
SEVERAL: Any = _Given(
    lambda x: torch.stack([x.labels(), x.integers(x.vocabulary, *x.shape), x.labels()], -1)
)


class Operation(NamedTuple):
    """How an operation is called. Its required arguments come from its signature."""

    differentiable: tuple[str, ...] = ()
    #: Options of each example.
    examples: tuple[dict[str, Any], ...] = ({},)
    #: Tokens per sequence for an operation on logits, 0 for others.
    length: int = 0
    #: Argument -> what makes it instead of what ARGUMENTS names.
    others: Mapping[str, Maker] = MappingProxyType({})


# Every term switched on.
_PPO = PolicyLossConfig.ppo(
    dual_clip=3.0, kl_coef=0.05, entropy_coef=0.01, correction_level="token", correction_max=2.0
)
# And what few losses have: weights, a gate, a weight of the KL.
_GATED = PolicyLossConfig.gspo(
    clip_low=0.2,
    clip_high=0.2,
    entropy_coef=0.01,
    gate="tv",
    gate_high=0.2,
    kl_coef=0.05,
    kl_weight="detached-ratio",
    correction_level="geometric",
    correction_max=2.0,
)
_OF_PPO = dict.fromkeys(("ref_logprobs", "rollout_logprobs", "entropy"), GIVEN)
# No clipping: rounding would decide the gradient of a ratio at the bound.
_REINFORCE = PolicyLossConfig.reinforce()
_OPERANDS = ("hidden", "weight", "bias")
_ROWS = (
    {"temperature": 0.7, "entropy": True},
    {"temperature": 0.7, "lse": True},
    {"temperature": 0.7, "entropy": True, "lse": True, "collision": True, "argmax": True},
    {"support": GIVEN, "entropy": True},
    {"labels": SEVERAL, "temperature": 0.7, "entropy": True},
)
_DIVERGENCES = (
    {"temperature": 0.7},
    {"direction": "jsd", "ref_softcap": 20.0, "ref_temperature": 0.8, "entropy": True},
)
# Moderate logits: a gradient is a difference of them, and its rounding grows with their size.
_NEAR = _all(lambda x: x.floats(*x.shape, x.vocabulary), "logits", "ref_logits")
_FAR = _all(Inputs.tokens, "logprobs", "ref_logprobs")
# Four tokens with half of the mass or less.
_TOPK = _all(lambda x: -2.5 - x.floats(*x.shape, 4).abs(), "logprobs", "ref_logprobs")
_SUMS = _all(Inputs.sequences, "logprobs", "ref_logprobs")
_WHOLE: dict[str, Maker] = {
    "mask": lambda x: torch.ones(x.shape, dtype=torch.bool, device=x.device)
}
_STEPS = {"mask": GIVEN, "gamma": 0.99}
_SEQUENCE_TIS = {
    "preset": "verl-seq-is",
    "reject": {"seq_mean_k3": 0.05},
    "normalize": True,
    "missing": "drop",
}

#: Public operation -> how it is called. A new operation adds an entry here.
OPERATIONS: dict[Callable[..., Any], Operation] = {
    discounted_returns: Operation(examples=(_STEPS,)),
    gae: Operation(examples=({**_STEPS, "whiten": True}, {**_STEPS, "lam": GIVEN})),
    group_advantages: Operation(examples=({"groups": 4},), others={"rewards": Inputs.samples}),
    kl_divergence: Operation(("logits",), _DIVERGENCES, 1, _NEAR),
    kl_penalty: Operation(("logprobs",), ({"estimator": "k3"},), others=_FAR),
    kto_loss: Operation(("logprobs", "ref_logprobs"), ({"kl": 0.1},), others=_SUMS),
    linear_kl_divergence: Operation(_OPERANDS, _DIVERGENCES, 2),
    linear_policy_loss: Operation(_OPERANDS, ({"config": _REINFORCE},), 2, _WHOLE),
    linear_token_logprobs: Operation(_OPERANDS, _ROWS, 2),
    mismatch_weights: Operation(examples=({"preset": "icepop", "missing": "one"}, _SEQUENCE_TIS)),
    optimal_token_baseline: Operation(
        examples=({"mask": GIVEN, "groups": 1},), others={"logprobs": lambda x: -x.tokens().abs()}
    ),
    policy_loss: Operation(
        ("logprobs", "entropy"),
        ({**_OF_PPO, "config": _PPO}, {**_OF_PPO, "weights": GIVEN, "config": _GATED}),
    ),
    ppo_advantages: Operation(examples=({**_STEPS, "kl_coef": 0.05},), others=_FAR),
    preference_loss: Operation(_PAIRS, (dict.fromkeys(_PAIRS[2:], GIVEN),)),
    reward_model_loss: Operation(_REWARDS, ({"center_coef": 0.01},)),
    sequence_logprobs: Operation(("logprobs",), others=_FAR),
    token_logprobs: Operation(("logits",), _ROWS, 1),
    topk_divergence: Operation(("logprobs",), ({"direction": "jsd"},), others=_TOPK),
    value_loss: Operation(("values",), ({"clip_range": 0.2},)),
    whiten: Operation(examples=({"mask": GIVEN},)),
}

#: The two tensors of a support.
SUPPORT = ("indptr", "indices")


class Call(NamedTuple):
    """An operation, its tensors and options by argument, and which tensors are differentiable."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    differentiable: tuple[str, ...]

    @property
    def op(self) -> str:
        return self.function.__name__

    def run(self, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """Calls the operation, with other tensors of the same names if they are given."""
        given: dict[str, Any] = dict(self.tensors if tensors is None else tensors)
        if SUPPORT[0] in given:
            given["support"] = tuple(given.pop(name) for name in SUPPORT)
        return self.function(**given, **self.options)

    def requiring(self, *names: str) -> "Call":
        """The call with new leaves, of which `names` require a gradient."""
        tensors = {k: t.detach().requires_grad_(k in names) for k, t in self.tensors.items()}
        return self._replace(tensors=tensors)


def call(function: Callable[..., Any], inputs: Inputs, **options: Any) -> Call:
    """A call of `function` with its required arguments, made from `inputs`, and with `options`.

    An option that is GIVEN, or SEVERAL labels, becomes a tensor from `inputs`. Packed inputs add
    their `cu_seqlens`. No tensor requires a gradient.
    """
    operation, parameters = OPERATIONS[function], inspect.signature(function).parameters
    inputs = inputs.over_vocabulary(operation.length) if operation.length else inputs
    given, makers = dict(options), {**ARGUMENTS, **operation.others, **inputs.others}
    for name, parameter in parameters.items():
        packed = name == "cu_seqlens" and inputs.packed
        if name in ARGUMENTS and (packed or parameter.default is parameter.empty):
            given.setdefault(name, GIVEN)
        if isinstance(marked := given.get(name), _Given):
            given[name] = (marked.make or makers[name])(inputs)
    given |= zip(SUPPORT, given.pop("support", None) or (), strict=False)
    names = [k for k in (*parameters, *SUPPORT) if isinstance(given.get(k), Tensor)]
    tensors = {name: given.pop(name) for name in names}
    return Call(function, tensors, given, tuple(k for k in operation.differentiable if k in names))


def examples(function: Callable[..., Any], inputs: Inputs) -> Iterator[Call]:
    """The example calls of an operation. Their differentiable tensors require a gradient."""
    for options in OPERATIONS[function].examples:
        found = call(function, inputs, **options)
        yield found.requiring(*found.differentiable)


def example(function: Callable[..., Any], inputs: Inputs) -> Call:
    """The first of `examples`."""
    return next(examples(function, inputs))


def tensors(value: Any, *, integers: bool = False) -> Iterator[Tensor]:
    """Floating tensors, or with `integers` all, in a tensor, a tuple of results, or metrics."""
    if isinstance(value, tuple):
        for item in value:
            yield from tensors(item, integers=integers)
        return
    value = value.tensor if isinstance(value, Metrics) else value
    if isinstance(value, Tensor) and (integers or value.is_floating_point()):
        yield value


def gradients(results: Sequence[Tensor], call: Call) -> list[Tensor]:
    """Gradients of a weighted sum of `results` w.r.t. the tensors of `call` that require grad."""
    leaves = [t for t in call.tensors.values() if t.requires_grad]
    outputs = [r for r in results if r.requires_grad]
    if not leaves or not outputs:
        return []
    # Distinct weights reveal a backward pass that mixes up its upstream gradients.
    upstream = [torch.linspace(0.5, 1.5, o.numel()).to(o).view(o.shape) for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True))


def results(call: Call) -> list[Tensor]:
    """The floating results of a call, detached, and the gradients of their weighted sum."""
    found = list(tensors(call.run()))
    return [r.detach() for r in found] + gradients(found, call)


def _overwrite_logits(inputs: Inputs) -> None:
    """`token_logprobs` with its gradient in the memory of the logits, which may not be a leaf."""
    found = example(token_logprobs, inputs)
    leaf, labels = found.tensors["logits"], found.tensors["labels"]
    logprobs = token_logprobs(leaf * 1, labels, inplace_backward=True).logprobs
    torch.autograd.grad(logprobs.sum(), leaf)


def warmup(
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = checks.FLOATING,
) -> None:
    """Runs every operation forward and backward once on tiny tensors.

    Later calls then have no first-call cost. On CPU this cost is loading the kernels' code, the
    first allocations and the start of the OpenMP team, which belongs to the calling thread. On
    GPUs it is compiling and loading kernels, which must not happen while a CUDA graph is captured.
    Results are discarded; no random state changes.

    Args:
        device: device of the tensors.
        dtypes: dtypes of the floating inputs, from float32, bfloat16, float16.

    Raises:
        TypeError: a dtype that no kernel supports.
        RuntimeError: the selected backend does not support this device.
    """
    device = torch.device(device)
    for dtype in dtypes:
        if dtype not in checks.FLOATING:
            names = ", ".join(str(d).removeprefix("torch.") for d in checks.FLOATING)
            raise TypeError(f"warmup: dtypes must be from {names}, got {dtype}")
    # At least one row for every thread of the team.
    rows = max(2, torch.get_num_threads())
    with torch.inference_mode(False), torch.enable_grad():
        for function, dtype in product(OPERATIONS, dtypes):
            inputs = Inputs(rows, 64, dtype, device, torch.Generator().manual_seed(0))
            for found in examples(function, inputs):
                results(found)
            if function is token_logprobs and select("token_logprobs", device) != REFERENCE:
                _overwrite_logits(inputs)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
