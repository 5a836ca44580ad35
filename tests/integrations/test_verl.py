"""verl with patch(): its own functions as its trainer and workers call them, before and after.

Masks have gaps inside rows and one row that is wholly masked. What verl leaves at masked positions
(carried values, whitened garbage) is never read; ours is 0 there.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Not importorskip: an import that fails where verl is installed must show.
if importlib.util.find_spec("verl") is None:
    pytest.skip("needs verl, which `make test` installs", allow_module_level=True)

import numpy as np
import torch
import verl.utils.torch_functional as verl_F
from verl.trainer.ppo import core_algos
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.utils import losses

from tests.parity.comparison import FP32, close, with_gradients
from tests.parity.verl_cases import (
    AGGREGATIONS,
    DP_SIZE,
    GLOBAL_BATCH,
    GLOBAL_TOKENS,
    actor_loss,
    outcome,
)
from tests.run_python import run_python
from tools.policy_batches import make_batch

from rlhf_kernels.integrations import _common, verl
from rlhf_kernels.testing import random_mask

ROOT = Path(__file__).parents[2]
MODES = ("vanilla", "gspo", "sapo", "cispo", "gpg")
UNPATCHED = {
    "gae": core_algos.compute_gae_advantage_return,
    "logprobs": verl_F.logprobs_from_logits,
    "forward": FusedLinearForPPO.forward,
    "policy": dict(core_algos.POLICY_LOSS_REGISTRY),
    "advantages": dict(core_algos.ADV_ESTIMATOR_REGISTRY),
    "value": losses.compute_value_loss,
}


def current():
    return {
        "gae": core_algos.compute_gae_advantage_return,
        "logprobs": verl_F.logprobs_from_logits,
        "forward": FusedLinearForPPO.forward,
        "policy": core_algos.POLICY_LOSS_REGISTRY,
        "advantages": core_algos.ADV_ESTIMATOR_REGISTRY,
        "value": losses.compute_value_loss,
    }


@pytest.fixture(autouse=True)
def _leave_unpatched():
    yield
    verl.unpatch()
    verl._INTEGRATION.reset_counts()
    assert current() == UNPATCHED


def same_where_kept(ours, theirs, mask, tolerance=FP32):
    mask = mask.bool()
    close(ours[mask], theirs[mask], tolerance)
    assert theirs[mask].abs().max() > 0.1


@pytest.mark.parametrize(("gamma", "lam"), ((1.0, 1.0), (0.99, 0.95), (0.9, 0.0)))
def test_gae(gamma, lam):
    rewards, values = torch.randn(2, 6, 37)
    mask = random_mask(6, 37).long()
    args = rewards, values, mask, gamma, lam
    theirs = core_algos.compute_gae_advantage_return(*(x.double() for x in args[:3]), gamma, lam)
    with verl.patched():
        ours = core_algos.compute_gae_advantage_return(*args)
        tensors = core_algos.compute_gae_advantage_return(
            *args[:3], torch.tensor(gamma), torch.tensor(lam)
        )
    for a, b, c in zip(ours, theirs, tensors, strict=True):
        same_where_kept(a, b, mask)
        same_where_kept(c, b, mask)
        assert (a[mask == 0] == 0).all()
    assert verl.report().served == {"compute_gae_advantage_return": 2}


ESTIMATORS = (
    ("grpo", {}),
    ("grpo", {"norm_adv_by_std_in_grpo": False}),
    ("rloo", {}),
    ("reinforce_plus_plus_baseline", {}),
    ("reinforce_plus_plus", {}),
)


@pytest.mark.parametrize(("name", "options"), ESTIMATORS)
@pytest.mark.parametrize("alone", (False, True))
def test_estimators(name, options, alone):
    """Through verl's registry; groups of one also as verl has them."""
    rewards, _, mask, ids, _ = outcome()
    if alone:
        # The last row's mask is empty, so not that.
        ids = torch.where(torch.arange(len(ids)) == 1, 99, ids)
    index = np.array([f"prompt-{i}" for i in ids], dtype=object)
    mask = mask.long()
    if name == "reinforce_plus_plus":
        rewards = torch.randn(mask.shape)
        options = {"config": core_algos.AlgoConfig(gamma=0.9)}

    def run():
        function = core_algos.get_adv_estimator_fn(name)
        return function(
            token_level_rewards=rewards.clone(), response_mask=mask, index=index, **options
        )

    theirs = run()
    with verl.patched():
        ours = run()
    assert sum(verl.report().served.values()) == 1 and not verl.report().fallbacks
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        # verl's statistics of a group are fp32.
        same_where_kept(a, b, mask, 1e-5)
        assert (a[mask == 0] == 0).all()


