"""Head: the LM head of a Hugging Face model, as the operations over hidden states take it.

This module does not import transformers: it only uses methods and settings of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

_TOKENS = 8
#: Standard deviation of logits large enough to reveal a cap; models use caps between 15 and 50.
_LARGE = 30.0


class HeadArguments(TypedDict):
    """The fields of a `Head` as keyword arguments; typed, so that a type checker keeps the call."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


class Head(NamedTuple):
    """The LM head of a model: logits = softcap((hidden @ weight.T + bias) * logit_scale).

    The fields are arguments of `linear_token_logprobs` and `linear_policy_loss`:
    `linear_policy_loss(hidden, labels=labels, **head.arguments(), ...)`.

    weight: [V, H], the model's own parameter.
    bias: [V], or None.
    softcap: c of c tanh(x / c), or None.
    logit_scale: multiplies hidden @ weight.T + bias.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def from_model(cls, model: nn.Module, *, check: bool = True) -> "Head":
        """The head of a Hugging Face causal LM, checked against the model.

        The check runs the model on eight random tokens and compares its logits with those of this
        head over the last hidden states of the base model. A second run scales the hidden states
        up, so that a cap of the logits shows. Training mode, gradients and random generators stay
        unchanged.

        The operations over heads read only `weight` and ignore the module around it. Adapters,
        parametrisations and hooks on the head are therefore refused, and so are sharded parameters.
        Wrappers of DDP, torch.compile and PEFT are unwrapped, including a head that PEFT trains
        fully.

        Args:
            model: a causal LM, with `get_output_embeddings`, `base_model` and `config`.
            check: False only reads the head and its settings. It runs no forward pass and accepts
                hooks on the head, which a wrapper may have set; the caller answers for them.

        Raises:
            ValueError: the model has no such head, or its parameters are sharded.
        """
        model = _unwrapped(model)
        module, weight = _output_embeddings(model, refuse_hooks=check)
        head = cls(weight, getattr(module, "bias", None), *_settings(model))
        if check:
            _check(model, module, head)
        return head

    def arguments(self) -> HeadArguments:
        """The fields as keyword arguments of `linear_token_logprobs` and `linear_policy_loss`.

        `_asdict()` gives the same values, but pyright cannot choose an overload by its types.
        """
        return {
            "weight": self.weight,
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states [..., H], fp32 [..., V]."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float() * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def _unwrapped(wrapped: nn.Module) -> nn.Module:
    """The model inside DDP, torch.compile and PEFT."""
    model: Any = wrapped
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            inner: nn.Module = model
            return inner


def _fail(model: nn.Module, why: str) -> ValueError:
    return ValueError(f"Head.from_model: {type(model).__name__} {why}")


def _in_use(module: Any) -> Any:
    """The active copy of a head that PEFT trains fully (modules_to_save); else `module` itself."""
    if not hasattr(module, "modules_to_save") or not hasattr(module, "original_module"):
        return module
    if module.disable_adapters:
        return module.original_module
    active = module.active_adapter
    return module.modules_to_save[active if isinstance(active, str) else active[0]]


def _output_embeddings(model: Any, *, refuse_hooks: bool) -> tuple[nn.Module, Tensor]:
    """The module of the head and its weight; raises if the module is more than a linear layer."""
    if type(model).__name__ == "FullyShardedDataParallel":
        raise _fail(model, "has sharded parameters: call it inside summon_full_params")
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise _fail(model, "is no Hugging Face model: it has no config or no get_output_embeddings")
    if getattr(config, "is_encoder_decoder", False):
        raise _fail(model, "has an encoder: expected a causal LM")
    module = model.get_output_embeddings()
    if module is None:
        raise _fail(model, "has no LM head")
    module = _in_use(module)
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise _fail(model, f"has a {kind} without a weight for its LM head")
    if hasattr(weight, "full_tensor"):
        raise _fail(
            model,
            "has a sharded LM head (DTensor): unshard it, or make a Head of weight.full_tensor()",
        )
    if hasattr(weight, "ds_id"):
        raise _fail(model, "has an LM head partitioned by ZeRO-3: gather its parameters first")
    if weight.is_meta:
        raise _fail(model, "has an LM head without data, on the meta device")
    if weight.dim() != 2 or not weight.dtype.is_floating_point or weight.element_size() < 2:
        raise _fail(
            model,
            f"has an LM head whose weight is {weight.dtype} of shape {tuple(weight.shape)}: "
            "expected [V, H] in floating point, neither quantised nor flattened",
        )
    if nn.utils.parametrize.is_parametrized(module):
        raise _fail(model, "has a parametrised LM head")
    extra = {n for n, _ in module.named_parameters()} - {"weight", "bias"}
    if extra:
        raise _fail(model, f"has an LM head with more parameters ({min(extra)}), as of adapters")
    hooks = refuse_hooks and (module._forward_hooks or module._forward_pre_hooks)
    if hooks or "forward" in vars(module):
        raise _fail(model, "has hooks on its LM head, or another forward than its class's")
    return module, weight


def _settings(model: Any) -> tuple[float | None, float]:
    """(softcap, logit scale) of a model's config, under the names that architectures use."""
    config = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    softcap = _declared(
        config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"
    )
    scale = _declared(config, "logit_scale", "lm_head_multiplier")
    divisor = _declared(config, "logits_scaling")
    if scale is None:
        scale = 1.0 / (divisor or 1.0)
    if not scale > 0 or (softcap is not None and not softcap >= 0):
        raise _fail(
            model, f"declares logit scale {scale} and cap {softcap}: expected positive numbers"
        )
    return softcap or None, scale


