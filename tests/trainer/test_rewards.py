"""Reward functions: where they are found, what they are given, what they may return."""

import asyncio
import codecs
import functools
import gc
import io
import math
import signal
import sys
import textwrap
import warnings
from decimal import Decimal
from fractions import Fraction
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerState

from tests.trainer.trainer_tools import (
    one_thread,  # noqa: F401
    online_trainer,
)

import rlhf_kernels as rk
from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.interrupts import Interrupted
from rlhf_kernels.trainer.reward_functions import load_reward
from rlhf_kernels.trainer.rewards import Rewards, weighted_sum


def table(*functions, count=3, columns=None, weights=None):
    """Rewards of `count` samples."""
    rewards = Rewards(list(functions), weights or [1.0] * len(functions))
    prompts = [f"p{i}" for i in range(count)]
    completions = [f"c{i}" for i in range(count)]
    return rewards(prompts, completions, [[i] for i in range(count)], columns or {})


def returns(value):
    """A function called `score` that returns the value."""

    def score(completions, **_):
        return value

    return score


# --- results -----------------------------------------------------------------------------------

GOOD = [
    ([1, 0.5, None], [1.0, 0.5, math.nan]),
    ((1, 2, 3), [1, 2, 3]),
    ([True, False, True], [1, 0, 1]),
    (np.array([1.0, 2.5, -3.0]), [1, 2.5, -3]),
    (np.array([1, 2, 3], dtype=np.int8), [1, 2, 3]),
    (np.array([True, False, True]), [1, 0, 1]),
    (np.array([1.5, None, 2], dtype=object), [1.5, math.nan, 2]),
    (np.array([1.5, 2, 3], dtype=np.float16), [1.5, 2, 3]),
    ([np.float16(1.5), np.int64(2), np.bool_(True)], [1.5, 2, 1]),
    ([Decimal("1.5"), Fraction(1, 2), 3], [1.5, 0.5, 3]),
    (torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [1, 2, 3]),
    (torch.tensor([1.0, 2.5, 3.0], dtype=torch.bfloat16), [1, 2.5, 3]),
    (torch.tensor([True, False, True]), [1, 0, 1]),
    ([torch.tensor(1.0), np.array(2.0), 3], [1, 2, 3]),
    # The largest of fp32, and one that it rounds to 0.
    ([3.4028234e38, -3.4028234e38, 1e-60], [3.4028234663852886e38, -3.4028234663852886e38, 0]),
]


@pytest.mark.parametrize(("value", "expected"), GOOD, ids=range(len(GOOD)))
def test_numbers_of_every_kind(value, expected):
    # A second function, since no sample may be left without any score.
    found = table(returns(value), returns([0.0] * 3))[:, 0]
    wanted = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


