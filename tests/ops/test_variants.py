"""Every variant of the field: our call against its formula, and the page that lists them."""

from pathlib import Path

import pytest

from tools.variants import Variant, difference
from tools.variants.__main__ import FAMILIES, report

import rlhf_kernels as rk

PAGE = Path(__file__).parents[2] / "docs" / "variants.md"
# Roundings of float32 relative to the largest value; sums of terms of both signs, exponentials.
BOUND = 16 * 2.0**-24
CASES = [
    pytest.param(v, f, id=f"{f.title}: {v.name}") for f in FAMILIES for v in f.variants if v.call
]


@pytest.mark.parametrize("served", ("cpu", "reference"))
@pytest.mark.parametrize(("variant", "family"), CASES)
def test_our_call_is_the_formula(variant, family, served):
    with rk.use_backend(served):
        found = difference(variant, family)
    assert found.value <= BOUND
    assert (found.gradient is None) == (not family.leaves)
    assert family.leaves == () or found.gradient <= BOUND
    # verl adds 1e-8 to what it divides by.
    assert found.theirs is None or found.theirs <= 2 * BOUND


def test_what_has_no_call_has_a_reason():
    for family in FAMILIES:
        for variant in family.variants:
            assert bool(variant.call) == (variant.oracle is not None)
            assert variant.call or variant.note


def test_a_wrong_formula_is_told():
    family = FAMILIES[0]
    first = family.variants[0]
    wrong = Variant(first.name, first.who, first.call, lambda t: 1.001 * first.oracle(t))
    assert difference(wrong, family).gradient > 50 * BOUND


def test_the_page_is_up_to_date():
    """Its text and calls; figures in the last place may differ between machines."""

    def words(page):
        lines = (line.split(" | ") for line in page.splitlines())
        return [cells[:3] + cells[6:] if len(cells) == 7 else cells for cells in lines]

    assert words(PAGE.read_text()) == words(report())
