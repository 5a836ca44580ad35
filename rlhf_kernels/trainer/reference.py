"""The frozen policy that penalties and DPO measure from."""

import copy
from typing import Any

from torch import Tensor, nn

from . import adapters
from .data import Batch
from .forward import Head, lm_head
from .modes import settled


class Reference:
    """The policy as it is now, whatever training makes of it.

    A copy, or where the policy trains an adapter: the policy with it switched off if it is new, and
    with a frozen copy of it in its place if it is not.

    Args:
        policy: before the distributed engine has it.
        moved: whether it was trained in this run, also where a checkpoint will say how far.
    """

    def __init__(self, policy: nn.Module, *, moved: bool = False) -> None:
        self.model: nn.Module | None = None
        self.adapter: str | None = None
        self._policy = policy
        if not hasattr(policy, "peft_config"):
            self.model = self._copy(policy)
        elif moved or not adapters.is_new(policy):
            if adapters.can_freeze_twin(policy):
                adapters.freeze_twin(policy)
                self.adapter = adapters.FROZEN
            else:
                # The adapter also trains weights of the base model.
                self.model = self._copy(policy)

    @staticmethod
    def _copy(policy: nn.Module) -> nn.Module:
        return settled(copy.deepcopy(policy).requires_grad_(False))

    def __call__(self, networks: Any, batch: Batch) -> Head:
        """The reference's head; `networks.policy` is the policy that it was made of."""
        if self.model is not None:
            return lm_head(self.model, batch)
        with adapters.acting(networks.policy, self.adapter):
            return lm_head(networks.policy, batch)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights that no file holds; none where the reference is the policy without adapter."""
        if self.model is not None:
            return dict(self.model.state_dict())
        return {n: p.detach() for n, p in self._own()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: it is of another model.
        """
        if self.model is not None:
            self.model.load_state_dict(state)
            return
        own = dict(self._own())
        if own.keys() != state.keys():
            raise ValueError("the reference is of other weights")
        for name, weight in own.items():
            weight.data.copy_(state[name])

    def _own(self) -> list[tuple[str, nn.Parameter]]:
        part = f".{self.adapter}."
        return [(n, p) for n, p in self._policy.named_parameters() if part in f"{n}."]
