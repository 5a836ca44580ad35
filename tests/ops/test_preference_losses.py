"""preference_loss and kto_loss against their papers' formulas, written here in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config.enums import F_DIVERGENCES, PREFERENCE_LOSSES
from rlhf_kernels.config.preference import (
    AVERAGED,
    OF_DIFFERENCES,
    REFERENCE_FREE,
    SMOOTHED,
    SORTED,
)
from rlhf_kernels.testing import DTYPES, assert_within_budget, generator, to_float64

BETA, TAU, GAMMA, ALPHA = 0.3, 0.07, 0.7, 0.2
LENGTHS = torch.tensor([[3, 9, 1, 20, 7, 0], [5, 2, 8, 1, 1, 4]])


def S(z):
    """log sigmoid."""
    return -torch.log1p(torch.exp(-z))


def sig(z):
    return 1 / (1 + torch.exp(-z))


def slope(name, x):
    """f'(u) of f-DPO, u = exp(x); alpha divergence of coefficient 0.6."""
    u = torch.exp(x)
    return {
        "reverse_kl": torch.log(u),
        "forward_kl": 1 - 1 / u,
        "js_divergence": torch.log(2 * u / (1 + u)),
        "alpha_divergence": (u ** (0.6 - 1) - 1) / (0.6 - 1),
    }[name]


def written_out(loss, chosen, rejected, ref_chosen, ref_rejected, *, s, f="reverse_kl"):
    """[B] terms, of sums and LENGTHS."""
    w, r = slope(f, chosen - ref_chosen), slope(f, rejected - ref_rejected)
    plain_w, plain_r = chosen - ref_chosen, rejected - ref_rejected
    many = LENGTHS.double().clamp(min=1)
    mean_w, mean_r = chosen / many[0], rejected / many[1]
    z = BETA * (w - r)

    def smooth(z):
        return -(1 - s) * S(z) - s * S(-z)

    def odds(x):
        return torch.exp(x) / (1 - torch.exp(x))

    if loss == "exo_pair":
        q = torch.stack([sig(z), sig(-z)])
        p = torch.tensor([1 - s, s], dtype=torch.float64)[:, None]
        return (q * (q.log() - p.log())).sum(0)
    if loss == "aot":
        margins, own = (chosen - rejected).sort()[0], (ref_chosen - ref_rejected).sort()[0]
        return smooth(BETA * (margins - own))
    if loss == "aot_unpaired":
        return smooth(BETA * (plain_w.sort()[0] - plain_r.sort()[0]))
    if loss == "discopop":
        m = sig(z / TAU)
        return -S(z) * (1 - m) + torch.exp(-z) * m
    if loss == "alphapo":
        reward_w, reward_r = ((1 - torch.exp(-ALPHA * x)) / ALPHA for x in (mean_w, mean_r))
        return smooth(BETA * (reward_w - reward_r) - GAMMA)
    one, two = BETA * plain_w, BETA * plain_r
    return {
        "sigmoid": lambda: smooth(z),
        "hinge": lambda: torch.relu(1 - z),
        "ipo": lambda: (w / many[0] - r / many[1] - 1 / (2 * BETA)) ** 2,
        "nca_pair": lambda: -S(one) - 0.5 * S(-one) - 0.5 * S(-two),
        "robust": lambda: (-(1 - s) * S(z) + s * S(-z)) / (1 - 2 * s),
        "bco_pair": lambda: -S(one) - S(-two),
        "sppo_hard": lambda: (plain_w - 0.5 / BETA) ** 2 + (plain_r + 0.5 / BETA) ** 2,
        "apo_zero": lambda: 1 - sig(one) + sig(two),
        "apo_down": lambda: sig(one) + 1 - sig(one - two),
        "sft": lambda: -chosen * len(chosen) / many[0].sum(),
        "sigmoid_norm": lambda: -S(BETA * (w / many[0] - r / many[1])),
        "cpo": lambda: smooth(BETA * (chosen - rejected)),
        "simpo": lambda: smooth(BETA * (mean_w - mean_r) - GAMMA),
        "orpo": lambda: -BETA * S(torch.log(odds(mean_w) / odds(mean_r))),
    }[loss]()