BAD = [
    (1.0, "a list of 3 rewards, found float 1.0"),
    (np.float32(1.0), "a list of 3 rewards, found float32"),
    (torch.tensor(1.0), r"a list of 3 rewards, found Tensor of \(\)"),
    (torch.ones(3, 1), r"a list of 3 rewards, found Tensor of \(3, 1\)"),
    (np.ones((1, 3)), r"a list of 3 rewards, found ndarray of \(1, 3\)"),
    (torch.ones(3).to_sparse(), r"a list of 3 rewards, found Tensor of \(3,\)"),
    (torch.ones(3, device="meta"), r"a list of 3 rewards, found Tensor of \(3,\)"),
    (None, "a list of 3 rewards, found None"),
    ("abc", "a list of 3 rewards, found str 'abc'"),
    (b"abc", "a list of 3 rewards, found bytes"),
    ({0: 1.0, 1: 1.0, 2: 1.0}, "a list of 3 rewards, found dict"),
    ({1.0, 2.0, 3.0}, "a list of 3 rewards, found set"),
    ((x for x in (1.0, 2.0, 3.0)), "a list of 3 rewards, found generator"),
    (map(float, [1, 2, 3]), "a list of 3 rewards, found map"),
    (range(3), "a list of 3 rewards, found range"),
    ([1.0, 2.0], "3 rewards, found 2"),
    ([1.0] * 4, "3 rewards, found 4"),
    ([], "3 rewards, found 0"),
    (np.ones(2), "3 rewards, found 2"),
    (["1.0"] * 3, "numbers or None, found str '1.0' for sample 0"),
    (np.array(["1", "2", "3"]), "numbers or None, found str '1' for sample 0"),
    ([1.0, [1.0], 1.0], r"numbers or None, found list \[1.0\] for sample 1"),
    ([1.0, (1.0,), 1.0], "numbers or None, found tuple"),
    ([1.0, {"reward": 1.0}, 1.0], "numbers or None, found dict"),
    ([1.0, torch.ones(1), 1.0], "numbers or None, found Tensor"),
    ([1.0, 1.0, 1j], "numbers or None, found complex 1j for sample 2"),
    (torch.ones(3, dtype=torch.complex64), "numbers or None, found complex"),
    (np.array([1, 2, 3], dtype="datetime64[s]"), "numbers or None, found datetime"),
    ([1.0, np.timedelta64(1, "s"), 1.0], "numbers or None, found timedelta64"),
    ([1.0, math.nan, 1.0], "finite rewards, found nan for sample 1"),
    ([1.0, math.inf, 1.0], "finite rewards, found inf for sample 1"),
    ([-math.inf, 1.0, 1.0], "finite rewards, found -inf for sample 0"),
    ([1e39, 1.0, 1.0], r"finite rewards, found 1e\+39 for sample 0"),
    ([1.0, 1.0, -1e300], r"finite rewards, found -1e\+300 for sample 2"),
    ([10**400, 1.0, 1.0], "finite rewards, found 1000"),
    ([Decimal("1e400"), 1.0, 1.0], r"finite rewards, found 1E\+400"),
    ([Decimal("sNaN"), 1.0, 1.0], "finite rewards, found sNaN"),
    (np.array([1.0, np.inf, 1.0], dtype=np.float16), "finite rewards, found inf"),
    (torch.tensor([1.0, math.nan, 1.0]), "finite rewards, found nan"),
    (torch.tensor([1.0, 1e200, 1.0], dtype=torch.float64), r"finite rewards, found 1e\+200"),
]


@pytest.mark.parametrize(("value", "match"), BAD, ids=range(len(BAD)))
def test_anything_else_names_the_function(value, match):
    with pytest.raises(UserError, match=f"^score: expected {match}"):
        table(returns(value))


def test_coroutines_are_awaited_together_also_where_a_loop_runs():
    order = []

    async def first(completions, **_):
        order.append("first begins")
        await asyncio.sleep(0.05)
        order.append("first ends")
        return [1.0] * len(completions)

    class Second:
        async def __call__(self, completions, **_):
            order.append("second begins")
            await asyncio.sleep(0)
            return [2.0 if c == "c1" else None for c in completions]

    def third(completions, **_):
        return [3.0] * len(completions)

    functions = (first, Second(), third, functools.partial(first, more=1))
    expected = [[1, math.nan, 3, 1], [1, 2, 3, 1], [1, math.nan, 3, 1]]
    found = table(*functions)
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    assert order.index("second begins") < order.index("first ends")

    async def inside():
        return table(*functions)

    torch.testing.assert_close(asyncio.run(inside()), found, equal_nan=True)


def test_asynchronous_rewards_keep_their_loop():
    """A client that is kept between calls belongs to the loop of its first call."""
    lock = asyncio.Lock()
    loops = set()

    async def score(completions, **_):
        async with lock:
            loops.add(asyncio.get_running_loop())
            await asyncio.sleep(0)
        return [1.0] * len(completions)

    for _ in range(3):
        table(score, score)
    assert len(loops) == 1


@pytest.mark.parametrize("error", [ValueError("bad row"), SystemExit(0), asyncio.CancelledError()])
@pytest.mark.parametrize("waits", [False, True])
def test_a_function_that_raises_names_the_row(error, waits):
    if waits:

        async def score(completions, **_):
            await asyncio.sleep(0)
            if "c2" in completions:
                raise error
            return [1.0] * len(completions)
    else:

        def score(completions, **_):
            if "c2" in completions:
                raise error
            return [1.0] * len(completions)

    match = rf"^score: raised .*{type(error).__name__}.* at sample 2, prompt 'p2', completion 'c2'"
    with pytest.raises(UserError, match=match):
        table(score, count=5)


def test_a_signal_is_not_the_functions_exit():
    def score(completions, **_):
        raise Interrupted

    with pytest.raises(Interrupted):
        table(score)


