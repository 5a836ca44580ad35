"""The names and orders that Python, C++ and Triton must share, read from csrc/abi_*.h."""

import re
from pathlib import Path

import pytest

import rlhf_kernels as rk
from rlhf_kernels.config import enums, metrics, mismatch, policy_codes
from rlhf_kernels.core import pair_options, row_options
from rlhf_kernels.kernels.native import boundary

CSRC = Path(rk.__file__).parent.parent / "csrc"
ABI = "".join(p.read_text() for p in sorted(CSRC.glob("abi*.h")))

pytestmark = pytest.mark.skipif(not ABI, reason="needs the source tree")


def fields(struct):
    """(type, name) of every member of a struct of abi_*.h, in order."""
    body = re.search(rf"struct {struct} {{(.*?)}};", ABI, re.DOTALL)[1]
    lines = re.findall(r"(\w+)\s+([\w\s,]+);", re.sub(r"//.*", "", body))
    return [(kind, name.strip()) for kind, names in lines for name in names.split(",")]


@pytest.mark.parametrize(
    ("struct", "kind", "names"),
    [
        ("PolicyCodes", "int32_t", policy_codes.PolicyCodes._fields),
        ("PolicyParams", "float", policy_codes.PolicyParams._fields),
        ("MismatchParams", "float", mismatch.MismatchParams._fields),
    ],
)
def test_a_policy_config_crosses_in_the_order_of_its_fields(struct, kind, names):
    assert fields(struct) == [(kind, name) for name in names]


def test_options_of_rows_cross_in_the_order_of_their_fields():
    kinds = {float: "double", int: "int64_t"}
    of_python = row_options.RowOptions.__annotations__
    # Native code is given a tensor for a result, or none.
    expected = [(kinds[t], name) for name, t in of_python.items() if t is not bool]
    assert fields("RowOptions") == expected


def test_options_of_rows_are_read_at_their_places():
    text = (CSRC / "bind" / "tensor.h").read_text()
    read = re.findall(r"value\.(\w+) = Py\w+\(item\((\d+)\)\);", text)
    assert {name for name, _ in read} == {name for _, name in fields("RowOptions")}
    for name, place in read:
        assert row_options.RowOptions._fields[int(place)] == name


def test_options_of_pairs_of_rows_cross_in_the_order_of_their_fields():
    names = [name for _, name in fields("PairOptions")]
    options = pair_options.PairOptions(0.7, True, 0.1, 2.0, 3.0, 4.0)
    assert options.native == tuple(getattr(options, name) for name in names)


# Of each part that reads options: its files, and those of them that may name an option, of rows and
# of pairs of rows.
READERS = [
    ("csrc/bind/*.h", {"tensor.h"}),
    ("csrc/cpu/*.h", {"rows.h", "kl_sums.h"}),
    ("csrc/cuda/*.cu*", {"rows.cuh", "kl_general.cu"}),
    ("rlhf_kernels/kernels/**/*.py", {"_rows.py", "kl_pairs.py"}),
    ("rlhf_kernels/head/*.py", set()),
    ("rlhf_kernels/ops/_*.py", set()),
]


@pytest.mark.parametrize(("files", "readers"), READERS, ids=[files for files, _ in READERS])
def test_one_file_of_each_part_reads_an_option_that_changes_logits(files, readers):
    """So a new option changes that file alone; other files carry the tuple whole."""
    paths = sorted(CSRC.parent.glob(files))
    assert len(paths) > 3
    naming = {p.name for p in paths if re.search(r"\bsoftcap\b", p.read_text())}
    # A kernel that unpacks the tuple itself breaks with each new field.
    naming |= {p.name for p in paths if re.search(r"= row_options$", p.read_text(), re.MULTILINE)}
    assert naming == readers


def test_a_policy_config_is_encoded_under_the_right_names():
    config = rk.PolicyLossConfig(
        objective="cispo", ratio_level="sequence-token", clip_low=0.1, clip_high=0.3,
        kl_coef=0.04, kl_estimator="abs+", kl_input_clamp=(-0.5, 0.75), kl_value_clamp=0.9,
        kl_weight="ratio", kl_weight_max=1.5, gate="tv", gate_low=0.5,
        gate_against="rollout", gate_two_sided=True, entropy_coef=0.01, correction_level="sequence",
        correction_mode="mask", correction_min=0.25, correction_max=4.0, sapo_tau_pos=1.25,
        sapo_tau_neg=1.5, log_ratio_clamp=(-2.0, 3.0), aggregation="seq-mean-token-sum",
    )  # fmt: skip
    assert config._codes == policy_codes.PolicyCodes(
        objective=3, ratio_level=2, kl_estimator=3, kl_straight_through=1,
        kl_weight=1, correction_level=2, correction_mode=1, aggregation=2, gate=1, gate_against=1,
        gate_two_sided=1, kl_weight_capped=1,
    )  # fmt: skip
    assert config._params == policy_codes.PolicyParams(
        clip_low=0.9, clip_high=1.3, dual_clip=3.0e38, delta=3.0e38, log_ratio_low=-2.0,
        log_ratio_high=3.0, penalty_coef=0.0, sapo_tau_pos=1.25, sapo_tau_neg=1.5, kl_coef=0.04,
        kl_input_low=-0.5, kl_input_high=0.75, kl_value_clamp=0.9, entropy_coef=0.01,
        correction_low=0.25, correction_high=4.0, gate_low=-0.5, gate_high=3.0e38,
        kl_weight_max=1.5,
    )  # fmt: skip
    bounds = rk.PolicyLossConfig(dual_clip=3.0, delta=2.0)._params
    assert (bounds.dual_clip, bounds.delta) == (3.0, 2.0)
    assert rk.PolicyLossConfig.ppo_penalty(penalty_coef=0.7)._params.penalty_coef == 0.7