def options_of(loss, smoothing=0.0, f="reverse_kl"):
    found = {"loss": loss, "beta": BETA, "label_smoothing": smoothing, "f_divergence": f}
    found |= {"discopop_tau": TAU} if loss == "discopop" else {}
    found |= {"gamma": GAMMA} if loss in ("simpo", "alphapo") else {}
    found |= {"alpha": ALPHA} if loss == "alphapo" else {}
    found |= {"f_alpha": 0.6} if f == "alpha_divergence" else {}
    return found | {"chosen_lengths": LENGTHS[0], "rejected_lengths": LENGTHS[1]}


def make_pairs(loss, dtype=torch.float32):
    """Sums around -8; the answers of a pair differ by several."""
    count = 2 if loss in REFERENCE_FREE else 4
    return [(-8 - 3 * torch.rand(6)).to(dtype).requires_grad_() for _ in range(count)]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


CASES = [
    *((loss, s, "reverse_kl") for loss in PREFERENCE_LOSSES for s in (0.0, 0.1)
      if (loss in SMOOTHED or s == 0) and (loss, s) != ("exo_pair", 0.0)),
    *((loss, 0.1 if loss == "exo_pair" else 0.0, f) for loss in OF_DIFFERENCES
      for f in F_DIVERGENCES[1:]),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "smoothing", "f"), CASES)
def test_value_and_gradient_from_the_formula(loss, smoothing, f):
    for dtype in DTYPES:
        pairs = make_pairs(loss, dtype)
        options = options_of(loss, smoothing, f)
        found = rk.preference_loss(*pairs, **options).loss
        wide = to_float64(pairs)
        whole = [*wide, *torch.zeros(4 - len(wide), 6, dtype=torch.float64)]
        expected = written_out(loss, *whole, s=smoothing, f=f).mean()
        slopes = gradients(expected, wide)
        exact = rk.preference_loss(*wide, **options).loss
        torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradients(exact, wide), slopes, rtol=1e-10, atol=1e-13)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-7)
        read = 1 if loss == "sft" else len(pairs)
        for g, slope, p in zip(gradients(found, pairs), slopes, pairs, strict=True):
            assert g.dtype is p.dtype
            rounding = max(torch.finfo(dtype).eps, 4e-6)
            torch.testing.assert_close(g.double(), slope, rtol=rounding, atol=rounding * 0.1)
        assert all(s.abs().max() > 1e-4 for s in slopes[:read])


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_gradcheck(loss):
    pairs = to_float64(make_pairs(loss))
    options = options_of(loss, 0.1 if loss in SMOOTHED else 0.0)
    assert torch.autograd.gradcheck(lambda *p: rk.preference_loss(*p, **options).loss, pairs)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_great_margins(loss):
    """Finite to 1e4, with the slopes of float64 in every tail."""
    far = torch.tensor([1e4, 3e3, 800.0, 300, 60, 25, 12, 2, 0, -2, -12, -25, -60, -300, -1e4])
    first = -far.abs() - 0.5 if loss == "orpo" else far
    second = torch.full_like(first, -3.0)
    rest = [] if loss in REFERENCE_FREE else [torch.zeros_like(far)] * 2
    lengths = torch.ones_like(far, dtype=torch.long)
    divergences = F_DIVERGENCES if loss in OF_DIFFERENCES else F_DIVERGENCES[:1]
    for f in divergences:
        options = options_of(loss, 0.1 if loss == "exo_pair" else 0.0, f)
        options |= {"chosen_lengths": lengths, "rejected_lengths": lengths}
        for swap in (False, True):
            given = [first, second][:: -1 if swap else 1]
            given = [x.clone().requires_grad_() for x in given]
            loss_, *rewards = rk.preference_loss(*given, *rest, **options)
            found = gradients(loss_, given)
            assert loss_.isfinite() and all(g.isfinite().all() for g in (*found, *rewards))
            wide = to_float64(given)
            exact = rk.preference_loss(*wide, *(r.double() for r in rest), **options).loss
            for g, e in zip(found, gradients(exact, wide), strict=True):
                # A far exponent carries the rounding of its argument.
                far_exponents = f != "reverse_kl" or loss in ("alphapo", "discopop")
                tolerance = 2e-3 if far_exponents else 4e-5
                torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=1e-17)


