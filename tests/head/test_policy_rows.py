"""The one kernel of a policy loss has the bits of the three that it stands for.

In the CPU's emulator, which runs the blocks of a cluster together.
"""

import contextlib
import ctypes
from unittest import mock

import pytest
import torch

from tests.head import gpu_way
from tests.kernels import emulated_cuda
from tests.kernels.guarded_memory import GuardedMemory
from tests.kernels.launchers import with_launchers
from tools import head_traffic

import rlhf_kernels as rk
from rlhf_kernels.config.enums import AGGREGATIONS
from rlhf_kernels.core.row_options import RowOptions
from rlhf_kernels.core.sentinels import SHARD_IGNORED
from rlhf_kernels.head import shard
from rlhf_kernels.head.policy import _complete
from rlhf_kernels.kernels import backends
from rlhf_kernels.kernels.rows import PolicyTokens, TokenConstants
from rlhf_kernels.testing import assert_bitwise_equal, generator

CPU = torch.device("cpu")
PLAIN = RowOptions(1.0, 0.0, True, SHARD_IGNORED)
# Columns of a tile of sums; the least vocabulary that the kernel is chosen for, and the largest.
TILE = 1024
LEAST, MOST = 15 * TILE + 1, 256 * TILE


@pytest.fixture(autouse=True)
def kernels():
    with emulated_cuda.installed(), rk.use_backend("cuda"), gpu_way.taken():
        yield


def one_kernel():
    return backends.get("cuda").kernels.rows.policy_rows_for(CPU, LEAST, PLAIN)


@contextlib.contextmanager
def chosen(kernel):
    """`kernel`, or None, whatever the vocabulary."""
    with with_launchers("cuda", policy_rows_for=lambda *_: kernel):
        yield


# ---- Rows of logits ------------------------------------------------------------------------------


def three_kernels(out, logits, labels, temperatures, options, constants, config):
    """What the head does without the one kernel; (log-probabilities, entropies)."""
    rows = backends.get("cuda").kernels.rows
    codes, params = config._codes, config._params
    logprobs, entropy, stats, *_ = rows.token_logprobs(logits, labels, temperatures, options)
    old, advantages, ref, rollout, weights = constants
    given = (logprobs, logprobs if old is None else old, advantages, labels != SHARD_IGNORED)
    bonus = params.entropy_coef != 0
    tokens = PolicyTokens(
        *(None if t is None else t.unsqueeze(0) for t in (*given, ref, rollout, entropy)),
        None, None, None, 1.0,
        codes._replace(aggregation=AGGREGATIONS.index("constant")), params,
    )  # fmt: skip
    found = rows.policy_loss(tokens, True, bonus)
    g, h = _complete(found, weights)
    upstream = g[0], h[0] if bonus else None
    rows.token_logprobs_backward_into(out, logits, labels, temperatures, stats, *upstream, options)
    return logprobs, entropy


class Rows:
    """Rows of logits and what their tokens have."""

    def __init__(self, count, vocab, dtype=torch.float32):
        random = generator(vocab)
        self.logits = 4 * torch.randn(count, vocab, generator=random)
        self.labels = torch.randint(0, vocab, (count,), generator=random)
        old, ref, rollout, advantages = torch.randn(4, count, generator=random)
        self.logprobs = self.logits.log_softmax(1).gather(1, self.labels[:, None])[:, 0]
        near = [(self.logprobs + 0.3 * x).to(dtype) for x in (old, ref, rollout)]
        weights = torch.rand(count, generator=random)
        self.constants = TokenConstants(near[0], advantages.to(dtype), *near[1:], weights)
        self.temperatures, self.options = None, PLAIN

    def same(self, config, gradient=torch.bfloat16):
        """Results of the one kernel, whose bits must be those of the three."""
        found = []
        for kernel in (one_kernel(), None):
            logits = self.logits.clone()
            out = logits if gradient == torch.float32 else torch.empty_like(logits, dtype=gradient)
            given = (out, logits, self.labels, self.temperatures, self.options, self.constants)
            if kernel is None:
                found.append((*three_kernels(*given, config), out))
            else:
                found.append((*kernel(*given, config._codes, config._params), out))
        for one, three in zip(*found, strict=True):
            # A GPU has one NaN. Of the emulator's two, the host's compiler chooses for each kernel.
            one, three = (x.masked_fill(x.isnan(), torch.nan) for x in (one, three))
            assert_bitwise_equal(one, three)
        return found[0]


