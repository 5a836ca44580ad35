"""Several labels per token, [..., K], on every backend."""

import math

import pytest
import torch

from tests.ops import logprobs_cases
from tests.ops import row_results_cases as one
from tests.ops.many_labels_cases import check, exact_fields, head, problem, upstreams
from tests.ops.row_results_cases import EVERY, ours, run

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.testing import DTYPES, assert_bitwise_equal

OPTIONS = [
    {"temperature": 0.7},
    {"softcap": 5.0},
    {"softcap": 30.0, "temperature": torch.tensor([0.3, 0.5, 1.0, 1.7, 2.0, 8.0])},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab,count", [(1, 2), (7, 3), (127, 1), (4099, 40), (8200, 3)])
def test_every_result_matches_fp64(backend, vocab, count, dtype):
    check(*problem(5, vocab, dtype, count))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_match_fp64(backend, options):
    check(*problem(6, 4173, torch.float32, 5), **options)


def test_only_log_probabilities(backend):
    """A gradient of these alone, whose kernels are others."""
    logits, labels = problem(5, 300, torch.float32, 4)
    upstream = {"logprobs": upstreams(labels)["logprobs"]}

    def alone(x, y):
        return {"logprobs": rk.token_logprobs(x, y).logprobs}

    found = run(alone, logits, labels, upstream)
    expected = run(exact_fields, logits.double(), labels, upstream)
    for name, a in found.items():
        torch.testing.assert_close(a.double(), expected[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
def test_each_label_has_the_bits_that_it_has_alone(backend, dtype, options):
    logits, labels = problem(6, 8300, dtype, 5)
    together = ours(logits, labels, **options)
    for k in range(labels.shape[1]):
        alone = one.ours(logits, labels[:, k], **options)
        assert_bitwise_equal(together["logprobs"][:, k], alone["logprobs"])
        kept = labels[:, k] >= 0
        for name in EVERY:
            assert_bitwise_equal(together[name][kept], alone[name][kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [("logprobs",), ("logprobs", "entropy"), one.FIELDS], ids=str)
def test_one_label_has_the_gradient_of_labels_without_a_dimension_more(backend, dtype, wanted):
    logits, labels = logprobs_cases.problem(6, 4300, dtype)
    labels[4] = -100
    upstream = {name: u for name, u in one.weights(6).items() if name in wanted}
    options = {"softcap": 5.0, "temperature": 0.7}
    expected = one.run(one.ours, logits, labels, upstream, **options)
    several = upstream | {"logprobs": upstream["logprobs"].unsqueeze(-1)}
    found = run(ours, logits, labels.unsqueeze(-1), several, **options)
    assert_bitwise_equal(found.pop("logprobs").squeeze(-1), expected.pop("logprobs"))
    for name, a in found.items():
        assert_bitwise_equal(a, expected[name])


def test_gradients_of_equal_labels_add_up(backend):
    logits, labels = problem(4, 500, torch.float32, 1)
    labels = torch.tensor([[3], [499], [17], [0]])
    once = run(ours, logits, labels, {"logprobs": torch.full((4, 1), 0.75)})
    pair, other = labels.repeat(1, 2), torch.tensor([[5], [6], [7], [8]])
    twice = run(ours, logits, pair, {"logprobs": torch.tensor([[0.5, 0.25]]).repeat(4, 1)})
    assert_bitwise_equal(twice["gradient"], once["gradient"])
    apart = torch.cat([labels, other, labels], 1)
    upstream = {"logprobs": torch.tensor([[0.5, 0.0, 0.25]]).repeat(4, 1)}
    found = run(ours, logits, apart, upstream)["gradient"]
    torch.testing.assert_close(found, once["gradient"], rtol=1e-6, atol=1e-9)
    upstream = {"logprobs": torch.tensor([[0.5, -0.5]]).repeat(4, 1)}
    assert (run(ours, logits, pair, upstream)["gradient"] == 0).all()


def test_upstream_gradients_that_cancel_stay_at_their_labels(backend):
    """logp_a - logp_b is the difference of two logits."""
    logits = torch.randn(3, 600)
    labels = torch.tensor([[4, 599], [0, 1], [300, 7]])
    found = run(ours, logits, labels, {"logprobs": torch.tensor([[1.0, -1.0]]).repeat(3, 1)})
    expected = torch.zeros(3, 600).scatter(1, labels, torch.tensor([[1.0, -1.0]]).repeat(3, 1))
    torch.testing.assert_close(found["gradient"], expected, rtol=1e-6, atol=1e-7)


def test_a_label_that_is_nearly_certain(backend):
    """1 - p keeps its digits beside a label without weight."""
    logits = torch.zeros(2, 5000)
    logits[:, 17] = 30.0
    labels = torch.tensor([[17, 3], [3, 17]])
    check(logits.requires_grad_(), labels, {"logprobs": torch.tensor([[1.0, 0.0], [0.0, 2.0]])})


def test_masks_ignored_rows_and_what_lies_below_them(backend):
    logits, labels = problem(6, 300, torch.float32, 3)
    mask = torch.tensor([1, 1, 1, 0, 1, 1])
    upstream = upstreams(labels)
    for u in upstream.values():
        u[5] = 0
    clean = run(ours, logits, labels, upstream, mask=mask)
    dirty, bad = logits.detach().clone(), labels.clone()
    dirty[1], dirty[3], dirty[5, 7] = math.nan, math.inf, math.nan
    bad[3] = torch.tensor([10**6, -7, 5])
    upstream["logprobs"] = torch.where(labels < 0, math.nan, upstream["logprobs"])
    temperature = torch.tensor([1.0, math.nan, 1.0, 0.0, 1.0, 1.0])
    found = run(ours, dirty, bad, upstream, mask=mask, temperature=temperature)
    for name, a in found.items():
        assert (a[[1, 3]] == (-1 if name == "argmax" else 0)).all()
        if name == "gradient":
            assert (a[5] == 0).all()
        assert_bitwise_equal(a[[0, 2, 4]], clean[name][[0, 2, 4]])


def test_rows_of_infinities(backend):
    logits, labels = torch.randn(5, 4100), torch.tensor([[0, 4099]] * 5)
    logits[0], logits[1, 2050], logits[2, :4000] = -math.inf, math.inf, -math.inf
    logits[3, 4] = math.nan
    upstream = {"logprobs": torch.ones(5, 2)}
    found = run(ours, logits, labels, upstream)
    expected = logits.log_softmax(-1).gather(-1, labels)
    torch.testing.assert_close(found["logprobs"], expected, equal_nan=True)
    assert found["logprobs"][2, 0] == -math.inf and found["logprobs"][[0, 1, 3]].isnan().all()
    for row in (2, 4):
        slope = -2 * logits[row].softmax(-1)
        slope[[0, 4099]] += 1
        torch.testing.assert_close(found["gradient"][row], slope)


def test_strides_and_rows(backend):
    """The same bits from any layout, alone and among others."""
    store = torch.randn(3, 9, 500)
    labels = torch.randint(0, 413, (3, 8, 3), dtype=torch.int32)
    view = store[:, 1:, 7:420]
    upstream = upstreams(labels)
    expected = run(ours, view.contiguous(), labels, upstream)
    moved = view.transpose(0, 1).contiguous().transpose(0, 1)
    turned = labels.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.full((3, 8, 5), -100, dtype=torch.int32)
    wide[..., 1:4] = labels
    for other in (turned, wide[..., 1:4], labels.transpose(0, 1).contiguous().transpose(0, 1)):
        found = run(ours, moved, other, upstream)
        for name, a in found.items():
            assert_bitwise_equal(a.contiguous(), expected[name])
    part = {k: u[2:, 3:4] for k, u in upstream.items()}
    single = run(ours, view[2:, 3:4].detach(), labels[2:, 3:4], part)
    for name, a in single.items():
        assert_bitwise_equal(a, expected[name][2:, 3:4])


def test_a_token_alone(backend):
    logits, labels = torch.randn(50), torch.tensor([3, 49, -100])
    found = run(ours, logits, labels, {"logprobs": torch.ones(3)})
    rows = run(ours, logits[None], labels[None], {"logprobs": torch.ones(1, 3)})
    for name, a in found.items():
        assert_bitwise_equal(a, rows[name][0])


def test_inplace_backward(backend):
    if backend == "reference":
        pytest.skip("the reference has no inplace_backward")
    logits, labels = problem(6, 500, torch.bfloat16, 4)
    upstream = upstreams(labels)
    expected = run(ours, logits, labels, upstream)

    def inplace(leaf, labels):
        return ours(leaf * 1, labels, inplace_backward=True)

    for name, a in run(inplace, logits, labels, upstream).items():
        assert_bitwise_equal(a, expected[name])


def test_more_labels_than_columns(backend):
    """All ids, each of them twice, as many as a kernel takes in several steps."""
    labels = torch.arange(200).repeat(3, 2).flip(-1)
    check(torch.randn(3, 200).requires_grad_(), labels)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_bad_data(name):
    with rk.use_backend(name):
        refuses_bad_data()


def refuses_bad_data():
    logits, labels = problem(6, 50, torch.float32, 3)
    bad = labels.clone()
    bad[3, 1] = 50
    with pytest.raises(IndexError, match="label at flat position 10 is 50"):
        rk.token_logprobs(logits, bad)
    temperature = torch.tensor([1.0, math.nan, 1.0, 1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="position 4"):
        rk.token_logprobs(logits, labels, temperature=temperature)


def test_a_bad_label_poisons_its_row_on_a_gpu(backend):
    if backend not in ("cuda", "triton"):
        pytest.skip("the other backends raise")
    logits, labels = problem(5, 50, torch.float32, 3)
    labels = labels.clamp(min=0)
    bad = labels.clone()
    bad[3, 1] = 50
    upstream = upstreams(labels)
    clean, found = (run(ours, logits, y, upstream) for y in (labels, bad))
    others = [0, 1, 2, 4]
    for name, a in found.items():
        assert_bitwise_equal(a[others], clean[name][others])
        assert name == "argmax" or a[3].isnan().any()
    assert found["logprobs"][3].isnan().all()


def test_what_is_refused():
    logits = torch.randn(2, 4, 9)
    for shape in ((2, 3, 5), (4, 4, 2), (2, 4, 0), (2, 4, 1, 1), (2,)):
        with pytest.raises(ValueError, match="labels"):
            rk.token_logprobs(logits, torch.zeros(shape, dtype=torch.int64))
    labels = torch.zeros(2, 4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mask must have the shape of labels without K"):
        rk.token_logprobs(logits, labels, torch.ones(2, 4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"temperature must broadcast .* labels without K"):
        rk.token_logprobs(logits, labels, temperature=torch.ones(2, 4, 3))
    support = (torch.arange(9), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="support goes with one label per token"):
        rk.token_logprobs(logits, labels, support=support)
    with pytest.raises(ValueError, match="support goes with one label per token"):
        rk.linear_token_logprobs(logits, torch.randn(5, 9), labels, support=support)
    with pytest.raises(ValueError, match="labels must have the shape of hidden without H"):
        rk.linear_policy_loss(
            logits, torch.randn(5, 9), labels, None, torch.zeros(2, 4), torch.ones(2, 4).bool()
        )


def test_gradcheck_of_the_reference():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 1, 4], [-100, -100, -100], [6, -100, 0]])
    for options in ({}, {"softcap": 5.0, "temperature": 0.7}):

        def every(x, o=options):
            return reference.token_logprobs(x, labels, **EVERY, **o)[:4]

        torch.autograd.gradcheck(every, logits)
        torch.autograd.gradgradcheck(every, logits)


# ---- From hidden states -------------------------------------------------------------------------


def of_head(operands, labels, upstream, **options):
    """The fields and the gradients of the operands."""
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    found = rk.linear_token_logprobs(*leaves[:2], labels, bias=leaves[2], **EVERY, **options)
    fields = {name: getattr(found, name) for name in (*one.FIELDS, "argmax")}
    total = sum((fields[k] * u).sum() for k, u in upstream.items())
    return fields, torch.autograd.grad(total, leaves)


HEAD_OPTIONS = [
    {},
    {"chunk_tokens": 4, "temperature": 0.7},
    {"kept_tokens": 18, "softcap": 3.0},
    {"kept_tokens": 21},
    {"chunk_tokens": 16, "batch_invariant": True},
    {"blocks": 2048},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
def test_a_head_matches_fp64(backend, options, dtype, monkeypatch):
    from rlhf_kernels.head import chunks

    options = dict(options)
    if budget := options.pop("blocks", None):
        # The backward pass on a CPU takes blocks of columns.
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", budget)
    if backend == "reference" and "batch_invariant" in options:
        pytest.skip("the reference has no batch_invariant")
    operands, labels = head(dtype=dtype)
    upstream = upstreams(labels)
    # A token whose upstream gradients are all zero, and one with that of a single label alone.
    for name, u in upstream.items():
        u[7] = 0
        u[8] *= 0 if name != "logprobs" else torch.tensor([0.0, 1.0, 0.0, 0.0])
    fields, gradients = of_head(operands, labels, upstream, **options)
    hidden, weight, bias = leaves = [t.double().requires_grad_() for t in operands]
    given = {k: v for k, v in options.items() if k in ("temperature", "softcap")}
    exact = exact_fields(hidden @ weight.T + bias, labels, **given)
    for name in one.FIELDS:
        torch.testing.assert_close(fields[name].double(), exact[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(fields["argmax"], exact["argmax"])
    total = sum((exact[k] * upstream[k].double()).sum() for k in upstream)
    tolerance = 2e-5 if dtype is torch.float32 else 8 * torch.finfo(dtype).eps
    for a, e in zip(gradients, torch.autograd.grad(total, leaves), strict=True):
        unit = float(e.abs().max())
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance * unit)


def test_a_head_multiplies_once_for_all_labels(monkeypatch):
    from rlhf_kernels.head.products import TiledHead

    rows, project = [], TiledHead.project

    def counted(self, states, *args):
        rows.append(len(states))
        return project(self, states, *args)

    monkeypatch.setattr(TiledHead, "project", counted)
    operands, labels = head(count=40)
    labels[10:] = -100
    with rk.use_backend("cpu"):
        of_head(operands, labels, upstreams(labels))
    # Forward and backward, the kept tokens.
    assert rows == [8, 8]


def test_a_bound_of_kept_tokens_that_is_too_small(monkeypatch):
    """NaN on a GPU."""
    from rlhf_kernels.core import data_checks

    operands, labels = head()
    kept = labels >= 0
    monkeypatch.setattr(data_checks, "can_read_on_host", lambda _: False)
    with rk.use_backend("cpu"):
        fields, _ = of_head(operands, labels, upstreams(labels), kept_tokens=9)
    assert fields["logprobs"][kept].isnan().any() and fields["entropy"].isnan().any()
    assert (fields["logprobs"][~kept] == 0).all()
    lost = fields["entropy"].isnan()
    assert fields["logprobs"][lost][kept[lost]].isnan().all()


def test_compiled():
    """With the size of K fixed, the same bits."""
    logits, labels = problem(6, 300, torch.float32, 4)
    upstream = upstreams(labels)
    with rk.use_backend("cpu"):
        function = torch.compile(ours, fullgraph=True, backend="aot_eager")
        expected, found = (run(f, logits, labels, upstream) for f in (ours, function))
    for name, a in found.items():
        assert_bitwise_equal(a, expected[name])