def test_functions_leave_the_process_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    threads = torch.get_num_threads()
    change = """
        import os, torch
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(torch.get_num_threads() + 1)
        os.chdir("elsewhere")
        torch.set_default_device("meta")
        torch.set_float32_matmul_precision("medium")
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
    """
    change = textwrap.dedent(change)
    body = textwrap.indent(change, "    ")
    code = f"{change}\ndef score(completions, **_):\n{body}\n    return [1.0] * len(completions)\n"
    (tmp_path / "changing_rewards.py").write_text(code)
    try:
        function = load_reward("changing_rewards:score")
        assert table(function).tolist() == [[1.0]] * 3
        assert torch.get_default_dtype() is torch.float32
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == threads
        assert Path.cwd() == tmp_path
        assert torch.get_default_device() == torch.device("cpu")
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")
        torch.set_autocast_enabled("cpu", False)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.set_num_threads(threads)


def test_functions_leave_the_switches_of_numbers_as_they_were():
    def score(completions, **_):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_flush_denormal(True)
        torch.backends.mkldnn.enabled = False
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.enable_flash_sdp(False)
        warnings.simplefilter("ignore")
        torch.nn.modules.module.register_module_forward_hook(lambda *given: given[-1] * 0)
        rk.use_backend("reference")
        return [1.0] * len(completions)

    tiny = torch.full((100_000,), torch.finfo(torch.float32).tiny)
    backend = rk.use_backend.current()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert table(score).tolist() == [[1.0]] * 3
        with pytest.warns(UserWarning, match="still told"):
            warnings.warn("still told", stacklevel=1)
    assert not torch.are_deterministic_algorithms_enabled()
    assert (tiny / 2).count_nonzero() == len(tiny)
    assert torch.backends.mkldnn.enabled
    assert rk.use_backend.current() == backend
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.nn.Identity()(tiny).count_nonzero() == len(tiny)


def _nothing(result):
    with torch._C.DisableTorchFunction():
        return torch.zeros_like(result) if isinstance(result, torch.Tensor) else result


class _Nothing(TorchFunctionMode):
    """Every function of torch gives zeros."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _nothing(func(*args, **(kwargs or {})))


class _Dispatched(TorchDispatchMode):
    """Every kernel of torch gives zeros."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _nothing(func(*args, **(kwargs or {})))


MODES = {
    "function": _Nothing,
    "dispatch": _Dispatched,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(torch.zeros_like, id),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("kinds", [*((kind,) for kind in MODES), tuple(MODES)], ids=str)
def test_functions_leave_no_mode_entered(kinds):
    kept = []

    def score(completions, **_):
        for kind in kinds * 2:
            kept.append(MODES[kind]())
            kept[-1].__enter__()
        return [1.0] * len(completions)

    value = torch.full((3,), 2.0, requires_grad=True)
    # A mode of the caller's own stays.
    doubled = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2)
    with doubled, torch.device("cpu"):
        assert table(score).tolist() == [[1.0]] * 3
        (value * value).sum().backward()
        assert torch.ones(1).device.type == "cpu"
    assert value.grad.tolist() == [8.0] * 3
    assert len(kept) == 2 * len(kinds)


def test_a_function_that_stays_in_inference_mode_is_named():
    kept = []

    def score(completions, **_):
        kept.append(torch.inference_mode())
        kept[-1].__enter__()
        return [1.0] * len(completions)

    try:
        with pytest.raises(UserError, match=r"score.*entered torch.inference_mode\(\)"):
            table(score)
    finally:
        kept.clear()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("name", ("fp32_precision", "cuda.matmul.fp32_precision"))
