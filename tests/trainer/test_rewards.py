"""Reward functions: where they are found, what they are given, what they may return."""

import asyncio
import functools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import TrainerState

from tests.trainer.trainer_tools import (
    one_thread,  # noqa: F401
    online_trainer,
)
from tests.trainer.trainer_tools import (
    reward_table as table,
)

from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.interrupts import Interrupted
from rlhf_kernels.trainer.rewards import Rewards, weighted_sum


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