@pytest.mark.parametrize(
    "alpha, chosen, rejected",
    [(8, -6, -5.5), (2, -25, -21), (8, -6, -6), (50, -6, -6.5), (3, 0, -100), (-8, -6, -5.5)],
)
def test_alphapo_at_far_exponents(alpha, chosen, rejected):
    """Also where each exponent alone overflows, but the loss and its gradient are 0."""
    found = [torch.tensor([float(x)], requires_grad=True) for x in (chosen, rejected)]
    loss = rk.preference_loss(*found, loss="alphapo", alpha=alpha, beta=1.0, gamma=0.0).loss
    wide = [x.detach().double().requires_grad_() for x in found]
    rewards = [(1 - torch.exp(-alpha * x)) / alpha for x in wide]
    exact = -F.logsigmoid(rewards[0] - rewards[1]).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-30)
    for got, right in zip(gradients(loss, found), gradients(exact, wide), strict=True):
        # An exponent carries the rounding of its argument.
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("beta", (1e-46, 1e39, 1e300))
@pytest.mark.parametrize("function", (rk.preference_loss, rk.kto_loss))
def test_a_beta_beyond_fp32_is_refused(function, beta):
    one = torch.zeros(2)
    more = {"desirable": one == 0, "kl": 0.0} if function is rk.kto_loss else {}
    with pytest.raises(ValueError, match="beta must be within float32's range"):
        function(one, one, *([] if more else [one, one]), beta=beta, **more)


def test_alphapo_beyond_the_cut_is_not_flat():
    found = [torch.tensor([x], requires_grad=True) for x in (-60.0, -50.0)]
    loss = rk.preference_loss(*found, loss="alphapo", alpha=2.0, beta=1.0).loss
    chosen, rejected = gradients(loss, found)
    assert 1e34 < loss < math.inf and chosen < -1e34 and 0 < rejected < -chosen


def test_tails_keep_their_slope():
    """Where one minus a number near 1 would be 0."""
    zero = torch.zeros(1)
    for loss, side, sign in (("apo_zero", 0, 1), ("apo_zero", 1, -1), ("exo_pair", 0, -1)):
        for distance in (20.0, -20.0):
            x = torch.full((1,), distance * sign, requires_grad=True)
            given = [zero, zero]
            given[side] = x
            smooth = 0.3 if loss == "exo_pair" else 0.0
            options = {"loss": loss, "beta": 1.0, "label_smoothing": smooth}
            (g,) = gradients(rk.preference_loss(*given, zero, zero, **options).loss, [x])
            wide = x.detach().double().requires_grad_()
            z = wide if side == 0 else -wide
            p, q = sig(z), sig(-z)
            # d/dx of sigmoid(-x) and of the KL, each as a product without a difference to 1.
            term = -p * q if loss == "apo_zero" else p * q * (z - math.log(0.7 / 0.3))
            expected = term if side == 0 else -term
            assert g.item() == pytest.approx(expected.item(), rel=1e-5) and g != 0


def test_orpo_of_certain_answers():
    for certain in (0, 1):
        given = [torch.tensor([-0.5, -0.5], requires_grad=True) for _ in range(2)]
        given[certain] = torch.tensor([0.0, -1e-6], requires_grad=True)
        found = rk.preference_loss(*given, loss="orpo")
        assert found.loss.isfinite() and found.loss >= 0
        assert all(g.isfinite().all() for g in gradients(found.loss, given))


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_nan_stays(loss):
    options = options_of(loss, 0.1 if loss == "exo_pair" else 0.0)
    for i in range(1 if loss == "sft" else len(make_pairs(loss))):
        pairs = [p.detach().clone() for p in make_pairs(loss)]
        pairs[i][2] = math.nan
        assert rk.preference_loss(*pairs, **options).loss.isnan(), i


@pytest.mark.parametrize("loss", AVERAGED)
def test_means_are_taken_as_they_are_given(loss):
    pairs, options = [p.detach() for p in make_pairs(loss)], options_of(loss)
    many = LENGTHS.clamp(min=1)
    means = [p / many[i % 2] for i, p in enumerate(pairs)]
    found = rk.preference_loss(*pairs, **options)
    again = rk.preference_loss(
        *means, **options | {"chosen_lengths": None, "rejected_lengths": None}
    )
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("loss", ("sigmoid", "hinge", "ipo"))
def test_without_a_reference_they_are_cpos(loss):
    pairs = make_pairs("cpo")
    zero = torch.zeros(6)
    found = rk.preference_loss(*pairs, loss=loss)
    assert torch.equal(found.loss, rk.preference_loss(*pairs, zero, zero, loss=loss).loss)
    if loss == "sigmoid":
        assert torch.equal(found.loss, rk.preference_loss(*pairs, loss="cpo").loss)


