"""Computes next-token logits for a growing batch of sequences."""

import enum
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .data import Batch, position_ids
from .forward import accepted, head_over, hidden_states

#: Names of the argument and the result of `forward` that hold the model's state.
_STATES = ("past_key_values", "cache_params", "state")


class Decoding(enum.Enum):
    """How the next token's logits are computed."""

    #: From the new tokens and the state (KV cache) of all tokens before them.
    CACHED = "cached"
    #: From a forward pass over the whole sequences, in the form that training uses.
    WHOLE = "whole"


class CachedDecoder:
    """Feeds only new tokens, after left-padded prompts `[B, P]` with their mask."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask
        self.positions = position_ids(mask)
        parameters = inspect.signature(model.forward).parameters
        self.name = next((name for name in _STATES if name in parameters), _STATES[0])
        # The model creates the type of state that it needs.
        self.state: Any = None

    def logits(self) -> Tensor:
        """Logits `[B, V]` after the last token of each row."""
        mask: Tensor | None = self.mask.long()
        if self.state is not None and self.name != _STATES[0]:
            # Only attention can see padding that was fed before; a recurrent state needs no mask.
            mask = None
        inputs = accepted(
            self.model,
            attention_mask=mask,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.name: self.state},
        )
        found = self.model(input_ids=self.ids, **inputs)
        self.state = found[self.name]
        logits: Tensor = found.logits[:, -1]
        return logits

    def append(self, tokens: Tensor, kept: Tensor) -> None:
        """Adds the next token of each row, `[B]`; `kept` is False for finished rows."""
        self.ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, kept[:, None]], 1)


class WholeDecoder:
    """Feeds the whole sequences at each step: slow, but correct for every causal model."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask

    def logits(self) -> Tensor:
        """Logits `[B, V]` after the last token of each row."""
        hidden = hidden_states(self.model, Batch(self.ids, self.mask, self.mask))
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        last = torch.where(self.mask, columns, 0).amax(1)
        rows = torch.arange(len(last), device=last.device)
        return head_over(self.model, hidden[rows, last][:, None]).logits()[:, 0]

    def append(self, tokens: Tensor, kept: Tensor) -> None:
        """Adds the next token of each row, `[B]`; `kept` is False for finished rows."""
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, kept[:, None]], 1)


def decoder(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, how: Decoding | None = None
) -> CachedDecoder | WholeDecoder:
    """The decoder that `probe.prove` found correct for the model, unless `how` is given."""
    how = how or getattr(model, "decoding", Decoding.CACHED)
    # Drop columns that are padding in every row: some models ignore the mask of a single row.
    first = int(mask.long().argmax(1).min())
    made = CachedDecoder if how is Decoding.CACHED else WholeDecoder
    return made(model, ids[:, first:], mask[:, first:])
