"""A vocabulary sharded over process groups: values, gradients, bits, faults, over gloo."""

import pytest
import torch

from tests.head.bounds import HeadBounds, assert_all_within, logprobs_bounds, policy_bounds
from tests.head.head_cases import CONFIGS, operands, policy_bounds_of, policy_problem
from tests.head.shard_ranks import Ranks
from tests.ops import many_labels_cases
from tests.ops.logprobs_cases import check_against_oracle, problem, run_here
from tests.ops.many_labels_cases import head as many_labels_head
from tests.ops.row_results_cases import EVERY, FIELDS
from tests.ops.row_results_cases import check as check_every

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.head import shard
from rlhf_kernels.kernels import backends
from rlhf_kernels.testing import assert_bitwise_equal, to_float64

# Two ranks and three, uneven, with empty shards in each place, and larger than one block.
SIZES = [[7, 50, 1], [31, 100], [0, 58, 0], [4099, 0, 130]]
OPTIONS = [
    {},
    {"temperature": 0.7, "softcap": 5.0},
    {"temperature": torch.tensor([0.3, 0.5, 1.0, 1.7, 2.0, 8.0])},
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Ranks(3, str(tmp_path_factory.mktemp("gloo") / "store"))
    yield processes
    processes.close()


def gathered(found, dims):
    """Results and gradients of the whole: shards joined, all else bit for bit the same."""
    (results, gradients), *others = found
    for other, more in others:
        for a, e in zip(other, results, strict=True):
            assert_bitwise_equal(a, e)
        for name in gradients.keys() - dims.keys():
            assert_bitwise_equal(more[name], gradients[name])
    for name in gradients.keys() & dims.keys():
        gradients[name] = torch.cat([g[name] for _, g in found], dims[name])
    return results, gradients


def on_ranks(ranks, sizes, op, backend, arguments, dims, upstream, **request):
    options = request.pop("options", {})
    request = dict(
        op=op, backend=backend, arguments=arguments, dims=dims, upstream=upstream, options=options,
        **request,
    )  # fmt: skip
    return gathered(ranks(sizes, **request), dims)


def logprobs_on(ranks, sizes, backend, logits, labels, upstream, **options):
    """(logprobs, entropy, gradient) as `run` of test_logprobs gives them."""
    names = options.keys() & {"through", "compiled", "blind", "checked", "penalty"}
    request = {k: options.pop(k) for k in names}
    results, gradients = on_ranks(
        ranks, sizes, "token_logprobs", backend, {"logits": logits, "labels": labels},
        {"logits": -1}, list(upstream), options={"entropy": True, **options}, **request,
    )  # fmt: skip
    return *results, gradients["logits"]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_token_logprobs_match_fp64(backend, ranks, sizes, options):
    def run(logits, labels, upstream, **options):
        return logprobs_on(ranks, sizes, backend, logits, labels, upstream, **options)

    logits, labels = problem(6, sum(sizes), torch.float32)
    # The first and the last label of the vocabulary.
    labels[:2] = torch.tensor([0, sum(sizes) - 1])
    check_against_oracle(logits, labels, run_kernel=run, **options)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
def test_every_result_matches_fp64(backend, ranks, options):
    sizes = [7, 0, 51]

    def run(logits, labels, upstream, **options):
        results, gradients = on_ranks(
            ranks, sizes, "token_logprobs", backend, {"logits": logits, "labels": labels},
            {"logits": -1}, [*upstream.values()], options=EVERY | options,
        )  # fmt: skip
        names = (*FIELDS, "argmax")
        return dict(zip(names, results, strict=True)) | {"gradient": gradients["logits"]}

    logits, labels = problem(6, sum(sizes), torch.float32)
    labels[:2] = torch.tensor([0, sum(sizes) - 1])
    check_every(logits, labels, run_kernel=run, **options)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "temperature": OPTIONS[2]["temperature"]}]
)
def test_several_labels_match_fp64(backend, ranks, options):
    sizes = [7, 0, 51]

    def run(logits, labels, upstream, **options):
        results, gradients = on_ranks(
            ranks, sizes, "token_logprobs", backend, {"logits": logits, "labels": labels},
            {"logits": -1}, [*upstream.values()], options=EVERY | options,
        )  # fmt: skip
        names = (*FIELDS, "argmax")
        return dict(zip(names, results, strict=True)) | {"gradient": gradients["logits"]}

    logits, labels = many_labels_cases.problem(6, sum(sizes), torch.float32, 4)
    labels[3] = torch.tensor([0, sum(sizes) - 1, 6, 7])
    many_labels_cases.check(logits, labels, run_kernel=run, **options)