PPO = rk.PolicyLossConfig.ppo()
EVERY = rk.PolicyLossConfig.ppo(
    kl_coef=0.1, entropy_coef=0.01, dual_clip=3.0, delta=1.4, kl_weight="ratio"
)


@pytest.mark.parametrize("gradient", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("vocab", (1, 7, 1027, 8 * TILE, 33 * TILE + 5))
def test_rows_of_any_length(vocab, gradient):
    for config in (PPO, EVERY):
        *_, grad = Rows(3, vocab).same(config, gradient)
        assert vocab == 1 or grad.count_nonzero() > vocab // 2


def test_rows_of_as_many_blocks_as_make_a_cluster():
    for vocab in (head_traffic.VOCABULARY, MOST - 3):
        *_, grad = Rows(1, vocab).same(EVERY)
        assert grad.count_nonzero() > vocab // 2
    suits = emulated_cuda.load().policy_rows_suits
    assert [suits(v, PLAIN) for v in (LEAST - 1, LEAST, MOST, MOST + 1)] == [
        False,
        True,
        True,
        False,
    ]
    # Options that change logits are not its business.
    capped = PLAIN._replace(softcap=30.0)
    assert not suits(LEAST, capped)
    few = Rows(1, 7)
    few.options = capped
    half = Rows(1, 7)
    half.logits = half.logits.half()
    for refused in (Rows(1, MOST + 1), few, half):
        with pytest.raises(RuntimeError, match="no policy_rows for"):
            refused.same(PPO)


OBJECTIVES = {
    "clip": PPO,
    "every term": EVERY,
    "penalty": rk.PolicyLossConfig.ppo_penalty(penalty_coef=0.3),
    "reinforce": rk.PolicyLossConfig.reinforce(),
    "cispo": rk.PolicyLossConfig.cispo(),
    "sapo": rk.PolicyLossConfig.sapo(entropy_coef=0.2),
    "clamps": rk.PolicyLossConfig.ppo(
        log_ratio_clamp=0.2, kl_coef=0.2, kl_input_clamp=0.3, kl_value_clamp=0.02
    ),
    **{
        f"kl {estimator}": rk.PolicyLossConfig.ppo(kl_coef=0.2, kl_estimator=estimator)
        for estimator in ("k1", "k2", "abs", "k3+")
    },
    "gate tv": rk.PolicyLossConfig.ppo(gate="tv", gate_low=0.01, gate_high=0.005),
    "gate kl": rk.PolicyLossConfig.cispo(
        gate="binary_kl", gate_low=1e-3, gate_high=1e-3, gate_against="rollout"
    ),
    "gate ratio": rk.PolicyLossConfig.reinforce(
        gate="ratio", gate_low=0.8, gate_high=1.2, kl_coef=0.2, kl_weight="one"
    ),
    "capped": rk.PolicyLossConfig.ppo(kl_coef=0.2, kl_weight="ratio", kl_weight_max=1.1),
    "weights, cut": rk.PolicyLossConfig.ppo(correction_level="token", correction_max=1.1),
    "weights, masked": rk.PolicyLossConfig.ppo(
        correction_level="token", correction_mode="mask", correction_min=0.8
    ),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_of_the_loss(name, dtype):
    # In fp32, where a product that is contracted shows.
    rows = Rows(48, 70, dtype)
    *_, grad = rows.same(OBJECTIVES[name], torch.float32)
    assert grad.count_nonzero() > grad.numel() // 8
    rows.constants = rows.constants._replace(
        old_logprobs=None, ref_logprobs=None, rollout_logprobs=None
    )
    if OBJECTIVES[name].kl_coef == 0 and OBJECTIVES[name].correction_level is None:
        rows.same(OBJECTIVES[name], torch.float32)


def test_temperatures():
    rows = Rows(6, 1500)
    rows.options = PLAIN._replace(temperature=0.6)
    rows.same(EVERY)
    rows.temperatures = torch.linspace(0.5, 2.0, 6)
    rows.same(EVERY)
    rows.temperatures = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf, 2.0**70])
    _, entropy, grad = rows.same(EVERY)
    assert entropy.isnan().tolist() == [False, *[True] * 5]
    assert grad[0].isfinite().all()


