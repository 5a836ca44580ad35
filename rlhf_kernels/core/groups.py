"""Process groups over which a vocabulary is sharded: their names and collectives.

Operators take a group by name, as torch's functional collectives do. "" means no group.
"""

from typing import Any

import torch
from torch import Tensor


def name(op: str, group: object) -> str:
    """The name of the argument `group`; "" for None or a group of one rank (nothing is sharded).

    Raises:
        TypeError: `group` is not a process group that this process belongs to.
    """
    if group is None:
        return ""
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"{op}: group must be a torch.distributed ProcessGroup that this process belongs to, "
            f"or None, got {type(group).__name__}"
        )
    return "" if group.size() == 1 else group.group_name


def _resolve(group: str) -> "torch.distributed.ProcessGroup":
    # The parameter's type differs between torch 2.13 (a type of its own) and 2.6 (str).
    name: Any = group
    return torch._C._distributed_c10d._resolve_process_group(name)


def rank(group: str) -> int:
    """This process's rank in the group."""
    return _resolve(group).rank()


def gather(t: Tensor, group: str) -> Tensor:
    """`t` of every rank in order, [ranks, *shape]."""
    ranks = _resolve(group)
    out = t.new_empty((ranks.size(), *t.shape))
    torch.distributed.all_gather(list(out.unbind()), t.contiguous(), group=ranks)
    return out


def sum_(t: Tensor, group: str) -> Tensor:
    """The sum of `t` over the ranks, in place."""
    torch.distributed.all_reduce(t, group=_resolve(group))
    return t


def maximum(t: Tensor, group: str) -> Tensor:
    """The maximum of `t` over the ranks."""
    return gather(t, group).amax(0)
