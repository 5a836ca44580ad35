"""Advantages: GAE, discounted returns and whitening.

Nothing here is differentiable: advantages and returns are constants of the loss.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .. import reference
from ..config.enums import MASKED_STEPS, MaskedSteps
from ..core import checks, data_checks, option_checks
from ..core.layout import constant, constants, fp32_like
from ..core.option_checks import shown
from ..kernels import backends
from . import advantages_general as general
from ._operator import define


@define("gae")
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dones: Tensor | None,
    bootstrap_values: Tensor | None,
    gamma: float,
    lam: float,
    masked: str,
    whiten: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return fp32_like(rewards), fp32_like(rewards)


@define("discounted_returns")
def _discounted_returns(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dones: Tensor | None,
    bootstrap_values: Tensor | None,
    gamma: float,
    masked: str,
    backend: str,
) -> Tensor:
    return fp32_like(rewards)


@define("whiten")
def _whiten(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float, backend: str
) -> Tensor:
    return fp32_like(x)


class Advantages(NamedTuple):
    """Result of `gae`."""

    advantages: Tensor
    returns: Tensor


def _check_tokens(
    op: str,
    tokens: Mapping[str, Tensor | None],
    masks: Mapping[str, Tensor | None],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The values of tokens and masks, checked; integer rewards become float32."""
    like, first = next(iter(tokens.items()))
    found: list[Tensor | None] = []
    for name, t in tokens.items():
        if name == "rewards":
            t = checks.real(op, name, t)
        elif t is not None or name != "ref_logprobs":
            checks.floating(op, name, t, double=True)
        found.append(t)
    assert first is not None  # the loop has raised otherwise
    if first.dim() != (2 if cu_seqlens is None else 1):
        expected = "[B, T]" if cu_seqlens is None else "[N], packed as cu_seqlens says,"
        raise ValueError(f"{op}: {like} must be {expected}, got {shown(first.shape)}")
    for name, t in masks.items():
        found.append(None if t is None else checks.mask(op, name, t))
    for name, t in (*tokens.items(), *masks.items()):
        if t is not None and t is not first:
            checks.same_shape(op, name, t, like, first.shape)
            checks.same_device(op, name, t, like, first.device)
    return tuple(found)


def check_scan(
    op: str,
    kinds: str,
    tokens: Mapping[str, Tensor | None],
    masks: Mapping[str, Tensor | None],
    sequences: Mapping[str, Tensor | None],
    cu_seqlens: Tensor | None,
    masked: str,
) -> tuple[Any, ...]:
    """Checks the arguments common to the scans; the first of `tokens` sets shape and device.

    `kinds`: of tokens and masks, as `checks.plain` takes them.

    Returns:
        The values of tokens, masks and sequences in one flat list, as kernels take them.
        Integer rewards, scores and bootstrap values become float32. Before them, whether none of
        the tensors can be float64, which the reference accepts but kernels do not.
    """
    found: tuple[Tensor | None, ...] = (*tokens.values(), *masks.values())
    first: Any = found[0]
    plain = checks.plain(kinds, *found)
    if not plain or cu_seqlens is not None or first.dim() != 2:
        found = _check_tokens(op, tokens, masks, cu_seqlens)
    if cu_seqlens is not None:
        checks.offsets(op, cu_seqlens)
        checks.same_device(op, "cu_seqlens", cu_seqlens, next(iter(tokens)), first.device)
    for name, t in sequences.items():
        if t is not None or name == "scores":
            t, plain = checks.real(op, name, t), False
            count = first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            if t.shape != (count,):
                raise ValueError(
                    f"{op}: {name} must have one entry per sequence, ({count},), "
                    f"got {shown(t.shape)}"
                )
            checks.same_device(op, name, t, next(iter(tokens)), first.device)
        found = (*found, t)
    option_checks.one_of(op, "masked", masked, MASKED_STEPS)
    return plain, *constants(*found)


