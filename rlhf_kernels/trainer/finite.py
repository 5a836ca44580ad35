"""Finds NaN and infinity, and the rows that they come from."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import UserError, require
from .data import Row, Text

ADVICE = (
    "try a lower learning_rate, look at these rows, train float32 weights without mixed_precision, "
    "or let some such steps pass with skip_nonfinite"
)
_SHOWN_ROWS = 4


class NonFinite(UserError):
    """A loss, gradient, weight or rollout has NaN or infinity.

    `broken` is true if trained weights have it too, so that there is nothing to save.
    """

    def __init__(self, message: str, *, broken: bool = False) -> None:
        super().__init__(message)
        self.broken = broken


class Micro:
    """The loss of a micro-batch as a function of the networks; also of each row alone.

    Args:
        loss: maps the networks and some rows to a loss and further results.
        rows: the rows of the micro-batch; anything that can be sliced.
        name: maps a row to its name in messages.
    """

    def __init__(
        self, loss: Callable[[Any, Any], Any], rows: Any, name: Callable[[Any], str]
    ) -> None:
        self.loss, self.rows, self.name = loss, rows, name

    def __call__(self, networks: Any) -> Any:
        return self.loss(networks, self.rows)

    def each(self) -> list["Micro"]:
        """A micro-batch for each row."""
        return [Micro(self.loss, self.rows[i : i + 1], self.name) for i in range(len(self.rows))]

    def __str__(self) -> str:
        return self.name(self.rows[0])


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements are finite; of sharded tensors, those of this process."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    floats = [t.detach() for t in local if t.is_floating_point() and t.dtype.itemsize > 1]
    # The norm needs one host read. It may overflow, so a bad norm is checked by elements.
    if bool(nn.utils.get_total_norm(floats).isfinite()):
        return True
    return all(bool(t.isfinite().all()) for t in floats)


def check_weights(name: str, network: nn.Module) -> None:
    """Requires that a network's weights are finite.

    Raises:
        UserError: names the first weight that is not finite.
    """
    if finite(network.parameters()):
        return
    bad = next(n for n, p in network.named_parameters() if not finite([p]))
    raise UserError(
        f"{name}: expected finite weights, found NaN or infinity in {bad}; use a model of an "
        "earlier step"
    )


def check_rows(rows: Tensor, names: Callable[[int], str], what: str, where: str) -> str:
    """A message about the rows that are False in a bool tensor `[B]`; empty if there are none."""
    bad = (~rows).nonzero()[:, 0].tolist()
    if not bad:
        return ""
    return f"{where}: {what} is not finite in {listed([names(i) for i in bad])}; {ADVICE}"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown, more = names[:_SHOWN_ROWS], len(names) - _SHOWN_ROWS
    return "; ".join(shown) + (f" and {more} others" if more > 0 else "")


def excerpt(*texts: Text | None, limit: int = 60) -> str:
    """Texts or conversations, cut to fit into a line."""
    parts = [
        text if isinstance(text, str) else " ".join(str(m.get("content", "")) for m in text)
        for text in texts
        if text
    ]
    whole = " | ".join(parts)
    return repr(whole if len(whole) <= limit else whole[: limit - 1] + "…")


def row_name(row: Row, number: int, part: str) -> str:
    """The file and line of a row, or its number in `part`, with an excerpt."""
    where = row.origin or f"{part} row {number}"
    return f"{where} ({excerpt(row.prompt, row.completion, row.chosen, row.rejected)})"


def require_trainable(name: str, network: nn.Module) -> None:
    """Refuses trained float16 weights: Adam's squares and epsilon underflow to 0 in float16."""
    kinds = {p.dtype for p in network.parameters() if p.requires_grad}
    expected = "float32 or bfloat16 for a trained model; mixed_precision fp16 keeps float32 weights"
    require(torch.float16 not in kinds, "dtype", expected, f"float16 in {name}")
