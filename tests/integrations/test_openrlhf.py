"""OpenRLHF with patch(): its own classes on a small model, before and after.

flash-attn, deepspeed and peft, which it needs to be imported, are stubs where they are missing
(tools/openrlhf_stubs.py); what is compared is OpenRLHF's own code.
"""

# ruff: noqa: E402 - the imports need the packages that are looked for first.
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.parity.comparison import FP32, close
from tools import openrlhf_stubs
from tools.policy_batches import make_batch

from rlhf_kernels.integrations import openrlhf
from rlhf_kernels.testing import random_mask

theirs = openrlhf_stubs.load()
if theirs is None:
    pytest.skip(
        "needs openrlhf, which `make test` installs for Python 3.11 on x86-64 Linux",
        allow_module_level=True,
    )

from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

GLOBAL = {"dp_size": 2, "batch_num_tokens": 301, "global_batch_size": 11}


def current():
    return {
        "actor": theirs.actor.Actor.forward,
        "policy": theirs.loss.PolicyLoss.forward,
        "value": theirs.loss.ValueLoss.forward,
        "logprobs": theirs.utils.log_probs_from_logits,
        "bound": theirs.actor.log_probs_from_logits,
        "kl": theirs.maker.compute_approx_kl,
        "gae": theirs.maker.RemoteExperienceMaker.get_advantages_and_returns,
    }


UNPATCHED = current()


@pytest.fixture(autouse=True)
def _leave_unpatched():
    # OpenRLHF compiles its entropy, which takes longer than all the rest.
    with torch.compiler.set_stance("force_eager"):
        yield
    openrlhf.unpatch()
    openrlhf._INTEGRATION.reset_counts()
    assert current() == UNPATCHED


SMALL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


def make_actor(kind=LlamaForCausalLM, config=LlamaConfig, *, temperature=0.7, packing=False):
    torch.manual_seed(0)
    options = SMALL | ({"head_dim": 16} if config is Gemma2Config else {})
    actor = theirs.actor.Actor(kind(config(**options)), temperature=temperature)
    # Set only where it loads the model itself.
    actor.packing_samples, actor.is_vlm = packing, False
    return actor


