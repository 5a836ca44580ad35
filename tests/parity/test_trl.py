"""Parity with TRL 1.16.0: log-probabilities and the loss of its GRPOTrainer, value and gradient.

`GRPOTrainer._compute_loss` itself runs, on an object that carries what it reads. The importance
weights for vLLM enter it ready-made (TRL computes them amid generation), so they are written out
here from TRL's documentation. Different by design:

- TRL multiplies by the mask; here NaN under the mask changes nothing.
- TRL's grpo, sapo and luspo count wholly masked sequences in their mean: pass that number as
  normalizer.
- TRL's clip fractions count sequences, not tokens, with importance_sampling_level="sequence", and
  for cispo only positive advantages.
- On CPU TRL returns bfloat16 log-probabilities from bfloat16 logits; ours are float32.
"""

import collections
import dataclasses
import importlib.util
import inspect
from types import SimpleNamespace

import pytest
import torch

from tests.parity.comparison import FP32, close, compare_policy_loss, compare_token_logprobs
from tools.policy_batches import Batch, make_batch

import rlhf_kernels as rk
from rlhf_kernels.testing import to_float64

# Not importorskip: an import that fails where TRL is installed must show.
if importlib.util.find_spec("trl") is None:
    pytest.skip("needs trl (the extra 'parity')", allow_module_level=True)

import trl
from trl.trainer import grpo_trainer, rloo_trainer, utils

ACCUMULATION, STEPS_PER_GENERATION, MAX_LENGTH, PROCESSES = 4, 2, 16, 2
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
MODES = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# Bounds within reach of the batches; every value exact in binary, since TRL rounds some to fp32.
SETTINGS = {
    "epsilon": 0.25,
    "epsilon_high": 0.375,
    "beta": 0.3,
    "sapo_temperature_neg": 1.5,
    "vllm_importance_sampling_clip_max": 1.25,
}


def trainer(loss_type, **settings):
    """What `_compute_loss` reads of a GRPOTrainer, made from the arguments as GRPOTrainer does."""
    defaults = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    args = SimpleNamespace(**defaults | settings)
    args.steps_per_generation = STEPS_PER_GENERATION
    return SimpleNamespace(
        args=args,
        loss_type=loss_type,
        importance_sampling_level=args.importance_sampling_level,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        beta=args.beta,
        entropy_coef=args.entropy_coef,
        _entropy_bonus_enabled=args.entropy_coef != 0,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        get_off_policy_mask=grpo_trainer.GRPOTrainer.get_off_policy_mask,
        use_vllm=args.use_vllm,
        vllm_importance_sampling_correction=args.vllm_importance_sampling_correction,
        aux_loss_enabled=False,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=ACCUMULATION,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=PROCESSES,
            sync_gradients=True,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        _metrics={"train": collections.defaultdict(list)},
    )


def vllm_weights(batch, args):
    level, mode = args.vllm_importance_sampling_mode.split("_")
    difference = (batch.old - batch.rollout) * batch.mask
    w = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
    low, high = args.vllm_importance_sampling_clip_min or 0, args.vllm_importance_sampling_clip_max
    if mode == "truncate":
        return w.clamp(low, high)
    return w * ((w >= low) & (w <= high))


def grpo_loss(loss_type, batch, items, **settings):
    """(loss, metrics) of GRPOTrainer._compute_loss."""
    stand_in = trainer(loss_type, **settings)
    stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (
        batch.logprobs,
        batch.entropy,
        None,
    )
    mask = batch.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": torch.tensor(items),
    }
    if stand_in.use_vllm:
        inputs["importance_sampling_ratio"] = vllm_weights(batch, stand_in.args)
        inputs["sampling_per_token_logps"] = batch.rollout
    loss = grpo_trainer.GRPOTrainer._compute_loss(stand_in, None, inputs)
    return loss, {name: values[-1] for name, values in stand_in._metrics["train"].items()}


def normalizer(loss_type, batch, items):
    """As the docstring of PolicyLossConfig.trl has it."""
    if loss_type in ("dapo", "cispo"):
        return items / PROCESSES * ACCUMULATION / STEPS_PER_GENERATION
    if loss_type == "bnpo":
        return float(batch.mask.sum()) * ACCUMULATION
    rows = len(batch.mask)
    return rows * ACCUMULATION * (MAX_LENGTH if loss_type == "dr_grpo" else 1)


def check(loss_type, batch, items=317, **settings):
    settings = SETTINGS | {"delta": None if loss_type in ("cispo", "sapo") else 1.75} | settings
    return compare_policy_loss(
        lambda batch: grpo_loss(loss_type, batch, items, **settings),
        batch,
        rk.PolicyLossConfig.trl(loss_type, **settings),
        normalizer=normalizer(loss_type, batch, items),
    )