@pytest.mark.parametrize(
    ("struct", "names"),
    [
        ("PolicyMetrics", metrics.POLICY_METRICS),
        ("ValueMetrics", metrics.VALUE_METRICS),
        ("MismatchMetrics", metrics.MISMATCH_METRICS),
    ],
)
def test_metrics_lie_in_the_order_of_their_names(struct, names):
    assert fields(struct) == [("float", name) for name in names]


# By enum of abi_*.h: the tuple of names, what the enum's own names have before and after each, and
# the names of the same constants in the Triton kernels, which have less of it.
ENUMS = {
    "KlEstimator": (enums.PLAIN_KL_ESTIMATORS, "k", "", ""),
    "Objective": (enums.OBJECTIVES, "k", "", ""),
    "RatioLevel": (enums.RATIO_LEVELS, "k", "Ratio", "_RATIO"),
    "CorrectionLevel": (enums.CORRECTION_CODES, "k", "Correction", "_CORRECTION"),
    "CorrectionMode": (enums.CORRECTION_MODES, "k", "", ""),
    "KlWeight": (enums.KL_WEIGHT_CODES, "k", "KlWeight", "_KL_WEIGHT"),
    "Gate": (enums.GATE_CODES, "k", "Gate", "_GATE"),
    "GateAnchor": (enums.GATE_ANCHORS, "k", "Anchor", "_ANCHOR"),
    "Aggregation": (enums.AGGREGATIONS, "k", "", ""),
    "MismatchLevel": (enums.MISMATCH_CODES, "k", "Weight", None),
    "Baseline": (enums.BASELINES, "kBaseline", "", None),
    "Scale": (enums.SCALES, "kScale", "", None),
}


def members(enum):
    """{name: value} of an enum of abi_*.h."""
    body = re.search(rf"enum {enum} : int32_t {{(.*?)}};", ABI, re.DOTALL)[1]
    found = re.findall(r"(\w+) = (\d+)", re.sub(r"//.*", "", body))
    assert len(found) == body.count("=")
    return {name: int(value) for name, value in found}


@pytest.mark.parametrize("enum", ENUMS)
def test_an_enum_has_the_names_of_its_tuple_in_order(enum):
    names, before, after, _ = ENUMS[enum]
    words = ["".join(map(str.capitalize, re.split("[-_]", n or "no"))) for n in names]
    assert members(enum) == {f"{before}{word}{after}": i for i, word in enumerate(words)}


def test_no_enum_of_choices_is_left_out():
    found = set(re.findall(r"enum (\w+) :", ABI))
    assert found == {*ENUMS, "DType", "StatusCode"}


def test_dtypes_and_status_codes_are_those_of_the_boundary():
    dtypes = {f"k{str(t).removeprefix('torch.').capitalize()}": i
              for t, i in boundary.DTYPE_CODES.items()}  # fmt: skip
    assert {n.lower(): i for n, i in members("DType").items()} == {
        n.lower(): i for n, i in dtypes.items()
    }
    for name, value in members("StatusCode").items():
        constant = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removeprefix("k")).upper()
        assert getattr(boundary, constant) == value, name


def test_the_triton_kernels_have_the_same_integers():
    pytest.importorskip("triton")
    from rlhf_kernels.kernels.triton import mismatch_math, policy_math, value

    for names, _, _, after in ENUMS.values():
        if after is not None:
            for i, name in enumerate(names):
                constant = (name or "no").replace("-", "_").upper() + after
                assert getattr(policy_math, constant).value == i, constant
    for i, name in enumerate(enums.MISMATCH_CODES):
        constant = (name or "none").replace("-", "_").upper()
        assert getattr(mismatch_math, constant).value == i, constant
    for i, name in enumerate(metrics.VALUE_METRICS):
        assert getattr(value, f"M_{name.upper()}").value == i, name


def of_source(name, enum):
    """Members of an enum of a header in csrc whose values count from 0, without their k."""
    body = re.search(rf"enum {enum} {{(.*?)}};", (CSRC / name).read_text(), re.DOTALL)[1]
    found = re.findall(r"(\w+)(.*?)(?:,|$)", re.sub(r"//.*", "", body).strip())
    assert not any(value.strip() for _, value in found)
    return [member.removeprefix("k") for member, _ in found]


def test_sums_and_totals_of_mismatch_weights_have_one_order():
    pytest.importorskip("triton")
    from rlhf_kernels.kernels.triton import mismatch_judge, mismatch_math

    orders = (("MismatchSum", mismatch_math, "S_"), ("MismatchTotal", mismatch_judge, ""))
    for enum, module, prefix in orders:
        *names, _ = of_source("mismatch_math.h", enum)
        for i, name in enumerate(names):
            words = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", re.sub("(Of|In)$", "", name)).upper()
            constant = prefix + words.replace("_SQUARE", "2")
            assert getattr(module, constant).value == i, constant
        if prefix:
            assert module.SUMS.value == len(names)
