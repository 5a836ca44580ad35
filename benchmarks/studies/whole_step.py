"""Measures one PPO and one GRPO update of a small transformers model, part by part.

    python -m benchmarks.studies.whole_step [name] [--only ppo grpo] [--quick]

Writes results/<name>-step.json; the report of that name includes it. The model's own parts (its
layers and the optimizer) run the same code for every provider, so operations cannot save time
there; their share of the step is shown separately. The other parts use eager torch, TRL's chunked
head, verl's functions or ours. The batch of completions is given, and sampling is not timed.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import rlhf_kernels as rk

from ..harness import Missing, memory
from ..harness.measure import GateError
from ..harness.peers import peer, verl_actor_config
from ..harness.ragged import padded
from ..points import advantages as gae_points
from ..points import head as head_points
from ..points import policy as policy_points
from ..points.kl import eager_k3
from ..points.value import squares
from ..reports import step as report
from . import kept

CPU = torch.device("cpu")
# The head has two fifths of the weights, as in models of half a billion parameters.
WIDTH, LAYERS, VOCAB, ROWS, PROMPT, RESPONSE = 512, 8, 32768, 8, 32, 96
GROUP, CLIP, KL_COEF, ROUNDS = 4, policy_points.CLIP, 0.05, 3
#: The allowed relative difference of losses and gradient norms from eager's.
GATE = 1e-3


class Batch(NamedTuple):
    """Completions: `ids` [B, prompt + R]; `labels` and `mask` of the R response tokens."""

    ids: Tensor
    labels: Tensor
    mask: Tensor
    scores: Tensor


class Operations(NamedTuple):
    """The operations of a provider; hidden is [B, R, H], per-token tensors are [B, R].

    Attributes:
        logprobs: (hidden, weight, labels, mask) -> log-probabilities, without a gradient.
        policy: (hidden, weight, batch, old, advantages, reference or None) -> loss. Advantages
            are [B, R] or [B]. With a reference the loss includes the k3 penalty.
        ppo_advantages: (scores, logprobs, reference, values, mask) -> advantages, returns.
        group_advantages: (scores) -> advantages [B].
        value: (values, old values, returns, mask) -> loss.
    """

    logprobs: Callable[..., Tensor]
    policy: Callable[..., Tensor]
    ppo_advantages: Callable[..., tuple[Tensor, Tensor]]
    group_advantages: Callable[[Tensor], Tensor]
    value: Callable[..., Tensor]


# --- providers -------------------------------------------------------------------------------


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def _shaped(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    rewards = -KL_COEF * (logprobs - reference) * mask
    return rewards.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores.unsqueeze(1))


def _in_torch(logprobs: Callable[..., Tensor]) -> Operations:
    """The operations in plain torch, except for the given log-probabilities."""

    def policy(hidden: Tensor, weight: Tensor, b: Batch, old: Tensor, a: Tensor, ref: Any) -> Any:
        own = logprobs(hidden, weight, b.labels, b.mask)
        tokens = a if a.dim() == 2 else a.unsqueeze(1)
        loss = _masked_mean(policy_points.terms(own, old, tokens)[1], b.mask)
        return loss if ref is None else loss + KL_COEF * _masked_mean(eager_k3(own, ref), b.mask)

    def advantages(s: Tensor, own: Tensor, ref: Tensor, v: Tensor, mask: Tensor) -> Any:
        weights = mask.float()
        found, returns = gae_points.loop(_shaped(s, own, ref, mask), v, weights)
        return gae_points.whitened(found, weights), returns

    def group(scores: Tensor) -> Tensor:
        return gae_points.standardized(scores, GROUP)

    def value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        return 0.5 * _masked_mean(torch.maximum(*squares(values, old, returns)), mask)

    return Operations(logprobs, policy, advantages, group, value)


def eager() -> Operations:
    """Plain torch, as in trainers without kernels."""
    return _in_torch(lambda *given: head_points.eager_logprobs(*given[:3]))


def trl() -> Operations | Missing:
    """TRL's chunked head; the rest of its step is plain torch, the same as in `eager`."""
    head = head_points.trl_head()

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        found = head(hidden.flatten(0, 1), weight, labels.flatten(), ())[0]
        return found.view_as(labels)

    return head and _in_torch(logprobs)


