"""Scores texts with a classifier's forward pass; scores do not depend on the rest of the batch."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .data import position_ids
from .errors import UserError
from .forward import vocabulary
from .modes import noted
from .trials import position_limit

# An id that no token has.
_NOWHERE = -1


def own_logits(model: PreTrainedModel, ids: Tensor, kept: Tensor, side: str | None) -> Tensor:
    """Scores `[B]` of the kept tokens of each row.

    Args:
        model: a classifier with one output.
        ids: tokens `[B, T]`.
        kept: True for tokens of the text, `[B, T]` bool.
        side: side of the padding, "left" or "right"; None scores one row at a time.

    Raises:
        UserError: a row is empty or is longer than the model's maximum length.
    """
    _check_lengths(model, kept)
    if side is None:
        return torch.cat([_alone(model, row[k]) for row, k in zip(ids, kept, strict=True)])
    # Move the text of each row to the side opposite to the padding.
    order = torch.sort(kept.int(), dim=1, descending=side == "right", stable=True).indices
    width = int(kept.sum(1).max())
    columns = order[:, :width] if side == "right" else order[:, -width:]
    mask = kept.gather(1, columns)
    ids = torch.where(mask, ids.gather(1, columns), _padding(model))
    if mask.all() and len(ids) == 1:
        return _alone(model, ids[0])
    options = {"attention_mask": mask.long()}
    if side == "left" and "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = position_ids(mask)
    try:
        with _last_column(model):
            scores: Tensor = model(input_ids=ids, **options).logits[:, 0]
            return scores
    except (ValueError, IndexError) as error:
        raise _refused(model, width, error) from error


def _alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The score `[1]` of one text."""
    if _sparse(model):
        # After a short text, the model stops using block-sparse attention: turn it on again.
        module: Any
        for module in model.modules():
            if hasattr(module, "set_attention_type"):
                module.set_attention_type("block_sparse")
    try:
        score: Tensor = model(input_ids=ids[None]).logits[:, 0]
        return score
    except (ValueError, IndexError) as error:
        raise _refused(model, len(ids), error) from error


def _refused(model: PreTrainedModel, length: int, error: Exception) -> UserError:
    name, text = type(model).__name__, " ".join(str(error).split())[:200]
    return UserError(f"{name} cannot score a text of {length} tokens: {text}")


def _sparse(model: PreTrainedModel) -> bool:
    """Whether block-sparse attention chooses blocks by the padded length of a text."""
    return getattr(model.config, "attention_type", None) == "block_sparse"


def _padding(model: PreTrainedModel) -> int:
    """The model's padding token, which its class may use to find the end of a text."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad if pad is not None and 0 <= pad < vocabulary(model) else 0


@contextlib.contextmanager
def _last_column(model: PreTrainedModel) -> Iterator[None]:
    """Makes a decoder without padding token read batches at the last column.

    Such a decoder reads a single row at its last token, and refuses batches. With a padding id that
    no token has, it reads every row of a left-padded batch at the last token too.
    """
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    without = [c for c in configs if getattr(c, "pad_token_id", None) is None]
    for config in without:
        config.pad_token_id = _NOWHERE
    try:
        yield
    finally:
        for config in without:
            config.pad_token_id = None


def padding_side(model: PreTrainedModel) -> str | None:
    """The side on which padding changes no score of this model; None if there is none.

    Compares padded rows of a few lengths with each row alone, on the given model.
    """
    noted(model).positions = limit = position_limit(model)
    if model.config.is_encoder_decoder or _sparse(model):
        # Encoder-decoders read the score at the last end token; all rows need as many of them.
        return None
    longest = 23 if limit is None else min(23, limit)
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({min(n, longest) for n in (1, 4, 7, 12, 17, 23)})
    usual = [i for i in range(vocabulary(model)) if i not in _special(model)][:1000]
    choice = torch.randint(len(usual), (len(lengths), longest), generator=generator)
    ids = torch.tensor(usual)[choice].to(model.device)
    columns = torch.arange(longest, device=model.device)
    kept = columns < torch.tensor(lengths, device=model.device)[:, None]
    with torch.no_grad():
        alone = own_logits(model, ids, kept, None).float()
        again = own_logits(model, ids, kept, None).float()
        if not torch.equal(alone, again):
            raise UserError(f"{type(model).__name__} scores the same text in different ways")
        for side in ("right", "left"):
            try:
                found = own_logits(model, ids, kept, side).float()
            except (ValueError, IndexError, RuntimeError, TypeError):
                continue
            if _agree(found, alone, model.dtype):
                return side
    return None


def _agree(found: Tensor, alone: Tensor, dtype: torch.dtype) -> bool:
    """Whether scores differ by rounding only, relative to the differences between texts."""
    scale = (alone.max() - alone.min() + alone.abs().max()).item()
    share = 1e-5 if dtype is torch.float32 else 2e-2
    return bool(torch.allclose(found, alone, atol=share * scale, rtol=0))


def _special(model: PreTrainedModel) -> set[int]:
    text = model.config.get_text_config()
    found = [getattr(text, f"{n}_token_id", None) for n in ("pad", "eos", "bos", "sep", "cls")]
    return {i for f in found for i in (f if isinstance(f, list) else [f]) if i is not None}


def _check_lengths(model: PreTrainedModel, kept: Tensor) -> None:
    limit, lengths = noted(model).positions, kept.sum(1)
    name = type(model).__name__
    if not lengths.all():
        row = int(lengths.argmin())
        raise UserError(f"{name}: expected texts of at least one token, found none in row {row}")
    if limit is not None and lengths.max() > limit:
        row, longest = int(lengths.argmax()), int(lengths.max())
        found = f"{longest} in row {row}; lower max_prompt_tokens or max_new_tokens"
        raise UserError(f"{name}: expected at most {limit} tokens, found {found}")