@pytest.mark.parametrize("gradient", (torch.bfloat16, torch.float32))
def test_rows_that_are_not_finite(gradient):
    vocab = 2 * TILE + 100
    rows = Rows(12, vocab)
    inf, nan = torch.inf, torch.nan
    rows.logits[0, 3:] = -inf
    rows.logits[1] = -inf
    rows.logits[2, :TILE] = -inf
    rows.logits[3, 5] = nan
    rows.logits[4] = nan
    rows.logits[5, 7] = inf
    rows.logits[6] = torch.finfo(torch.float32).min
    rows.logits[7, 9:] = torch.finfo(torch.float32).min
    rows.logits[8] *= 1e37
    rows.labels[9:] = torch.tensor([vocab, -1, SHARD_IGNORED])
    for config in (PPO, EVERY):
        logprobs, _, grad = rows.same(config, gradient)
        assert logprobs[[1, 3, 4, 9, 10]].isnan().all() and logprobs[11] == 0
        assert grad[11].count_nonzero() == 0
    for field in ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs", "weights"):
        whole = Rows(4, 70)
        getattr(whole.constants, field)[:] = torch.tensor([nan, inf, -inf, 0.0])
        whole.same(EVERY)


def test_a_token_without_a_gradient_has_zeros():
    rows = Rows(4, 3 * TILE)
    rows.constants.advantages[1:3] = 0.0
    *_, grad = rows.same(PPO)
    assert [bool(g.any()) for g in grad] == [True, False, False, True]


def test_a_row_does_not_depend_on_where_it_lies():
    """Behind any address, in a batch or alone; and nothing beside it is written."""
    rows, vocab = Rows(3, 1531), 1531
    expected = rows.same(EVERY)
    for before in range(0, 9, 2):
        memory = torch.full((3, vocab + before + 7), 9.0)
        logits = memory[:, before : before + vocab].copy_(rows.logits)
        gradients = torch.full((3, vocab + before + 7), 7.0, dtype=torch.bfloat16)
        out = gradients[:, before : before + vocab]
        codes = EVERY._codes, EVERY._params
        found = one_kernel()(out, logits, rows.labels, None, PLAIN, rows.constants, *codes)
        for one, e in zip((*found, out.contiguous()), expected, strict=True):
            assert_bitwise_equal(one, e)
        gradients[:, before : before + vocab] = 7.0
        assert (gradients == 7).all() and (memory[:, :before] == 9).all()
    for i in range(3):
        alone = TokenConstants(*(t[i : i + 1] for t in rows.constants))
        out = torch.empty(1, vocab, dtype=torch.bfloat16)
        given = (out, rows.logits[i : i + 1], rows.labels[i : i + 1], None, PLAIN, alone)
        found = one_kernel()(*given, EVERY._codes, EVERY._params)
        for one, e in zip((*found, out), expected, strict=True):
            assert_bitwise_equal(one[0], e[i])


@pytest.mark.parametrize("side", ("start", "end"))
def test_ignored_rows_and_what_lies_beyond_are_not_read(side):
    """A row lies in the protected page that follows the others, or before them; it is ignored."""
    vocab, kept = 1531, slice(0, 4) if side == "end" else slice(1, 5)
    with GuardedMemory(side) as memory:
        rows = Rows(4, vocab)
        labels = torch.full((5,), SHARD_IGNORED)
        labels[kept] = rows.labels
        constants = TokenConstants(*(torch.zeros(5) for _ in rows.constants))
        for given, own in zip(constants, rows.constants, strict=True):
            given[kept] = own
        out = torch.empty(5, vocab, dtype=torch.bfloat16)
    address = rows.logits.data_ptr() - 4 * vocab * kept.start
    protected = (ctypes.c_float * (5 * vocab)).from_address(address)
    logits = torch.frombuffer(protected, dtype=torch.float32).view(5, vocab)
    given = (out, logits, labels, None, PLAIN, constants, EVERY._codes, EVERY._params)
    found = one_kernel()(*given)
    memory.check()
    for one, e in zip((*found, out), rows.same(EVERY), strict=True):
        assert_bitwise_equal(one[kept].contiguous(), e)
        assert one.count_nonzero() == e.count_nonzero()


# ---- The head ------------------------------------------------------------------------------------

TOKENS, H, V = 24, 16, 520


