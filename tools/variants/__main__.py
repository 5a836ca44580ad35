"""Prints the table of variants, or writes it with --report; see docs/variants.md."""

import argparse

from tools import tables
from tools.variants import Variant, advantages, difference, divergences, policy, preference

FAMILIES = (
    policy.FAMILY,
    advantages.FAMILY,
    preference.FAMILY,
    divergences.FAMILY,
)
HEAD = ("variant", "who has it", "our call", "value", "gradient", "verl", "")
TEXT = """# What the field trains with, and our call of it

Made by `make variants`, checked by the tests: every call below is run on the CPU in float32 and
compared with its formula in float64, which `tools/variants/` has beside it. The figures are the
largest differences of value and gradient, relative to the largest of each, and from verl's own
function in float64 where it has one; an estimator has no gradient. The parity tests compare with
TRL 1.16, verl 0.9.1 and OpenRLHF 0.11.2 in more settings; the other trainers were read in August
2026. `C` is `rk.PolicyLossConfig`.
"""


def _row(variant: Variant, found: tuple[str, ...]) -> tuple[str, ...]:
    steps = [f"`{name} = {expression}`" for name, expression in variant.where]
    call = "<br>".join([*steps, f"`{variant.call}`"]) if variant.call else "–"
    # A bar would end the cell.
    call = call.replace("|", "\\|")
    return variant.name, variant.who, call, *found, variant.note


def report() -> str:
    """The page."""
    lines = [TEXT]
    for family in FAMILIES:
        rows = []
        for variant in family.variants:
            found = vars(difference(variant, family)).values() if variant.call else [None] * 3
            rows.append(_row(variant, tuple("–" if x is None else f"{x:.0e}" for x in found)))
        lines += [f"## {family.title}", "", *tables.table(HEAD, rows, left=3, right=1), ""]
    return "\n".join(lines)


def main() -> None:
    """Prints or writes the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.variants", description=__doc__)
    parser.add_argument("--report", type=argparse.FileType("w"), help="where the page goes")
    options = parser.parse_args()
    print(report().rstrip(), file=options.report)


if __name__ == "__main__":
    main()
