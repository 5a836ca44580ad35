"""verl's own calls: the actor's loss through `ppo_loss`, advantages through its registry."""

import numpy as np
import torch
from tensordict import TensorDict
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils import losses

from tests.parity.comparison import compare_policy_loss
from tools.policy_batches import Batch

import rlhf_kernels as rk
from rlhf_kernels.testing import random_mask

DP_SIZE, GLOBAL_TOKENS, GLOBAL_BATCH, SCALE_FACTOR = 2, 301, 11, 24
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
# Bounds within reach of the batches.
ACTOR = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.75, "tau_neg": 1.5}
# verl adds 1e-8 to the lengths that it divides by.
EXACT = 1e-7


def normalizer(loss_agg_mode):
    """As the docstring of PolicyLossConfig.verl has it."""
    return {
        "token-mean": GLOBAL_TOKENS / DP_SIZE,
        "token-sum": 1 / DP_SIZE,
        "seq-mean-token-sum-norm": GLOBAL_BATCH * SCALE_FACTOR / DP_SIZE,
    }.get(loss_agg_mode, GLOBAL_BATCH / DP_SIZE)


def actor_loss(
    batch: Batch, loss_mode: str, *, distributed: bool, weights=None, policy=None, **actor
):
    """(loss, metrics) of verl's ppo_loss."""
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, **(policy or {})),
        loss_scale_factor=SCALE_FACTOR,
        **actor,
    )
    rows, cols = batch.mask.shape
    # A prompt of one token, so that verl's shift by one lands on the responses.
    tensors = {
        "prompts": torch.ones(rows, 1, dtype=torch.long),
        "responses": torch.ones(rows, cols, dtype=torch.long),
        "attention_mask": torch.ones(rows, 1 + cols, dtype=torch.long),
        "response_mask": batch.mask.long(),
        "old_log_probs": batch.old,
        "advantages": batch.advantages,
        "ref_log_prob": batch.ref,
    }
    if weights is not None:
        tensors["rollout_is_weights"] = weights
    data = TensorDict(tensors, batch_size=rows)
    tensordict_utils.assign_non_tensor(
        data,
        dp_size=DP_SIZE if distributed else 1,
        batch_num_tokens=GLOBAL_TOKENS if distributed else None,
        global_batch_size=GLOBAL_BATCH if distributed else None,
    )

    def packed(x):
        return torch.cat([x, x.new_zeros(rows, 1)], dim=1).flatten()

    output = {"log_probs": packed(batch.logprobs), "entropy": packed(batch.entropy)}
    loss, metrics = losses.ppo_loss(config, output, data)
    return loss, {k: getattr(v, "values", [v])[0] for k, v in metrics.items()}


def rollout_weights(batch, rollout_is, threshold):
    return rollout_corr_helper.compute_rollout_correction_weights(
        batch.old - batch.rollout, batch.mask.long(), rollout_is, threshold
    )[0]


def check(batch, loss_mode, loss_agg_mode, *, distributed, rollout=None, exact=EXACT, **actor):
    """The whole of verl's actor loss against ours; metrics of both."""
    actor = ACTOR | actor | {"loss_agg_mode": loss_agg_mode}
    correction = {}
    if rollout is not None:
        correction = dict(zip(("rollout_is", "rollout_is_threshold"), rollout, strict=True))
    divisor = normalizer(loss_agg_mode)
    if loss_mode == "sapo":
        divisor = GLOBAL_BATCH / DP_SIZE
    if not distributed:
        sequences = float(batch.mask.any(-1).sum())
        divisor = sequences * SCALE_FACTOR if loss_agg_mode == "seq-mean-token-sum-norm" else None

    def theirs(batch):
        weights = None if rollout is None else rollout_weights(batch, *rollout)
        return actor_loss(batch, loss_mode, distributed=distributed, weights=weights, **actor)

    return compare_policy_loss(
        theirs,
        batch,
        rk.PolicyLossConfig.verl(loss_mode, **actor, **correction),
        normalizer=divisor,
        exact=exact,
    )


def outcome(rows=9, cols=7):
    """Token rewards with the score on the last kept token, ragged groups, mask with gaps."""
    mask = random_mask(rows, cols)
    last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & mask
    scores = torch.randn(rows).where(mask.any(-1), 0)
    ids = torch.tensor([3, 1, 3, 7, 1, 3, 7, 1, 1])[:rows]
    index = np.array([f"prompt-{i}" for i in ids])
    return torch.where(last, scores.unsqueeze(-1), 0), scores, mask, ids, index


def estimate(name, rewards, mask, index, **options):
    function = core_algos.get_adv_estimator_fn(name)
    return function(token_level_rewards=rewards, response_mask=mask.long(), index=index, **options)[
        0
    ]
