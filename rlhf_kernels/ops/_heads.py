"""Checks shared by the operations over an LM head."""

import torch
from torch import Tensor

from ..core import checks, option_checks
from ..core.layout import MaybeTensor
from ..core.option_checks import shown
from ..head.arguments import Batching
from ..head.chunks import exact_size
from ..kernels import backends


def check_head(
    op: str,
    hidden: object,
    weight: object,
    bias: object,
    names: tuple[str, str, str],
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Requires hidden [..., H] and weight [V, H], bias [V], all on one device.

    V may be 0 in a vocabulary shard.

    Returns:
        The operands. Under autocast they are cast as F.linear casts them. Otherwise all have one
        dtype, or weight is float32 and hidden has 16 bits, for a product in fp32.
    """
    hidden_name, weight_name, bias_name = names
    hidden = checks.floating(op, hidden_name, hidden, double=True)
    weight = checks.floating(op, weight_name, weight, double=True)
    if weight.dim() != 2 or (weight.shape[0] == 0 and not sharded):
        raise ValueError(
            f"{op}: {weight_name} must be [V, H] with V >= 1, got {shown(weight.shape)}"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {hidden_name} must be [..., {shown(weight.shape[1])}] as {weight_name} is "
            f"[V, H], got {shown(hidden.shape)}"
        )
    if weight.shape[1] == 0:
        raise ValueError(
            f"{op}: {hidden_name} must be [..., H] with H >= 1, got {shown(hidden.shape)}"
        )
    checks.same_device(op, weight_name, weight, hidden_name, hidden.device)
    if bias is not None:
        bias = checks.floating(op, bias_name, bias, double=True)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: {bias_name} must be [V], {shown(weight.shape[:1])}, got {shown(bias.shape)}"
            )
        checks.same_device(op, bias_name, bias, hidden_name, hidden.device)
    kind = hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
        bias = _autocast(bias, dtype)
    _check_head_dtypes(op, hidden, weight, bias, names)
    return hidden, weight, bias


def _autocast(t: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """An operand cast to the autocast dtype; float64 stays, as in F.linear."""
    return t if t is None or t.dtype is torch.float64 else t.to(dtype)


def _check_head_dtypes(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]
) -> None:
    hidden_name, weight_name, bias_name = names
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    if hidden.dtype != weight.dtype and not (half and weight.dtype is torch.float32):
        raise TypeError(
            f"{op}: {weight_name} must have {hidden_name}'s dtype {hidden.dtype}"
            f"{', or float32' if half else ''}, got {weight.dtype}; cast one of them, or call "
            "under torch.autocast, which casts both"
        )
    if bias is not None and (bias.dtype is torch.float64) != (weight.dtype is torch.float64):
        raise TypeError(
            f"{op}: {bias_name} must have {weight_name}'s dtype {weight.dtype}, got {bias.dtype}"
        )


def check_ref_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Requires a reference head with the same tokens and vocabulary as the policy's head.

    Returns:
        The operands of the reference head, as `check_head` returns them, detached.
    """
    names = ("ref_hidden", "ref_weight", "ref_bias")
    checks.floating(op, "ref_hidden", ref_hidden, double=True)
    checks.same_device(op, "ref_hidden", ref_hidden, "hidden", hidden.device)
    with torch.no_grad():
        head = check_head(op, ref_hidden, ref_weight, ref_bias, names, sharded=sharded)
    expected = tuple(hidden.shape[:-1]), weight.shape[0]
    got = tuple(ref_hidden.shape[:-1]), ref_weight.shape[0]
    if got != expected:
        raise ValueError(
            f"{op}: ref_hidden and ref_weight must have the tokens and the vocabulary of hidden "
            f"and weight, {expected[0]} and {expected[1]}, got {got[0]} and {got[1]}"
        )
    found, matrix, bias = head
    return found.detach(), matrix.detach(), None if bias is None else bias.detach()


def check_batching(
    op: str,
    chunk_tokens: object,
    kept_tokens: object,
    batch_invariant: object,
    weight: Tensor,
    columns: int,
    backend: str,
) -> Batching:
    """How tokens are cut into products of `columns` columns of logits in total."""
    if chunk_tokens is not None:
        chunk_tokens = option_checks.integer(
            op, "chunk_tokens", chunk_tokens, low=1, what=" or None"
        )
    if kept_tokens is not None:
        kept_tokens = option_checks.integer(op, "kept_tokens", kept_tokens, low=0, what=" or None")
    if not option_checks.flag(op, "batch_invariant", batch_invariant):
        return Batching.of(chunk_tokens, kept_tokens, exact=False)
    if backend == backends.REFERENCE:
        raise ValueError(f"{op}: the reference backend has no batch_invariant")
    size = exact_size(chunk_tokens, weight.device, columns, weight.dtype)
    return Batching.of(size, kept_tokens, exact=True)
