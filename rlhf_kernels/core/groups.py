"""Process groups over which a vocabulary is sharded: their names, and the collectives needed.

Operators carry a group by its name, as torch's functional collectives do. "" stands for no group.
"""

from typing import Any

import torch
from torch import Tensor


def name(op: str, group: object) -> str:
    """The name of the argument `group`, "" where the vocabulary is whole: None, or one rank.

    Raises:
        TypeError: not a process group that this process belongs to.
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
    # Its parameter is a type of its own in torch 2.13 and a string in 2.6.
    name: Any = group
    return torch._C._distributed_c10d._resolve_process_group(name)


def rank(group: str) -> int:
    """This process's place in the group."""
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
