"""Parity with verl 0.9.1: advantages and whitening.

Masks have gaps inside rows and one row that is wholly masked. Different by design:

- What verl leaves at masked positions is carried values, products with garbage or whitened zeros;
  here it is 0. Tests compare unmasked positions, and that ours are 0 elsewhere.
- A group of one has advantage 0 here; verl takes its reward as it is.
- verl computes group statistics in fp32, ours are fp64.
"""

import importlib.util

import pytest

# Not importorskip: an import that fails where verl is installed must show.
if importlib.util.find_spec("verl") is None:
    pytest.skip("needs verl, which `make test` installs", allow_module_level=True)

import numpy as np
import torch
import verl.utils.torch_functional as verl_F
from verl.trainer.ppo import core_algos

from tests.parity.comparison import FP32, close
from tests.parity.verl_cases import EXACT, estimate, outcome

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import random_mask


def same_where_kept(actual, theirs, mask, tolerance=FP32):
    """Equal at unmasked positions, and ours exactly 0 elsewhere."""
    mask = mask.bool()
    close(actual[mask], theirs[mask], tolerance)
    assert (actual[~mask] == 0).all() and theirs[mask].abs().max() > 0.1


@pytest.mark.parametrize(("gamma", "lam"), ((1.0, 1.0), (0.99, 0.95), (0.9, 0.0)))
@pytest.mark.parametrize("shape", ((4, 9), (6, 37)))
def test_gae(backend, shape, gamma, lam):
    rewards, values = torch.randn(2, *shape)
    mask = random_mask(*shape)
    ours = rk.gae(rewards, values, mask=mask, gamma=gamma, lam=lam, whiten=True)
    raw = rk.gae(rewards, values, mask=mask, gamma=gamma, lam=lam)
    wide = rewards.double(), values.double(), mask.double(), gamma, lam
    oracle = core_algos.compute_gae_advantage_return(*wide)
    defined = reference.gae(*wide[:2], mask=mask, gamma=gamma, lam=lam, whiten=True)
    for a, b, d in zip(ours, oracle, defined, strict=True):
        same_where_kept(a, b, mask)
        same_where_kept(d, b, mask, EXACT)
    # verl's masked_whiten of our raw advantages is our whitening of them.
    same_where_kept(ours.advantages, verl_F.masked_whiten(raw.advantages.double(), mask), mask)


def test_gae_carries_over_masked_steps(backend):
    values, rewards = torch.tensor([[1.0, 1, 5, 5, 1]]), torch.tensor([[0.0, 0, 0, 0, 2]])
    mask = torch.tensor([[1, 1, 0, 0, 1]])
    expected = torch.tensor([[0.9025, 0.95, 0, 0, 1]])
    close(rk.gae(rewards, values, mask=mask).advantages, expected, FP32)
    _, returns = core_algos.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)
    same_where_kept(torch.where(mask == 1, expected + values, 0), returns, mask)


@pytest.mark.parametrize(
    ("name", "verl_options", "options"),
    (
        ("grpo", {}, {}),
        ("grpo_vectorized", {}, {}),
        ("grpo", {"norm_adv_by_std_in_grpo": False}, {"scale": "none"}),
        ("rloo", {}, {"baseline": "leave-one-out", "scale": "none"}),
        ("rloo_vectorized", {}, {"baseline": "leave-one-out", "scale": "none"}),
    ),
)
def test_group_advantages(backend, name, verl_options, options):
    rewards, scores, mask, ids, index = outcome()
    ours = rk.group_advantages(scores, ids, **options)
    per_token = torch.where(mask, ours.unsqueeze(-1), 0)
    same_where_kept(per_token, estimate(name, rewards, mask, index, **verl_options), mask, 1e-5)
    s, g = scores.double().numpy(), ids.numpy()
    for i in range(len(s)):
        group = s[g == g[i]]
        a = s[i] - group.mean()
        if options.get("baseline"):
            a *= len(group) / (len(group) - 1)
        if not options.get("scale"):
            a /= group.std(ddof=1) + 1e-6
        assert ours[i].item() == pytest.approx(a, rel=1e-6, abs=1e-6)


