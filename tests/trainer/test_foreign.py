"""What a reward function, or its import, does to the process: undone, or said."""

import codecs
import gc
import io
import signal
import sys
import textwrap
import warnings
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.trainer_tools import (
    one_thread,  # noqa: F401
)
from tests.trainer.trainer_tools import (
    reward_table as table,
)

import rlhf_kernels as rk
from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.reward_functions import load_reward


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
