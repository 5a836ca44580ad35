"""Tests, on the given model, whether the forward passes of training and sampling are correct.

A pass is correct if each sequence gets the same result as alone, without padding and without a
cache. This depends on the architecture (ALiBi, learned positions, convolutions, recurrent states),
the attention implementation and transformers' version. Every run therefore tests it at its start,
with its own weights, device and dtype, on a few dozen random tokens.
"""

import enum
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

import rlhf_kernels as rk

from .config import UserError
from .data import Batch, pad
from .decoding import Decoding, decoder
from .forward import Form, causal_lm, hidden_states
from .modes import keep_scale, noted
from .trials import Pass, Rows, Trial, name_of, position_limit, trials

T = TypeVar("T", bound=enum.Enum)

# Integers by their size; elements that are hashed at a time, which a cache holds; a hash's factor.
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGESTED = 2**16
_PRIME = 0x100000001B3

_INSTEAD = {
    Form.PADDED: "its passes are padded",
    Form.ALIGNED: "its passes are padded on the right only",
    Form.ALONE: "its passes take one sequence after the other, which is slow",
}


def prove(policy: nn.Module, *, max_length: int, packing: bool = False) -> None:
    """Finds correct ways to run a causal LM, and stores them as its `form` and `decoding`.

    `proved_length` is the tested sequence length. A warning says if the preferred way is not
    correct. Weights, mode and random generators do not change.

    Args:
        policy: a causal LM, with or without an adapter.
        max_length: tokens of the run's longest sequence.
        packing: whether training passes should be packed.

    Raises:
        UserError: no form is correct, a later token changes an earlier one, or the logits are not a
            linear head of the last hidden states.
    """
    model = causal_lm(policy)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"model: {name_of(model)} has an encoder: expected a causal LM")
    with _undisturbed(model):
        check_head(model)
        found = _settle_form(model, max_length, packing)
        for witness in {id(t.model): t.model for t in found}.values():
            check_head(witness)
        ways = {how: [_decoding(how)] for how in Decoding}
        noted(model).decoding = decoding = _first(found, ways, Trial.logits, "decode")
        noted(model).proved_length = max_length
    if decoding is Decoding.WHOLE:
        _say(model, "its cache", "each new token takes a pass over its whole sequence: slow")


def prove_states(model: PreTrainedModel, *, max_length: int, packing: bool = False) -> None:
    """Like `prove`, for a model of which only the hidden states are used; sets `form`."""
    with _undisturbed(model):
        _settle_form(model, max_length, packing)


def check_length(network: nn.Module, lengths: Iterable[int]) -> None:
    """Raises UserError if a sequence is longer than the network's table of positions."""
    model = causal_lm(network)
    limit = position_limit(model)
    # Computing the lengths may be expensive, so it is skipped if there is no limit.
    longest = 0 if limit is None else max(lengths, default=0)
    if longest > (limit or 0):
        raise UserError(
            f"model: {name_of(model)} has positions for {limit} tokens, but prompt and completion "
            f"take up to {longest}: lower max_prompt_tokens or max_new_tokens"
        )


