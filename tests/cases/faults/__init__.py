"""Bad data and odd layouts for every operation with kernels, and the promised results.

Tensors are made on the default device. Sizes include several tiles of a kernel and rows that end
inside a vector, but are small enough for an interpreter.
"""

from collections.abc import Callable, Iterator

from tests.cases.faults.case import Case, assert_promised
from tests.cases.faults.rows import kl_divergence, kl_penalty, token_logprobs
from tests.cases.faults.tokens import (
    discounted_returns,
    gae,
    group_advantages,
    policy_loss,
    ppo_advantages,
    value_loss,
    whiten,
)

__all__ = ["OPERATIONS", "Case", "assert_promised"]

_ALL = (
    token_logprobs, kl_divergence, kl_penalty, gae, discounted_returns, ppo_advantages, whiten,
    group_advantages, policy_loss, value_loss,
)  # fmt: skip
#: Operation -> its cases.
OPERATIONS: dict[str, Callable[[], Iterator[Case]]] = {f.__name__: f for f in _ALL}
