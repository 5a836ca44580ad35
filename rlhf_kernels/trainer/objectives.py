"""What the offline stages minimise: supervised, reward model, preferences and KTO."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import rlhf_kernels as rk

from ..config.preference import AVERAGED
from . import models
from .config import DPOConfig, KTOConfig, RewardConfig
from .data import Batch, Row, collate
from .encoding import encode_pair, encode_row
from .learner import Learner


class Pair(NamedTuple):
    """Two completions of a prompt as tokens; the first is preferred."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float


# A loss, and metrics that are added up over the micro-batches.
Loss = tuple[Tensor, dict[str, Tensor]]

# A stage minimises an objective: a sum over the items of a batch (rows or pairs) divided by the
# size of the batch. `encode` makes an item from a row, or None to drop the row; `size` is the
# divisor for a batch of items, with what else depends on the whole batch; `loss` is the sum over
# some items divided by `size`; `lengths` are the tokens of the longest sequences.


class SFT:
    """-log p(completion | prompt), averaged over the tokens of the batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
        self.tokenizer, self.limit = tokenizer, limit

    def encode(self, row: Row) -> tuple[list[int], list[int]] | None:
        prompt, completion = encode_row(self.tokenizer, row)
        return (prompt, completion) if _fits(self.limit, completion) else None

    def lengths(self, items: Sequence[tuple[list[int], list[int]]]) -> Iterable[int]:
        return (len(prompt) + len(completion) for prompt, completion in items)

    def size(self, items: Sequence[tuple[list[int], list[int]]], learner: Learner) -> float:
        return float(sum(len(completion) for _, completion in items))

    def loss(self, networks: models.Networks, items: Sequence[Any], size: float) -> Loss:
        batch = collate(self.tokenizer, items, networks.policy.device)
        loss = -models.lm_head(networks.policy, batch).logprobs(batch.labels).sum() / size
        return loss, {"loss": loss.detach()}


class _Pairwise:
    """Encodes preference pairs; `scored` encodes them as a reward model reads them."""

    scored = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        config: RewardConfig | DPOConfig,
        reference: models.Reference | None = None,
    ) -> None:
        self.tokenizer, self.limit, self.config, self.reference = (
            tokenizer,
            limit,
            config,
            reference,
        )
        self.margin = getattr(config, "margin", 0.0)

    def encode(self, row: Row) -> Pair | None:
        first, chosen, rejected = encode_pair(self.tokenizer, row, scored=self.scored)
        if not _fits(self.limit, chosen, rejected):
            return None
        return Pair(first, chosen, rejected, float(row.columns.get("margin", self.margin)))

    def lengths(self, items: Sequence[Pair]) -> Iterable[int]:
        return (len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in items)

    def size(self, items: Sequence[Pair], learner: Learner) -> float:
        return float(len(items))

    def batch(self, items: Sequence[Pair], device: torch.device) -> Batch:
        """The chosen completions, followed by the rejected ones."""
        rows = [(p.prompt, p.chosen) for p in items] + [(p.prompt, p.rejected) for p in items]
        # Without a prompt nothing predicts the first token, so it serves as the prompt.
        rows = [(prompt, rest) if prompt else (rest[:1], rest[1:]) for prompt, rest in rows]
        return collate(self.tokenizer, rows, device)


class RewardModelling(_Pairwise):
    """The Bradley-Terry loss, -log sigmoid(r_w - r_l - margin), plus a centring term."""

    scored = True
    config: RewardConfig

    def loss(self, networks: models.Networks, items: Sequence[Pair], size: float) -> Loss:
        batch = self.batch(items, networks.reward.device)
        chosen, rejected = models.sequence_rewards(networks.reward, batch).float().chunk(2)
        margin = torch.tensor([p.margin for p in items], device=chosen.device)
        center_coef = self.config.center_coef
        found = rk.reward_model_loss(chosen, rejected, margin=margin, center_coef=center_coef)
        share = len(items) / size
        loss = found.loss * share
        return loss, {
            "loss": loss.detach(),
            "accuracy": found.accuracy * share,
            "margin": (chosen - rejected).detach().mean() * share,
            "reward_mean": (chosen + rejected).detach().mean() / 2 * share,
        }


class _Size(float):
    """A number of pairs that also holds the number of tokens of their chosen completions."""

    tokens: int


class DPO(_Pairwise):
    """Direct preference optimisation and variants; the reference is the initial policy."""

    config: DPOConfig

    def size(self, items: Sequence[Pair], learner: Learner) -> float:
        size = _Size(len(items))
        # `batch` moves the first token of a pair without prompt out of the completion.
        size.tokens = sum(len(p.chosen) - (not p.prompt) for p in items)
        return size

    def loss(self, networks: models.Networks, items: Sequence[Pair], size: float) -> Loss:
        batch = self.batch(items, networks.policy.device)
        config = self.config
        weights = dict(enumerate(config.loss_weights or [1.0] * len(config.loss_type)))
        # The sft loss is averaged over tokens, the other losses over pairs.
        of_pairs = [i for i, name in enumerate(config.loss_type) if name != "sft"]
        plain = config.f_divergence_type == "reverse_kl"
        average = plain and all(name in AVERAGED for name in config.loss_type)
        lengths = batch.completion_mask.sum(-1)
        names = ("chosen_lengths", "rejected_lengths")
        counts: dict[str, Any] = dict(zip(names, lengths.chunk(2), strict=True))
        policy = self._sums(models.lm_head(networks.policy, batch), batch, average)
        reference: tuple[Tensor, ...] = ()
        if self.reference is not None:
            with torch.no_grad():
                reference = self._sums(self.reference(networks, batch), batch, average)
        share = len(items) / size
        terms = []
        if of_pairs:
            # DPOConfig has checked the names.
            losses: list[Any] = [config.loss_type[i] for i in of_pairs]
            found = rk.preference_loss(
                *policy,
                *reference,
                loss=losses,
                loss_weights=[weights[i] for i in of_pairs],
                beta=config.beta,
                label_smoothing=config.label_smoothing,
                f_divergence=config.f_divergence_type,
                f_alpha=config.f_alpha_divergence_coef,
                discopop_tau=config.discopop_tau,
                gamma=config.simpo_gamma,
                alpha=config.alpha,
                **({} if average else counts),
            )
            terms.append(found.loss * share)
        if len(of_pairs) < len(weights):
            tokens = rk.preference_loss(*policy, loss="sft", beta=config.beta, **counts)
            weight = sum(weights[i] for i in weights if i not in of_pairs)
            whole = max(size.tokens, 1) if isinstance(size, _Size) else size
            terms.append(tokens.loss * weight * (int(lengths.chunk(2)[0].sum()) / whole))
            found = found if of_pairs else tokens
        loss = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        margins = found.chosen_rewards - found.rejected_rewards
        return loss, {
            "loss": loss.detach(),
            "accuracy": (margins > 0).float().mean() * share,
            "margin": margins.mean() * share,
            "reward_chosen": found.chosen_rewards.mean() * share,
            "reward_rejected": found.rejected_rewards.mean() * share,
        }

    def _sums(self, head: models.Head, batch: Batch, average: bool) -> tuple[Tensor, ...]:
        """Log-probabilities of the chosen and the rejected completions, summed or averaged."""
        mask = batch.completion_mask
        options: dict[str, Any] = {}
        if self.config.ld_alpha is not None:
            chosen, rejected = mask.sum(-1).chunk(2)
            shared = torch.minimum(chosen, rejected).repeat(2)
            options = {"shared_lengths": shared, "ld_alpha": self.config.ld_alpha}
        logprobs = head.logprobs(batch.labels)
        return rk.sequence_logprobs(logprobs, mask=mask, average=average, **options).chunk(2)


class Example(NamedTuple):
    """A prompt and a completion as tokens, and whether the completion is desirable."""

    prompt: list[int]
    completion: list[int]
    desirable: bool


class _KTOSize(float):
    """The number of examples, with the number of desirable ones and the KL baseline."""

    desirable: int
    kl: float


class KTO:
    """Kahneman-Tversky optimisation: completions that are desirable or not, without pairs.

    The baseline is KL(policy || reference), estimated as the mean log-ratio of mismatched examples:
    every prompt with the completion of the example before it in the batch. It is a constant of the
    whole batch, so micro-batches and processes do not change it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        config: KTOConfig,
        reference: models.Reference,
    ) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self.config, self.reference = config, reference

    def encode(self, row: Row) -> Example | None:
        prompt, completion = encode_row(self.tokenizer, row)
        if not _fits(self.limit, completion):
            return None
        return Example(prompt, completion, row.columns["label"])

    def lengths(self, items: Sequence[Example]) -> Iterable[int]:
        # Mismatched examples may join the longest prompt and the longest completion.
        prompt = max((len(x.prompt) for x in items), default=0)
        return [prompt + max((len(x.completion) for x in items), default=0)]

    def size(self, items: Sequence[Example], learner: Learner) -> float:
        size = _KTOSize(len(items))
        size.desirable = sum(x.desirable for x in items)
        size.kl = self._kl(items, learner) if self.config.loss_type == "kto" else 0.0
        return size

    def _kl(self, items: Sequence[Example], learner: Learner) -> float:
        before = [*items[-1:], *items[:-1]]
        mismatched = [
            x._replace(completion=y.completion) for x, y in zip(items, before, strict=True)
        ]
        own = learner.share(mismatched)
        step = learner.config.micro_batch_size or learner.config.batch_size
        parts = [own[start : start + step] for start in range(0, len(own), step)]
        sums = [learner.forward(partial(self._ratios, items=part)) for part in parts]
        return learner.total(torch.stack(sums).sum()).item() / len(items)

    def _ratios(self, networks: models.Networks, items: Sequence[Example]) -> Tensor:
        """The sum of the log-ratios of some examples."""
        policy, reference = self._sums(networks, items)
        return (policy - reference).sum()

    def _sums(self, networks: models.Networks, items: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completions under the policy and the reference, [B] each."""
        pairs = [(x.prompt, x.completion) for x in items]
        batch = collate(self.tokenizer, pairs, networks.policy.device)
        mask = batch.completion_mask
        policy = models.lm_head(networks.policy, batch).logprobs(batch.labels)
        with torch.no_grad():
            reference = self.reference(networks, batch).logprobs(batch.labels)
        return rk.sequence_logprobs(policy, mask=mask), rk.sequence_logprobs(reference, mask=mask)

    def loss(self, networks: models.Networks, items: Sequence[Example], size: float) -> Loss:
        assert isinstance(size, _KTOSize)  # What `KTO.size` returns.
        policy, reference = self._sums(networks, items)
        desirable = torch.tensor([x.desirable for x in items], device=policy.device)
        config = self.config
        found = rk.kto_loss(
            policy,
            reference,
            desirable,
            kl=size.kl,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        share = len(items) / size
        loss = found.loss * share
        # Of a batch without examples of a kind, its mean is reported as 0.
        good = found.rewards[desirable].sum() / max(size.desirable, 1)
        bad = found.rewards[~desirable].sum() / max(float(size) - size.desirable, 1.0)
        baseline = max(size.kl, 0.0)
        right = (found.rewards > config.beta * baseline) == desirable
        return loss, {
            "loss": loss.detach(),
            "accuracy": right.float().mean() * share,
            "margin": good - bad,
            "reward_desirable": good,
            "reward_undesirable": bad,
            "kl": torch.full_like(good, baseline * share),
        }


Objective = SFT | RewardModelling | DPO | KTO


def _fits(limit: int | None, *completions: list[int]) -> bool:
    return limit is None or all(len(c) <= limit for c in completions)
