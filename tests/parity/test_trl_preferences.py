"""Parity with TRL 1.16.0: the losses of its DPO, KTO, CPO and ORPO trainers, value and gradient.

The trainers' own methods run, on an object that carries what they read. Different by design: TRL's
DPO ignores label_smoothing with "sigmoid", ours is then conservative DPO.
"""

import collections
import importlib.util
from types import SimpleNamespace

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.config.preference import OF_DIFFERENCES, SORTED

# Not importorskip: an import that fails where TRL is installed must show.
if importlib.util.find_spec("trl") is None:
    pytest.skip("needs trl (the extra 'parity')", allow_module_level=True)

from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

NAMES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# With weights TRL's hinge has no gradient (it is multiplied in place); its sft weighs the mean.
UNWEIGHTED = ("hinge", "sft")
PAIRS, TOKENS = 5, 9
CASES = [
    *((name, "reverse_kl", None, False) for name in NAMES),
    *((name, "reverse_kl", 0.4, False) for name in ("sigmoid", "ipo", "aot")),
    *((name, "reverse_kl", None, True) for name in NAMES if name not in (*SORTED, *UNWEIGHTED)),
    *((name, f, None, False) for name in OF_DIFFERENCES
      for f in ("forward_kl", "js_divergence", "alpha_divergence")),
    (("sigmoid", "bco_pair", "sft"), "reverse_kl", None, False),
]  # fmt: skip


def outputs(logprobs, collision):
    zeros = torch.zeros_like(logprobs)
    return SimpleNamespace(
        log_probs=logprobs, log_sum_sq_probs=collision, entropy=zeros, mean_logits=zeros,
        is_top1=zeros.bool(),
    )  # fmt: skip


def theirs(names, f, ld_alpha, weighting, policy, reference, collision, completion, smoothing):
    model = lambda **_: outputs(policy, collision)  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, ld_alpha=ld_alpha,
        precompute_ref_logps=True, beta=0.3, f_divergence_type=f, f_alpha_divergence_coef=0.6,
        loss_types=list(names), loss_weights=[0.8, 0.2, 1.5][: len(names)],
        label_smoothing=smoothing, use_weighting=weighting, args=SimpleNamespace(discopop_tau=0.07),
        _total_train_tokens=0, _metrics=collections.defaultdict(
            lambda: collections.defaultdict(list)),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x,
                                    gather_for_metrics=lambda x: x),
    )  # fmt: skip
    chosen, rejected = reference.chunk(2)
    inputs = {"completion_mask": completion, "input_ids": completion.long(),
              "attention_mask": torch.ones_like(completion), "ref_chosen_logps": chosen,
              "ref_rejected_logps": rejected}  # fmt: skip
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


@pytest.mark.parametrize(("names", "f", "ld_alpha", "weighting"), CASES)
def test_dpo(names, f, ld_alpha, weighting):
    names = (names,) if isinstance(names, str) else names
    smoothing = 0.1 if set(names) & {"exo_pair", "robust", *SORTED} else 0.0
    lengths = torch.randint(1, TOKENS + 1, (2 * PAIRS,))
    mask = torch.arange(TOKENS) < lengths[:, None]
    # Their first position predicts nothing.
    completion = torch.cat([torch.zeros(2 * PAIRS, 1), mask], 1).long()
    logprobs = torch.where(mask, -3 * torch.rand(2 * PAIRS, TOKENS), 0.0).requires_grad_()
    own = torch.where(mask, -3 * torch.rand(2 * PAIRS, TOKENS), 0.0)
    collision = torch.where(mask, -torch.rand(2 * PAIRS, TOKENS), 0.0)
    options = {}
    if ld_alpha is not None:
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
        options = {"shared_lengths": shared, "ld_alpha": ld_alpha}
    reference = rk.sequence_logprobs(own, mask, **options)
    expected = theirs(names, f, ld_alpha, weighting, logprobs, reference, collision, completion,
                      smoothing)  # fmt: skip
    sums = rk.sequence_logprobs(logprobs, mask, **options).chunk(2)
    weights = None
    if weighting:
        mean = rk.sequence_logprobs(logprobs - collision, mask, average=True).exp().detach()
        weights = mean[:PAIRS] * mean[PAIRS:]
    found = rk.preference_loss(
        *sums, *(() if names == ("sft",) else reference.chunk(2)), loss=names,
        loss_weights=[0.8, 0.2, 1.5][: len(names)], beta=0.3, label_smoothing=smoothing,
        f_divergence=f, f_alpha=0.6 if f == "alpha_divergence" else 0.5, weights=weights,
        discopop_tau=0.07 if "discopop" in names else 0.05,
        chosen_lengths=lengths[:PAIRS], rejected_lengths=lengths[PAIRS:],
    ).loss  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-6)
    # The model's log-probability of a token without a label is 0, whatever its logits.
    slopes = [torch.autograd.grad(x, logprobs)[0] * mask for x in (found, expected)]
    assert slopes[1].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, rtol=3e-5, atol=2e-6)


