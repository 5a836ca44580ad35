"""The tokens that end a completion."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .chat import rendered
from .config import UserError
from .forward import causal_lm, vocabulary

_TURN = "sentinel"


def end_token_ids(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[int, ...]:
    """The sorted tokens that end a completion.

    These are the end tokens in the model's generation configuration, its configuration (and the
    text model's in a multimodal one) and the tokenizer, and the special token that closes an
    assistant's turn in the chat template, because supervised completions end with it. Ids outside
    the vocabulary, which are common defaults of configurations, are left out.

    Raises:
        UserError: an `eos_token_id` is neither a token nor a list of tokens.
    """
    model = causal_lm(policy)
    config = model.config
    holders = {
        "generation_config": getattr(model, "generation_config", None),
        "config": config,
        "text config": config.get_text_config(decoder=True),
        "tokenizer": tokenizer,
    }
    declared = {
        token
        for name, holder in holders.items()
        for token in _tokens(getattr(holder, "eos_token_id", None), name)
    }
    if tokenizer is not None:
        declared.update(_turn_end(tokenizer))
    size = vocabulary(model)
    return tuple(sorted(token for token in declared if 0 <= token < size))


def _tokens(value: Any, name: str) -> Iterable[int]:
    """The tokens of an `eos_token_id`, which is None, a token or a list of tokens."""
    found = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(not isinstance(token, int) or isinstance(token, bool) for token in found):
        raise UserError(
            f"model: eos_token_id of its {name}: expected a token's number or a list of them, "
            f"found {value!r}"
        )
    return found


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The special token that follows an assistant's content in the chat template, if any."""
    if not getattr(tokenizer, "chat_template", None):
        return
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _TURN}]
    try:
        text = rendered(tokenizer, turns, {})
    except UserError:  # The template rejects the conversation.
        return
    _, found, rest = text.rpartition(_TURN)
    if not found:
        return
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    closing = [token for token in special if rest.lstrip().startswith(token)]
    if closing:
        yield special[max(closing, key=len)]
