"""Small example inputs of every operation, for `warmup` and the doctor."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.policy import PolicyLossConfig
from ..core import checks
from ._metrics import Metrics
from .advantages import discounted_returns, gae, group_advantages, ppo_advantages, whiten
from .kl import kl_divergence, kl_penalty
from .linear_kl import linear_kl_divergence
from .linear_logprobs import linear_token_logprobs
from .linear_policy import linear_policy_loss
from .logprobs import token_logprobs
from .policy import policy_loss
from .preference import kto_loss, preference_loss, reward_model_loss, sequence_logprobs
from .value import value_loss


class Inputs(NamedTuple):
    """Makes random inputs of one size, dtype and device from its own generator."""

    rows: int
    size: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def _seeded(self) -> dict[str, Any]:
        # The default device may differ from the generator's.
        return {"generator": self.generator, "device": self.generator.device}

    def floats(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        values = torch.randn(shape, **self._seeded()) * scale
        return values.to(self.device, self.dtype).requires_grad_(grad)

    def tokens(self, *, grad: bool = False) -> Tensor:
        """Per-token values [rows, size]."""
        return self.floats(self.rows, self.size, grad=grad)

    def mask(self) -> Tensor:
        """Bool [rows, size] with gaps and one wholly masked row."""
        mask = torch.rand(self.rows, self.size, **self._seeded()) < 0.8
        mask[-1] = False
        return mask.to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, **self._seeded()).to(self.device)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _discounted_returns(x: Inputs) -> Call:
    return (x.tokens(),), {"mask": x.mask(), "gamma": 0.99}


def _gae(x: Inputs) -> Call:
    return (x.tokens(), x.tokens()), {"mask": x.mask(), "gamma": 0.99, "whiten": True}


def _group_advantages(x: Inputs) -> Call:
    return (x.floats(4 * x.rows, grad=False), 4), {}


def _kl_divergence(x: Inputs) -> Call:
    return (x.tokens(grad=True), x.tokens()), {"temperature": 0.7}


def _kl_penalty(x: Inputs) -> Call:
    return (x.tokens(grad=True), x.tokens()), {"estimator": "k3"}


def _kto_loss(x: Inputs) -> Call:
    values = x.floats(x.rows), x.floats(x.rows, grad=False), x.integers(2, x.rows)
    return values, {"kl": 0.1}


def _head(x: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states [rows, 2, 16] and a weight [size, 16]."""
    return x.floats(x.rows, 2, 16), x.floats(x.size, 16, scale=0.5)


def _linear_kl_divergence(x: Inputs) -> Call:
    hidden, weight = _head(x)
    ref = x.floats(x.rows, 2, 16, grad=False), x.floats(x.size, 16, scale=0.5, grad=False)
    return (hidden, weight, *ref), {"temperature": 0.7}


def _linear_policy_loss(x: Inputs) -> Call:
    hidden, weight = _head(x)
    old = x.floats(x.rows, 2, scale=0.2, grad=False) - 6
    mask = torch.ones(x.rows, 2, dtype=torch.bool, device=x.device)
    # One sign only: terms of both signs would cancel and hide errors.
    advantages = x.floats(x.rows, 2, grad=False).abs()
    labels = x.integers(x.size, x.rows, 2)
    # No clipping: rounding would decide the gradient of a ratio at the bound.
    config = PolicyLossConfig.reinforce()
    return (hidden, weight, labels, old, advantages), {"mask": mask, "config": config}


def _linear_token_logprobs(x: Inputs) -> Call:
    hidden, weight = _head(x)
    return (hidden, weight, x.integers(x.size, x.rows, 2)), {"temperature": 0.7, "entropy": True}


def _policy_loss(x: Inputs) -> Call:
    logprobs = x.floats(x.rows, x.size, scale=0.2)
    old, rollout, ref = (x.floats(x.rows, x.size, scale=0.2, grad=False) for _ in range(3))
    # Every term switched on.
    config = PolicyLossConfig.ppo(
        dual_clip=3.0,
        kl_coef=0.05,
        entropy_coef=0.01,
        correction_level="token",
        correction_max=2.0,
    )
    options = {"ref_logprobs": ref, "rollout_logprobs": rollout, "config": config}
    options["entropy"] = x.tokens(grad=True)
    # One sign only: terms of both signs would cancel and hide errors.
    return (logprobs, old, x.tokens().abs()), options | {"mask": x.mask()}