def test_lists_and_weights():
    pairs = make_pairs("sigmoid")
    lengths = {"chosen_lengths": LENGTHS[0], "rejected_lengths": LENGTHS[1]}
    names, shares = ("sigmoid", "bco_pair", "sft", "ipo"), (0.8, 0.2, 1.5, -0.5)
    whole = rk.preference_loss(*pairs, loss=names, loss_weights=shares, **lengths)
    apart = 0
    for name, share in zip(names, shares, strict=True):
        given = pairs[:2] if name == "sft" else pairs
        apart = apart + share * rk.preference_loss(*given, loss=name, **lengths).loss
    torch.testing.assert_close(whole.loss, apart)
    torch.testing.assert_close(gradients(whole.loss, pairs), gradients(apart, pairs))
    plain = rk.preference_loss(*pairs, loss=list(names), **lengths).loss
    torch.testing.assert_close(
        plain, sum(rk.preference_loss(*(pairs[:2] if n == "sft" else pairs), loss=n, **lengths).loss
                   for n in names))  # fmt: skip
    # The smoothing is of the loss that has it.
    both = rk.preference_loss(*pairs, loss=("bco_pair", "exo_pair"), label_smoothing=0.1).loss
    one = rk.preference_loss(*pairs, loss="exo_pair", label_smoothing=0.1).loss
    torch.testing.assert_close(both, one + rk.preference_loss(*pairs, loss="bco_pair").loss)
    weights = torch.rand(6).bfloat16().requires_grad_()
    for name in set(PREFERENCE_LOSSES) - set(SORTED):
        given = [p.detach().double() for p in make_pairs(name)]
        options = options_of(name, 0.1 if name == "exo_pair" else 0.0)
        found = rk.preference_loss(*given, weights=weights, **options).loss
        assert not found.requires_grad
        terms = written_out(name, *given, *torch.zeros(4 - len(given), 6).double(),
                            s=options["label_smoothing"])  # fmt: skip
        torch.testing.assert_close(found, (terms * weights.detach().double()).mean())


