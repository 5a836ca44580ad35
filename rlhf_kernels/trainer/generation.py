"""A batched sampler with a KV cache."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .data import Batch, position_ids


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
    generator: torch.Generator | None = None,
) -> Batch:
    """Completions of left-padded prompts `[B, P]`, as one batch.

    Tokens are drawn from softmax(logits / temperature); `temperature=0` takes the most likely one.
    The loop is our own because transformers' `generate` mixes in the checkpoint's generation
    settings (top-k, top-p, penalties), after which the tokens no longer come from the distribution
    that the loss differentiates, and because it draws from the global generator alone.
    """
    cache = DynamicCache(config=model.config)
    attention, positions, ids = prompt_mask, position_ids(prompt_mask), prompt_ids
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    tokens, masks = [], []
    for _ in range(max_new_tokens):
        logits = (
            model(
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = torch.softmax(logits / temperature, -1)
            token = torch.multinomial(probs, 1, generator=generator)[:, 0]
        tokens.append(torch.where(alive, token, pad_token_id))
        masks.append(alive)
        alive = alive & (token != eos_token_id)
        # Finished rows keep decoding; what they see never reaches another row.
        attention = torch.cat([attention, masks[-1][:, None]], 1)
        positions, ids = positions[:, -1:] + 1, tokens[-1][:, None]
        if not alive.any():
            break
    completion, mask = torch.stack(tokens, 1), torch.stack(masks, 1)
    return Batch(torch.cat([prompt_ids, completion], 1), attention, mask)