@pytest.mark.parametrize("request_", [{}, {"budget": 256}, {"blind": True}], ids=str)
def test_several_labels_of_a_head(backend, ranks, request_):
    """Those of every rank, and the gradients, are those of the whole head."""
    sizes = [70, 0, 189]
    (hidden, weight, bias), labels = many_labels_head()
    upstream = [u for u in many_labels_cases.upstreams(labels).values()]
    arguments = {"hidden": hidden, "weight": weight, "bias": bias}
    arguments = {k: t.requires_grad_() for k, t in arguments.items()} | {"labels": labels}
    results, gradients = on_ranks(
        ranks, sizes, "linear_token_logprobs", backend, arguments, {"weight": 0, "bias": 0},
        upstream, options=EVERY, **request_,
    )  # fmt: skip
    with rk.use_backend("reference"):
        expected = rk.linear_token_logprobs(**arguments, **EVERY)
    leaves = [arguments[k] for k in gradients]
    slopes = torch.autograd.grad(expected[:4], leaves, upstream)
    for a, e in zip([*results, *gradients.values()], [*expected, *slopes], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-5 * float(e.detach().abs().max()))


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_the_most_likely_token_is_that_of_the_whole_vocabulary(backend, ranks, chunk_tokens):
    """Of equal logits on two ranks the first; NaN above infinity; a cap hides no difference."""
    sizes, inf, nan = [3, 0, 4], torch.inf, torch.nan
    logits = torch.tensor([
        [0.0, inf, 1.0, 2.0, nan, 0.0, 0.0], [0.0, nan, 1.0, inf, nan, 0.0, 0.0],
        [40.0, 0.0, 0.0, 1.0, 41.0, 0.0, 41.0], [-inf] * 7,
        [-inf] * 3 + [-inf, -1.0, -1.0, -inf], [0.0, 3.0, 1.0, 3.0, 2.0, 0.0, 0.0],
        [5.0, inf, 1.0, inf, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
    ])  # fmt: skip
    expected = [4, 1, 4, 0, 4, 1, 1, -1]
    labels = torch.zeros(len(logits), dtype=torch.int64)
    labels[-1] = -100
    options = {"argmax": True, "softcap": 2.0}
    (_, ids), _ = on_ranks(
        ranks, sizes, "token_logprobs", backend, {"logits": logits, "labels": labels},
        {"logits": -1}, [], options=options,
    )  # fmt: skip
    assert ids.tolist() == expected
    # A product has no place for NaN in one column alone, but the bias has.
    for row, label, place in zip(logits, labels, expected, strict=True):
        head = {"hidden": torch.zeros(6, 2), "weight": torch.zeros(7, 2), "bias": row}
        (_, ids), _ = on_ranks(
            ranks, sizes, "linear_token_logprobs", backend, head | {"labels": label.expand(6)},
            {"weight": 0, "bias": 0}, [], options=options | {"chunk_tokens": chunk_tokens},
        )  # fmt: skip
        assert ids.tolist() == [place] * 6


def test_gradient_penalty_of_the_reference(ranks):
    """Its second derivatives are exact, also those that pass through another rank's shard."""
    sizes = [3, 1, 6]
    logits, labels = problem(6, sum(sizes), torch.float64)
    upstream = [torch.randn(6, dtype=torch.float64) for _ in range(2)]
    leaf = logits.clone().requires_grad_()
    whole = torch.log_softmax(leaf, -1)
    results = [whole.gather(-1, labels[:, None])[:, 0], -(whole.exp() * whole).sum(-1)]
    (found,) = torch.autograd.grad(results, leaf, upstream, create_graph=True)
    (expected,) = torch.autograd.grad(found.square().sum(), leaf)
    assert expected.abs().max() > 0.1
    *_, second = logprobs_on(ranks, sizes, "reference", leaf, labels, upstream, penalty=True)
    torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_match_fp64(backend, ranks, dtype):
    def run(logits, labels, upstream):
        return logprobs_on(ranks, [7, 50, 1], backend, logits, labels, upstream)

    logits, labels = problem(6, 58, dtype)
    check_against_oracle(logits, labels.int(), run_kernel=run)


def test_bits_are_the_same_between_runs_and_in_a_batch(backend, ranks):
    logits, labels = problem(6, 58, torch.float32)
    upstream = torch.randn(2, 6)
    first = logprobs_on(ranks, [7, 50, 1], backend, logits, labels, upstream)
    again = logprobs_on(ranks, [7, 50, 1], backend, logits, labels, upstream)
    alone = logprobs_on(
        ranks, [7, 50, 1], backend, logits[2:3].detach().requires_grad_(), labels[2:3],
        upstream[:, 2:3],
    )  # fmt: skip
    for a, b, c in zip(first, again, alone, strict=True):
        assert_bitwise_equal(a, b)
        assert_bitwise_equal(a[2:3], c)


def test_group_of_one_rank_is_no_group(backend, ranks):
    logits, labels = problem(6, 58, torch.float32)
    upstream = torch.randn(2, 6)
    found = logprobs_on(ranks, [58], backend, logits, labels, upstream)
    for a, e in zip(found, run_here(logits, labels, upstream), strict=True):
        assert_bitwise_equal(a, e)


def test_infinities_nan_and_ignored_tokens_as_without_a_group(backend, ranks):
    logits, labels = problem(12, 58, torch.float32)
    labels[:] = torch.tensor([3, 20, 57, 3, 20, 20, 20, 5, -100, 57, 30, 30])
    with torch.no_grad():
        # Whole shards of -inf, with the label in them or elsewhere; a padded end; a row of -inf.
        logits[0, :7] = logits[1, :7] = logits[2, 57] = -torch.inf
        logits[3, 7:57] = -torch.inf
        logits[4] = -torch.inf
        # NaN in a shard of -inf, NaN in a shard of numbers, +inf, an ignored row of NaN.
        logits[5, :7] = -torch.inf
        logits[5, 2] = torch.nan
        logits[6, 40] = torch.nan
        logits[7, 57] = torch.inf
        logits[8] = torch.nan
        # Shares of a shard that no float holds.
        logits[9, 57], logits[10, 57] = -3e4, 3e4
        logits[11, 7:57] = torch.finfo(torch.float32).min
    upstream = torch.randn(2, 12)
    found = logprobs_on(ranks, [7, 50, 1], backend, logits, labels, upstream)
    expected = run_here(logits, labels, upstream)
    assert not expected[0][:3].isnan().any() and expected[0][9:].isfinite().all()
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert found[0][0] == found[0][2] == -torch.inf and found[0][3].isfinite()
    assert found[0][4:8].isnan().all() and found[2][5, 7:].isnan().all()
    assert found[0][8] == found[1][8] == 0 and (found[2][8] == 0).all()


@pytest.mark.parametrize("kernels", ["cpu", "triton"])
def test_backward_in_place(kernels, ranks):
    logits, labels = problem(6, 58, torch.float32)
    upstream = torch.randn(2, 6)
    apart = logprobs_on(ranks, [7, 50, 1], kernels, logits, labels, upstream, through=1.0)
    inplace = logprobs_on(
        ranks, [7, 50, 1], kernels, logits, labels, upstream, through=1.0, inplace_backward=True
    )
    for a, e in zip(inplace, apart, strict=True):
        assert_bitwise_equal(a, e)


@pytest.mark.parametrize("kernels", ["cpu"])
def test_compiled(kernels, ranks):
    logits, labels = problem(6, 58, torch.float32)
    upstream = torch.randn(2, 6)
    eager = logprobs_on(ranks, [7, 50, 1], kernels, logits, labels, upstream)
    compiled = logprobs_on(ranks, [7, 50, 1], kernels, logits, labels, upstream, compiled=True)
    for a, e in zip(compiled, eager, strict=True):
        assert_bitwise_equal(a, e)


HEAD_DIMS = {"weight": 0, "bias": 0, "ref_weight": 0, "ref_bias": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[30, 1, 100], [0, 131]], ids=str)
@pytest.mark.parametrize("blocks", [False, True], ids=["chunks", "blocks"])
def test_head_matches_fp64(backend, ranks, blocks, sizes, dtype):
    if blocks and backend == "reference":
        pytest.skip("the reference takes all logits at once")
    hidden, weight, bias, labels = operands(dtype)
    labels[:, 3:5] = -100
    upstream = torch.randn(2, *labels.shape)
    upstream[:, 0, 6:9] = 0
    options = {"entropy": True, "temperature": 0.7, "softcap": 9.0, "logit_scale": 0.5}
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}
    results, gradients = on_ranks(
        ranks, sizes, "linear_token_logprobs", backend, arguments, HEAD_DIMS, list(upstream),
        options=options if blocks else {**options, "chunk_tokens": 16},
        # The rank with 100 words takes 64 and 36 of them in its backward pass.
        budget=2000 if blocks else None,
    )  # fmt: skip
    h, w, b = leaves = to_float64((hidden, weight, bias))
    exact = reference.linear_token_logprobs(h, w, labels, bias=b, **options)[:2]
    exact_gradients = torch.autograd.grad(exact, leaves, list(upstream.double()))
    actual = (*results, gradients["hidden"], gradients["weight"], gradients["bias"])
    del options["entropy"]
    head = HeadBounds(hidden, weight, bias, **options)
    # The ranks' parts of the gradient of hidden are summed in fp32, and of the words of a block.
    parts = {"words": min(s for s in sizes if s) if backend != "reference" else None}
    bounds = logprobs_bounds(head, labels, upstream, tokens=None if blocks else 16, **parts)
    assert_all_within(actual, (*exact, *exact_gradients), bounds)
    assert (results[0][:, 3:5] == 0).all()
    assert gradients["hidden"].dtype == dtype and (gradients["hidden"][0, 6:9] == 0).all()


