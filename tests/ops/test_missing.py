"""Inputs that are NaN: where results, metrics and gradients are NaN is one rule on all backends."""

import torch

import rlhf_kernels as rk
from rlhf_kernels.config.metrics import POLICY_METRICS, VALUE_METRICS

NAN = float("nan")


def missing_calls():
    """(label, call, inputs, which of them are differentiated) of losses per token."""
    old = torch.tensor([[-1.0, -2.0, -0.5, -1.5], [-1.0, -0.2, -3.0, -0.7]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 3] = False
    advantages = torch.tensor([[1.0, -1.0, 0.5, 2.0], [-0.5, 1.5, -2.0, 1.0]])
    config = rk.PolicyLossConfig
    configs = [
        config(), config(log_ratio_clamp=None), config(dual_clip=3.0), config(delta=4.0),
        config.reinforce(), config.cispo(), config.sapo(), config.gspo(),
        config(objective="penalty", penalty_coef=0.5), config(ratio_level="sequence-token"),
        config(correction_level="sequence", correction_max=2.0),
        config(entropy_coef=0.1),
        *(config(kl_coef=0.1, kl_estimator=e) for e in ("k1", "k2", "k3", "abs", "k3+")),
        config(kl_coef=0.1, kl_input_clamp=2.0, kl_value_clamp=1.0),
        config(kl_coef=0.1, kl_weight="ratio"),
    ]  # fmt: skip
    tokens = {
        "logprobs": old + 0.1, "old_logprobs": old, "advantages": advantages,
        "ref_logprobs": old - 0.2, "entropy": -old,
    }  # fmt: skip
    for c in configs:
        rollout = {} if c.correction_level is None else {"rollout_logprobs": old - 0.1}
        wanted = ("logprobs", "entropy") if c.entropy_coef else ("logprobs",)
        yield (
            str(c), lambda c=c, **t: rk.policy_loss(mask=mask, config=c, **t), tokens | rollout,
            wanted,
        )  # fmt: skip
    given = {"values": old + 0.3, "old_values": old, "returns": advantages}
    for clip in (None, 0.2):
        yield (
            f"value_loss {clip}", lambda c=clip, **t: rk.value_loss(mask=mask, clip_range=c, **t),
            given, ("values",),
        )  # fmt: skip
    pair = {"logprobs": old, "ref_logprobs": old - 0.2}
    for e in ("k1", "k2", "k3", "abs", "k1+", "abs+"):
        yield e, lambda e=e, **t: rk.kl_penalty(estimator=e, **t), pair, ("logprobs",)


def missing_pattern(call, inputs, wanted, name, at):
    """Where results and gradients are NaN when the input `name` is, at one token."""
    given = {k: t.clone() for k, t in inputs.items()}
    given[name][at] = NAN
    for k in wanted:
        given[k].requires_grad_()
    result = call(**given)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    found = [loss.detach()] + ([] if loss is result else [result.metrics.tensor])
    found += torch.autograd.grad(loss.sum(), [given[k] for k in wanted], materialize_grads=True)
    return [t.isnan() for t in found]


def test_a_kept_input_that_is_nan_shows_at_the_same_places_everywhere(backend):
    """NaN in a kept token: the CPU's kernels are the rule; a masked one changes nothing."""
    for label, call, inputs, wanted in missing_calls():
        for name in inputs:
            for at in ((1, 2), (0, 3)):
                found = missing_pattern(call, inputs, wanted, name, at)
                with rk.use_backend("cpu"):
                    rule = missing_pattern(call, inputs, wanted, name, at)
                for i, (a, e) in enumerate(zip(found, rule, strict=True)):
                    assert torch.equal(a, e), f"{label}: {name} at {at}, result {i}: {a}, {e}"
                if at == (0, 3) and len(found[0].shape) == 0:
                    assert not any(t.any() for t in found), f"{label}: masked {name}"


def test_a_policy_or_value_that_is_nan_is_nan_in_loss_gradient_and_metrics(backend):
    for label, call, inputs, wanted in missing_calls():
        loss, *metrics, slope = missing_pattern(call, inputs, wanted[:1], wanted[0], (1, 2))
        assert loss.any(), label
        # A term that is linear in it has a slope that does not know it.
        linear = "objective='reinforce'" in label or label == "k1"
        assert linear or slope[1, 2], label
        if metrics and not label.startswith("value"):
            assert metrics[0][POLICY_METRICS.index("ess")], label
        elif metrics:
            assert metrics[0][VALUE_METRICS.index("explained_variance")], label
