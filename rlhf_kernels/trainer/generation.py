"""A batched sampler with a KV cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .data import Batch, position_ids


class Generation(NamedTuple):
    """Prompts with their completions, and the sampler's own log-probabilities `[B, T]`."""

    batch: Batch
    logprobs: Tensor


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    any_alive: Callable[[Tensor], bool] = torch.any,
) -> Generation:
    """Completions of left-padded prompts `[B, P]`, as one batch `[B, P + max_new_tokens]`.

    Tokens are drawn from softmax(logits / temperature); `temperature=0` takes the most likely one.
    Each draw inverts the distribution at its own number of `uniforms`, `[B, max_new_tokens]` in
    [0, 1): a completion does not depend on the rows beside it, nor on how many processes share
    them. The loop is our own because transformers' `generate` mixes in the checkpoint's generation
    settings (top-k, top-p, penalties), after which the tokens no longer come from the distribution
    that the loss differentiates, and because it draws from the global generator alone.
    """
    cache = DynamicCache(config=model.config)
    attention, positions, ids = prompt_mask, position_ids(prompt_mask), prompt_ids
    shape = (len(prompt_ids), max_new_tokens)
    tokens = prompt_ids.new_full(shape, pad_token_id)
    mask = torch.zeros(shape, dtype=torch.bool, device=prompt_ids.device)
    logprobs = torch.zeros(shape, device=prompt_ids.device)
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    for t in range(max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        scores = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
        if temperature == 0:
            token = scores.argmax(-1)
        else:
            # In fp64, so that rounding cannot reach a token of probability 0.
            sums = scores.double().exp().cumsum(-1)
            drawn = uniforms[:, t, None].double() * sums[:, -1:]
            token = torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=sums.shape[1] - 1)
        tokens[:, t] = torch.where(alive, token, pad_token_id)
        mask[:, t] = alive
        logprobs[:, t] = torch.where(alive, scores.gather(1, token[:, None])[:, 0], 0.0)
        alive = alive & (token != eos_token_id)
        if not any_alive(alive):
            break
        # Finished rows keep decoding; what they see never reaches another row.
        attention = torch.cat([attention, mask[:, t : t + 1]], 1)
        positions, ids = positions[:, -1:] + 1, tokens[:, t : t + 1]
    whole = Batch(torch.cat([prompt_ids, tokens], 1), torch.cat([prompt_mask, mask], 1), mask)
    return Generation(whole, logprobs)
