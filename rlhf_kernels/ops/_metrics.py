"""Metrics of a loss: a mapping of names to the entries of one tensor."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor


class Metrics(Mapping[str, Tensor]):
    """0-d tensors by name, all views of `tensor`, which is on the device of the loss.

    `metrics["tokens"]`, iteration and `dict(metrics)` need no host sync; `as_dict()` copies all
    metrics to the host at once. An unknown name raises KeyError.

    Not a named tuple: torch.compile of torch 2.6 ignores an overridden `__getitem__` of one.
    """

    tensor: Tensor
    _names: ClassVar[tuple[str, ...]]
    _positions: ClassVar[dict[str, int]]

    def __init_subclass__(cls) -> None:
        cls._positions = {name: i for i, name in enumerate(cls._names)}

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, name: str) -> Tensor:
        position = self._positions.get(name)
        if position is None:
            raise KeyError(f"metrics are {', '.join(self._names)}; got {name!r}")
        return self.tensor[position]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"

    def as_dict(self) -> dict[str, float]:
        """All metrics as Python floats, by one copy to the host."""
        return dict(zip(self._names, self.tensor.tolist(), strict=True))


def register_metrics(kind: type[Metrics]) -> None:
    """Registers `kind` as a pytree node, so torch.export and make_fx see its tensor."""
    torch.utils._pytree.register_pytree_node(
        kind,
        lambda metrics: ([metrics.tensor], None),
        lambda tensors, _: kind(*tensors),
        serialized_type_name=f"rlhf_kernels.{kind.__name__}",
    )