def test_functions_may_use_the_newer_names_of_precision(tmp_path, monkeypatch, name):
    """After them torch refuses to be asked by the older one."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("a torch without these names")
    monkeypatch.chdir(tmp_path)
    holder = attrgetter(name.rpartition(".")[0])(torch.backends) if "." in name else torch.backends
    before = holder.fp32_precision
    change = f"torch.backends.{name} = 'tf32'\n"
    code = f"import torch\n{change}def score(completions, **_):\n    {change}"
    (tmp_path / "precise_rewards.py").write_text(f"{code}    return [1.0] * len(completions)\n")
    try:
        assert table(load_reward("precise_rewards:score")).tolist() == [[1.0]] * 3
        assert holder.fp32_precision == before
        assert torch.get_float32_matmul_precision() == "highest"
        # A program that has used them before, whose choice stays.
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert table(load_reward("precise_rewards:score")).tolist() == [[1.0]] * 3
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        holder.fp32_precision = before


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_functions_neither_close_nor_keep_a_standard_stream(capsys, stream, waits):
    def done():
        print("told", file=getattr(sys, stream))
        getattr(sys, stream).close()
        setattr(sys, stream, io.StringIO())
        print("lost", file=getattr(sys, stream))

    def score(completions, **_):
        done()
        return [1.0] * len(completions)

    async def later(completions, **_):
        done()
        return [1.0] * len(completions)

    before = getattr(sys, stream)
    assert table(later if waits else score).tolist() == [[1.0]] * 3
    assert getattr(sys, stream) is before and not before.closed
    print("after", file=getattr(sys, stream))
    assert getattr(capsys.readouterr(), stream[3:]).split() == ["told", "after"]


@pytest.mark.parametrize("waits", [False, True])
def test_functions_may_wrap_a_standard_stream(waits):
    """As many do for UTF-8; the wrapper closes what it wraps when it goes."""
    below = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    before, sys.stdout = sys.stdout, below

    def done():
        sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
        print("told", flush=True)
        sys.stdout = codecs.getwriter("utf-8")(sys.stdout.detach())
        print("again", flush=True)

    def score(completions, **_):
        done()
        return [1.0] * len(completions)

    async def later(completions, **_):
        done()
        return [1.0] * len(completions)

    try:
        assert table(later if waits else score).tolist() == [[1.0]] * 3
        gc.collect()
        assert sys.stdout is below and not below.closed and not below.buffer.closed
        print("after", flush=True)
        assert below.buffer.getvalue().split() == [b"told", b"again", b"after"]
    finally:
        sys.stdout = before


def test_functions_leave_the_handlers_of_signals(monkeypatch):
    def score(completions, **_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return [1.0] * len(completions)

    def mine(*_):
        pass

    before = {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        table(score)
        assert [signal.getsignal(number) for number in before] == [mine, mine]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_open_autocast_leaves_no_old_casts_of_the_weights():
    def score(completions, **_):
        torch.autocast("cpu", dtype=torch.float16).__enter__()
        return [1.0] * len(completions)

    lower = torch.get_autocast_dtype("cpu")
    table(score)
    assert torch.get_autocast_dtype("cpu") is lower
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(1, 4)
    sums = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums.append((x @ weight).sum().item())
        with torch.no_grad():
            weight.mul_(2)
    assert sums == [16.0, 32.0]


class _Own(BaseException):
    """What `except Exception` does not catch, as pytest's and asyncio's."""


@pytest.mark.parametrize("waits", [False, True])
def test_exceptions_of_every_base_name_the_function(waits):
    def score(completions, **_):
        raise _Own("mine")

    async def later(completions, **_):
        raise _Own("mine")

    with pytest.raises(UserError, match=r"raised .*_Own: mine"):
        table(later if waits else score)


def test_a_function_that_raises_on_no_row_alone():
    def score(completions, **_):
        if len(completions) > 1:
            raise ConnectionError("no server")
        return [1.0]

    match = r"^score: raised ConnectionError: no server \(test_rewards.py, line \d+\) in a"
    with pytest.raises(UserError, match=match):
        table(score, count=4)


# --- arguments ---------------------------------------------------------------------------------


def test_functions_are_given_what_they_name():
    state = TrainerState(global_step=7, max_steps=9)
    seen = {}

    def some(completions, answer):
        seen["some"] = (completions, answer)
        return [1.0] * len(completions)

    def none():
        return [1.0] * 3

    def with_state(trainer_state, log_metric=None, unknown=5):
        seen["state"] = (trainer_state.global_step, trainer_state.max_steps, unknown)
        return [1.0] * 3

    def everything(**columns):
        seen["everything"] = set(columns)
        return [1.0] * 3

    rewards = Rewards([some, none, with_state, everything], [1.0] * 4, state=state)
    rewards(["p"] * 3, ["a", "b", "c"], [[1]] * 3, {"answer": [1, 2, 3], "prompts": "hidden"})
    assert seen["some"] == (["a", "b", "c"], [1, 2, 3]) and seen["state"] == (7, 9, 5)
    names = {"prompts", "completions", "completion_ids", "answer", "trainer_state"}
    assert seen["everything"] == names | {"log_extra", "log_metric"}


def test_a_column_that_no_row_of_a_batch_has_is_none():
    """What a function is called with does not depend on the order of the rows."""
    seen = []

    def score(completions, answer, hint="unset"):
        seen.append((answer, hint))
        return [1.0] * len(completions)

    rewards = Rewards([score], [1.0])
    rewards.check(["answer", "hint"])
    rewards(["p"] * 2, ["a", "b"], [[1]] * 2, {"answer": [1, None], "hint": [None, 2]})
    rewards(["p"] * 2, ["a", "b"], [[1]] * 2, {})
    assert seen == [([1, None], [None, 2]), ([None, None], [None, None])]


def test_a_missing_column_is_named():
    def score(completions, solution, **_):
        return [1.0] * len(completions)

    told = r"^score: expected a column 'solution' in the data, found answer; the trainer's own "
    with pytest.raises(UserError, match=told + "arguments are prompts, completions, "):
        Rewards([score], [1.0]).check(["answer"])
    with pytest.raises(UserError, match="found none beside what it trains on; the trainer's own"):
        Rewards([score], [1.0]).check([])
    Rewards([score, lambda **_: [], functools.partial(score, solution=[])], [1.0] * 3).check(
        ["solution"]
    )


def test_functions_cannot_change_the_data_nor_each_other():
    message = {"role": "user", "content": "q"}
    prompts, ids = [[message]], [[1, 2]]
    columns = {"meta": [{"a": [1]}], "array": [np.ones(2)]}

    def spoil(prompts, completions, completion_ids, meta, array, trainer_state):
        prompts[0][0]["content"] = "changed"
        completions[0] = "changed"
        completion_ids[0].append(3)
        meta[0]["a"].clear()
        array[0][:] = 0
        trainer_state.global_step = 99
        prompts.clear()
        return [1.0]

    def look(prompts, completions, completion_ids, meta, array, trainer_state):
        same = (prompts, completions, completion_ids, meta) == (
            [[{"role": "user", "content": "q"}]], ["c"], [[1, 2]], [{"a": [1]}],
        )  # fmt: skip
        return [float(same and array[0].sum() == 2 and trainer_state.global_step == 0)]

    found = Rewards([spoil, look], [1.0, 1.0])(prompts, ["c"], ids, columns)
    assert found.tolist() == [[1.0, 1.0]]
    assert message["content"] == "q" and ids == [[1, 2]] and columns["meta"] == [{"a": [1]}]


def test_equal_names_are_told_apart():
    a, b = returns([1.0] * 3), returns([2.0] * 3)
    rewards = Rewards([a, b, lambda **_: [], functools.partial(a), b], [1.0] * 5)
    assert rewards.names == ["score", "score_2", "<lambda>", "score_3", "score_4"]


def test_sums_that_fp32_does_not_hold_are_refused():
    big = torch.tensor([[1.0], [3e38]])
    with pytest.raises(UserError, match=r"reward_weights: expected a finite sum.* for sample 1"):
        weighted_sum(big, [10.0])
    assert weighted_sum(big, [-1.0]).tolist() == [-1.0, pytest.approx(-3e38)]


def test_state_and_logs_of_a_run():
    trainer = online_trainer("grpo", kl_coef=0.0, num_generations=4, num_samples=5, total_steps=4)
    states = []

    def score(completions, trainer_state, log_metric, log_extra):
        states.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
        log_metric("length", len(completions))
        log_metric("length", torch.tensor(0.0))
        log_extra("upper", [c.upper() for c in completions])
        return [float(len(c)) for c in completions]

    trainer.sample.rewards = Rewards([score], [1.0])
    rows = [trainer.step() for _ in range(2)]
    prompts = len(trainer.sample.task.train)
    assert states == [(0, 4, 0.0), (1, 4, 8 / prompts)]
    assert [row["logged/length"] for row in rows] == [16.0, 16.0]
    found = trainer.evaluate()
    assert found["logged"] == {"upper": [t.upper() for t in found["texts"][:5]]}
    # What evaluation logged is not the next step's.
    assert trainer.step()["logged/length"] == 16.0

    def bad(completions, log_metric, **_):
        log_metric("x", math.nan)

    with pytest.raises(UserError, match=r"^bad: log_metric 'x': expected a finite number"):
        table(bad)
    with pytest.raises(UserError, match=r"^short: log_extra 'x': expected 3 values, found 1"):

        def short(log_extra, **_):
            log_extra("x", [1])

        table(short)