def _ppo_advantages(x: Inputs) -> Call:
    arguments = (x.floats(x.rows, grad=False), x.tokens(), x.tokens(), x.tokens())
    return arguments, {"mask": x.mask(), "kl_coef": 0.05, "gamma": 0.99}


def _preference_loss(x: Inputs) -> Call:
    return tuple(x.floats(x.rows, grad=i < 2) for i in range(4)), {}


def _reward_model_loss(x: Inputs) -> Call:
    return (x.floats(x.rows), x.floats(x.rows)), {"center_coef": 0.01}


def _sequence_logprobs(x: Inputs) -> Call:
    return (x.tokens(grad=True),), {"mask": x.mask()}


def _token_logprobs(x: Inputs) -> Call:
    logits = x.floats(x.rows, x.size, scale=4.0)
    return (logits, x.integers(x.size, x.rows)), {"temperature": 0.7, "entropy": True}


def _support(x: Inputs, rows: int) -> tuple[Tensor, Tensor]:
    """Three token ids for each of `rows` tokens."""
    indptr = 3 * torch.arange(rows + 1, device=x.device)
    token_ids = (x.integers(x.size - 2, rows, 1) + torch.arange(3, device=x.device)).reshape(-1)
    return indptr, token_ids


def _linear_token_logprobs_support(x: Inputs) -> Call:
    hidden, weight = _head(x)
    support = _support(x, 2 * x.rows)
    return (hidden, weight, support[1][::3].view(x.rows, 2)), {"support": support, "entropy": True}


def _token_logprobs_support(x: Inputs) -> Call:
    support = _support(x, x.rows)
    logits = x.floats(x.rows, x.size, scale=4.0)
    return (logits, support[1][::3]), {"support": support, "entropy": True}


def _value_loss(x: Inputs) -> Call:
    options = {"mask": x.mask(), "clip_range": 0.2}
    return (x.tokens(grad=True), x.tokens(), x.tokens()), options


def _whiten(x: Inputs) -> Call:
    return (x.tokens(),), {"mask": x.mask()}


#: Public operation -> its example arguments. A new operation adds a line here.
EXAMPLES: dict[Callable[..., Any], Callable[[Inputs], Call]] = {
    discounted_returns: _discounted_returns,
    gae: _gae,
    group_advantages: _group_advantages,
    kl_divergence: _kl_divergence,
    kl_penalty: _kl_penalty,
    kto_loss: _kto_loss,
    linear_kl_divergence: _linear_kl_divergence,
    linear_policy_loss: _linear_policy_loss,
    linear_token_logprobs: _linear_token_logprobs,
    policy_loss: _policy_loss,
    ppo_advantages: _ppo_advantages,
    preference_loss: _preference_loss,
    reward_model_loss: _reward_model_loss,
    sequence_logprobs: _sequence_logprobs,
    token_logprobs: _token_logprobs,
    value_loss: _value_loss,
    whiten: _whiten,
}

#: Further calls of an operation, for kernels that its example does not reach.
VARIANTS: dict[Callable[..., Any], tuple[Callable[[Inputs], Call], ...]] = {
    linear_token_logprobs: (_linear_token_logprobs_support,),
    token_logprobs: (_token_logprobs_support,),
}


def tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors in a result: a tensor, a tuple of results, or metrics."""
    if isinstance(value, tuple):
        for item in value:
            yield from tensors(item)
        return
    value = value.tensor if isinstance(value, Metrics) else value
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value


def gradients(results: Sequence[Tensor], call: Call) -> list[Tensor]:
    """Gradients of a weighted sum of `results` w.r.t. the arguments of `call` that require grad."""
    leaves = [v for v in (*call[0], *call[1].values()) if isinstance(v, Tensor) and v.requires_grad]
    outputs = [r for r in results if r.requires_grad]
    if not leaves or not outputs:
        return []
    # Distinct weights reveal a backward pass that mixes up its upstream gradients.
    upstream = [torch.linspace(0.5, 1.5, o.numel()).to(o).view(o.shape) for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True))


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
        for function, example in EXAMPLES.items():
            for make, dtype in product((example, *VARIANTS.get(function, ())), dtypes):
                call = make(Inputs(rows, 64, dtype, device, torch.Generator().manual_seed(0)))
                gradients(list(tensors(function(*call[0], **call[1]))), call)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