def test_head_with_one_gradient(backend, ranks):
    # A frozen head: no gradient but that of hidden; a frozen trunk: none of hidden, no exchange.
    hidden, weight, _, labels = operands(bias=False)
    labels = labels.int()
    upstream = torch.randn(labels.shape)
    for wanted in ("hidden", "weight"):
        tensors = {"hidden": hidden, "weight": weight}
        tensors = {k: t.detach().clone().requires_grad_(k == wanted) for k, t in tensors.items()}
        _, gradients = on_ranks(
            ranks, [30, 1, 100], "linear_token_logprobs", backend, {**tensors, "labels": labels},
            HEAD_DIMS, [upstream],
        )  # fmt: skip
        assert set(gradients) == {wanted}
        leaf = to_float64(tensors)
        logprobs = reference.linear_token_logprobs(**leaf, labels=labels)[0]
        exact = torch.autograd.grad(logprobs, leaf[wanted], upstream.double())
        bounds = logprobs_bounds(HeadBounds(hidden, weight), labels, (upstream, torch.zeros(())))
        assert_all_within((gradients[wanted],), exact, [bounds[2 if wanted == "hidden" else 3]])


POLICY = ("ppo, every term", "grpo", "gspo", "sequence correction")


@pytest.mark.parametrize("name", POLICY)
def test_policy_loss_matches_fp64(backend, ranks, name):
    leaves, tokens, constants = policy_problem()
    options = {"config": CONFIGS[name], "temperature": 0.8}
    arguments = dict(zip(("hidden", "weight", "bias"), leaves, strict=True))
    names = ("labels", "old_logprobs", "advantages", "mask")
    arguments |= dict(zip(names, tokens, strict=True)) | constants
    results, gradients = on_ranks(
        ranks, [30, 1, 100], "linear_policy_loss", backend, arguments, HEAD_DIMS,
        [torch.tensor(2.0)], options={**options, "chunk_tokens": 16},
    )  # fmt: skip
    exact = to_float64(arguments)
    loss, metrics = reference.linear_policy_loss(**exact, **options)
    wanted = ("hidden", "weight", "bias")
    exact_gradients = torch.autograd.grad(2.0 * loss, [exact[k] for k in wanted])
    actual = (*results, *(gradients[k] for k in wanted))
    bounds = policy_bounds_of(leaves, tokens, constants, upstream=2.0, config=CONFIGS[name])
    assert_all_within(actual, (loss, metrics, *exact_gradients), bounds)


