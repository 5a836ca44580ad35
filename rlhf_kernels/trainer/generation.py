"""Engines that complete prompts: a batched sampler with a KV cache."""

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
    """Prompts with their completions, and the sampler's own log-probabilities `[B, T]`."""

    batch: Batch
    logprobs: Tensor


class Engine(Protocol):
    """An engine that completes prompts; T is the longest completion of the run."""

    def __call__(
        self, ids: Tensor, mask: Tensor, uniforms: Tensor, *, temperature: float
    ) -> Generation:
        """Completions of left-padded prompts `[B, P]`, as one batch `[B, P + T]`.

        `uniforms`, `[B, T]` in [0, 1), is all the randomness that there is; `temperature=0` takes
        the most likely tokens.
        """


class TransformersEngine:
    """The policy itself, `batch_size` prompts at once (0: all)."""

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
                    causal_lm(networks.policy), *part, temperature=temperature,
                    eos_token_id=ends,
                    pad_token_id=self.tokenizer.pad_token_id, any_alive=self.learner.any_alive,
                )
                for part in parts
            ]
        )  # fmt: skip
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
    any_alive: Callable[[Tensor], bool] = torch.any,
) -> Generation:
    """Completions as `Engine` has them.

    Tokens are drawn from softmax(logits / temperature), each by inverting the distribution at its
    own number: a completion does not depend on the rows beside it, nor on how many processes share
    them. The loop is our own because transformers' `generate` mixes in the checkpoint's generation
    settings (top-k, top-p, penalties), after which the tokens no longer come from the distribution
    that the loss differentiates, and because it draws from the global generator alone.

    Args:
        model: proved (`probe.prove`); its attribute `decoding` says whether it may keep a cache.
        prompt_ids: left-padded prompts `[B, P]`.
        prompt_mask: their mask.
        uniforms: `[B, T]`.
        eos_token_id: one or more tokens that end a completion, beside those that the model names.
        pad_token_id: what stands after the end.
        temperature: 0 takes the most likely tokens.
        any_alive: whether a row of any process is left.
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
            # In fp64, so that rounding cannot reach a token of probability 0.
            sums = scores.double().exp().cumsum(-1)
            drawn = uniforms[:, t, None].double() * sums[:, -1:]
            token = torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=sums.shape[1] - 1)
        tokens[:, t] = torch.where(alive, token, pad_token_id)
        mask[:, t] = alive
        logprobs[:, t] = torch.where(alive, scores.gather(1, token[:, None])[:, 0], 0.0)
        alive = alive & ~torch.isin(token, ends)
        if not any_alive(alive):
            break
        # Finished rows keep decoding; what they see never reaches another row.
        decoding.append(tokens[:, t], mask[:, t])
    whole = Batch(torch.cat([prompt_ids, tokens], 1), torch.cat([prompt_mask, mask], 1), mask)
    return Generation(whole, logprobs)