def test_opo_and_pass_at_k(backend):
    rewards, scores, mask, ids, index = outcome()
    ours = rk.group_advantages(
        scores, ids, baseline="length-mean", scale="none", lengths=mask.sum(-1)
    )
    per_token = torch.where(mask, ours.unsqueeze(-1), 0)
    same_where_kept(per_token, estimate("opo", rewards.double(), mask, index), mask)
    for divides in (True, False):
        config = core_algos.AlgoConfig(norm_adv_by_std_in_grpo=divides)
        theirs = estimate("grpo_passk", rewards.double(), mask, index, config=config)
        scale = "group" if divides else "none"
        ours = rk.group_advantages(scores, ids, baseline="pass@k", scale=scale)
        same_where_kept(torch.where(mask, ours.unsqueeze(-1), 0), theirs, mask)


@pytest.mark.parametrize("name", ("optimal_token_baseline", "tir_optimal_token_baseline"))
@pytest.mark.parametrize("zero_tail", (True, False))
def test_optimal_token_baseline(backend, name, zero_tail):
    rewards, _, mask, ids, index = outcome()
    if name == "optimal_token_baseline":
        # It counts the columns of a row, TIR-OTB the kept tokens: the same without gaps.
        mask = torch.arange(mask.shape[1]) < mask.sum(-1, keepdim=True)
    g = torch.Generator().manual_seed(0)
    more = torch.randn(rewards.shape, generator=g)
    logprobs, collision, weights = (torch.rand(rewards.shape, generator=g) for _ in range(3))
    options = {"old_log_probs": -logprobs.double(), "sum_pi_squared": collision.double()}
    options |= {"rollout_is_weights": weights.double(), "handle_zero_tail": zero_tail}
    theirs = estimate(name, more.double(), mask, index, **options)
    ours = rk.optimal_token_baseline(
        more, -logprobs, collision, ids, mask, importance_weights=weights, zero_tail=zero_tail
    )
    same_where_kept(ours.advantages, theirs, mask)


def test_groups_of_one_differ(backend):
    """By design: verl keeps the reward, which has no baseline; here there is nothing to learn."""
    rewards, scores, mask, _, _ = outcome(2)
    alone = np.array(["a", "b"])
    close(estimate("grpo", rewards, mask, alone), scores.unsqueeze(-1) * mask, 2e-6)
    assert (rk.group_advantages(scores, 1) == 0).all() and scores.abs().min() > 0.1


def test_remax(backend):
    rewards, scores, mask, _, index = outcome()
    greedy = torch.randn(len(scores))
    theirs = estimate("remax", rewards, mask, index, reward_baselines=greedy)
    returns = rk.discounted_returns(rewards, mask=mask)
    same_where_kept(torch.where(mask, returns - greedy.unsqueeze(-1), 0), theirs, mask)
    # A score on the last token alone is the reward of the sequence.
    ours = rk.group_advantages(scores, 1, baseline="greedy", scale="none", greedy_rewards=greedy)
    same_where_kept(torch.where(mask, ours.unsqueeze(-1), 0), theirs, mask)
    close(ours, scores.double() - greedy.double(), FP32)


@pytest.mark.parametrize("gamma", (1.0, 0.9))
def test_reinforce_plus_plus(backend, gamma):
    _, _, mask, _, index = outcome()
    rewards = torch.randn(mask.shape)
    config = core_algos.AlgoConfig(gamma=gamma)
    theirs = estimate("reinforce_plus_plus", rewards.double(), mask, index, config=config)
    ours = rk.whiten(rk.discounted_returns(rewards, mask=mask, gamma=gamma), mask=mask)
    same_where_kept(ours, theirs, mask)
    kept = ours[mask].double()
    assert abs(kept.mean()) < 1e-6 and kept.var() == pytest.approx(1, rel=1e-6)


def test_reinforce_plus_plus_baseline(backend):
    rewards, scores, mask, ids, index = outcome()
    theirs = estimate("reinforce_plus_plus_baseline", rewards.double(), mask, index)
    centred = rk.group_advantages(scores, ids, scale="none")
    ours = rk.whiten(centred.unsqueeze(-1).expand(mask.shape), mask=mask)
    same_where_kept(ours, theirs, mask)
    kept = ours[mask].double()
    assert abs(kept.mean()) < 1e-6 and kept.var() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("shift_mean", (True, False))
def test_whiten(backend, shift_mean):
    x, mask = 3 * torch.randn(6, 37) + 5, random_mask(6, 37)
    ours = rk.whiten(x, mask=mask, shift_mean=shift_mean)
    same_where_kept(ours, verl_F.masked_whiten(x.double(), mask, shift_mean), mask)
    kept = x[mask].double()
    closed = (kept - kept.mean()) / (kept.var() + 1e-8).sqrt() + (0 if shift_mean else kept.mean())
    close(ours[mask], closed, FP32)
