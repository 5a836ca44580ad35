"""The names and orders that Python, C++ and Triton must share, read from csrc/abi.h."""

import re
from pathlib import Path

import pytest

import rlhf_kernels as rk
from rlhf_kernels.config import policy

ABI = Path(rk.__file__).parent.parent / "csrc" / "abi.h"

pytestmark = pytest.mark.skipif(not ABI.is_file(), reason="needs the source tree")


def fields(struct):
    """(type, name) of every member of a struct of abi.h, in order."""
    body = re.search(rf"struct {struct} {{(.*?)}};", ABI.read_text(), re.DOTALL)[1]
    lines = re.findall(r"(\w+)\s+([\w\s,]+);", re.sub(r"//.*", "", body))
    return [(kind, name.strip()) for kind, names in lines for name in names.split(",")]


@pytest.mark.parametrize(
    ("struct", "kind", "names"),
    [
        ("PolicyCodes", "int32_t", policy.PolicyCodes._fields),
        ("PolicyParams", "float", policy.PolicyParams._fields),
    ],
)
def test_a_policy_config_crosses_in_the_order_of_its_fields(struct, kind, names):
    assert fields(struct) == [(kind, name) for name in names]


def test_a_policy_config_is_encoded_under_the_right_names():
    config = rk.PolicyLossConfig(
        objective="cispo", ratio_level="sequence-token", clip_low=0.1, clip_high=0.3,
        kl_coef=0.04, kl_estimator="abs+", kl_input_clamp=(-0.5, 0.75), kl_value_clamp=0.9,
        kl_importance_weighted=True, entropy_coef=0.01, correction_level="sequence",
        correction_mode="mask", correction_min=0.25, correction_max=4.0, sapo_tau_pos=1.25,
        sapo_tau_neg=1.5, log_ratio_clamp=(-2.0, 3.0), aggregation="seq-mean-token-sum",
    )  # fmt: skip
    assert config._codes == policy.PolicyCodes(
        objective=3, ratio_level=2, kl_estimator=3, kl_straight_through=1,
        kl_importance_weighted=1, correction_level=2, correction_mode=1, aggregation=2,
    )  # fmt: skip
    assert config._params == policy.PolicyParams(
        clip_low=0.9, clip_high=1.3, dual_clip=3.0e38, delta=3.0e38, log_ratio_low=-2.0,
        log_ratio_high=3.0, penalty_coef=0.0, sapo_tau_pos=1.25, sapo_tau_neg=1.5, kl_coef=0.04,
        kl_input_low=-0.5, kl_input_high=0.75, kl_value_clamp=0.9, entropy_coef=0.01,
        correction_low=0.25, correction_high=4.0,
    )  # fmt: skip
    bounds = rk.PolicyLossConfig(dual_clip=3.0, delta=2.0)._params
    assert (bounds.dual_clip, bounds.delta) == (3.0, 2.0)
    assert rk.PolicyLossConfig.ppo_penalty(penalty_coef=0.7)._params.penalty_coef == 0.7