def test_defaults_are_those_of_grpo_config():
    theirs = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    ours = inspect.signature(rk.PolicyLossConfig.trl).parameters
    ours = {name: p.default for name, p in ours.items() if name != "options"}
    assert ours == {name: theirs[name] for name in ours} and len(ours) > 15
    assert rk.PolicyLossConfig.trl("cispo").clip_bounds() == (-float("inf"), 0.2)


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("loss_type", LOSSES)
def test_grpo_loss(backend, loss_type, level):
    # Estimates with and without bias correction take turns with the five modes.
    modes = list(enumerate(MODES))
    turn = LOSSES.index(loss_type)
    if backend in ("cuda", "triton"):
        # Seconds a call in an interpreter: one mode of each, all of them among the losses.
        modes = [modes[turn % len(modes)]]
    for i, mode in modes:
        batch = make_batch(per_sequence=turn % 2 == 0)
        bias = i % 2 == 0
        settings = {"importance_sampling_level": level, "use_bias_correction_kl": bias}
        if mode is not None:
            settings |= {"use_vllm": True, "vllm_importance_sampling_mode": mode}
            settings["vllm_importance_sampling_clip_min"] = 0.875 if bias else None
        ours, theirs = check(loss_type, batch, **settings)
        check_metrics(loss_type, level, bias, batch, ours, theirs)


def check_metrics(loss_type, level, bias, batch, ours, theirs):
    close(ours["entropy"], theirs["entropy"], FP32)
    if not bias:
        close(ours["k3_ref"], theirs["kl"], FP32)
    if level == "sequence":
        return
    low, high = ours["clip_frac_low"], ours["clip_frac_high"]
    if loss_type == "cispo":
        positive = batch._replace(advantages=batch.advantages.abs())
        ours, theirs = check(loss_type, positive, use_bias_correction_kl=bias)
        close(ours["clip_frac_high"], theirs["cispo_clip_ratio"], FP32)
        assert high > 0.05
    elif loss_type != "sapo":
        close(low, theirs["clip_ratio/low_mean"], FP32)
        close(high, theirs["clip_ratio/high_mean"], FP32)
        close(low + high, theirs["clip_ratio/region_mean"], FP32)
        assert low > 0.05 and high > 0.05 and ours["dual_clip_frac"] > 0.05


def test_kl_with_bias_correction_is_logged_as_our_kl_loss(backend):
    batch = make_batch()
    ours, theirs = check("bnpo", batch)
    close(ours["kl_loss"] * ACCUMULATION, theirs["kl"], FP32)
    assert theirs["kl"] > 0.01


@pytest.mark.parametrize("loss_type", ("bnpo", "dapo", "cispo"))
def test_entropy_bonus(backend, loss_type):
    batch = make_batch()
    # Where the items of the generation batch are this micro-batch's share of them.
    items = int(batch.mask.sum()) * PROCESSES * STEPS_PER_GENERATION
    check(loss_type, batch, items, entropy_coef=0.125)


@pytest.mark.parametrize("vllm", (False, True))
def test_off_policy_sequence_mask(backend, vllm):
    batch = make_batch(12, 20, per_sequence=True)
    settings = {"off_policy_mask_threshold": 0.011, "use_vllm": vllm}
    for loss_type in ("dapo", "cispo"):
        ours, _ = check(loss_type, batch, vllm_importance_sampling_mode="token_mask", **settings)
        assert 0 < ours["gate_frac_low"] < 1 and ours["kl_loss"] > 0


def test_first_step_without_old_logprobs(backend):
    batch = make_batch()
    batch = batch._replace(old=batch.logprobs.detach())
    settings = SETTINGS | {"delta": 1.75}
    config = rk.PolicyLossConfig.trl("bnpo", **settings)

    def theirs(batch):
        skipped = batch._replace(old=None)
        return grpo_loss("bnpo", skipped, 1, **settings)

    compare_policy_loss(theirs, batch, config, normalizer=float(batch.mask.sum()) * ACCUMULATION)


