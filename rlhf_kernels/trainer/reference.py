"""The reference policy: frozen, for KL penalties and DPO."""

import copy
from typing import Any

from torch import Tensor, nn

from . import adapters
from .data import Batch
from .forward import Head, lm_head
from .modes import settled


class Reference:
    """A frozen snapshot of the policy, which training does not change.

    It is a copy of the model, except where the policy trains an adapter: then it is the policy with
    a new adapter switched off, or with a frozen copy of an adapter that is not new.

    Args:
        policy: the policy before accelerate wraps it.
        moved: whether this run has trained it, or a checkpoint will restore a trained reference.
        teacher: a model that is the reference instead.
    """

    def __init__(
        self, policy: nn.Module, *, moved: bool = False, teacher: nn.Module | None = None
    ) -> None:
        self.model: nn.Module | None = None
        self.adapter: str | None = None
        self._policy = policy
        if teacher is not None:
            self.model = settled(teacher.requires_grad_(False))
        elif not adapters.is_adapted(policy):
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
        """The reference's LM head; `networks.policy` must be the policy given to `__init__`."""
        if self.model is not None:
            return lm_head(self.model, batch)
        with adapters.acting(networks.policy, self.adapter):
            return lm_head(networks.policy, batch)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights that no file holds; empty if the reference is the policy without its adapter."""
        if self.model is not None:
            return dict(self.model.state_dict())
        return {n: p.detach() for n, p in self._own()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the result of `state_dict`.

        Raises:
            ValueError: the state belongs to another model.
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
