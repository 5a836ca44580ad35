"""Head: the LM head of a Hugging Face model, as the operations over hidden states take it.

Nothing is imported of transformers: what is asked of a model are its methods and its settings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TOKENS = 8
#: Standard deviation of the logits on which a cap shows; caps of models lie between 15 and 50.
_LARGE = 30.0


class Head(NamedTuple):
    """The LM head of a model: logits = softcap((hidden @ weight.T + bias) * logit_scale).

    Its fields are arguments of `linear_token_logprobs` and `linear_policy_loss`:
    `linear_policy_loss(hidden, labels=labels, **head._asdict(), ...)`.

    weight: [V, H], the model's own parameter.
    bias: [V], or None.
    softcap: c of c tanh(x / c), or None.
    logit_scale: multiplies the product.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def from_model(cls, model: nn.Module, *, check: bool = True) -> "Head":
        """The head of a Hugging Face causal LM, checked on the model itself.

        The check is a forward pass over eight random tokens: the logits of the model against those
        of this head over the last hidden states of its base model, once as they are and once so
        much larger that a cap would show. Mode, gradients and generators stay as they are.

        The operations over heads read `weight`, so that what acts around the module alone would be
        lost: adapters, parametrisations and hooks on the head are refused. Wrappers of DDP,
        torch.compile and PEFT are looked through, also that of a head which PEFT trains whole;
        sharded parameters are refused.

        Args:
            model: a causal LM, with `get_output_embeddings`, `base_model` and `config`.
            check: False only reads the head and its settings: no forward pass, and hooks, which may
                be a wrapper's, are the caller's affair.

        Raises:
            ValueError: what the model has is not such a head, or its parameters are not whole.
        """
        model = _unwrapped(model)
        module, weight = _output_embeddings(model, refuse_hooks=check)
        head = cls(weight, getattr(module, "bias", None), *_settings(model))
        if check:
            _check(model, module, head)
        return head

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states [..., H] themselves, fp32 [..., V]."""
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
    """The copy of a head that PEFT trains whole (modules_to_save), where that is in use."""
    if not hasattr(module, "modules_to_save") or not hasattr(module, "original_module"):
        return module
    if module.disable_adapters:
        return module.original_module
    active = module.active_adapter
    return module.modules_to_save[active if isinstance(active, str) else active[0]]


def _output_embeddings(model: Any, *, refuse_hooks: bool) -> tuple[nn.Module, Tensor]:
    """The module of the head, and its weight, which alone says what it computes."""
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
    """(softcap, logit scale) of a configuration, by the names that architectures give them."""
    config = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    softcap = _declared(
        config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"
    )
    scale = _declared(config, "logit_scale", "lm_head_multiplier")
    divisor = _declared(config, "logits_scaling")
    return softcap or None, scale or 1.0 / (divisor or 1.0)


def _declared(config: Any, *names: str) -> float | None:
    """The first of these settings that is a number; MPT's scale may be a word that it ignores."""
    found = (getattr(config, name, None) for name in names)
    numbers = (v for v in found if isinstance(v, int | float) and not isinstance(v, bool))
    return next((float(value) for value in numbers), None)


def _check(model: nn.Module, module: nn.Module, head: Head) -> None:
    """Raises ValueError where the model's logits are not the head's over its hidden states."""
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
            ours, bound = _expected(head, hidden)
            # Written so that NaN fails.
            if not bool(((ours - theirs).abs() <= bound).all()):
                raise _fail(
                    model,
                    "does more between hidden states and logits than a linear head with bias, "
                    f"scale {head.logit_scale} and cap {head.softcap}",
                )
            factor = _LARGE / max(float(theirs.std()), 1e-6)


def _expected(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in fp64, and how far those of the model may lie from them.

    A product of n terms in fp32 errs by n + 1 roundings of the sum of magnitudes, whatever the
    order. The result is rounded to the operands' dtype, and where a GEMM splits the sum so are a
    few of its parts, which are about as large: four roundings. Scale, division, tanh and product
    of the cap each round their own result.
    """
    weight, states = head.weight.double(), hidden.double()
    bias = states.new_zeros(()) if head.bias is None else head.bias.double()
    linear = states @ weight.T + bias
    size = states.abs() @ weight.abs().T + bias.abs()
    eps = torch.finfo(hidden.dtype).eps
    spread = linear.abs() + linear.square().mean(-1, keepdim=True).sqrt()
    error = (states.shape[-1] + 1) * torch.finfo(torch.float32).eps * size + 2 * eps * spread
    logits = linear * head.logit_scale
    bound = error * abs(head.logit_scale) + eps * logits.abs()
    if head.softcap is None:
        return logits, bound
    capped = head.softcap * (logits / head.softcap).tanh()
    # The cap's slope is at most 1.
    return capped, bound + 2 * eps * capped.abs()


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
        except Exception as error:  # Whatever a model raises that wants more than tokens.
            raise _fail(
                model,
                f"does not compute {ids.shape[1]} tokens ({type(error).__name__}: "
                f"{str(error)[:120]}): expected a model that takes input_ids alone; try another "
                "attn_implementation (sdpa, eager), or see whether its config.json is whole",
            ) from error
    if not isinstance(hidden, Tensor) or not isinstance(theirs, Tensor):
        raise _fail(model, "gives no logits, or no hidden states")
    # Some bodies end in fp32 whatever the dtype of the head, which is given theirs rounded.
    return hidden.to(dtype) * factor, theirs.double()


def _backbone(model: Any) -> nn.Module:
    """The model without its head; the prefix of some classes names a part of a larger model."""
    parts = [part for part in model.children() if hasattr(part, "base_model_prefix")]
    found: nn.Module = parts[0] if parts and model.base_model is model else model.base_model
    return found


def _token_ids(model: Any, weight: Tensor) -> Tensor:
    """Random tokens [1, 8], none of which means padding, an image or the like to the model."""
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
    """Evaluation without gradients; the modes of all modules and the generators as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