class Segments(nn.Module):
    """A model that takes packed rows, as flash-attn's varlen does: each sequence by itself."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, sequences, attention_mask, position_ids):
        assert attention_mask is None and sequences.shape[0] == 1
        segments = (position_ids[0] == 0).cumsum(0)
        allowed = (segments[:, None] == segments).tril()[None, None]
        mask = torch.zeros(allowed.shape, dtype=self.module.dtype).masked_fill(
            ~allowed, torch.finfo(self.module.dtype).min
        )
        return self.module(sequences, attention_mask=mask, position_ids=position_ids)


def inputs():
    """Left-padded prompts of up to 4 tokens and answers of up to 6, with a gap in the mask."""
    g = torch.Generator().manual_seed(1)
    sequences = torch.randint(131, (3, 10), generator=g)
    attention = torch.ones(3, 10, dtype=torch.long)
    attention[0, :2] = attention[1, -2:] = 0
    action = attention[:, 4:].bool()
    action[2, 2] = False
    return sequences, action, attention


def run(actor, *, mode="action", entropy=True):
    sequences, action, attention = inputs()
    options = {"return_output": entropy, "return_entropy": entropy}
    mask = action if mode == "action" else None
    out = actor(sequences, mask, attention, return_logprobs=mode == "all", **options)
    logprobs, output = out if entropy else (out, None)
    kept = action if mode == "action" else attention[:, 1:].bool() & attention[:, :-1].bool()
    weights = torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)
    loss = (torch.where(kept, logprobs, 0) * weights).sum()
    results = [torch.where(kept, logprobs, 0)]
    if entropy:
        h = torch.where(kept, output.entropy[:, -kept.shape[1] :], 0)
        loss = loss + (h * weights.flip(0)).sum()
        results.append(h)
    gradients = torch.autograd.grad(loss, tuple(actor.parameters()))
    return [*results, *gradients]


@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("mode", ("action", "all"))
def test_actor(mode, entropy):
    actor = make_actor()
    expected = run(actor, mode=mode, entropy=entropy)
    with openrlhf.patched():
        found = run(actor, mode=mode, entropy=entropy)
        assert "forward" not in vars(actor.model.lm_head)
    assert openrlhf.report().served == {"Actor.forward": 1}
    assert (expected[0] != 0).sum() > 10
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        close(a, b, 2e-5)


@pytest.mark.parametrize("mode", ("action", "all"))
def test_packed_actor(mode):
    """packing_samples: unpadded rows in and out."""
    actor = make_actor(packing=True)
    padded = run(make_actor(), mode=mode)
    actor.model = Segments(actor.model)
    expected = run(actor, mode=mode)
    with openrlhf.patched():
        found = run(actor, mode=mode)
    assert openrlhf.report().served == {"Actor.forward": 1}
    for a, b, c in zip(found, expected, padded, strict=True):
        close(a, b, 2e-5)
        close(a, c, 2e-5)


def test_bfloat16_actor():
    """OpenRLHF rounds logits to bfloat16, so that only such digits can agree."""
    actor = make_actor().bfloat16()
    expected = run(actor)
    with openrlhf.patched():
        found = run(actor)
    assert openrlhf.report().served == {"Actor.forward": 1}
    for a, b in zip(found[:2], expected[:2], strict=True):
        close(a, b, 2**-6)
    for a, b in zip(found[2:], expected[2:], strict=True):
        close(a, b, 2**-4)


def test_actor_without_gradient():
    actor = make_actor()
    sequences, action, attention = inputs()
    with torch.no_grad():
        expected = actor(sequences, action, attention)
        with openrlhf.patched():
            found = actor(sequences, action, attention)
    assert openrlhf.report().served == {"Actor.forward": 1}
    close(found, expected, 2e-5)


def test_actors_that_fall_back():
    """Another use of the logits, a cap behind the head, ZeRO-3, a wrapped head."""
    sequences, action, attention = inputs()
    capped = make_actor(Gemma2ForCausalLM, Gemma2Config)
    expected = capped(sequences, action, attention)
    plain, sharded, lora = make_actor(), make_actor(), make_actor()
    sharded.model.lm_head.weight.ds_id = 1
    lora.model.lm_head = nn.Sequential(lora.model.lm_head)
    with openrlhf.patched():
        for _ in range(2):
            close(capped(sequences, action, attention), expected, 2e-5)
        logits = plain(sequences, attention_mask=attention, return_output=True)["logits"]
        assert logits.shape == (3, 10, 131)
        for actor in (sharded, lora):
            assert actor(sequences, action, attention).shape == action.shape
    reasons = openrlhf.report().fallbacks["Actor.forward"]
    assert reasons == {
        "Gemma2ForCausalLM does more to its logits than its head": 2,
        "a call for the logits": 1,
        "LlamaForCausalLM has an LM head partitioned by ZeRO-3: gather its parameters first": 1,
        "LlamaForCausalLM has a Sequential without a weight for its LM head": 1,
    }
    # Their forward calls our functions of logits.
    assert openrlhf.report().served["log_probs_from_logits"] == 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_logits(dtype):
    logits = (3 * torch.randn(3, 7, 67)).to(dtype)
    labels = torch.randint(67, (3, 7))

    def once():
        x = logits.clone().requires_grad_()
        lp = theirs.actor.log_probs_from_logits(x, labels)
        h = theirs.actor.compute_entropy(x)
        return lp, h, torch.autograd.grad((lp - h).float().sum(), x)[0]

    expected = once()
    with openrlhf.patched():
        found = once()
    assert len(openrlhf.report().served) == 2
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-5 if dtype == torch.float32 else 2**-5)


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
@pytest.mark.parametrize("unbiased", (False, True))
@pytest.mark.parametrize("old", (False, True))
def test_kl(estimator, unbiased, old):
    batch = make_batch(4, 9)
    far = torch.tensor([2.0, 4.0, 12.0, 25.0, -4.0, -12.0, -25.0, -100.0])
    batch.ref[0, :8] = batch.logprobs.detach()[0, :8] + far
    previous = batch.old if old else None
    weights = torch.randn(batch.mask.shape)

    def once():
        kl = theirs.maker.compute_approx_kl(
            batch.logprobs, batch.ref, previous, estimator, unbiased
        )
        return kl, torch.autograd.grad((kl * weights).sum(), batch.logprobs)[0]

    expected = once()
    with openrlhf.patched():
        found = once()
    assert openrlhf.report().served == {"compute_approx_kl": 1}
    for a, b in zip(found, expected, strict=True):
        close(a, b, 2 * FP32)


LOSSES = (
    {},
    {"dual_clip": 1.75},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)},
    {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": [0.8, 1.2],
    },
    {"is_correction_level": "seq", "is_correction_threshold": (0.95, 1.03)},
    *(
        {
            "is_correction_level": level,
            "is_correction_gating": gating,
            "is_correction_threshold": [0.0, most],
        }
        for level, gating, most in (
            ("token", "tv", 0.05),
            ("seq", "tv", 0.035),
            ("token", "binary_kl", 0.02),
            ("seq", "binary_kl", 0.01),
        )
    ),
)


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("distributed", (False, True))
def test_policy_loss(options, distributed):
    batch = make_batch()
    mask = batch.mask.clone()
    # OpenRLHF divides by the tokens of a sequence.
    mask[-1, 0] = True
    function = theirs.loss.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, **options)

    def once():
        out = function(
            batch.logprobs, batch.old, batch.advantages, mask, batch.rollout,
            **(GLOBAL if distributed else {}),
        )  # fmt: skip
        return *out, torch.autograd.grad(out[0], batch.logprobs)[0]

    expected = once()
    with openrlhf.patched():
        found = once()
    assert openrlhf.report().served == {"PolicyLoss.forward": 1}
    if options.get("is_correction_level", "off") != "off" and "policy_loss_type" not in options:
        assert 0.05 < expected[4] < 0.95
    close(found[0], expected[0], 2 * FP32, scale=float(expected[-1].abs().sum()))
    close(found[-1], expected[-1], 4 * FP32)
    assert expected[1] > 0.05
    for a, b in zip(found[1:5], expected[1:5], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            close(a, b, 10 * FP32, scale=0.1)


@pytest.mark.parametrize("clip", (None, 0.25))
@pytest.mark.parametrize("by_token", (False, True))
@pytest.mark.parametrize("distributed", (False, True))
def test_value_loss(clip, by_token, distributed):
    old, returns = torch.randn(2, 5, 13)
    values = (old + 0.4 * torch.randn(5, 13)).requires_grad_()
    mask = random_mask(5, 13).long()
    function = theirs.loss.ValueLoss(clip, by_token)

    def once():
        loss = function(values, old, returns, mask, **(GLOBAL if distributed else {}))
        return loss, torch.autograd.grad(loss, values)[0]

    expected = once()
    with openrlhf.patched():
        found = once()
    assert openrlhf.report().served == {"ValueLoss.forward": 1}
    for a, b in zip(found, expected, strict=True):
        close(a, b, 2 * FP32)


@pytest.mark.parametrize(("gamma", "lam"), ((1.0, 1.0), (0.9, 0.95)))
def test_advantages(gamma, lam):
    maker = theirs.maker.RemoteExperienceMaker.__new__(theirs.maker.RemoteExperienceMaker)
    values, rewards = torch.randn(2, 6, 37)
    mask = random_mask(6, 37)

    def once(mask):
        advantages, returns = maker.get_advantages_and_returns(values, rewards, mask, gamma, lam)
        return advantages, returns, maker.get_cumulative_returns(rewards, mask, gamma)

    for m in (mask, mask.long(), None):
        expected = once(m)
        with openrlhf.patched():
            found = once(m)
        for a, b in zip(found, expected, strict=True):
            kept = mask if m is not None else torch.ones_like(mask)
            close(a[kept], b[kept], 2 * FP32)
            # OpenRLHF's decay through masked tokens, where nobody reads them.
            assert (a[~kept] == 0).all()
    assert openrlhf.report().served == {
        "RemoteExperienceMaker.get_advantages_and_returns": 3,
        "RemoteExperienceMaker.get_cumulative_returns": 3,
    }


def test_patch_is_idempotent_and_reversible():
    first = openrlhf.patch()
    assert openrlhf.patch() == first and len(first.replaced) == 8 and not first.absent
    assert theirs.actor.log_probs_from_logits is theirs.utils.log_probs_from_logits
    assert theirs.maker.compute_approx_kl is not UNPATCHED["kl"]
    assert not openrlhf.unpatch().replaced and current() == UNPATCHED


def test_unknown_signatures_are_refused(monkeypatch):
    monkeypatch.setattr(theirs.loss.ValueLoss, "forward", lambda self, values: values)
    with pytest.raises(openrlhf.IncompatibleError, match=r"parameters are \(self, values\)"):
        openrlhf.patch()
    assert theirs.actor.Actor.forward is UNPATCHED["actor"]


def test_setup_patches_at_import():
    """In a process of its own, as a Ray worker's setup hook; it imports nothing itself."""
    program = """
import sys
from rlhf_kernels.integrations import openrlhf
openrlhf.setup()
openrlhf.setup()
assert "openrlhf" not in sys.modules and "transformers" not in sys.modules
from tools import openrlhf_stubs
theirs = openrlhf_stubs.load()
names = openrlhf.report().replaced
assert theirs.actor.Actor.forward.__code__.co_name == "dispatch"
assert theirs.maker.compute_approx_kl is theirs.utils.compute_approx_kl
print(len(names), openrlhf.unpatch().active)
assert theirs.actor.Actor.forward.__code__.co_name == "forward"
"""
    variables = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    extra = os.environ.get("PYTHONPATH")
    variables["PYTHONPATH"] += os.pathsep + extra if extra else ""
    out = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=900
    )
    assert out.stdout.split("\n")[-2] == "8 False", out.stderr