def _general_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    of_ends: str,
    ends: general.Ends,
    cu_seqlens: Tensor | None,
    rates: tuple[object, object, object],
    masked: MaskedSteps,
    whiten: bool,
) -> Advantages:
    """`gae` with truncated steps, or rates that are tensors or the returns' own.

    `of_ends` is what the caller calls the terminated steps.
    """
    op = "gae"
    _, rewards, values, mask, terminated, truncated = check_scan(
        op,
        "ffMMM",
        {"rewards": rewards, "values": values},
        {"mask": mask, of_ends: ends.terminated, "truncated": ends.truncated},
        {},
        cu_seqlens,
        masked,
    )
    tokens = general.Tokens("rewards", rewards, values, mask, cu_seqlens, masked)
    ends = ends._replace(terminated=terminated, truncated=truncated)
    flag = option_checks.flag(op, "whiten", whiten)
    return Advantages(*general.scan(op, tokens, ends, rates, flag)[:2])


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    masked: MaskedSteps = "carry",
    whiten: bool = False,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al., 1506.02438).

    delta_t = r_t + gamma_t V_{t+1} - V_t, A_t = delta_t + gamma_t lam_t A_{t+1}, returns = A + V.
    lam = 0 is TD(0), lam = 1 Monte Carlo. Results are detached: constants of the loss.

    At a terminated step V_{t+1} and A_{t+1} are 0. At a truncated step V_{t+1} is the bootstrap
    value and A_{t+1} is 0. A step that is both is terminated. This is what gymnasium's two flags
    mean, and what torchrl and Stable-Baselines3 compute from them.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`; float32, bfloat16 or float16; integers and
            bools become float32.
        values: the shape of rewards; V_t, the value before step t.
        mask: the shape of rewards; bool or integer, nonzero = keep, or floating with only 0 and 1.
            None keeps everything.
        cu_seqlens: [S+1] int32 or int64; sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1].
        dones: the shape and dtypes of mask; nonzero where the step ended its episode. No later
            value or advantage enters such a step. Another name of `terminated`; where a trainer's
            dones include truncated steps, pass terminated and truncated instead.
        terminated: the shape and dtypes of mask; nonzero where the episode ended in this step.
        truncated: the shape and dtypes of mask; nonzero where the episode was cut off after this
            step. Needs `bootstrap_values`.
        bootstrap_values: the value of the state that follows. [B], or [S] if packed: after the end
            of each sequence; of its steps, only the last kept one may then be truncated (checked
            on CPU; elsewhere an earlier one receives the same value). Or in the shape of rewards:
            read at truncated steps and at the last step of each sequence, and 0 where masked. 0 if
            None.
        gamma: discount, in [0, 1]: a number, or a tensor of floating or integer dtype. A tensor has
            one entry per sequence, [B] or packed [S], or one per step, in the shape of rewards.
            Packed with S = N it has one per sequence. Entries outside [0, 1] raise on CPU and give
            NaN elsewhere. As numbers, entries of fp32 tensors are those of fp32.
        lam: decay of the estimator, like gamma. VAPO's (2504.05118) has one entry per sequence.
        value_lam: the lam of the returns, like gamma; None for `lam`. Advantages keep `lam`
            (VC-PPO, 2503.01491, and VAPO: value_lam=1.0). Costs no second pass.
        masked: how masked steps count. "carry" (verl, NeMo-RL, AReaL): not at all; the steps before
            and after are neighbours. "zero" (OpenRLHF): as steps with reward 0 and value 0, which
            discount the advantage that passes through; their `dones`, `truncated` and rates apply,
            and `bootstrap_values` [B] follow the padding.
        whiten: give advantages zero mean and unit variance over the mask, as `whiten` does. verl's
            gae is whiten=True; OpenRLHF's is masked="zero", then whiten(unbiased=False, eps=0).

    Returns:
        Advantages(advantages, returns), float32 in the shape of rewards; exactly 0 at masked
        positions, whatever the inputs hold there.

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; an unknown option; dones beside terminated
            or truncated; truncated without bootstrap_values; on CPU, cu_seqlens that do not start
            at 0, decrease, or do not end at N.
    """
    op = "gae"
    of_ends = "dones"
    usual = bootstrap_values is terminated is truncated is value_lam is None
    if not usual or type(gamma) is not float or type(lam) is not float:
        of_ends, dones = general.the_ends(op, dones, terminated, truncated)
        if general.needed(gamma, lam, value_lam, truncated, bootstrap_values, rewards, cu_seqlens):
            ends = general.Ends(dones, truncated, bootstrap_values)
            rates = gamma, lam, value_lam
            return _general_gae(
                rewards, values, mask, of_ends, ends, cu_seqlens, rates, masked, whiten
            )
    plain = checks.plain("ffMM", rewards, values, mask, dones) and rewards.dim() == 2
    if not plain or cu_seqlens is not None or bootstrap_values is not None:
        tokens, flags = {"rewards": rewards, "values": values}, {"mask": mask, of_ends: dones}
        end = {"bootstrap_values": bootstrap_values}
        plain, rewards, values, mask, dones, bootstrap_values = check_scan(
            op, "ffMM", tokens, flags, end, cu_seqlens, masked
        )
    else:
        rewards, values = constant(rewards), constant(values)
        option_checks.one_of(op, "masked", masked, MASKED_STEPS)
    gamma = option_checks.rate(op, "gamma", gamma)
    lam = option_checks.rate(op, "lam", lam)
    whiten = option_checks.flag(op, "whiten", whiten)
    backend = backends.select(op, rewards.device)
    if backend == backends.REFERENCE:
        data_checks.offsets_valid(op, cu_seqlens, rewards.shape[0])
        return Advantages(
            *reference.gae(
                rewards,
                values,
                mask=mask,
                cu_seqlens=cu_seqlens,
                dones=dones,
                bootstrap_values=bootstrap_values,
                gamma=gamma,
                lam=lam,
                masked=masked,
                whiten=whiten,
            )
        )
    if not plain:
        checks.not_double(op, rewards=rewards, values=values, bootstrap_values=bootstrap_values)
    return Advantages(
        *_gae(
            rewards, values, mask, cu_seqlens, dones, bootstrap_values,
            gamma, lam, masked, whiten, backend, plain=plain and cu_seqlens is None,
        )
    )  # fmt: skip


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    masked: MaskedSteps = "carry",
) -> Tensor:
    """Return to go, G_t = r_t + gamma G_{t+1} (REINFORCE, Williams 1992; REINFORCE++, 2501.03262).

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`; float32, bfloat16 or float16; integers and
            bools become float32.
        mask: as in `gae`.
        cu_seqlens: as in `gae`.
        dones: as in `gae`.
        bootstrap_values: [B], or [S] if packed: return after the last step. 0 if None.
        gamma: discount, in [0, 1].
        masked: as in `gae`: "carry" skips masked steps, "zero" discounts through them.

    Returns:
        Returns, float32 in the shape of rewards, detached; exactly 0 at masked positions.

    Raises:
        TypeError, ValueError: as in `gae`.
    """
    op = "discounted_returns"
    flags, end = {"mask": mask, "dones": dones}, {"bootstrap_values": bootstrap_values}
    plain, rewards, mask, dones, bootstrap_values = check_scan(
        op, "fMM", {"rewards": rewards}, flags, end, cu_seqlens, masked
    )
    gamma = option_checks.rate(op, "gamma", gamma)
    backend = backends.select(op, rewards.device)
    if backend == backends.REFERENCE:
        data_checks.offsets_valid(op, cu_seqlens, rewards.shape[0])
        return reference.discounted_returns(
            rewards,
            mask=mask,
            cu_seqlens=cu_seqlens,
            dones=dones,
            bootstrap_values=bootstrap_values,
            gamma=gamma,
            masked=masked,
        )
    if not plain:
        checks.not_double(op, rewards=rewards, bootstrap_values=bootstrap_values)
    return _discounted_returns(
        rewards, mask, cu_seqlens, dones, bootstrap_values, gamma, masked, backend
    )


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(var + eps), with mean and variance over the kept elements.

    Statistics are two-pass in fp64, never E[x^2] - mean^2.

    Args:
        x: [...], float32, bfloat16 or float16; integers and bools become float32.
        mask: the shape of x; as in `gae`.
        shift_mean: False adds the mean back.
        unbiased: divide the sum of squares by n - 1, not n. True for TRL and verl, False for
            OpenRLHF.
        eps: added to the variance, >= 0.

    Returns:
        float32 in the shape of x, detached; exactly 0 at masked positions. A single kept element
        has variance 0, so its result is 0 (with shift_mean=False, its own value).

    Raises:
        TypeError: wrong dtype or type of an argument.
        ValueError: shapes or devices that do not match; eps below 0.
    """
    op = "whiten"
    x = constant(checks.real(op, "x", x))
    mask = checks.row_mask(op, mask, "x", x.shape, x.device)
    shift_mean = option_checks.flag(op, "shift_mean", shift_mean)
    unbiased = option_checks.flag(op, "unbiased", unbiased)
    eps = option_checks.non_negative(op, "eps", eps)
    backend = backends.select(op, x.device)
    if backend == backends.REFERENCE:
        return reference.whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps)
    checks.not_double(op, x=x)
    return _whiten(x, mask, shift_mean, unbiased, eps, backend)