def test_wpo_from_token_logprobs():
    logits = torch.randn(4, 5, 11, dtype=torch.float64)
    labels = torch.randint(0, 11, (4, 5))
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = False
    p = logits.softmax(-1)
    logprobs = p.gather(-1, labels[..., None])[..., 0].log()
    mean = rk.sequence_logprobs(logprobs.float() - p.square().sum(-1).log().float(), mask,
                                average=True)  # fmt: skip
    chosen, rejected = mean.exp().chunk(2)
    expected = [
        math.exp(sum((p[i, t, labels[i, t]] / (p[i, t] ** 2).sum()).log().item()
                     for t in range(5) if mask[i, t]) / int(mask[i].sum()))
        for i in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(chosen * rejected, torch.tensor(
        [expected[0] * expected[2], expected[1] * expected[3]]))  # fmt: skip


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_rewards(loss):
    pairs = make_pairs(loss)
    found = rk.preference_loss(*pairs, **options_of(loss, 0.1 if loss == "exo_pair" else 0.0))
    many = LENGTHS.clamp(min=1) if loss in AVERAGED else torch.ones_like(LENGTHS)
    for i, reward in enumerate(found[1:]):
        x = pairs[i].detach() - (pairs[i + 2].detach() if len(pairs) == 4 else 0)
        x = x / many[i]
        x = (1 - torch.exp(-ALPHA * x)) / ALPHA if loss == "alphapo" else x
        torch.testing.assert_close(reward, BETA * x)
        assert not reward.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kl", (0.0, -1.0, 0.8, "tensor"))
def test_kto(kl, dtype):
    logprobs, ref = ((-8 - 3 * torch.rand(6)).to(dtype).requires_grad_() for _ in range(2))
    desirable = torch.tensor([True, False, True, False, False, True])
    kl = torch.tensor(0.6, requires_grad=True) if kl == "tensor" else kl
    options = {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    found = rk.kto_loss(logprobs, ref, desirable, kl=kl, **options)
    wide = to_float64([logprobs, ref])
    base = max(kl.item() if isinstance(kl, torch.Tensor) else kl, 0.0)
    z = BETA * (wide[0] - wide[1] - base)
    expected = torch.where(desirable, 1.5 * (1 - sig(z)), 0.75 * sig(z)).mean()
    torch.testing.assert_close(found.loss.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.rewards, (BETA * (wide[0] - wide[1]).detach()).float())
    assert found.loss.dtype is torch.float32 and not found.rewards.requires_grad
    plain = gradients(reference.kto_loss(logprobs, ref, desirable, kl=kl, **options)[0],
                      [logprobs, ref])  # fmt: skip
    for g, e, p in zip(gradients(found.loss, [logprobs, ref]), gradients(expected, wide), plain,
                       strict=True):  # fmt: skip
        assert_within_budget(g, e, p)
    if isinstance(kl, torch.Tensor):
        assert torch.autograd.grad(found.loss, kl, allow_unused=True) == (None,)
    assert torch.autograd.gradcheck(
        lambda *p: rk.kto_loss(*p, desirable, kl=0.3, beta=BETA).loss, to_float64([logprobs, ref])
    )


def test_kto_extremes():
    far = torch.tensor([1e4, 20.0, -20.0, -1e4], requires_grad=True)
    zero = torch.zeros(4)
    for wanted in (torch.ones(4, dtype=torch.int32), torch.zeros(4, dtype=torch.bool)):
        loss = rk.kto_loss(far, zero, wanted, kl=0.0, beta=1.0).loss
        (g,) = gradients(loss, [far])
        tail = math.exp(-20.0) / 4
        expected = torch.tensor([0, tail, tail, 0]) * (-1 if wanted[0] else 1)
        torch.testing.assert_close(g, expected, rtol=1e-5, atol=0)
    for given in ((math.nan, 0.0, 0.1), (0.0, math.nan, 0.1), (0.0, 0.0, torch.tensor(math.nan))):
        a, b, kl = given
        found = rk.kto_loss(zero + a, zero + b, zero.bool(), kl=kl)
        assert found.loss.isnan()


def test_ld_dpo():
    mask = torch.rand(4, 12, generator=generator(0)) < 0.8
    mask[3] = False
    logprobs = torch.where(mask, -torch.rand(4, 12), math.nan).requires_grad_()
    counts = mask.sum(-1)
    shared = torch.tensor([3, int(counts[1]), 0, 2])
    for alpha, average in ((0.4, False), (0.0, True), (1.0, False)):
        found = rk.sequence_logprobs(
            logprobs, mask, average=average, shared_lengths=shared, ld_alpha=alpha
        )
        expected, slopes = torch.zeros(4), torch.zeros(4, 12)
        for i in range(4):
            kept = [t for t in range(12) if mask[i, t]]
            for n, t in enumerate(kept):
                weight = (1.0 if n < shared[i] else alpha) / (len(kept) if average else 1)
                expected[i] += weight * logprobs[i, t].item()
                slopes[i, t] = weight
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found.sum(), [logprobs])[0], slopes)
    plain = rk.sequence_logprobs(logprobs, mask)
    assert torch.equal(rk.sequence_logprobs(logprobs, mask, shared_lengths=shared), plain)
    lengths = [12, 0, 5, 1, 0]
    offsets = torch.tensor([0, 12, 12, 17, 18, 18])
    inside = torch.arange(12) < torch.tensor(lengths)[:, None]
    mask, logprobs = torch.rand(5, 12, generator=generator(1)) < 0.7, -torch.rand(5, 12)
    shared = torch.tensor([4, 1, 2, 0, 3])
    for average in (False, True):
        options = {"average": average, "ld_alpha": 0.3, "shared_lengths": shared}
        padded = rk.sequence_logprobs(logprobs, mask & inside, **options)
        packed = rk.sequence_logprobs(logprobs[inside], mask[inside], cu_seqlens=offsets, **options)
        torch.testing.assert_close(packed, padded)
    # As many sequences as tokens, by an empty one.
    three = -torch.tensor([1.0, 2.0, 4.0])
    options = {"shared_lengths": torch.tensor([2, 0, 0]), "cu_seqlens": torch.tensor([0, 2, 2, 3])}
    found = rk.sequence_logprobs(three, three < 0, ld_alpha=0.5, **options)
    assert found.tolist() == [-3.0, 0.0, -2.0]
    # What is left out may be anything.
    logprobs = torch.tensor([[-1.0, -math.inf]])
    options = {"shared_lengths": torch.tensor([1]), "ld_alpha": 0.0}
    assert rk.sequence_logprobs(logprobs, torch.ones(1, 2), **options) == -1