def test_policy_loss_with_reference_head(backend, ranks):
    # bf16, the default chunk, an empty shard, a reference policy whose head is sharded too.
    leaves, tokens, _ = policy_problem(torch.bfloat16)
    ref_hidden, ref_weight, ref_bias, _ = operands(torch.bfloat16, width=12, seed=1)
    arguments = dict(zip(("hidden", "weight", "bias"), leaves, strict=True))
    arguments |= dict(zip(("labels", "old_logprobs", "advantages", "mask"), tokens, strict=True))
    theirs = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    arguments |= {k: t.detach() for k, t in theirs.items()}
    options = {"config": rk.PolicyLossConfig.grpo(kl_coef=0.1)}
    results, gradients = on_ranks(
        ranks, [100, 0, 31], "linear_policy_loss", backend, arguments, HEAD_DIMS,
        [torch.tensor(1.0)], options=options,
    )  # fmt: skip
    exact = to_float64(arguments)
    head = {k: exact.pop(k) for k in theirs}
    labels = tokens[0].masked_fill(~tokens[3], -100)
    ref = reference.linear_token_logprobs(*list(head.values())[:2], labels, bias=head["ref_bias"])
    constants = {"ref_logprobs": ref[0].detach()}
    loss, metrics = reference.linear_policy_loss(**exact, **constants, **options)
    wanted = ("hidden", "weight", "bias")
    exact_gradients = torch.autograd.grad(loss, [exact[k] for k in wanted])
    actual = (*results, *(gradients[k] for k in wanted))
    ref_error = HeadBounds(*theirs.values()).logprobs(labels)
    bounds = policy_bounds(
        HeadBounds(*leaves), tokens, constants, ref_error=ref_error, words_of_block=31, **options
    )
    assert_all_within(actual, (loss, metrics, *exact_gradients), bounds)


