"""Metrics of a loss: one tensor whose entries have names."""

from typing import ClassVar

import torch
from torch import Tensor


class Metrics:
    """Named entries of one tensor.

    `metrics["tokens"]` is a 0-d view of `values`; `as_dict()` copies all to the host. Neither a
    tuple nor a mapping: torch.compile of torch 2.6 calls no `__getitem__` of a named tuple.
    """

    fields: ClassVar[tuple[str, ...]]
    _positions: ClassVar[dict[str, int]]

    def __init_subclass__(cls) -> None:
        cls._positions = {name: i for i, name in enumerate(cls.fields)}

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __getitem__(self, name: str) -> Tensor:
        position = self._positions.get(name)
        if position is None:
            raise ValueError(f"metrics must be one of {', '.join(self.fields)}, got {name!r}")
        return self.values[position]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.values!r})"

    def as_dict(self) -> dict[str, float]:
        """All metrics as Python floats; the only host synchronisation."""
        return dict(zip(self.fields, self.values.tolist(), strict=True))


def register_metrics(kind: type[Metrics]) -> None:
    """Makes torch.export and make_fx see the tensor in results that hold a `kind`."""
    torch.utils._pytree.register_pytree_node(
        kind,
        lambda metrics: ([metrics.values], None),
        lambda values, _: kind(*values),
        serialized_type_name=f"rlhf_kernels.{kind.__name__}",
    )
