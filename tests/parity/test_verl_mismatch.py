"""Parity with verl 0.9.1: the whole of its rollout correction, by mismatch_weights.

Weights of rejected tokens are 0 here; verl leaves them and takes the tokens from the mask. Its
fractions and means over sequences count rows without a token too, as if they had ratio 0 or 1.
"""

import importlib.util

import pytest
import torch

from tests.ops import mismatch_cases

import rlhf_kernels as rk
from rlhf_kernels.config.mismatch import CRITERIA

# Not importorskip: an import that fails where verl is installed must show.
if importlib.util.find_spec("verl") is None:
    pytest.skip("needs verl, which `make test` installs", allow_module_level=True)

from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import rollout_corr_helper as helper

#: Ours -> verl's, of every level.
METRICS = {
    **{f"weight_{n}": f"rollout_is_{n}" for n in ("mean", "std")},
    "ess": "rollout_is_eff_sample_size",
    **{f"fraction_{n}": f"rollout_is_ratio_fraction_{n}" for n in ("low", "high")},
    **{f"seq_weight_{n}": f"rollout_is_seq_{n}" for n in ("mean", "std", "min", "max")},
    "seq_max_deviation": "rollout_is_seq_max_deviation",
    **{f"seq_fraction_{n}": f"rollout_is_seq_fraction_{n}" for n in ("low", "high")},
}
OFF_POLICY = (
    *("kl", "k3_kl", "chi2_token", "chi2_seq", "training_ppl", "training_log_ppl", "rollout_ppl"),
    *("rollout_log_ppl", "log_ppl_diff", "log_ppl_abs_diff", "log_ppl_diff_max"),
    *("log_ppl_diff_min", "ppl_ratio"),
)


def make_inputs(*shape, spread):
    """No row without a token; some log-ratios beyond verl's clamp with a spread of 12."""
    old, rollout, mask = mismatch_cases.make_inputs(*shape, spread=spread)
    mask[:, 0] = True
    return old, rollout, mask


def of_verl(args, config):
    """(weights or None, mask, metrics) of verl's whole correction.

    In float64: its variances near 0 are differences of numbers near 1.
    """
    proto, kept, metrics = helper.compute_rollout_correction_and_rejection_mask(
        *(t.double() for t in args[:2]),
        args[2].long(),
        config.rollout_is,
        config.rollout_is_threshold,
        config.rollout_is_batch_normalize,
        config.rollout_rs,
        config.rollout_rs_threshold,
    )
    weights = None if proto is None else proto.batch["rollout_is_weights"]
    return weights, kept.bool(), {k.removeprefix("rollout_corr/"): v for k, v in metrics.items()}


def check(args, config, **options):
    """Compares a call of ours with verl's configuration of the same correction.

    Not its metrics where log-ratios are beyond its clamp, which its k3_kl and chi2 then sum to
    numbers beyond fp32's digits.
    """
    found = rk.mismatch_weights(*args, log_ratio_clamp=20.0, **options)
    weights, kept, theirs = of_verl(args, config)
    assert torch.equal(found.mask, kept)
    if weights is not None:
        torch.testing.assert_close(found.weights, (weights * kept).float(), rtol=1e-5, atol=1e-12)
    ours = found.metrics.as_dict()
    if (args[0] - args[1]).abs().max() > 20:
        return ours
    names = {n: n for n in OFF_POLICY}
    if config.rollout_is is not None:
        names |= METRICS
        if config.rollout_is == "token":
            names |= {f"weight_{n}": f"rollout_is_{n}" for n in ("min", "max")}
        else:
            names |= {f"raw_{n}": f"rollout_is_{n}" for n in ("min", "max")}
        if config.rollout_is_batch_normalize:
            names["norm_factor"] = "rollout_is_batch_norm_factor"
    if config.rollout_rs is not None:
        names |= {"rejected": "rollout_rs_masked_fraction"}
        names |= {"rejected_sequences": "rollout_rs_seq_masked_fraction"}
    for name, other in names.items():
        assert ours[name] == pytest.approx(theirs[other], rel=1e-5, abs=1e-6), name
    return ours


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("spread", (0.05, 0.5, 3.0, 12.0))
@pytest.mark.parametrize(
    ("level", "low", "high"),
    [("token", None, 2.0), ("token", 0.5, 5.0), ("sequence", None, 2.0), ("sequence", 1e-7, 1e7)],
)
def test_weights(level, low, high, spread, normalize):
    threshold = high if low is None else f"{low}_{high}"
    config = RolloutCorrectionConfig(
        rollout_is=level, rollout_is_threshold=threshold, rollout_is_batch_normalize=normalize
    )
    mode = "truncate" if low is None else "mask"
    options = {"level": level, "mode": mode, "low": low, "high": high, "normalize": normalize}
    found = check(make_inputs(9, 31, spread=spread), config, **options)
    if spread == 12:
        assert found["fraction_high"] > 0 and found["fraction_low"] > 0


REJECTIONS = {
    "token_k1": ((0.8, 1.3), "0.8_1.3"),
    "token_k2": (0.02, "0.02"),
    "token_k3": (0.02, "0.02"),
    "seq_sum_k1": (2.0, "2.0"),
    "seq_sum_k2": (0.55, "0.55"),
    "seq_sum_k3": (0.55, "0.55"),
    "seq_mean_k1": ((0.97, 1.03), "0.97_1.03"),
    "seq_mean_k2": (0.021, "0.021"),
    "seq_mean_k3": (0.021, "0.021"),
    "seq_max_k2": (0.12, "0.12"),
    "seq_max_k3": (0.12, "0.12"),
}


def test_verl_has_these_criteria():
    assert set(REJECTIONS) == helper.SUPPORTED_ROLLOUT_RS_OPTIONS <= set(CRITERIA)


@pytest.mark.parametrize("name", REJECTIONS)
def test_each_rejection(name):
    bound, threshold = REJECTIONS[name]
    config = RolloutCorrectionConfig(
        rollout_is=None, rollout_rs=name, rollout_rs_threshold=threshold
    )
    found = check(make_inputs(12, 31, spread=0.2), config, reject={name: bound})
    assert 0 < found["rejected"] < 1


def test_several_rejections_with_weights():
    names = ("token_k1", "seq_mean_k3", "seq_max_k2")
    config = RolloutCorrectionConfig(
        rollout_is="token",
        rollout_is_threshold=1.2,
        rollout_is_batch_normalize=True,
        rollout_rs=",".join(names),
        rollout_rs_threshold=",".join(REJECTIONS[n][1] for n in names),
    )
    reject = {n: REJECTIONS[n][0] for n in names}
    options = {"level": "token", "high": 1.2, "normalize": True, "reject": reject}
    found = check(make_inputs(12, 31, spread=0.2), config, **options)
    assert 0 < found["rejected"] < 1 and found["norm_factor"] != 1


@pytest.mark.parametrize(
    ("preset", "config"),
    [
        ("verl-token-is", RolloutCorrectionConfig.decoupled_token_is()),
        ("verl-token-icepop", RolloutCorrectionConfig.decoupled_token_icepop()),
        ("verl-seq-is", RolloutCorrectionConfig.decoupled_seq_is()),
        ("verl-seq-is-rs", RolloutCorrectionConfig.decoupled_seq_is_rs()),
        ("verl-geo-rs", RolloutCorrectionConfig.decoupled_geo_rs()),
        ("verl-k3-rs", RolloutCorrectionConfig.decoupled_k3_rs()),
    ],
)
def test_presets(preset, config):
    for spread in (0.004, 0.1, 3.0, 12.0):
        check(make_inputs(12, 31, spread=spread), config, preset=preset)