def bad(ranks, op, sizes, backend, arguments, replaced, dims, **options):
    """(type, message) of the error on each rank, where rank 1 alone has `replaced`."""
    answers = ranks.answers(
        len(sizes), op=op, backend=backend, arguments=arguments, dims=dims, sizes=sizes,
        upstream=[], options=options, only_rank={1: replaced},
    )  # fmt: skip
    assert not any(good for good, _ in answers), answers
    return [(type(error), str(error)) for _, error in answers]


def test_bad_data_on_one_rank_raises_on_all(backend, ranks):
    logits, labels = problem(4, 58, torch.float32)
    arguments = {"logits": logits, "labels": labels, "temperature": torch.ones(4)}

    def errors(**replaced):
        return bad(
            ranks, "token_logprobs", [7, 50, 1], backend, arguments, replaced, {"logits": -1}
        )

    for label in (58, -1):
        wrong = labels.clone()
        wrong[2] = label
        found = errors(labels=wrong)
        assert [e for e, _ in found] == [IndexError] * 3, found
        assert all(f"position 2 on rank 1 is {label}" in m and "< 58" in m for _, m in found)
    found = errors(temperature=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert [e for e, _ in found] == [ValueError] * 3
    assert all("temperature at flat position 1 on rank 1" in m for _, m in found)
    found = errors(labels=labels.roll(1))
    assert [e for e, _ in found] == [ValueError] * 3
    assert all("labels must be the same on every rank" in m for _, m in found)
    # The ranks are still in step.
    good = logprobs_on(ranks, [7, 50, 1], backend, logits, labels, torch.ones(2, 4))
    assert good[0].isfinite().all()


def test_bad_label_in_the_head_raises_on_all(backend, ranks):
    leaves, tokens, _ = policy_problem()
    labels, old, advantages, mask = tokens
    arguments = dict(zip(("hidden", "weight", "bias"), leaves, strict=True)) | {"labels": labels}
    wrong = labels.clone()
    wrong[mask] = 131
    # Under the mask nothing is looked at, whichever rank has it.
    under = labels.clone()
    under[~mask] = 10**6
    more = {"old_logprobs": old, "advantages": advantages, "mask": mask}
    config = rk.PolicyLossConfig.ppo()
    calls = {
        "linear_token_logprobs": (arguments, {"ignore_index": -7}),
        "linear_policy_loss": (arguments | more, {"config": config}),
    }
    for op, (given, options) in calls.items():
        args = (ranks, op, [30, 1, 100], backend, given)
        found = bad(*args, {"labels": wrong}, HEAD_DIMS, **options)
        assert [e for e, _ in found] == [IndexError] * 3, found
        assert all(op in m and "on rank 1 is 131" in m for _, m in found)
    on_ranks(
        ranks, [30, 1, 100], "linear_policy_loss", backend, arguments | more, HEAD_DIMS, [],
        options={"config": config}, only_rank={1: {"labels": under}},
    )  # fmt: skip


@pytest.mark.parametrize("kernels", ["triton"])
def test_bad_data_poisons_where_it_may_not_be_looked_at(kernels, ranks):
    logits, labels = problem(4, 58, torch.float32)
    upstream = torch.randn(2, 4)
    clean = logprobs_on(ranks, [7, 50, 1], kernels, logits, labels, upstream)
    checked = logprobs_on(ranks, [7, 50, 1], kernels, logits, labels, upstream, checked=True)
    for a, e in zip(checked, clean, strict=True):
        assert_bitwise_equal(a, e)
    labels[1], labels[3] = 58, -1
    found = logprobs_on(ranks, [7, 50, 1], kernels, logits, labels, upstream, blind=True)
    for a, e in zip(found, clean, strict=True):
        assert a[[1, 3]].isnan().all()
        assert_bitwise_equal(a[[0, 2]], e[[0, 2]])


def test_group_is_checked():
    logits, labels = problem(4, 58, torch.float32)
    for group in ("world", -100):
        with pytest.raises(TypeError, match="group must be a torch"):
            rk.token_logprobs(logits, labels, group=group)
    with pytest.raises(ValueError, match="V >= 1"):
        rk.token_logprobs(logits[:, :0], labels)


def test_kernels_of_a_group_are_made_once():
    kernels = backends.get("cpu").kernels
    first = shard.kernels_of(kernels.rows, kernels.memory, "0")
    again = backends.get("cpu").kernels
    assert shard.kernels_of(again.rows, again.memory, "0") is first
    assert shard.kernels_of(again.rows, again.memory, "1") is not first
