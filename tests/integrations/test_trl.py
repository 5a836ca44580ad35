"""TRL with patch(): every trainer computes the same losses, gradients and metrics as without.

The trainers run whole, on a small model with random weights. Between two runs of the same seed the
first step differs by rounding and the next by what the optimizer makes of it; BUDGET holds both.
"""

import importlib.util
import sys

import pytest
import torch

# Not importorskip: an import that fails where TRL is installed must show.
if importlib.util.find_spec("trl") is None:
    pytest.skip("needs trl (the extra 'parity')", allow_module_level=True)

from trl.trainer import utils

from benchmarks.studies import trl_runs
from rlhf_kernels.integrations import _common, _patch, trl

# Relative to the largest of a run's figures; fp32.
BUDGET = 1e-4
SIZES = trl_runs.Sizes()
HEAD = "_ChunkedLogProbFunction"
UNPATCHED = {
    name: getattr(utils, name)
    for name in (HEAD, "_use_triton", "selective_log_softmax", "entropy_from_logits")
}


@pytest.fixture(autouse=True)
def _leave_unpatched():
    yield
    trl.unpatch()
    trl._INTEGRATION.reset_counts()
    for name, original in UNPATCHED.items():
        assert getattr(utils, name) is original


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    trl_runs.save_models(folder, SIZES)
    return folder


def close(ours, theirs, tolerance, scale=0.0):
    scale = max(scale, *(abs(x) for x in theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) <= tolerance * scale, (ours, theirs)


@pytest.mark.parametrize("name", trl_runs.RUNS)
def test_trains_the_same(models, name):
    theirs = trl_runs.run(name, models, SIZES)
    with trl.patched():
        ours = trl_runs.run(name, models, SIZES)
    report = trl.report()
    if name == "Reward":
        # A classifier: it has no head, and its loss is written inside the trainer.
        assert not report.served
    else:
        assert report.served[HEAD] >= SIZES.steps and not report.fallbacks
    assert len(ours.losses) == len(ours.grad_norms) == SIZES.steps
    # A GRPO loss is a difference of terms about as large as 1.
    close(ours.losses, theirs.losses, BUDGET, scale=1.0)
    close(ours.grad_norms, theirs.grad_norms, BUDGET)
    assert min(ours.grad_norms) > 1e-3 and len(set(ours.losses)) > 1
    assert ours.metrics.keys() == theirs.metrics.keys()
    for key, value in theirs.metrics.items():
        if key != "step_time":
            close([ours.metrics[key]], [value], BUDGET, scale=1.0)


def test_bfloat16(models):
    """bfloat16 autocast: TRL rounds logits to 8 bits, so that only such digits can agree."""
    theirs = trl_runs.run("SFT", models, SIZES, bf16=True)
    with trl.patched():
        ours = trl_runs.run("SFT", models, SIZES, bf16=True)
    assert trl.report().served[HEAD] == SIZES.steps
    close(ours.losses, theirs.losses, 2**-8)
    close(ours.grad_norms, theirs.grad_norms, 2**-6)


def head_inputs(dtype, *, bias=True, scale=1.0):
    g = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(23, 16, generator=g)
    weight = torch.randn(97, 16, generator=g)
    targets = torch.randint(97, (23,), generator=g)
    # Labels that are the likeliest word, and not.
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]
    b = torch.randn(97, generator=g) if bias else None
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, b)]
    return *leaves, targets


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("scale", (0.1, 1.0))
def test_head(softcap, scale):
    """All outputs of the head and its gradients, against TRL's in fp32."""
    results = []
    for patched in (False, True):
        if patched:
            trl.patch()
        leaves = head_inputs(torch.float32, scale=scale)
        out = utils._ChunkedLogProbFunction.apply(*leaves, 0.7, 32, softcap, 1.5, OUTPUTS)
        weights = torch.linspace(-1, 1, 23)
        (out[0] @ weights + (out[1] * weights.flip(0)).sum()).backward()
        results.append((*out, *(t.grad for t in leaves[:3])))
    assert 0 < results[0][4].sum() < 23
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert trl.report().served == {HEAD: 1}