@pytest.mark.parametrize("loss", (("sigmoid", "exo_pair"), "aot", "alphapo", "orpo", "kto"))
def test_compile_without_graph_breaks(loss):
    def step(w, r, ref_w, ref_r, lengths, kl):
        if loss == "kto":
            return rk.kto_loss(w, ref_w, lengths > 2, kl=kl).loss
        refs = () if loss in REFERENCE_FREE else (ref_w, ref_r)
        options = {"chosen_lengths": lengths, "rejected_lengths": lengths}
        if isinstance(loss, tuple):
            options |= {"label_smoothing": 0.1, "f_divergence": "js_divergence"}
        return rk.preference_loss(w, r, *refs, loss=loss, **options).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    for rows in (4, 7):
        inputs = [-torch.rand(rows) - 1 for _ in range(4)]
        inputs += [torch.randint(1, 9, (rows,)), torch.tensor(0.2)]
        assert torch.equal(compiled(*inputs), step(*inputs))


def test_what_contradicts_is_refused_by_name():
    a, n, two = torch.zeros(4), torch.ones(4, dtype=torch.long), {"loss": ["hinge", "bco_pair"]}
    for count, options, message in (
        (4, {"loss": "kto"}, "loss must be one of sigmoid, hinge"),
        (4, {"loss": ()}, "loss must be a name or several"),
        (4, two | {"loss_weights": [1.0]}, "loss_weights must be 2 numbers, one per loss, got 1"),
        (4, two | {"loss_weights": [1.0, math.nan]}, "loss_weights must be finite"),
        (4, {"beta": 0}, "beta"),
        (4, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        (4, two | {"label_smoothing": 0.1}, "label_smoothing must be 0 with loss hinge and bco"),
        (4, {"loss": "exo_pair"}, "label_smoothing must be > 0 with loss exo_pair"),
        (4, {"loss": "bco_pair", "f_divergence": "forward_kl"}, "f_divergence must be reverse_kl"),
        (4, {"f_alpha": 0.7}, "f_alpha must be 0.5 with f_divergence reverse_kl"),
        (4, {"f_divergence": "js"}, "f_divergence must be one of"),
        (4, {"gamma": 1.0}, "gamma must be 0.5 with loss sigmoid"),
        (4, {"alpha": 1.0}, "alpha must be 0.25 with loss sigmoid"),
        (4, {"discopop_tau": 1.0}, "discopop_tau must be 0.05 with loss sigmoid"),
        (4, {"loss": "discopop", "discopop_tau": 0.0}, "discopop_tau"),
        (4, {"loss": "simpo"}, "ref_chosen_logprobs must be None with loss 'simpo'"),
        (2, {"loss": "apo_zero"}, "ref_chosen_logprobs and ref_rejected_logprobs must be given"),
        (3, {}, "ref_rejected_logprobs must be given with ref_chosen_logprobs"),
        (2, {"loss": "sft"}, "chosen_lengths must be given with loss 'sft'"),
        (2, {"loss": "simpo", "chosen_lengths": n}, "rejected_lengths must be given with chosen"),
        (4, {"chosen_lengths": n[:3], "rejected_lengths": n}, "chosen_lengths must have the shape"),
        (4, {"loss": "aot", "weights": a}, "weights must be None with loss 'aot'"),
        (4, {"weights": a[:3]}, "weights must have the shape"),
    ):
        with pytest.raises(ValueError, match=f"^preference_loss: {message}"):
            rk.preference_loss(*[a] * count, **options)
    for options, message in (
        ({"chosen_lengths": a, "rejected_lengths": n}, "chosen_lengths must be bool or integer"),
        (two | {"loss_weights": 0.5}, "loss_weights must be a list of numbers, got float"),
        ({"loss": ["sigmoid", 1]}, "loss must be one of the strings"),
    ):
        with pytest.raises(TypeError, match=f"^preference_loss: {message}"):
            rk.preference_loss(a, a, a, a, **options)
    with pytest.raises(ValueError, match=r"^kto_loss: desirable must have the shape"):
        rk.kto_loss(a, a, n[:2], kl=0.0)
    with pytest.raises(ValueError, match=r"^kto_loss: kl must have the shape of a number"):
        rk.kto_loss(a, a, n, kl=a)
    with pytest.raises(ValueError, match=r"^sequence_logprobs: ld_alpha must be 1 without shared"):
        rk.sequence_logprobs(a[None], n[None], ld_alpha=0.5)
    for shared, error in ((n[:2], ValueError), (a[:1], TypeError)):
        with pytest.raises(error, match=r"^sequence_logprobs: shared_lengths must"):
            rk.sequence_logprobs(a[None], n[None], shared_lengths=shared)
