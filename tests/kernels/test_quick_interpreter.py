"""The changes to Triton's interpreter that make the other tests quick leave it right."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.run_python import run_python

import rlhf_kernels as rk
from rlhf_kernels.kernels.triton._launch import INTERPRETED, kernel, launch
from rlhf_kernels.kernels.triton.advantages_scan import ahead, ahead_both, ahead_cut

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="is about the interpreter")

SIZE = 16


@triton.jit
def latest(a, b):
    return tl.where(b > 0, b, a)


@kernel
def scans_kernel(x, out, N: tl.constexpr, REVERSE: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(x + N + i)
    p, q = tl.associative_scan((a, b), 0, ahead, reverse=REVERSE)
    tl.store(out + i, p)
    tl.store(out + N + i, q)
    p, q = tl.associative_scan((tl.where(i == 5, -1.0, a), b), 0, ahead_cut, reverse=REVERSE)
    tl.store(out + 2 * N + i, p)
    tl.store(out + 3 * N + i, q)
    p, q, r = tl.associative_scan((a, b, b + 1.0), 0, ahead_both, reverse=REVERSE)
    tl.store(out + 4 * N + i, r)
    tl.store(out + 5 * N + i, tl.associative_scan(b, 0, latest, reverse=REVERSE))


def in_order(combine, *columns):
    rows = list(zip(*columns, strict=True))
    for i in range(1, len(rows)):
        rows[i] = combine(*rows[i - 1], *rows[i])
    return list(zip(*rows, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_scans_are_those_in_order(reverse):
    # Small numbers, exact in any order.
    a = torch.tensor([1.0, 2, 0.5, 1]).repeat(SIZE // 4)
    b = torch.randint(-4, 5, (SIZE,)).float()
    out = torch.empty(6, SIZE)
    launch(scans_kernel, 1, out, torch.stack([a, b]), out, N=SIZE, REVERSE=reverse, warps=1)
    cut = a.clone()
    cut[5] = -1
    a, b, cut = (t.flip(0).tolist() if reverse else t.tolist() for t in (a, b, cut))

    def ahead_cut(p, q, a, b):
        return (-1.0, b) if a < 0 else (-1.0 if p < 0 else a * p, a * q + b)

    expected = [
        *in_order(lambda p, q, a, b: (a * p, a * q + b), a, b),
        *in_order(ahead_cut, cut, b),
        in_order(lambda p, q, a, b: (a * p, a * q + b), a, [y + 1 for y in b])[1],
        in_order(lambda p, b: (b if b > 0 else p,), b)[0],
    ]
    expected = torch.tensor(expected)
    assert torch.equal(out, expected.flip(1) if reverse else expected)


def test_the_language_is_itself_again_after_a_launch():
    before = {name: getattr(tl, name) for name in dir(tl)} | vars(tl.tensor)
    out = torch.empty(6, SIZE)
    launch(scans_kernel, 1, out, torch.ones(2, SIZE), out, N=SIZE, REVERSE=False, warps=1)
    assert {name: getattr(tl, name) for name in dir(tl)} | vars(tl.tensor) == before


def digest():
    """Of the bits of results without scans, of blocks, scalars and pointers."""
    found = hashlib.sha256()
    logits = torch.randn(3, 301, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits.requires_grad_()
    with rk.use_backend("triton"):
        out = rk.token_logprobs(logits, torch.tensor([0, -100, 300]), entropy=True, softcap=5.0)
        loss, metrics = rk.policy_loss(
            logits, logits.detach() + 0.1, logits.detach(), mask=logits > 0,
            config=rk.PolicyLossConfig.gspo(),
        )  # fmt: skip
        (grad,) = torch.autograd.grad([out.logprobs.sum() + out.entropy.sum() + loss], logits)
    for t in (out.logprobs, out.entropy, loss, metrics.tensor, grad.float()):
        found.update(t.detach().numpy().tobytes())
    return found.hexdigest()


def test_bits_are_those_of_the_interpreter_as_it_comes():
    script = "from tests.kernels.test_quick_interpreter import digest; print(digest())"
    root = str(Path(__file__).parents[2])
    done = run_python("-W", "ignore", "-c", script, PYTHONPATH=root, TRITON_INTERPRET="1")
    assert done.stdout.strip() == digest()


@kernel
def sum_kernel(x, out):
    tl.store(out, tl.load(x) + tl.load(x + 1))


def test_a_debug_build_still_sees_integers_that_overflow(monkeypatch):
    x, out = torch.tensor([2**31 - 1, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch(sum_kernel, 1, out, x, out, warps=1)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    with pytest.raises(Exception, match="int32 overflow detected"):
        launch(sum_kernel, 1, out, x, out, warps=1)