def test_head_without_rows():
    """A micro-batch without a label still gives gradients, of zero."""
    trl.patch()
    hidden, weight, bias, targets = head_inputs(torch.float32)
    out = utils._ChunkedLogProbFunction.apply(
        hidden[:0], weight, bias, targets[:0], 1.0, 32, None, 1.0, OUTPUTS
    )
    assert all(t.shape == (0,) for t in out)
    out[0].sum().backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_older_heads(monkeypatch):
    """The layouts of TRL 1.4 to 1.12 (no bias) and of 1.13 and 1.14 (no outputs)."""

    class NoBias(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, last_hidden, weight, targets, temperature, chunk_size,
            final_logit_softcapping=None, logit_scale=1.0,
        ):  # fmt: skip
            raise AssertionError("TRL's own was called")

    class NoOutputs(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, last_hidden, weight, bias, targets, temperature, chunk_size,
            final_logit_softcapping=None, logit_scale=1.0,
        ):  # fmt: skip
            raise AssertionError("TRL's own was called")

    hidden, weight, bias, targets = head_inputs(torch.float32)
    for kind, args, b in ((NoBias, (), None), (NoOutputs, (bias,), bias)):
        expected = UNPATCHED[HEAD].apply(hidden, weight, b, targets, 0.7, 32, 5.0, 1.0, OUTPUTS)
        monkeypatch.setattr(utils, HEAD, kind)
        with trl.patched():
            found = getattr(utils, HEAD).apply(hidden, weight, *args, targets, 0.7, 32, 5.0)
        assert getattr(utils, HEAD) is kind
        monkeypatch.undo()
        assert len(found) == 2
        for ours, theirs in zip(found, expected[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_logits(dtype):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, 67, generator=g)).to(dtype)
    index = torch.randint(67, (3, 5), generator=g)
    mask = torch.rand(3, 5, generator=g) > 0.4
    several = torch.randint(67, (3, 5, 2), generator=g)

    def run():
        x = logits.clone().requires_grad_()
        lp, h = utils.selective_log_softmax_and_entropy(x, index, temperature=0.6, row_mask=mask)
        results = [lp, h, utils.selective_log_softmax(x, index), utils.entropy_from_logits(x)]
        results.append(utils.selective_log_softmax(x, several))
        results.append(torch.autograd.grad(sum(r.float().sum() for r in results), x)[0])
        constant = utils.selective_log_softmax_and_entropy(x, index, entropy_requires_grad=False)[1]
        assert not constant.requires_grad
        return results

    theirs = run()
    with trl.patched():
        ours = run()
    tolerance = 2e-5 if dtype == torch.float32 else 2**-4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)
    # TRL's results have the dtype of the logits on CPU.
    assert {r.dtype for r in ours[:4]} == {torch.float32}
    assert ours[4].dtype == dtype
    report = trl.report()
    assert report.fallbacks == {
        "selective_log_softmax": {"labels of another shape than the logits' rows": 1}
    }
    assert report.served["selective_log_softmax_and_entropy"] == 2


@pytest.mark.parametrize(
    "reason, change",
    (
        ("float64 hidden states", {"dtype": torch.float64}),
        ("logit_scale 0.0", {"logit_scale": 0.0}),
        ("no kernels for cpu tensors", {"kernels": False}),
    ),
)
def test_calls_that_fall_back(reason, change, monkeypatch):
    trl.patch()
    monkeypatch.setattr(_common, "_has_kernels", lambda _: change.get("kernels", True))
    leaves = head_inputs(change.get("dtype", torch.float32))
    scale = change.get("logit_scale", 1.0)
    out = utils._ChunkedLogProbFunction.apply(*leaves, 1.0, 32, None, scale, ("log_probs",))
    assert out[0].shape == (23,) and (out[0] < 0).all()
    (found,) = trl.report().fallbacks[HEAD]
    assert reason in found and "fell back" in str(trl.report())


def test_patch_is_idempotent_and_reversible():
    before = trl.report()
    assert not before.active and f"{utils.__name__}.{HEAD}" in before.available
    first = trl.patch()
    ours = {name: getattr(utils, name) for name in UNPATCHED}
    assert not set(ours.values()) & set(UNPATCHED.values())
    assert trl.patch() == first and {n: getattr(utils, n) for n in ours} == ours
    with trl.patched():
        assert getattr(utils, HEAD) is ours[HEAD]
    # The context found it patched, so it left it so.
    assert trl.report().active and set(first.replaced) == set(before.available)
    after = trl.unpatch()
    assert not after.active and not after.replaced and not after.kept


def test_names_that_others_imported():
    """Where a module of TRL imported the name, under any name, ours is there; and it goes again."""
    module = type(sys)("trl.a_module")
    module.imported_before = utils.entropy_from_logits
    sys.modules[module.__name__] = module
    try:
        trl.patch()
        assert module.imported_before is utils.entropy_from_logits
        module.imported_after = ours = utils.entropy_from_logits
        trl.unpatch()
        assert module.imported_after is module.imported_before is UNPATCHED["entropy_from_logits"]
    finally:
        del sys.modules[module.__name__]
    # References to our function that outlive the patch call TRL's function again.
    logits = torch.randn(2, 9, dtype=torch.bfloat16)
    assert ours(logits).dtype == torch.bfloat16 and not trl.report().served


def test_what_replaced_ours_stays():
    def of_another(logits):
        return logits

    trl.patch()
    utils.entropy_from_logits = of_another
    try:
        report = trl.unpatch()
        assert utils.entropy_from_logits is of_another
    finally:
        utils.entropy_from_logits = UNPATCHED["entropy_from_logits"]
    assert report.kept == ("trl.trainer.utils.entropy_from_logits",)
    assert "replaced again" in str(report)


def test_unknown_signatures_and_versions_are_refused(monkeypatch):
    def selective_log_softmax(logits, index, top_k):
        return logits

    monkeypatch.setattr(utils, "selective_log_softmax", selective_log_softmax)
    with pytest.raises(trl.IncompatibleError, match=r"parameters are \(logits, index, top_k\)"):
        trl.patch()
    assert getattr(utils, HEAD) is UNPATCHED[HEAD] and not trl.report().active
    monkeypatch.delattr(utils, "selective_log_softmax")
    with pytest.raises(trl.IncompatibleError, match="selective_log_softmax is not in this version"):
        trl.patch()
    monkeypatch.undo()
    for version in ("0.29.1", "2.0.0"):
        monkeypatch.setattr(_patch.importlib.metadata, "version", lambda _, v=version: v)
        with pytest.raises(trl.IncompatibleError, match=f"trl {version}: .* from 1.0 to below 2.0"):
            trl.patch()
