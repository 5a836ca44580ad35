"""OpenRLHF's `Actor.forward` without logits: the model runs with an LM head that returns its input,
and the log-probabilities come from these hidden states.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from ._common import CastHead, require_temperature
from ._patch import Unsupported

_IGNORED = -100

# Models whose forward changes the logits after the head, as a call has shown.
_not_the_head: set[type] = set()


def _lm_head(model: Any) -> tuple[nn.Module, nn.Linear]:
    """The model without its wrappers, and its LM head."""
    while hasattr(model, "module"):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    try:
        # For what it refuses. What the model does to its logits behind the head, a call shows.
        rk.Head.from_model(model, check=False)
    except ValueError as error:
        raise Unsupported(str(error).removeprefix("Head.from_model: ")) from None
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise Unsupported(f"an LM head that is a {type(head).__name__}")
    if type(model) in _not_the_head:
        raise Unsupported(f"{type(model).__name__} does more to its logits than its head")
    return model, head


@contextlib.contextmanager
def _passing_through(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Makes the head return its input, and records the input in the list."""
    given: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden

    head.forward = forward  # type: ignore[assignment, method-assign] # Of this object, for a call.
    try:
        yield given
    finally:
        del head.forward


def _wanted_labels(
    labels: Tensor, sequences: Tensor, action_mask: Tensor, indices: Tensor | None
) -> Tensor:
    """The labels, ignored where tokens of prompts and padding need no log-probability.

    Args:
        labels: [B, T], or packed [1, N].
        sequences: [B, T].
        action_mask: of the last steps, [B, steps].
        indices: of the packed tokens among all; None without packing.
    """
    wanted = torch.zeros_like(sequences, dtype=torch.bool)
    wanted[:, -1 - action_mask.shape[1] : -1] = action_mask != 0
    if indices is not None:
        wanted = wanted.flatten()[indices].unsqueeze(0)
    return labels.masked_fill(~wanted, _IGNORED)


def actor_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward for that of OpenRLHF's Actor, `original`, whose module packs the sequences."""
    functions = sys.modules[original.__module__]

    def forward(
        self: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        if action_mask is None and not return_logprobs:
            raise Unsupported("a call for the logits")
        if mm_inputs or getattr(self, "is_vlm", False):
            raise Unsupported("a vision-language model")
        if return_entropy and not return_output:
            raise Unsupported("an entropy without the output that carries it")
        if attention_mask is None:
            raise Unsupported("no attention mask")
        require_temperature(self.temperature)
        model, head = _lm_head(self.model)
        # Check before the model runs; its hidden states will have the dtype of its parameters.
        CastHead(head.weight.new_empty(0, head.weight.shape[1]), head.weight, head.bias)

        packing = self.packing_samples
        if packing:
            inputs, position_ids, labels, pad, indices = functions.unpad_and_slice_tensor(
                sequences, attention_mask, ring_attn_group
            )
        else:
            inputs, labels, pad, indices = sequences, sequences.roll(-1, 1), 0, None
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(
                attention_mask == 0, 1
            )
        if action_mask is not None and ring_attn_group is None:
            labels = _wanted_labels(labels, sequences, action_mask, indices)
        with _passing_through(head) as given:
            output = self.model(
                inputs,
                attention_mask=None if packing else attention_mask,
                position_ids=position_ids,
            )
        if len(given) != 1 or output["logits"] is not given[0]:
            _not_the_head.add(type(model))
            raise Unsupported(f"{type(model).__name__} does more to its logits than its head")
        found = CastHead(given[0], head.weight, head.bias).token_logprobs(
            labels, temperature=float(self.temperature), entropy=return_entropy
        )
        # These are hidden states, which no caller must mistake for logits.
        output["logits"] = None

        def padded(x: Tensor) -> Tensor:
            if packing:
                x = functions.gather_and_pad_tensor(
                    x, ring_attn_group, pad, indices, *sequences.shape
                )
            return x[:, :-1]

        logprobs = padded(found.logprobs)
        if found.entropy is not None:
            output.entropy = padded(found.entropy)
        if action_mask is not None:
            logprobs = torch.where(action_mask != 0, logprobs[:, -action_mask.shape[1] :], 0)
        return (logprobs, output) if return_output else logprobs

    return forward
