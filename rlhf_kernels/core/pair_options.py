"""Options of a divergence between two models, shared by every operation that computes one."""

from typing import Literal, NamedTuple

from . import option_checks, temperature_rules
from .option_checks import shown

#: The value of an option of the reference that makes it the policy's.
Same = Literal["same"]
SAME: Same = "same"


class PairOptions(NamedTuple):
    """Options as operators, the head and launchers take them.

    `ops._operator` flattens the fields into a schema in this order.

    temperature: divides the policy's logits after their cap.
    reverse: the policy's distribution weighs, as in KL(policy || ref); true with beta.
    beta: of the generalised Jensen-Shannon divergence, inside (0, 1); 0 for none.
    softcap, ref_softcap: c of c tanh(x / c), 0 for none.
    ref_scale: multiplies the reference's logits after their cap; both are then divided by
        `temperature`.
    entropy: whether the policy's entropy is wanted.
    """

    temperature: float
    reverse: bool = True
    beta: float = 0.0
    softcap: float = 0.0
    ref_softcap: float = 0.0
    ref_scale: float = 1.0
    entropy: bool = False

    @property
    def native(self) -> tuple[float, float, float, float]:
        """PairOptions of csrc/abi_rows.h."""
        return self.beta, self.softcap, self.ref_softcap, self.ref_scale


def _direction(op: str, direction: object, beta: object) -> tuple[bool, float]:
    """`reverse` and `beta` of PairOptions."""
    weight = 0.5 if beta is None else option_checks.rate(op, "beta", beta)
    if direction != "jsd":
        if beta is not None:
            raise ValueError(
                f'{op}: beta is an option of direction="jsd"; got beta {shown(beta)} with '
                f"direction={shown(direction)}"
            )
        return direction == "reverse", 0.0
    if weight in (0.0, 1.0):
        return weight == 1.0, 0.0
    return True, weight


def _cap(op: str, name: str, value: object) -> float | None:
    return None if value is None else option_checks.positive(op, name, value)


def _same(op: str, name: str, value: object) -> bool:
    """Whether an option of the reference is the policy's."""
    if isinstance(value, str):
        option_checks.one_of(op, name, value, (SAME,))
        return True
    return False


@option_checks.remembered
def checked(
    op: str,
    direction: object = "reverse",
    beta: object = None,
    temperature: object = 1.0,
    ref_temperature: object = SAME,
    softcap: object = None,
    ref_softcap: object = SAME,
    entropy: object = False,
    logit_scale: object = 1.0,
    ref_logit_scale: object = SAME,
) -> PairOptions:
    """Requires valid options of a divergence in a known direction.

    Returns:
        The options for logits without a scale: scale * x under a cap c and a temperature T is x
        under c / scale and T / scale.
    """
    reverse, weight = _direction(op, direction, beta)
    own = (
        option_checks.positive(op, "temperature", temperature),
        _cap(op, "softcap", softcap),
        option_checks.positive(op, "logit_scale", logit_scale),
    )
    temperature_rules.check(op, *own)
    wanted = option_checks.flag(op, "entropy", entropy)
    effective = own[0] / own[2]
    cap = 0.0 if own[1] is None else own[1] / own[2]
    given = (
        _same(op, "ref_temperature", ref_temperature),
        _same(op, "ref_softcap", ref_softcap),
        _same(op, "ref_logit_scale", ref_logit_scale),
    )
    if all(given):
        return PairOptions(effective, reverse, weight, cap, cap, 1.0, wanted)
    ref = (
        own[0] if given[0] else option_checks.positive(op, "ref_temperature", ref_temperature),
        own[1] if given[1] else _cap(op, "ref_softcap", ref_softcap),
        own[2] if given[2] else option_checks.positive(op, "ref_logit_scale", ref_logit_scale),
    )
    temperature_rules.check(op, *ref, prefix="ref_")
    ref_cap = 0.0 if ref[1] is None else ref[1] / ref[2]
    scale = effective / (ref[0] / ref[2])
    if not temperature_rules.LOWEST <= scale <= temperature_rules.HIGHEST:
        raise ValueError(
            f"{op}: the temperatures of the two models, each over its logit_scale, must be within "
            f"a factor of 2^60 of each other, got a factor of {shown(scale)}"
        )
    return PairOptions(effective, reverse, weight, cap, ref_cap, scale, wanted)
