"""The stages that learn from a dataset: supervised, reward model and DPO."""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import rlhf_kernels as rk

from ..config.preference import AVERAGED
from . import models
from .config import DPOConfig, OptimConfig, RewardConfig, UserError
from .data import Batch, Row, Sampler, collate
from .encoding import encode_pair, encode_row
from .finite import ADVICE, Micro, NonFinite, listed, row_name
from .learner import Learner
from .probe import check_length
from .timing import timed


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
# divisor for a batch of items; `loss` is the sum over some items divided by `size`; `length` is
# the number of tokens of an item's longest sequence.


class SFT:
    """-log p(completion | prompt), averaged over the tokens of the batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
        self.tokenizer, self.limit = tokenizer, limit

    def encode(self, row: Row) -> tuple[list[int], list[int]] | None:
        prompt, completion = encode_row(self.tokenizer, row)
        return (prompt, completion) if _fits(self.limit, completion) else None

    def length(self, item: tuple[list[int], list[int]]) -> int:
        return len(item[0]) + len(item[1])

    def size(self, items: Sequence[tuple[list[int], list[int]]]) -> float:
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

    def length(self, item: Pair) -> int:
        return len(item.prompt) + max(len(item.chosen), len(item.rejected))

    def size(self, items: Sequence[Pair]) -> float:
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

    def size(self, items: Sequence[Pair]) -> float:
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
        counts = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
        policy = self._sums(models.lm_head(networks.policy, batch), batch, average)
        reference: tuple[Tensor, ...] = ()
        if self.reference is not None:
            with torch.no_grad():
                reference = self._sums(self.reference(networks, batch), batch, average)
        share = len(items) / size
        terms = []
        if of_pairs:
            found = rk.preference_loss(
                *policy,
                *reference,
                loss=[config.loss_type[i] for i in of_pairs],
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
        mask, options = batch.completion_mask, {}
        if self.config.ld_alpha is not None:
            chosen, rejected = mask.sum(-1).chunk(2)
            shared = torch.minimum(chosen, rejected).repeat(2)
            options = {"shared_lengths": shared, "ld_alpha": self.config.ld_alpha}
        logprobs = head.logprobs(batch.labels)
        return rk.sequence_logprobs(logprobs, mask=mask, average=average, **options).chunk(2)


def _fits(limit: int | None, *completions: list[int]) -> bool:
    return limit is None or all(len(c) <= limit for c in completions)


class OfflineTrainer:
    """The state of an offline run; `step()` is one optimizer step."""

    def __init__(
        self,
        learner: Learner,
        objective: SFT | _Pairwise,
        train: Sequence[Row],
        held_out: Sequence[Row],
        optim: OptimConfig,
        *,
        seed: int,
    ) -> None:
        self.learner, self.objective, self.optim = learner, objective, optim
        self.reference = getattr(objective, "reference", None)
        # Each item with its row, for messages.
        self._rows: list[tuple[Any, Row, str]] = []
        self.train = self._encode(train, "training")
        self.held_out = self._encode(held_out, "held-out")
        self.dropped = len(train) + len(held_out) - len(self.train) - len(self.held_out)
        for name, given, kept in (
            ("training", train, self.train), ("held-out", held_out, self.held_out),
        ):  # fmt: skip
            if given and not kept:
                found = f"the completions of all {len(given)} {name} rows are longer; raise it"
                raise UserError(f"max_new_tokens: expected rows whose completions fit: {found}")
        for network in learner.networks.children():
            check_length(network, map(objective.length, [*self.train, *self.held_out]))
        self.sampler = Sampler(len(self.train), optim.batch_size, seed)
        self.steps_done = 0

    def _encode(self, rows: Sequence[Row], part: str) -> list[Any]:
        items = [(self.objective.encode(row), row, part) for row in rows]
        kept = [item for item in items if item[0] is not None]
        self._rows += kept
        return [item for item, _, _ in kept]

    def _name(self, wanted: Any) -> str:
        """The name of an item in messages."""
        for number, (item, row, part) in enumerate(self._rows):
            if item is wanted:
                return row_name(
                    row, number if part == "training" else number - len(self.train), part
                )
        return "a row"

    def state_dict(self) -> dict[str, Any]:
        return {"steps_done": self.steps_done, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_done = state["steps_done"]
        self.sampler.load_state_dict(state["sampler"])

    def next_items(self) -> list[Any]:
        """The next batch, for all processes together."""
        return [self.train[i] for i in next(self.sampler)]

    def losses(
        self, items: Sequence[Any], *, size: float | None = None, weight: float = 1.0
    ) -> list[Micro]:
        """Loss functions of this process's micro-batches; they add up to `weight` times the loss.

        `size` is the divisor if these items are part of a larger batch; by default it is theirs.
        """
        whole = size or self.objective.size(items)

        def function(networks: models.Networks, part: Sequence[Any]) -> Loss:
            loss, metrics = self.objective.loss(networks, part, whole)
            return weight * loss, metrics

        own = self.learner.share(items)
        parts = self.learner.micro(torch.arange(len(own)))
        return [Micro(function, [own[i] for i in part], self._name) for part in parts]

    def step(self) -> dict[str, float]:
        """Takes one optimizer step; returns its metrics."""
        started = time.perf_counter()
        timed.seconds()
        items = self.next_items()
        found = self._sum(self.learner.accumulate(self.losses(items)))
        norms = self.learner.step(self.steps_done)
        row = {
            "step": self.steps_done,
            **found,
            "grad_norm": norms[0].item(),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            "time/kernels": timed.seconds(),
            "time/step": time.perf_counter() - started,
        }
        if self.optim.skip_nonfinite:
            row["skipped"] = float(self.learner.skipped > 0)
        self.steps_done += 1
        return row

    def _sum(self, metrics: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        table = torch.stack([torch.stack(list(m.values())) for m in metrics])
        return dict(zip(metrics[0], self.learner.total(table.sum(0)).tolist(), strict=True))

    def evaluate(self) -> dict[str, Any]:
        """`scores`: metrics over the held-out rows, cut to a multiple of the processes."""
        processes, step = self.learner.processes, self.optim.batch_size
        items = self.held_out[: len(self.held_out) // processes * processes]
        size = self.objective.size(items)
        parts = [items[start : start + step] for start in range(0, len(items), step)]
        functions = [f for part in parts for f in self.losses(part, size=size)]
        losses, metrics = zip(*map(self.learner.forward, functions), strict=True)
        number, bad = self.learner.first_bad(functions, torch.stack(losses))
        if number is not None:
            told = listed(bad) or "no row alone has it"
            raise NonFinite(f"evaluation: loss is not finite: {told}; {ADVICE}")
        found = self._sum(metrics)
        found["rows"] = float(len(items))
        if "accuracy" in found:
            low, high = wilson_interval(found["accuracy"], size)
            found |= {"accuracy_low": low, "accuracy_high": high}
        return {"scores": found, "texts": []}


def wilson_interval(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion of `count` trials (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - z * spread / (1 + z * z / count), middle + z * spread / (1 + z * z / count)