def test_rloo_loss(backend):
    """RLOOTrainer's ratio is that of whole sequences: each is one token here."""
    batch = make_batch(12, 3, per_sequence=True)
    stand_in = trainer("grpo", **SETTINGS)

    def per_sequence(x):
        return rk.sequence_logprobs(x, mask=batch.mask)

    def theirs(batch):
        stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (
            batch.logprobs,
            batch.entropy,
            None,
        )
        mask = batch.mask.long()
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        inputs = dict.fromkeys(names, mask) | {"advantages": batch.advantages}
        inputs["old_logps"] = (batch.old * batch.mask).sum(-1)
        loss = rloo_trainer.RLOOTrainer._compute_loss(stand_in, None, inputs)
        return loss, torch.autograd.grad(loss, batch.logprobs)[0]

    config = rk.PolicyLossConfig.trl("grpo", epsilon=0.25, epsilon_high=0.375)
    ours, metrics = rk.policy_loss(
        per_sequence(batch.logprobs)[:, None],
        per_sequence(batch.old)[:, None],
        batch.advantages,
        mask=torch.ones(12, 1, dtype=torch.bool),
        config=config,
    )
    gradient = torch.autograd.grad(ours, batch.logprobs)[0]
    wide = Batch(*to_float64(tuple(batch)))
    for values, tolerance in ((theirs(wide), 2 * FP32), (theirs(batch), 4 * FP32)):
        close(ours, values[0], tolerance, scale=0.5)
        close(gradient, values[1], tolerance)
    close(metrics["clip_frac_low"], stand_in._metrics["train"]["clip_ratio/low_mean"][-1], FP32)
    close(metrics["clip_frac_high"], stand_in._metrics["train"]["clip_ratio/high_mean"][-1], FP32)
    assert metrics["clip_frac_low"] > 0 and metrics["clip_frac_high"] > 0
    assert (gradient != 0).float().mean() > 0.2


def test_group_advantages(backend):
    """TRL computes them amid generation: its std, and the formulas of its comments, in fp64."""
    rewards = torch.randn(12)
    wide = rewards.double().view(3, 4)
    centred = wide - wide.mean(1, keepdim=True)
    std = utils.nanstd(wide, dim=1, keepdim=True)
    close(rk.group_advantages(rewards, 4, eps=1e-4), (centred / (std + 1e-4)).flatten(), FP32)
    ours = rk.group_advantages(rewards, 4, scale="none") / (rewards.std() + 1e-4)
    close(ours, (centred / (utils.nanstd(wide) + 1e-4)).flatten(), FP32)
    alone = (wide - (wide.sum(1, keepdim=True) - wide) / 3).flatten()
    options = {"baseline": "leave-one-out", "eps": 1e-4}
    close(rk.group_advantages(rewards, 4, scale="none", **options), alone, FP32)
    ours = rk.group_advantages(rewards, 4, scale="batch", **options)
    close(ours, (alone - alone.mean()) / (utils.nanstd(alone) + 1e-4), FP32)
    x = (centred / (std + 1e-4)).flatten() + 0.5
    ours = rk.group_advantages(x.float(), 4, baseline="none", scale="batch", eps=1e-4)
    close(ours, (x - x.mean()) / (utils.nanstd(x) + 1e-4), FP32)


def test_log_ratios_are_not_clamped_before_they_overflow(backend):
    old = torch.full((1, 3), -45.0)
    batch = make_batch(1, 3)._replace(old=old, advantages=-torch.ones(1, 3), mask=old < 0)
    batch = batch._replace(logprobs=(old + torch.tensor([25.0, -25.0, 0.5])).requires_grad_())
    ours, _ = check("dapo", batch, beta=0.0, delta=None)
    close(ours["ratio_max"], torch.tensor(25.0, dtype=torch.float64).exp(), FP32)
    assert ours["ratio_min"] < 1e-10
    far = batch._replace(logprobs=batch.old + 100.0)
    config = rk.PolicyLossConfig.trl()
    assert (
        grpo_loss("dapo", far, 3)[0].isinf()
        and rk.policy_loss(*far[:3], mask=far[3], config=config).loss.isfinite()
    )


def test_what_cannot_be_expressed_is_refused():
    preset = rk.PolicyLossConfig.trl
    for options, message in (
        ({"loss_type": "vespo"}, "vespo.*cannot be expressed"),
        ({"loss_type": "ppo"}, "loss_type must be one of"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 cannot be expressed"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy cannot be expressed"),
        ({"loss_type": "grpo", "entropy_coef": 0.1}, "entropy_coef with loss_type='grpo' cannot"),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "x"}, "must be one of token_truncate"),
        ({"delta": 1.1}, "delta must be above the upper clip bound"),
        ({"clip_low": -1.0}, "clip_low must be"),
    ):
        with pytest.raises(ValueError, match=message):
            preset(**options)
    assert preset(clip_high=0.3).clip_high == 0.3
    uncapped = {"use_vllm": True, "vllm_importance_sampling_clip_max": None}
    assert preset(**uncapped).correction_bounds() == (0.0, float("inf"))
    assert preset(use_vllm=True, vllm_importance_sampling_correction=False) == preset()


@pytest.mark.parametrize(("vocabulary", "temperature"), ((1031, 0.75), (37, 1.0)))
def test_logprobs_and_entropy(backend, vocabulary, temperature):
    def apart(x, labels, temperature):
        logprobs = utils.selective_log_softmax(x, labels, temperature)
        return logprobs, utils.entropy_from_logits(x / temperature)

    theirs = utils.selective_log_softmax_and_entropy if vocabulary == 37 else apart
    compare_token_logprobs(theirs, vocabulary, temperature=temperature)