def compare_actor(loss_mode, ours_mode, batch, **options):
    theirs = actor_loss(batch, loss_mode, **options)
    with verl.patched(losses=ours_mode == loss_mode):
        ours = actor_loss(batch, ours_mode, **options)
    a, b = with_gradients(ours[0], batch), with_gradients(theirs[0], batch)
    # A loss is a sum of terms about as large as its slopes.
    close(a[0], b[0], 2 * FP32, scale=float(b[1].abs().sum()))
    close(a[1], b[1], 4 * FP32)
    close(a[2], b[2], FP32)
    assert (b[1] != 0).sum() > 10
    assert ours[1].keys() == theirs[1].keys()
    for key, value in theirs[1].items():
        close(ours[1][key], value, 10 * FP32, scale=0.1)


@pytest.mark.parametrize("replace", (False, True))
@pytest.mark.parametrize("loss_mode", MODES)
def test_policy_losses(loss_mode, replace):
    """The whole of verl's ppo_loss, with rk_* by name and with verl's own names replaced."""
    for i, loss_agg_mode in enumerate(AGGREGATIONS):
        # Each aggregation both ways, once by name and once in the place of verl's.
        distributed = (i + replace) % 2 == 0
        batch = make_batch(seed=i)
        weights = None
        if i % 2:
            weights = torch.exp(batch.old - batch.rollout).clamp(max=1.25)
        compare_actor(
            loss_mode,
            loss_mode if replace else f"rk_{loss_mode}",
            batch,
            distributed=distributed,
            weights=weights,
            loss_agg_mode=loss_agg_mode,
            clip_ratio_low=0.2,
            clip_ratio_high=0.28,
            clip_ratio_c=1.75,
            tau_neg=1.5,
            entropy_coeff=0.05,
            use_kl_loss=True,
            kl_loss_coef=0.3,
        )
    served = verl.report().served
    assert sum(served.values()) == len(AGGREGATIONS) and not verl.report().fallbacks


def test_weights_of_zero():
    """IcePop's: such a token has no loss and no gradient; here it is no clipped token either."""
    batch = make_batch()
    weights = (torch.rand(batch.mask.shape) > 0.3).float()
    theirs = actor_loss(batch, "vanilla", distributed=False, weights=weights)[0]
    with verl.patched():
        ours = actor_loss(batch, "rk_vanilla", distributed=False, weights=weights)[0]
    a, b = with_gradients(ours, batch), with_gradients(theirs, batch)
    close(a[0], b[0], 2 * FP32, scale=float(b[1].abs().sum()))
    close(a[1], b[1], 4 * FP32)
    assert (a[1][weights == 0] == 0).all()


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize("distributed", (False, True))
def test_value_loss(loss_agg_mode, distributed):
    mask = random_mask(5, 13).long()
    old, returns = torch.randn(2, 5, 13)
    info = {"loss_scale_factor": 24}
    if distributed:
        info |= {
            "dp_size": DP_SIZE,
            "batch_num_tokens": GLOBAL_TOKENS,
            "global_batch_size": GLOBAL_BATCH,
        }
    values = (old + torch.randn(5, 13)).requires_grad_()

    def run():
        loss, fraction = losses.compute_value_loss(
            vpreds=values,
            returns=returns,
            values=old,
            response_mask=mask,
            cliprange_value=0.5,
            loss_agg_mode=loss_agg_mode,
            **info,
        )
        return loss, fraction, torch.autograd.grad(loss, values)[0]

    theirs = run()
    with verl.patched(losses=True):
        ours = run()
    assert 0.05 < theirs[1] < 0.95
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 2 * FP32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_logits(dtype):
    logits = (3 * torch.randn(23, 67)).to(dtype)
    labels = torch.randint(67, (23,))

    def run():
        x = logits.clone().requires_grad_()
        results = [
            verl_F.logprobs_from_logits(x, labels),
            verl_F.entropy_from_logits(x),
            verl_F.entropy_from_logits_with_chunking(x, chunk_size=5),
        ]
        gradient = torch.autograd.grad(sum(r.float().sum() for r in results), x)[0]
        return *results, gradient

    theirs = run()
    with verl.patched():
        ours = run()
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-5 if dtype == torch.float32 else 2**-5)
    # verl's have the dtype of the logits on CPU.
    assert {r.dtype for r in ours[:3]} == {torch.float32}


def test_engines_bind_ours():
    """A module that imported the name from verl has ours, and verl's again."""
    engine = type(sys)("verl.an_engine")
    engine.logprobs_from_logits = verl_F.logprobs_from_logits
    sys.modules[engine.__name__] = engine
    try:
        with verl.patched():
            assert engine.logprobs_from_logits is verl_F.logprobs_from_logits
            assert engine.logprobs_from_logits is not UNPATCHED["logprobs"]
        assert engine.logprobs_from_logits is UNPATCHED["logprobs"]
    finally:
        del sys.modules[engine.__name__]


def test_compiles():
    """verl compiles its entropy function when a worker starts."""
    logits = torch.randn(23, 67)
    expected = verl_F.entropy_from_logits(logits)
    with verl.patched():
        compiled = torch.compile(verl_F.entropy_from_logits, dynamic=True, backend="aot_eager")
        close(compiled(logits), expected, 1e-5)
        close(compiled(torch.cat([logits, logits])), expected.repeat(2), 1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ((31,), (3, 11)))