def _declared(config: Any, *names: str) -> float | None:
    """The first of these settings that is a number. MPT's logit_scale may be a string."""
    found = (getattr(config, name, None) for name in names)
    numbers = (v for v in found if isinstance(v, int | float) and not isinstance(v, bool))
    return next((float(value) for value in numbers), None)


def _check(model: nn.Module, module: nn.Module, head: Head) -> None:
    """Raises ValueError if the model's logits differ from the head's over its hidden states."""
    ids = _token_ids(model, head.weight)
    with _undisturbed(model):
        factor = 1.0
        for _ in range(2):
            hidden, theirs = _pass(model, module, head.weight.dtype, ids, factor)
            same = hidden.shape == (*ids.shape, head.weight.shape[1])
            if not same or theirs.shape != (*ids.shape, head.weight.shape[0]):
                raise _fail(
                    model, f"gives logits {tuple(theirs.shape)} of states {tuple(hidden.shape)}"
                )
            if not _agree(head, hidden, theirs):
                raise _fail(
                    model,
                    "does more between hidden states and logits than a linear head with bias, "
                    f"scale {head.logit_scale} and cap {head.softcap}",
                )
            factor = _LARGE / max(float(theirs.std()), 1e-6)


def _agree(head: Head, hidden: Tensor, theirs: Tensor) -> bool:
    """Whether the model's logits are those of the head, but for roundings; false at NaN.

    A factor close to 1 stays within the bound of each logit in 16 bits. But roundings have both
    signs, so their projection on the logits is far below one rounding, and the factor's is not.
    """
    ours, bound, fp32_error = _expected(head, hidden)
    apart, eps = theirs - ours, torch.finfo(hidden.dtype).eps
    projection = (apart * ours).sum().abs()
    allowed = (eps * ours.square() + fp32_error * ours.abs()).sum()
    return bool((apart.abs() <= bound).all()) and bool(projection <= allowed)


def _expected(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in fp64, the bound on the error of the model's logits, and its part from fp32 sums.

    An fp32 dot product of n terms has an error of at most n + 1 roundings of the sum of magnitudes,
    in any order. The GEMM rounds the result to the operands' dtype; a GEMM that splits the sum also
    rounds a few partial sums of about the same size. The bound counts four such roundings. Scale,
    division, tanh and product of the cap each round once more.
    """
    weight, states = head.weight.double(), hidden.double()
    bias = states.new_zeros(()) if head.bias is None else head.bias.double()
    linear = states @ weight.T + bias
    size = states.abs() @ weight.abs().T + bias.abs()
    eps = torch.finfo(hidden.dtype).eps
    spread = linear.abs() + linear.square().mean(-1, keepdim=True).sqrt()
    sums = (states.shape[-1] + 1) * torch.finfo(torch.float32).eps * size * head.logit_scale
    logits = linear * head.logit_scale
    bound = sums + 2 * eps * spread * head.logit_scale + eps * logits.abs()
    if head.softcap is None:
        return logits, bound, sums
    capped = head.softcap * (logits / head.softcap).tanh()
    # The cap's slope is at most 1.
    return capped, bound + 2 * eps * capped.abs(), sums


def _pass(
    model: nn.Module, module: nn.Module, dtype: torch.dtype, ids: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """Hidden states times a factor, and the model's logits of them, fp64."""
    hook = module.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]))
    with hook:
        try:
            theirs = model(input_ids=ids).logits
            base = _backbone(model)
            hidden = base(input_ids=ids).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # A model that needs more inputs may raise anything.
            raise _fail(
                model,
                f"does not compute {ids.shape[1]} tokens ({type(error).__name__}: "
                f"{str(error)[:120]}): expected a model that takes input_ids alone; try another "
                "attn_implementation (sdpa, eager), or see whether its config.json is whole",
            ) from error
    if not isinstance(hidden, Tensor) or not isinstance(theirs, Tensor):
        raise _fail(model, "gives no logits, or no hidden states")
    # Some base models return fp32 whatever the head's dtype; the model rounds before its head.
    return hidden.to(dtype) * factor, theirs.double()


def _backbone(model: Any) -> nn.Module:
    """The model without its head. Some classes have a base_model that is the model itself."""
    parts = [part for part in model.children() if hasattr(part, "base_model_prefix")]
    found: nn.Module = parts[0] if parts and model.base_model is model else model.base_model
    return found


def _token_ids(model: Any, weight: Tensor) -> Tensor:
    """Random token ids [1, 8] without the model's special tokens (padding, image and others)."""
    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    settings = {**vars(config), **vars(text)}
    special = {v for k, v in settings.items() if "token" in k and isinstance(v, int)}
    rows = min(weight.shape[0], model.get_input_embeddings().weight.shape[0])
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [token for token in drawn if token not in special] or drawn
    return torch.tensor([(tokens * _TOKENS)[:_TOKENS]], device=weight.device)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores module modes and random generators on exit."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
