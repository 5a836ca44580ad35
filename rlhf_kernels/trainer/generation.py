"""Engines that complete prompts; the transformers engine samples batches with a KV cache."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Batch
from .decoding import decoder
from .endings import end_token_ids
from .forward import causal_lm
from .learner import Learner


class Generation(NamedTuple):
    """Prompts with completions, and the sampler's log-probabilities `[B, T]`."""

    batch: Batch
    logprobs: Tensor


class Engine(Protocol):
    """An engine that completes prompts with up to T tokens, the run's `max_new_tokens`."""

    def __call__(
        self, ids: Tensor, mask: Tensor, uniforms: Tensor, *, temperature: float
    ) -> Generation:
        """Completes left-padded prompts `[B, P]`; returns one batch `[B, P + T]`.

        `uniforms`, `[B, T]` in [0, 1), is the only source of randomness; `temperature=0` takes the
        most likely tokens.
        """


class TransformersEngine:
    """Samples from the policy itself, with `batch_size` prompts in a batch (0: all)."""

    def __init__(
        self, learner: Learner, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 0
    ) -> None:
        self.learner, self.tokenizer, self.batch_size = learner, tokenizer, batch_size

    def __call__(
        self, ids: Tensor, mask: Tensor, uniforms: Tensor, *, temperature: float
    ) -> Generation:
        size = self.batch_size or len(ids)
        parts = zip(ids.split(size), mask.split(size), uniforms.split(size), strict=True)
        ends = end_token_ids(self.learner.networks.policy, self.tokenizer)
        found = self.learner.forward(
            lambda networks: [
                generate(
                    causal_lm(networks.policy),
                    *part,
                    temperature=temperature,
                    eos_token_id=ends,
                    pad_token_id=self.tokenizer.pad_token_id,
                    any_alive=self.learner.any_alive,
                )
                for part in parts
            ]
        )
        batches, logprobs = zip(*found, strict=True)
        return Generation(Batch(*map(torch.cat, zip(*batches, strict=True))), torch.cat(logprobs))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    temperature: float = 1.0,
    any_alive: Callable[[Tensor], bool | Tensor] = torch.any,
) -> Generation:
    """Completes prompts as `Engine` specifies.

    Each token is drawn from softmax(logits / temperature) by inverting the distribution at the
    token's own uniform number, so a completion depends neither on other rows nor on the number of
    processes. transformers' `generate` cannot be used: it applies the generation settings of the
    checkpoint (top-k, top-p, penalties), so its tokens do not come from the distribution that the
    loss differentiates, and it draws from the global generator.

    Args:
        model: tested by `probe.prove`, which sets `decoding`: whether a KV cache may be used.
        prompt_ids: left-padded prompts `[B, P]`.
        prompt_mask: the mask of the prompts, `[B, P]`.
        uniforms: `[B, T]`.
        eos_token_id: tokens that end a completion, in addition to the model's own.
        pad_token_id: token after the end.
        temperature: 0 takes the most likely tokens.
        any_alive: whether a row of any process is unfinished.
    """
    model.eval()
    given = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    ends = torch.tensor(sorted({*given, *end_token_ids(model)}), device=prompt_ids.device)
    decoding = decoder(model, prompt_ids, prompt_mask)
    tokens = prompt_ids.new_full(uniforms.shape, pad_token_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logprobs = torch.zeros(uniforms.shape, device=tokens.device)
    alive = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    for t in range(uniforms.shape[1]):
        scores = torch.log_softmax(decoding.logits().float() / (temperature or 1.0), -1)
        if temperature == 0:
            token = scores.argmax(-1)
        else:
            # The sums are fp64, so that rounding cannot select a token of probability 0.
            sums = scores.double().exp().cumsum(-1)
            drawn = uniforms[:, t, None].double() * sums[:, -1:]
            token = torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=sums.shape[1] - 1)
        tokens[:, t] = torch.where(alive, token, pad_token_id)
        mask[:, t] = alive
        logprobs[:, t] = torch.where(alive, scores.gather(1, token[:, None])[:, 0], 0.0)
        alive = alive & ~torch.isin(token, ends)
        if not any_alive(alive):
            break
        # Finished rows keep decoding, but their tokens are masked and no other row sees them.
        decoding.append(tokens[:, t], mask[:, t])
    whole = Batch(torch.cat([prompt_ids, tokens], 1), torch.cat([prompt_mask, mask], 1), mask)
    return Generation(whole, logprobs)
