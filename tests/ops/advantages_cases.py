"""Definitions of the advantages as scalar loops, and their inputs."""

import itertools
import math
import statistics

import torch

from rlhf_kernels.kernels import triton
from rlhf_kernels.testing import generator

# Around a block of 128 tokens, and several of them.
LENGTHS = (0, 1, 2, 127, 128, 129, 300)


# Triton's interpreter takes milliseconds a token, but its blocks are of 32 and its tiles of 64.
INTERPRETED_LENGTHS = (0, 1, 2, 33, 64, 140)


MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.uint8)


def scalar_scan(rewards, values, mask, dones, bootstrap, gamma, lam, masked):
    """One sequence by the definition, in Python floats (fp64): (advantages, returns) as lists."""
    advantage, value = 0.0, bootstrap
    out = []
    for r, v, keep, done in reversed(list(zip(rewards, values, mask, dones, strict=True))):
        if not keep and masked == "carry":
            out.append((0.0, 0.0))
            continue
        if not keep:
            r = v = 0.0
        delta = r + (0.0 if done else gamma * value) - v
        advantage = delta + (0.0 if done else gamma * lam * advantage)
        value = v
        out.append((advantage, advantage + v) if keep else (0.0, 0.0))
    return [list(column) for column in zip(*reversed(out), strict=True)] or [[], []]


def scalar_whiten(x, mask):
    kept = [a for a, keep in zip(x, mask, strict=True) if keep]
    if len(kept) < 2:
        return [0.0] * len(x)
    mean, var = statistics.fmean(kept), statistics.variance(kept)
    return [
        (a - mean) / math.sqrt(var + 1e-8) if keep else 0.0 for a, keep in zip(x, mask, strict=True)
    ]


def spans(shape, cu_seqlens):
    """(row, start, end) of each sequence."""
    if cu_seqlens is None:
        return [(b, 0, shape[1]) for b in range(shape[0])]
    bounds = cu_seqlens.tolist()
    return [(0, a, b) for a, b in itertools.pairwise(bounds)]


def oracle(
    rewards, values, *, mask=None, cu_seqlens=None, dones=None, bootstrap_values=None, gamma=1.0,
    lam=0.95, masked="carry", whiten=False,
):  # fmt: skip
    """Advantages and returns in fp64, sequence by sequence."""
    shape = rewards.shape

    def grid(x, default):
        x = torch.full(shape, default) if x is None else x
        return (x if cu_seqlens is None else x[None]).tolist()

    r, v = grid(rewards.double(), 0.0), grid(values.double(), 0.0)
    m, d = grid(mask, 1), grid(dones, 0)
    sequences = spans(shape, cu_seqlens)
    boot = [0.0] * len(sequences) if bootstrap_values is None else bootstrap_values.tolist()
    out = torch.zeros(2, len(r), len(r[0]) if r else 0, dtype=torch.float64)
    for (b, i, j), end in zip(sequences, boot, strict=True):
        part = (r[b][i:j], v[b][i:j], m[b][i:j], d[b][i:j])
        out[:, b, i:j] = torch.tensor(scalar_scan(*part, end, gamma, lam, masked))
    advantages, returns = (x.reshape(shape) for x in out)
    if whiten:
        flat_mask = [k for row in m for k in row]
        flat = scalar_whiten(advantages.flatten().tolist(), flat_mask)
        advantages = torch.tensor(flat, dtype=torch.float64).reshape(shape)
    return advantages, returns


def assert_close(actual, expected, tolerance=2e-6):
    assert actual.dtype is torch.float32
    assert actual.shape == expected.shape
    scale = 1.0 + (float(expected.abs().max()) if expected.numel() else 0.0)
    assert_error = (actual.double() - expected).abs()
    assert not assert_error.isnan().any()
    assert (assert_error <= tolerance * scale).all(), float(assert_error.max())


def case(seed, *, packed, dtype=torch.float32, mask_dtype=torch.bool, cols=300, rows=7):
    """Random inputs of every kind, as arguments of gae."""
    g = generator(seed)
    if packed:
        lengths = torch.randint(0, cols + 1, (rows,), generator=g)
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        shape = (int(cu[-1]),)
    else:
        cu, shape = None, (rows, cols)
    mask = torch.rand(shape, generator=g) < 0.7
    return {
        "rewards": torch.randn(shape, generator=g).to(dtype),
        "values": torch.randn(shape, generator=g).to(dtype),
        "mask": mask.to(mask_dtype) if mask_dtype is torch.bool else mask.to(mask_dtype) * 3,
        "cu_seqlens": cu,
        "dones": torch.rand(shape, generator=g) < 0.05,
        "bootstrap_values": torch.randn(rows, generator=g),
    }


def interpreted(backend):
    return backend == "triton" and triton.interpreted()


def size(backend, cols=140):
    """Arguments of `case`: in the interpreter few rows, of several tiles still."""
    return {"rows": 3, "cols": cols} if interpreted(backend) else {}


def lengths(backend):
    return INTERPRETED_LENGTHS if interpreted(backend) else LENGTHS