def check_head(policy: nn.Module) -> None:
    """Raises UserError if the logits of `lm_head` differ from the model's own."""
    try:
        rk.Head.from_model(causal_lm(policy))
    except ValueError as error:
        reason = str(error).removeprefix("Head.from_model: ")
        raise UserError(f"model: {reason}") from error


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; restores mode and global generators afterwards.

    Raises:
        UserError: a forward pass changed the weights, which training and saving do not expect.
    """
    keep_scale(model)
    before = {name: (p._version, _digest(p)) for name, p in model.named_parameters()}
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        yield
    model.train(training)
    changed = [
        name
        for name, p in model.named_parameters()
        if name not in before or (p._version != before[name][0] and _digest(p) != before[name][1])
    ]
    if changed:
        raise UserError(
            f"model: {name_of(model)} changes its own weights in a forward pass ({changed[0]}): "
            "expected one that computes only"
        )


def _digest(weight: Tensor) -> int:
    """A hash of a weight's bits in their order, to tell whether a pass that wrote to it changed it.

    An adapter of experts' weights writes them back as they were in every pass. Sums of integers do
    not depend on the order in which a device adds them.
    """
    words = weight.detach().reshape(-1).view(_WORDS[weight.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (min(_DIGESTED, len(words)),), generator=generator)
    factors = factors.to(weight.device) * 2 + 1
    found = len(words)
    for part in words.split(_DIGESTED):
        found = (found * _PRIME + int((part * factors[: len(part)]).sum())) % 2**64
    return found


def digests(networks: nn.Module) -> dict[str, int]:
    """A hash of each trained weight by its name, to tell whether training changed any."""
    return {name: _digest(p) for name, p in networks.named_parameters() if p.requires_grad}


def _settle_form(model: PreTrainedModel, max_length: int, packing: bool) -> list[Trial]:
    """Sets `model.form`; returns the trials."""
    found = trials(model, max_length=max_length)
    ways = {
        form: [_passing(form)] + [_passing(form, each=True)] * (form is Form.PADDED)
        for form in Form
        if packing or form is not Form.PACKED
    }
    form = _first(found, ways, lambda trial: trial.hidden, "compute states")
    for proved in (model, *(trial.model for trial in found)):
        noted(proved).form = form
    if getattr(model, "recomputes", False):
        _check_training_mode(found[0], ways[form][0])
    if form is not next(iter(ways)):
        _say(model, "packing" if packing else "padding on the left", _INSTEAD[form])
    return found


def _check_training_mode(trial: Trial, run: Pass) -> None:
    """Raises UserError if training mode, which checkpointing needs, changes the results."""
    with torch.enable_grad():
        same = trial.right(run, trial.hidden)
    trial.model.eval()
    if not same:
        raise UserError(
            f"model: {name_of(trial.model)} computes otherwise in training mode: expected "
            "gradient_checkpointing false"
        )


def _passing(form: Form, *, each: bool = False) -> Pass:
    """Hidden states of rows in a form, as one padded batch or with `each` row by itself."""

    def run(model: PreTrainedModel, rows: Rows, filler: int) -> list[Tensor]:
        prompts, completions = zip(*rows, strict=True)
        parts = pad(prompts, filler, left=True), pad(completions, filler, left=False)
        ids, mask = (torch.cat(pair, 1).to(model.device) for pair in zip(*parts, strict=True))
        batch = Batch(ids, mask, mask)
        size = 1 if each else len(rows)
        index = torch.arange(len(rows), device=model.device).split(size)
        hidden = torch.cat([hidden_states(model, batch.rows(i), form) for i in index])
        return [states[own].detach() for states, own in zip(hidden, mask, strict=True)]

    return run


def _decoding(how: Decoding) -> Pass:
    """Logits of completions that are fed token by token after left-padded prompts."""

    def run(model: PreTrainedModel, rows: Rows, filler: int) -> list[Tensor]:
        prompts, completions = zip(*rows, strict=True)
        ids, mask = (t.to(model.device) for t in pad(prompts, filler, left=True))
        tokens, kept = (t.to(model.device) for t in pad(completions, filler, left=False))
        decoding, found = decoder(model, ids, mask, how), []
        for t in range(tokens.shape[1]):
            found.append(decoding.logits())
            decoding.append(tokens[:, t], kept[:, t])
        logits = torch.stack(found, 1)
        return [own[: len(c)] for own, c in zip(logits, completions, strict=True)]

    return run


def _first(
    found: Sequence[Trial],
    ways: Mapping[T, Sequence[Pass]],
    alone: Callable[[Trial], list[Tensor]],
    verb: str,
) -> T:
    """The first of the ways that is correct in all trials and on all processes."""
    names = list(ways)
    index, cause = 0, None
    while index < len(names):
        try:
            if all(
                trial.right(run, alone(trial), beside=number == 0)
                for trial in found
                for number, run in enumerate(ways[names[index]])
            ):
                break
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # A model may raise anything on inputs that it rejects.
            cause = error
        index += 1
    index = _agreed(index, found[0].model.device)
    if index == len(names):
        raise UserError(
            f"model: {name_of(found[0].model)} does not {verb} in a batch as it does alone, in any "
            f"of the forms {', '.join(str(name.value) for name in names)}"
            + (f" ({type(cause).__name__}: {str(cause)[:120]})" if cause else "")
            + "; try another attn_implementation (sdpa, eager) or model"
        ) from cause
    return names[index]


def _agreed(index: int, device: torch.device) -> int:
    """The maximum over the processes, which all have to use the same way."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return index
    largest = torch.tensor(index, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def _say(model: PreTrainedModel, what: str, instead: str) -> None:
    """Warns, on one process."""
    several = distributed.is_available() and distributed.is_initialized()
    if not several or distributed.get_rank() == 0:
        message = f"model: {name_of(model)} is not right with {what}, so {instead}"
        warnings.warn(message, stacklevel=4)