def verl() -> Operations | Missing:
    """verl's functions, on logits."""
    names = ("compute_policy_loss_vanilla", "kl_penalty", "compute_gae_advantage_return")
    names += ("compute_grpo_outcome_advantage", "compute_value_loss")
    of_core = [peer("verl.trainer.ppo.core_algos", n) for n in names]
    of_logits = peer("verl.utils.torch_functional", "logprobs_from_logits")
    found = [of_logits, verl_actor_config(), *of_core]
    if absent := [f for f in found if isinstance(f, Missing)]:
        return absent[0]
    of_logits, config, vanilla, penalty, gae, outcome, value_loss = found

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return of_logits(hidden @ weight.T, labels)

    def policy(hidden: Tensor, weight: Tensor, b: Batch, old: Tensor, a: Tensor, ref: Any) -> Any:
        own = logprobs(hidden, weight, b.labels, b.mask)
        tokens = a if a.dim() == 2 else a.unsqueeze(1).expand_as(own)
        loss = vanilla(old, own, tokens, b.mask.long(), "token-mean", config=config)[0]
        if ref is None:
            return loss
        return loss + KL_COEF * _masked_mean(penalty(own, ref, "k3"), b.mask)

    def advantages(s: Tensor, own: Tensor, ref: Tensor, v: Tensor, mask: Tensor) -> Any:
        return gae(_shaped(s, own, ref, mask), v, mask.long(), gae_points.GAMMA, gae_points.LAM)

    def group(scores: Tensor) -> Tensor:
        ones = torch.ones(len(scores), 1, dtype=torch.long)
        ids = np.repeat(np.arange(len(scores) // GROUP), GROUP)
        return outcome(scores.clone().unsqueeze(1), ones, ids)[0].squeeze(1)

    def value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        return value_loss(values, returns, old, mask.long(), CLIP)[0]

    return Operations(logprobs, policy, advantages, group, value)


def ours() -> Operations:
    """Our fused head and kernels."""

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        kept = labels.masked_fill(~mask, -100)
        return rk.linear_token_logprobs(hidden, weight, kept).logprobs

    def policy(hidden: Tensor, weight: Tensor, b: Batch, old: Tensor, a: Tensor, ref: Any) -> Any:
        options = {} if ref is None else {"kl_coef": KL_COEF, "kl_estimator": "k3"}
        config = rk.PolicyLossConfig.ppo(clip_low=CLIP, clip_high=CLIP, **options)
        rest = {"mask": b.mask, "ref_logprobs": ref, "config": config}
        return rk.linear_policy_loss(hidden, weight, b.labels, old, a, **rest).loss

    def advantages(s: Tensor, own: Tensor, ref: Tensor, v: Tensor, mask: Tensor) -> Any:
        g, lam = gae_points.GAMMA, gae_points.LAM
        return rk.ppo_advantages(s, own, ref, v, mask=mask, kl_coef=KL_COEF, gamma=g, lam=lam)[:2]

    def value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        return rk.value_loss(values, old, returns, mask=mask, clip_range=CLIP).loss

    return Operations(logprobs, policy, advantages, lambda s: rk.group_advantages(s, GROUP), value)


PROVIDERS = {"eager": eager, "TRL": trl, "verl": verl, "ours": ours}

# --- the step --------------------------------------------------------------------------------


class Clock(Counter[str]):
    """The seconds of each part, in the order of their first use."""

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[part] += time.perf_counter() - start


class Step:
    """Models and a batch; the learning rate is 0, so that all steps do the same."""

    def __init__(self, quick: bool) -> None:
        torch.manual_seed(0)
        width, layers, vocab = (32, 1, 200) if quick else (WIDTH, LAYERS, VOCAB)
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=8, max_position_embeddings=512,
            tie_word_embeddings=False, pad_token_id=0,
        )  # fmt: skip
        self.policy, self.reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
        self.critic, self.scalar = LlamaModel(config), nn.Linear(width, 1)
        modules = (self.policy, self.critic, self.scalar)
        self.parameters = [p for m in modules for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0)
        rows, prompt, response = (GROUP, 4, 8) if quick else (ROWS, PROMPT, RESPONSE)
        ids = torch.randint(1, vocab, (rows, prompt + response))
        mask = padded((rows, response), CPU)
        self.batch = Batch(ids, ids[:, -response:], mask, torch.randn(rows))
        count = sum(p.numel() for p in self.policy.parameters())
        self.shape = {"rows": rows, "prompt": prompt, "response": response, "vocab": vocab}
        self.shape |= {"width": width, "layers": layers, "parameters": count}

    def _hidden(self, model: nn.Module) -> Tensor:
        """The hidden states that predict the tokens of the response."""
        body = model.model if isinstance(model, LlamaForCausalLM) else model
        hidden = body(self.batch.ids, use_cache=False).last_hidden_state
        return hidden[:, -self.batch.labels.shape[1] - 1 : -1]

    def _logprobs(self, model: nn.Module, name: str, ops: Operations, clock: Clock) -> Tensor:
        with clock(f"{name}: layers"):
            hidden = self._hidden(model).contiguous()
        with clock(f"{name}: head, log-probabilities"):
            return ops.logprobs(hidden, model.lm_head.weight, self.batch.labels, self.batch.mask)

    def _update(
        self, model: nn.Module, name: str, loss_of: Callable[[Tensor], Tensor], clock: Clock
    ) -> Tensor:
        """Computes the gradients of a loss; times the layers' part separately."""
        with clock(f"{name} update: layers forward"):
            hidden = self._hidden(model).contiguous()
        leaf = hidden.detach().requires_grad_()
        with clock(f"{name} update: {'head and loss' if name == 'policy' else 'loss'}, both ways"):
            loss = loss_of(leaf)
            loss.backward()
        with clock(f"{name} update: layers backward"):
            hidden.backward(leaf.grad)
        return loss.detach()

    def _values(self, hidden: Tensor) -> Tensor:
        return self.scalar(hidden).squeeze(-1)

    def losses(self, algorithm: str, ops: Operations, clock: Clock) -> list[Tensor]:
        """Losses of "ppo" (policy, critic) or "grpo", whose loss includes the KL penalty."""
        b, is_ppo = self.batch, algorithm == "ppo"
        with torch.no_grad():
            old = self._logprobs(self.policy, "old", ops, clock)
            ref = self._logprobs(self.reference, "reference", ops, clock)
            if is_ppo:
                with clock("values: layers"):
                    values = self._values(self._hidden(self.critic))
            with clock("advantages"):
                if is_ppo:
                    of_tokens = ops.ppo_advantages(b.scores, old, ref, values, mask=b.mask)
                    advantages, returns = of_tokens
                else:
                    advantages = ops.group_advantages(b.scores)
        rest = (self.policy.lm_head.weight, b, old, advantages, None if is_ppo else ref)
        losses = [self._update(self.policy, "policy", lambda h: ops.policy(h, *rest), clock)]
        if is_ppo:

            def value_loss(hidden: Tensor) -> Tensor:
                return ops.value(self._values(hidden), values, returns, b.mask)

            losses.append(self._update(self.critic, "critic", value_loss, clock))
        with clock("optimizer"):
            self.optimizer.step()
        return losses

    def run(self, algorithm: str, ops: Operations) -> tuple[dict[str, float], Tensor]:
        """The seconds of each part; and losses and gradient norms, to compare providers."""
        self.optimizer.zero_grad(set_to_none=True)
        clock = Clock()
        losses = self.losses(algorithm, ops, clock)
        parts = (self.policy.lm_head.parameters(), self.policy.model.parameters(), self.parameters)
        norms = [nn.utils.get_total_norm([p.grad for p in m if p.grad is not None]) for m in parts]
        return dict(clock), torch.stack([*losses, *norms])


def measure(algorithm: str, quick: bool) -> dict[str, Any]:
    """The median seconds of each part, and the peak memory of a step above the memory before."""
    step = Step(quick)
    made = {name: make() for name, make in PROVIDERS.items()}
    absent = {n: m.reason for n, m in made.items() if isinstance(m, Missing)}
    providers = {n: m for n, m in made.items() if n not in absent}
    # The first step creates the optimizer's state.
    expected = step.run(algorithm, providers["eager"])[1]
    peaks: dict[str, int | None] = {}
    for name, ops in providers.items():
        # The first step of a provider includes one-time setup, so its peak is measured later.
        found = step.run(algorithm, ops)[1]
        off = float(((found - expected) / expected.abs().clamp(min=1e-2)).abs().max())
        if not off <= GATE:
            raise GateError(f"{name}: a loss or gradient is off by {off:.2g} of eager's")
        step.optimizer.zero_grad(set_to_none=True)
        peaks[name] = memory.peak_extra_bytes(lambda ops=ops: step.run(algorithm, ops), CPU)
    times: dict[str, list[dict[str, float]]] = {n: [] for n in providers}
    for _ in range(ROUNDS):
        for name, ops in providers.items():
            times[name].append(step.run(algorithm, ops)[0])
    medians = {
        name: {part: statistics.median(r[part] for r in rounds) for part in rounds[0]}
        for name, rounds in times.items()
    }
    return {"shape": step.shape, "seconds": medians, "peak_bytes": peaks, "absent": absent}


def main() -> None:
    parser = kept.parser(__doc__)
    names = ("ppo", "grpo")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="algorithms")
    args = parser.parse_args()
    rk.use_backend("cpu")
    file = kept.measured(args, "step", "steps", args.only, measure)
    print("\n".join(report.lines(file)))


if __name__ == "__main__":
    main()
