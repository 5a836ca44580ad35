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


class _Model(NamedTuple):
    """Options of one of the two models, as a caller gives them."""

    temperature: float
    softcap: float | None
    logit_scale: float

    @property
    def divisor(self) -> float:
        """Of logits without a scale: scale * x under a temperature T is x under T / scale."""
        return self.temperature / self.logit_scale

    @property
    def cap(self) -> float:
        """Of logits without a scale; 0 for none."""
        return 0.0 if self.softcap is None else self.softcap / self.logit_scale


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
    own = _Model(
        option_checks.positive(op, "temperature", temperature),
        _cap(op, "softcap", softcap),
        option_checks.positive(op, "logit_scale", logit_scale),
    )
    temperature_rules.check(op, own.temperature, own.softcap, own.logit_scale)
    wanted = option_checks.flag(op, "entropy", entropy)
    ref = _Model(
        own.temperature
        if _same(op, "ref_temperature", ref_temperature)
        else option_checks.positive(op, "ref_temperature", ref_temperature),
        own.softcap
        if _same(op, "ref_softcap", ref_softcap)
        else _cap(op, "ref_softcap", ref_softcap),
        own.logit_scale
        if _same(op, "ref_logit_scale", ref_logit_scale)
        else option_checks.positive(op, "ref_logit_scale", ref_logit_scale),
    )
    if ref == own:
        return PairOptions(own.divisor, reverse, weight, own.cap, own.cap, 1.0, wanted)
    temperature_rules.check(op, ref.temperature, ref.softcap, ref.logit_scale, prefix="ref_")
    scale = own.divisor / ref.divisor
    if not temperature_rules.LOWEST <= scale <= temperature_rules.HIGHEST:
        raise ValueError(
            f"{op}: the temperatures of the two models, each over its logit_scale, must be within "
            f"a factor of 2^60 of each other, got a factor of {shown(scale)}"
        )
    return PairOptions(own.divisor, reverse, weight, own.cap, ref.cap, scale, wanted)