class Problem:
    """A head with [2, 12] tokens, some of them masked, some without an advantage."""

    def __init__(self, dtype=torch.bfloat16, vocab=V):
        random = generator(3)

        def draw(*shape, scale=1.0):
            return (scale * torch.randn(shape, generator=random)).to(dtype)

        self.leaves = [draw(2, 12, H), draw(vocab, H, scale=0.5), draw(vocab)]
        self.labels = torch.randint(0, vocab, (2, 12), generator=random)
        self.mask = torch.rand((2, 12), generator=random) < 0.75
        self.old, self.advantages, self.rollout = torch.randn(3, 2, 12, generator=random)
        self.old, self.rollout = self.old - 6, self.rollout - 6
        self.advantages[:, 3:5] = 0
        self.ref = {"ref_hidden": draw(2, 12, H), "ref_weight": draw(vocab, H, scale=0.5)}

    def run(self, old=True, **options):
        """(loss, metrics, gradients of hidden, weight and bias)."""
        hidden, weight, bias = leaves = [t.clone().requires_grad_() for t in self.leaves]
        loss, metrics = rk.linear_policy_loss(
            hidden, weight, self.labels, self.old if old else None, self.advantages, self.mask,
            bias=bias, **options,
        )  # fmt: skip
        return loss.detach(), metrics.tensor, *torch.autograd.grad(loss, leaves)

    def same(self, **options):
        """`run` by the one kernel, whose bits must be those of three."""
        found = []
        for kernel in (mock.Mock(wraps=one_kernel()), None):
            with chosen(kernel):
                found.append(self.run(**options))
            assert kernel is None or kernel.call_count > 0
        for one, three in zip(*found, strict=True):
            assert_bitwise_equal(one, three)
        return found[0]


CALLS = {
    "clip": {},
    "every term, a reference head": {"config": EVERY, "temperature": 0.7, "chunk_tokens": 7},
    "own log-probabilities": {"old": False, "config": rk.PolicyLossConfig.reinforce()},
    "sequences' means": {
        "config": rk.PolicyLossConfig.grpo(aggregation="seq-mean-token-mean", kl_coef=0.0),
        "temperature": torch.linspace(0.5, 2.0, TOKENS).view(2, 12),
        "logit_scale": 0.5,
    },
    "a given count": {"kept_tokens": TOKENS - 1, "config": rk.PolicyLossConfig.ppo()},
    "weights": {
        "config": rk.PolicyLossConfig.ppo(correction_level="token", correction_max=1.5),
        "batch_invariant": True,
        "normalizer": 5.0,
    },
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("name", CALLS)
def test_a_call(name, dtype):
    problem, options = Problem(dtype), dict(CALLS[name])
    if options.get("config", PPO).kl_coef != 0:
        options |= problem.ref
    if options.get("config", PPO).correction_level is not None:
        options["rollout_logprobs"] = problem.rollout
    *_, weight, _ = problem.same(**options)
    assert weight.abs().max() > 0


def test_packed_sequences():
    problem = Problem()
    problem.leaves[0] = problem.leaves[0].view(TOKENS, H)
    for name in ("labels", "mask", "old", "advantages"):
        setattr(problem, name, getattr(problem, name).view(-1))
    problem.same(
        cu_seqlens=torch.tensor([0, 5, 5, TOKENS]),
        config=EVERY,
        **{
            name: t.view(TOKENS, H) if name == "ref_hidden" else t
            for name, t in problem.ref.items()
        },
    )


def test_a_large_vocabulary_takes_one_launch_and_reads_logits_once_from_memory():
    for vocab, config, launches, size in (
        (LEAST, EVERY, 1, 6),
        (LEAST - 1, EVERY, 6, 10),
        # A token's gradient needs its sequence.
        (LEAST, rk.PolicyLossConfig.gspo(clip_low=0.2, clip_high=0.3), 6, 10),
    ):
        problem = Problem(vocab=vocab)
        problem.mask[:] = True
        options = {} if config.kl_coef == 0 else {"ref_logprobs": problem.old}
        with gpu_way.counted() as cost:
            problem.run(config=config, **options)
        assert cost.rows == size * TOKENS * vocab
        if size == 6:
            # What the report predicts from.
            predicted = head_traffic.traffic(TOKENS, H, vocab, TOKENS, one_kernel=True)
            assert (cost.products, cost.rows) == (predicted.products, predicted.rows)
        # The loss and its metrics; the scale of three gradients.
        assert sum(cost.kernels.values()) - 2 - 3 == launches
        assert cost.kernels["policy_rows"] == (size == 6)


def test_softcap_and_shards_take_three_kernels():
    problem = Problem(vocab=LEAST)
    with gpu_way.counted() as cost:
        problem.run(softcap=30.0)
    assert cost.kernels["policy_rows"] == 0 and cost.kernels["token_logprobs"] > 0
    rows = backends.get("cuda").kernels.rows
    assert shard.ShardRows(rows, "a group").policy_rows_for(CPU, LEAST, PLAIN) is None