def test_fused_linear(shape, dtype):
    hidden = torch.randn(*shape, 16).to(dtype)
    weight = torch.randn(131, 16).to(dtype)
    labels = torch.randint(131, shape)
    weights = torch.linspace(-1, 1, labels.numel()).view(shape)

    def run():
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        head = FusedLinearForPPO(chunk_size=8)
        logprobs, entropy = head(h, w, labels.int(), temperature=0.7)
        # verl's backward multiplies in 2 dimensions.
        loss = (logprobs * weights).sum() + (entropy * weights.flip(0)).float().sum()
        return logprobs, entropy, *torch.autograd.grad(loss, (h, w))

    theirs = run()
    with verl.patched():
        ours = run()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        close(a, b, tolerance)
    assert verl.report().served == {"FusedLinearForPPO.forward": 1}


def test_fused_linear_under_autocast():
    """fp32 parameters, bfloat16 products; the gradients are fp32 again."""
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(31, 16, requires_grad=True)
    labels = torch.randint(31, (9,))
    with verl.patched(), torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = FusedLinearForPPO()(hidden, weight, labels)
    exact = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    close(logprobs, exact, 2**-6)
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    for a, b in zip(gradients, torch.autograd.grad(exact.sum(), (hidden, weight)), strict=True):
        assert a.dtype == torch.float32
        close(a, b, 2**-5)


def test_calls_that_fall_back(monkeypatch):
    rewards, values = torch.randn(2, 3, 5)
    mask = torch.ones(3, 5)
    verl.patch()
    gae = core_algos.compute_gae_advantage_return
    theirs = UNPATCHED["gae"](rewards, values, mask, 0.9, 0.9)
    for a, b in zip(gae(rewards, values, mask, 0.9, 0.9), theirs, strict=True):
        assert torch.equal(a, b)
    gae(rewards.double(), values.double(), mask.long(), 0.9, 0.9)
    with pytest.raises(AssertionError):
        core_algos.get_policy_loss_fn("rk_vanilla")(rewards, values, rewards, mask.long())
    monkeypatch.setattr(_common, "_has_kernels", lambda device_type: False)
    verl_F.entropy_from_logits(rewards)
    assert verl.report().fallbacks == {
        "compute_gae_advantage_return": {"a mask of weights": 1, "torch.float64 rewards": 1},
        "rk_vanilla": {"no config": 1},
        "entropy_from_logits": {"no kernels for cpu tensors": 1},
    }


def test_patch_is_idempotent_and_reversible():
    first = verl.patch()
    assert verl.patch().replaced == first.replaced and len(first.replaced) == 9 + len(MODES)
    assert set(core_algos.POLICY_LOSS_REGISTRY) - set(UNPATCHED["policy"]) == {
        f"rk_{mode}" for mode in MODES
    }
    # The registry of estimators holds ours too.
    gae = core_algos.ADV_ESTIMATOR_REGISTRY["gae"]
    assert gae is core_algos.compute_gae_advantage_return is not UNPATCHED["gae"]
    assert core_algos.get_policy_loss_fn("vanilla") is UNPATCHED["policy"]["vanilla"]
    more = verl.patch(losses=True)
    assert set(more.replaced) > set(first.replaced) and not more.available
    assert core_algos.get_policy_loss_fn("vanilla") is not UNPATCHED["policy"]["vanilla"]
    assert losses.compute_value_loss is not UNPATCHED["value"]
    assert not verl.unpatch().replaced


def test_unknown_signatures_are_refused(monkeypatch):
    monkeypatch.setattr(core_algos, "compute_gae_advantage_return", lambda rewards, values: None)
    with pytest.raises(verl.IncompatibleError, match=r"parameters are \(rewards, values\)"):
        verl.patch()
    assert verl_F.logprobs_from_logits is UNPATCHED["logprobs"]


PLUGIN = "rlhf_kernels.integrations.verl_plugin"


def test_plugin_by_name_in_the_driver():
    """verl imports the plug-in; then its compute_advantage, which the trainer calls, is ours."""
    folders = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    driver = ("-m", "tests.integrations.verl_driver")
    run_python(*driver, VERL_USE_EXTERNAL_MODULES=PLUGIN, PYTHONPATH=folders)


@pytest.mark.parametrize(("switch", "patched"), ((None, 0), ("0", 0), ("1", 14), ("losses", 20)))
def test_plugin_by_entry_point(monkeypatch, switch, patched):
    """Inert without the switch: verl loads it wherever the package is installed."""
    monkeypatch.delenv("RLHF_KERNELS_VERL", raising=False)
    if switch is not None:
        monkeypatch.setenv("RLHF_KERNELS_VERL", switch)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    importlib.import_module(PLUGIN)
    assert len(verl.report().replaced) == patched
    assert f'rlhf_kernels = "{PLUGIN}"' in (ROOT / "pyproject.toml").read_text()


def test_plugin_refuses_an_unknown_switch(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_VERL", "yes")
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    with pytest.raises(ValueError, match="expected 0, 1 or losses, got 'yes'"):
        importlib.import_module(PLUGIN)
