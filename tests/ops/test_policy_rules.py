"""policy_loss on every backend: bits, launches, compilation, bad data."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.bits import BAD_BATCHES, check_compiled, check_threads
from tests.ops.policy_cases import (
    BASES,
    CORRECTIONS,
    EVERYTHING,
    KERNELS,
    Config,
    make_config,
    make_inputs,
    run,
)

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.config import enums
from rlhf_kernels.core import env
from rlhf_kernels.core.sequences import token_weights
from rlhf_kernels.testing import DTYPES, to_float64


@pytest.mark.parametrize("shape", ((3, 20000), (70, 600)))
def test_threads_do_not_change_bits(shape):
    args, options = make_inputs(*shape)
    config = Config(**EVERYTHING, ratio_level="sequence", aggregation="seq-mean-token-mean")
    check_threads(lambda: run(rk.policy_loss, args, options, config=config))


@pytest.mark.parametrize("kernels", KERNELS)
def test_opcheck(kernels):
    args, options = make_inputs(3, 20)
    config = Config(**EVERYTHING)
    inputs = [t.detach() for t in (*args, *options.values())]
    lists = list(config._codes), list(config._params)
    op = torch.ops.rlhf_kernels.policy_loss.default
    for grads in ((True, True), (False, False)):
        torch.library.opcheck(op, (*inputs, None, None, None, 0.0, *lists, *grads, kernels))
    strided = [t.t().contiguous().t() for t in inputs]
    strided.append(torch.rand(3))
    torch.library.opcheck(op, (*strided, None, torch.tensor(5.0), 0.0, *lists, True, True, kernels))


def test_opcheck_of_the_backward():
    first, second = torch.randn(3, 20), torch.randn(3, 20)
    scalars = torch.tensor(0.1), torch.tensor(2.0)
    op = torch.ops.rlhf_kernels.loss_backward.default
    for other, dtypes in ((second, (torch.float32, torch.bfloat16)), (None, (torch.float16,) * 2)):
        torch.library.opcheck(op, (first, other, *scalars, *dtypes, "triton"))


@pytest.mark.parametrize(
    "config, forward",
    [
        (Config(), ["policy", "combine"]),
        (Config.rloo(**EVERYTHING), ["policy", "combine"]),
        (Config.grpo(), ["statistics", "policy", "combine"]),
        (Config(**EVERYTHING, **CORRECTIONS[3]), ["statistics", "policy", "combine"]),
        (Config(ratio_level="sequence-token"), ["statistics", "policy", "combine"]),
        (Config.gspo(**EVERYTHING), ["statistics", "policy", "pooled", "combine"]),
    ],
)
def test_launches_of_the_triton_backend(monkeypatch, config, forward):
    from rlhf_kernels.kernels.triton import _tokens, policy, policy_backward

    launched, launch = [], policy.launch

    def listen(kernel, *args, **options):
        launched.append(kernel.fn.__name__.removesuffix("_kernel"))
        launch(kernel, *args, **options)

    for module in (policy, policy_backward, _tokens):
        monkeypatch.setattr(module, "launch", listen)
    args, options = make_inputs(3, 1100)
    with rk.use_backend("triton"):
        loss = rk.policy_loss(*args[:3], mask=args[3], **options, config=config).loss
        assert launched == forward
        torch.autograd.grad(loss, (args[0], options["entropy"]), allow_unused=True)
        assert launched == [*forward, "backward"]


def test_bad_data_poisons_the_triton_backend(monkeypatch):
    args, options = make_inputs(3, 8)
    flat = [t.detach().reshape(-1) for t in args]
    config = Config(entropy_coef=0.1)
    for offsets, divisor in BAD_BATCHES:
        inputs = [t.clone() for t in flat]
        entropy = options["entropy"].detach().reshape(-1).requires_grad_()
        inputs[0].requires_grad_()
        extra = {
            "entropy": entropy,
            "cu_seqlens": torch.tensor(offsets),
            "normalizer": torch.tensor(divisor),
            "config": config,
        }
        with rk.use_backend("triton"):
            loss, metrics = rk.policy_loss(*inputs[:3], mask=inputs[3], **extra)
            gradients = torch.autograd.grad(loss, (inputs[0], entropy))
            assert loss.isnan() and metrics.tensor.isnan().all(), (offsets, divisor)
            assert all(g.isnan().all() for g in gradients)
            with monkeypatch.context() as patch:
                patch.setattr(env, "CHECK", True)
                with pytest.raises(ValueError, match=r"cu_seqlens must|normalizer must"):
                    rk.policy_loss(*inputs[:3], mask=inputs[3], **extra)


def test_compile_without_graph_breaks(backend):
    config = Config(**EVERYTHING)

    def step(logprobs, old, advantages, mask, ref, entropy):
        loss, metrics = rk.policy_loss(
            logprobs, old, advantages, mask=mask, ref_logprobs=ref, entropy=entropy, config=config
        )
        return 1.5 * loss, metrics["k3_ref"], metrics.tensor

    inputs = (make_inputs(4, cols) for cols in (5, 16, 33, 100, 700))
    batches = ((*args, more["ref_logprobs"], more["entropy"]) for args, more in inputs)
    check_compiled(step, batches, lambda batch: (batch[0], batch[-1]))


@pytest.mark.parametrize("kernels", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 540),
    seed=st.integers(0, 2**20),
    keep=st.sampled_from((0.0, 0.3, 0.9, 1.0)),
    dtype=st.sampled_from(DTYPES),
    base=st.sampled_from(BASES),
    aggregation=st.sampled_from(enums.AGGREGATIONS),
    correction=st.sampled_from(CORRECTIONS),
    estimator=st.sampled_from(enums.KL_ESTIMATORS),
    weighted=st.booleans(),
)
def test_fuzz(
    kernels, rows, cols, seed, keep, dtype, base, aggregation, correction, estimator, weighted
):
    args, options = make_inputs(rows, cols, dtype, seed=seed, keep=keep)
    config = make_config(base, aggregation, correction, estimator, weighted)
    with rk.use_backend(kernels):
        actual = run(rk.policy_loss, args, options, config=config)
    expected = run(reference.policy_loss, args, options, config=config)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=2e-5, atol=2e-5)
    # Terms of the size of the weights may cancel: |x| and x of abs+ do so exactly, to a rounding.
    weight = token_weights(args[3], aggregation, config.normalizer, torch.float32, None).max()
    for a, b in zip(actual[2:], expected[2:], strict=True):
        tolerance = 4 * torch.finfo(dtype).eps if dtype is not torch.float32 else 1e-5
        atol = tolerance * float(b.float().abs().max()) + 1e-6 * float(weight)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective"),
        ({"ratio_level": "batch"}, "ratio_level"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"correction_level": "row", "correction_max": 2.0}, "correction_level"),
        ({"correction_mode": "drop"}, "correction_mode"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_low": 2.0, "clip_high": 1.0, "clip_absolute": True}, "clip_low"),
        ({"clip_high": math.nan}, "clip_high"),
        ({"clip_high": "0.2"}, "clip_high"),
        ({"clip_absolute": 1}, "clip_absolute"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": 3.0, "objective": "cispo"}, "dual_clip"),
        ({"delta": 1.1}, "delta"),
        ({"delta": 2.0, "clip_high": None}, "delta"),
        ({"penalty_coef": 1.0}, "penalty_coef"),
        ({"objective": "reinforce", "ratio_level": "sequence"}, "ratio_level"),
        ({"sapo_tau_pos": 0.0}, "sapo_tau_pos"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl_input_clamp": 0.0}, "kl_input_clamp"),
        ({"log_ratio_clamp": (1.0, 2.0)}, "log_ratio_clamp"),
        ({"kl_value_clamp": -1.0}, "kl_value_clamp"),
        ({"entropy_coef": True}, "entropy_coef"),
        ({"correction_max": 2.0}, "correction_level"),
        ({"correction_level": "token"}, "correction_max"),
        (
            {"correction_level": "token", "correction_min": 2.0, "correction_max": 1.0},
            "correction_min",
        ),
        ({"normalizer": 0.0}, "normalizer"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=f"PolicyLossConfig: {message} must be"):
        Config(**options)


def test_bad_arguments_raise(backend, monkeypatch):
    # Where data would not be looked at: test_bad_data_poisons_the_triton_backend.
    monkeypatch.setattr(env, "CHECK", True)
    args, _ = make_inputs(3, 8)
    logprobs, old, advantages, mask = args
    for bad, error, message in (
        ((logprobs, old[:, 1:], advantages, mask), ValueError, "old_logprobs must have the shape"),
        ((logprobs, old, advantages[0], mask), ValueError, "advantages must have the shape"),
        ((logprobs, old, advantages, mask * 0.5), TypeError, r"mask\.bool\(\)"),
        ((logprobs, old, advantages, mask[:2]), ValueError, "mask must have the shape"),
        ((logprobs.long(), old, advantages, mask), TypeError, "logprobs must be one of"),
        ((logprobs[0], old[0], advantages[0], mask[0]), ValueError, r"logprobs must be \[B, T\]"),
        ((logprobs, old.tolist(), advantages, mask), TypeError, "old_logprobs must be a Tensor"),
        ((logprobs, old.to("meta"), advantages, mask), ValueError, "device"),
    ):
        with pytest.raises(error, match=message):
            rk.policy_loss(*bad[:3], mask=bad[3])
    for config, message in (
        (Config(kl_coef=0.1), "ref_logprobs must be given"),
        (Config(entropy_coef=0.1), "entropy must be given"),
        (Config(correction_level="token", correction_max=2.0), "rollout_logprobs must be given"),
        (Config.dr_grpo(), "normalizer must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.policy_loss(*args[:3], mask=args[3], config=config)
    with pytest.raises(TypeError, match="config must be a PolicyLossConfig"):
        rk.policy_loss(*args[:3], mask=args[3], config={"objective": "clip"})
    for bad in (0, -1.0, math.nan, torch.tensor(0.0), torch.tensor([1.0]), torch.tensor(math.inf)):
        with pytest.raises(ValueError, match="normalizer must be"):
            rk.policy_loss(*args[:3], mask=args[3], normalizer=bad)
    flat = [t.detach().reshape(-1) for t in args]
    for offsets, error in (
        ([0, 8, 20], ValueError),
        ([1, 8, 24], ValueError),
        ([0, 30, 24], ValueError),
        ([0, 16, 8, 24], ValueError),
        ([[0, 24]], ValueError),
        ([0.0, 24.0], TypeError),
    ):
        with pytest.raises(error, match="cu_seqlens"):
            rk.policy_loss(*flat[:3], mask=flat[3], cu_seqlens=torch.tensor(offsets))


def test_fp64_only_on_the_reference():
    wide = to_float64(make_inputs(3, 8)[0])
    with rk.use_backend("reference"):
        assert rk.policy_loss(*wide[:3], mask=wide[3]).loss.dtype is torch.float64
    with rk.use_backend("cpu"), pytest.raises(TypeError, match="logprobs must be one of float32"):
        rk.policy_loss(*wide[:3], mask=wide[3])