def assert_same(found, expected, logprobs):
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-6)
    slopes = [torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (found, expected)]
    assert slopes[1].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, rtol=3e-5, atol=2e-6)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("shift", [0.5, -0.5])
@pytest.mark.parametrize("kind", ["mixed", "desirable", "undesirable"])
def test_kto(loss_type, shift, kind):
    logprobs = (-3 * torch.rand(PAIRS, TOKENS)).requires_grad_()
    reference, mismatched = -3 * torch.rand(PAIRS, TOKENS), -9 * torch.rand(PAIRS)
    desirable = torch.tensor([True, False, True, True, False])
    if kind != "mixed":
        desirable = torch.full((PAIRS,), kind == "desirable")
    completion = torch.ones(PAIRS, TOKENS + 1).long()
    zeros = torch.zeros(PAIRS, TOKENS)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, precompute_ref_logps=True,
        calculate_KL=loss_type == "kto", loss_type=loss_type, beta=0.3, desirable_weight=1.3,
        undesirable_weight=0.7, _total_train_tokens=0,
        _compute_kl_logps=lambda *_: mismatched + shift,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x,
                                    gather_for_metrics=lambda x: x),
    )  # fmt: skip
    inputs = {"completion_mask": completion, "input_ids": completion, "label": desirable,
              "attention_mask": completion, "ref_logps": reference.sum(-1),
              "ref_KL_logps": mismatched}  # fmt: skip
    expected = KTOTrainer._compute_loss(
        trainer, lambda **_: outputs(logprobs, zeros), inputs, False
    )
    found = rk.kto_loss(
        rk.sequence_logprobs(logprobs, torch.ones(PAIRS, TOKENS)), reference.sum(-1), desirable,
        kl=shift if loss_type == "kto" else 0.0, beta=0.3, desirable_weight=1.3,
        undesirable_weight=0.7,
    )  # fmt: skip
    assert_same(found.loss, expected, logprobs)


@pytest.mark.parametrize(
    ("ours", "theirs", "alpha"),
    [("cpo", "sigmoid", 0.0), ("simpo", "simpo", 0.0), ("alphapo", "simpo", 0.4)],
)
def test_cpo(ours, theirs, alpha):
    """CPO's loss is of sums over tokens, that of SimPO and AlphaPO of means."""
    logprobs = (-3 * torch.rand(2 * PAIRS, TOKENS)).requires_grad_()
    smoothing = 0.1 if ours == "cpo" else 0.0
    trainer = SimpleNamespace(
        alpha=alpha, beta=1.5, loss_type=theirs, simpo_gamma=0.7, label_smoothing=smoothing,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    sums = logprobs.sum(-1) if ours == "cpo" else logprobs.mean(-1)
    expected = CPOTrainer.cpo_loss(trainer, *sums.chunk(2))[0].mean()
    mask = torch.ones(2 * PAIRS, TOKENS)
    average = ours != "cpo"
    options = {} if ours == "cpo" else {"gamma": 0.7}
    if ours == "alphapo":
        options["alpha"] = alpha
    found = rk.preference_loss(
        *rk.sequence_logprobs(logprobs, mask, average=average).chunk(2), loss=ours, beta=1.5,
        label_smoothing=smoothing, **options,
    )  # fmt: skip
    assert_same(found.loss, expected, logprobs)


def test_orpo():
    """TRL subtracts what it calls the losses from the language model's: the sign is the other."""
    logprobs = (-3 * torch.rand(2 * PAIRS, TOKENS)).requires_grad_()
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device=torch.device("cpu")))
    expected = -ORPOTrainer.odds_ratio_loss(trainer, *logprobs.mean(-1).chunk(2))[0].mean()
    mask = torch.ones(2 * PAIRS, TOKENS)
    means = rk.sequence_logprobs(logprobs, mask, average=True).chunk(2)
    found = rk.preference_loss(*means, loss="orpo", beta=0.4)
    assert_same(found.loss, expected, logprobs)
