"""What only a GPU can show, for every operation with kernels; `make gpu-check` runs this.

On both backends, CUDA and Triton. Also on `--device cpu`, under Triton's interpreter and the CUDA
emulator and with fewer repeats, where that can show it.
No default device is set here: a kernel that forgets to name one would fail.
"""

import contextlib
import functools
import warnings

import pytest
import torch

from tests.cases.faults import OPERATIONS, assert_promised
from tests.cases.layouts import layouts
from tests.kernels.gpu_calls import (
    HEADS,
    KERNELS,
    OF_TOKENS,
    ROWWISE,
    Step,
    assert_all_equal,
    compilations,
    each_call,
    each_kernel,
    example,
    moved,
    rowwise,
    run,
)
from tests.kernels.gpu_faults import FAULTS, examples, results
from tests.kernels.launchers import with_launchers

import rlhf_kernels as rk
from rlhf_kernels.core import env
from rlhf_kernels.core.row_options import RowOptions
from rlhf_kernels.core.sentinels import SHARD_IGNORED
from rlhf_kernels.kernels import backends, native, triton
from rlhf_kernels.ops import _calls
from rlhf_kernels.testing import DTYPES, assert_within_budget, to_float64

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=("cuda", "triton"))
def kernels(request, device):
    """The backend, forced."""
    name = request.param
    torch.set_default_device(None)
    with contextlib.ExitStack() as stack:
        if name == "cuda" and device.type == "cpu":
            from tests.kernels import emulated_cuda

            stack.enter_context(emulated_cuda.installed())
        elif name == "cuda" and (reason := native.unavailable_reason("cuda")) is not None:
            pytest.skip(f"backend cuda: {reason}")
        stack.enter_context(rk.use_backend(name))
        yield name


@pytest.fixture
def compiling(kernels, device):
    """For what is about compilation at run time."""
    if kernels != "triton":
        pytest.skip("compiled when it was built")
    if device.type == "cpu":
        pytest.skip("the interpreter compiles nothing")


@pytest.fixture(scope="module", autouse=True)
def _restore_default_device():
    before = torch.get_default_device()
    yield
    torch.set_default_device(before)


@pytest.fixture
def device(request):
    device = torch.device(request.config.getoption("--device"))
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, 0)
    return device


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("streams, graphs and the like of CUDA and ROCm")
    return device


def test_every_operation_has_kernels(device, kernels):
    if native.unavailable_reason("cpu") is not None:
        pytest.skip("the CPU extension, which lists the operations, is not built")
    found = triton.launchers() if kernels == "triton" else native.launchers("cuda")
    assert set(found) >= set(native.launchers("cpu"))
    if device.type != "cpu":
        assert kernels in rk.available_backends(device) and not triton.interpreted()
        with rk.use_backend("auto"):
            for name in found:
                assert backends.select(name, device) == rk.available_backends(device)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_agrees_with_the_cpu_backend_within_budget(device, function, dtype):
    # The reference of a scan is a loop over its tokens.
    large = (33_000,) if function in (rk.token_logprobs, rk.kl_divergence) else ()
    for size in (1, 127, 4099) if device.type == "cpu" else (1, 7, 127, 257, 4099, *large):
        call = example(function, torch.device("cpu"), rows=3, size=size, dtype=dtype)
        actual = run(moved(call, device))
        with rk.use_backend("reference"):
            plain = run(call)
            oracle = run(call._replace(tensors=to_float64(call.tensors)))
        # Without the extension, which some machine may not be able to build, its budget is torch's.
        other = plain
        if native.unavailable_reason("cpu") is None:
            with rk.use_backend("cpu"):
                other = run(call)
        assert len(actual) == len(oracle) == len(other) > 0
        for a, o, t, c in zip(actual, oracle, plain, other, strict=True):
            # As in test_backends: the operations' own tests know their intermediate values better.
            scale = max(1e-6, float(o.abs().max()))
            assert_within_budget(a.cpu(), o, t, scale=scale, factor=4.0)
            assert_within_budget(a.cpu(), o, c, scale=scale, factor=4.0)


@pytest.mark.parametrize("rows,size", [(70_000, 9), (3, 70_001)])
@each_kernel
def test_more_than_65535_rows_or_tokens(device, function, rows, size):
    if device.type == "cpu":
        rows, size = min(rows, 70), min(size, 5000)
    call = example(function, torch.device("cpu"), rows=rows, size=size)
    # The reference would loop over the tokens for half a minute: only where there is no other.
    with rk.use_backend("reference" if native.unavailable_reason("cpu") else "cpu"):
        expected = run(call)
    actual = run(moved(call, device))
    for a, e in zip(actual, expected, strict=True):
        unit = torch.finfo(torch.float32).eps * max(1.0, float(e.abs().max()))
        assert float((a.cpu().double() - e.double()).abs().max()) <= 64 * unit


@each_call
def test_repeats_are_bitwise_equal(device, function):
    call = example(function, device, rows=9, size=5003, dtype=torch.bfloat16)
    first = run(call)
    for _ in range(2 if device.type == "cpu" else 100):
        assert_all_equal(run(call), first)


@each_call
def test_nothing_is_read_that_was_not_written(device, function):
    """Scratch and results full of NaN before the kernels run."""
    call = example(function, device, rows=9, size=9001)
    expected = run(call)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        assert_all_equal(run(call), expected)
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("size", (151_936, 50_257))
@pytest.mark.parametrize("name", ROWWISE)
def test_a_row_does_not_depend_on_its_surroundings(device, name, size, dtype):
    rows, size = (19, size) if device.type != "cpu" else (4, size // 37)
    function, inputs = rowwise(name, rows, size, dtype, device)
    whole = function(*(t.clone() for t in inputs))
    for i in (0, rows // 2, rows - 1):
        alone = function(*(t[i : i + 1].clone() for t in inputs))
        assert_all_equal(alone, [w[i : i + 1] for w in whole])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(device)
    assert_all_equal(function(*(t[order] for t in inputs)), [w[order] for w in whole])
    _, strangers = rowwise(name, 2 * rows + 1, size, dtype, device, seed=1)
    around = [torch.cat([s, t, s]) for s, t in zip(strangers, inputs, strict=True)]
    at = slice(2 * rows + 1, 3 * rows + 1)
    assert_all_equal([a[at] for a in function(*around)], whole)
    views = [[view for _, view in layouts(t)] for t in inputs]
    for i in range(4):
        assert_all_equal(function(*(v[i] for v in views)), whole)


@each_kernel
def test_odd_layouts_change_nothing(device, function):
    found = {n: c for n, c in examples(device) if n.startswith(f"{function.__name__} 5x")}
    (_, first), *others = found.items()
    expected = first()
    assert len(others) == 3
    for _, call in others:
        assert_all_equal(call(), expected)


@functools.cache
def case_named(operation, name):
    return next(c for c in OPERATIONS[operation]() if c.name == name)


@pytest.mark.parametrize("operation, fault", FAULTS, ids=lambda v: getattr(v, "name", v))
def test_bad_data_poisons_or_raises(device, operation, fault, monkeypatch):
    expected = results(case_named(operation, fault.like), device)
    assert_promised(fault, results(fault, device), expected)
    # The device still works.
    assert torch.ones(3, device=device).sum().item() == 3
    monkeypatch.setattr(env, "CHECK", True)
    with pytest.raises((IndexError, ValueError)) as raised:
        results(fault, device)
    assert fault.error in f"{raised.type.__name__}: {raised.value}"


@each_kernel
def test_nothing_is_compiled_per_length(compiling, device, function):
    # Aligned and not: the two variants that a vocabulary may have.
    for rows, size in ((2, 64), (3, 65)):
        run(example(function, device, rows=rows, size=size))
    with compilations() as compiled:
        for rows, size in ((1, 1), (2, 16), (5, 1031), (16, 4096), (17, 129), (3, 70_001)):
            run(example(function, device, rows=rows, size=size, seed=size))
    assert compiled == []


def test_compilations_are_counted(compiling, device):
    # A combination that no other test here uses.
    logits, labels = torch.zeros(2, 64, dtype=torch.float16), torch.ones(2, dtype=torch.int32)
    with compilations() as compiled:
        rk.token_logprobs(logits.to(device), labels.to(device), softcap=9.0)
    assert compiled


def test_warmup_compiles_what_is_called(compiling, device):
    rk.warmup(device)
    with compilations() as compiled:
        for function in KERNELS:
            for dtype in DTYPES:
                run(example(function, device, rows=4, size=128, dtype=dtype))
    assert compiled == []


@each_call
def test_no_host_synchronisation(cuda, function):
    step = Step(example(function, cuda, rows=4, size=2048))
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        # That the mode works.
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=cuda).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("function", HEADS, ids=lambda f: f.__name__)
def test_a_head_waits_once_a_pass_to_count_tokens(cuda, function):
    call = example(function, cuda, rows=4, size=2048)
    del call.options["kept_tokens"]
    results = list(_calls.tensors(call.run()))
    upstream = [torch.ones_like(r) for r in results if r.requires_grad]
    passes = 1 if function is rk.linear_policy_loss else 2
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            results = [r for r in _calls.tensors(call.run()) if r.requires_grad]
            leaves = [t for t in call.tensors.values() if t.requires_grad]
            torch.autograd.grad(results, leaves, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchroniz" in str(w.message)]
    assert len(waits) == passes


def _masked_head(hidden, weight, labels, mask, **options):
    leaf = hidden.detach().requires_grad_()
    found = rk.linear_token_logprobs(leaf, weight, labels, mask, entropy=True, **options)
    (gradient,) = torch.autograd.grad(
        [found.logprobs, found.entropy], leaf, [torch.ones_like(x) for x in found[:2]]
    )
    return found.logprobs.detach(), found.entropy.detach(), gradient


def test_a_graph_of_a_head_replays_with_another_mask(device):
    """Of any number of tokens up to the one that it was captured with."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 9, 16, generator=g).to(device)
    weight, labels = torch.randn(70, 16, generator=g), torch.randint(70, (5, 9), generator=g)
    inputs = [hidden, weight.to(device), labels.to(device), torch.zeros(5, 9).bool().to(device)]
    options = {"kept_tokens": 30, "chunk_tokens": 16}
    captured = _masked_head(*inputs, **options)
    graph = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _masked_head(*inputs, **options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _masked_head(*inputs, **options)
    for kept in (0, 7, 30):
        inputs[3].zero_().view(-1)[torch.randperm(45, generator=g)[:kept].to(device)] = True
        if graph is None:
            captured = _masked_head(*inputs, **options)
        else:
            graph.replay()
        for a, e in zip(captured, _masked_head(*inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
            assert (a.abs().amax(-1) if a.dim() == 3 else a.abs()).count_nonzero() == kept


# One block to a row, two, four, five (no power of two), and eight, the most of a cluster.
@pytest.mark.parametrize("vocab", (20_000, 50_257, 128_256, 151_936, 262_144))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_one_kernel_of_a_policy_loss_has_the_bits_of_three(cuda, kernels, vocab, dtype):
    rows = backends.get(kernels).kernels.rows
    options = RowOptions(1.0, 0.0, True, SHARD_IGNORED)
    if rows.policy_rows_for(cuda, vocab, options) is None:
        pytest.skip("three kernels here")
    g = torch.Generator().manual_seed(vocab)
    tokens, width = 300, 32
    hidden, weight = torch.randn(tokens, width, generator=g), torch.randn(vocab, width, generator=g)
    labels = torch.randint(vocab, (tokens,), generator=g)
    old, advantages = torch.randn(2, tokens, generator=g)
    mask = torch.rand(tokens, generator=g) < 0.9
    operands = [t.to(cuda, dtype).requires_grad_() for t in (hidden, weight / 4)]
    given = [t.to(cuda) for t in (labels, old - 12, advantages, mask)]
    offsets = torch.tensor([0, tokens], device=cuda)
    found = []
    for config in (
        rk.PolicyLossConfig.ppo(),
        rk.PolicyLossConfig.ppo(kl_coef=0.1, entropy_coef=0.01, dual_clip=3.0),
    ):
        ref = {"ref_logprobs": given[1] + 0.1} if config.kl_coef else {}
        for one in (True, False):
            other = {} if one else {"policy_rows_for": lambda *_: None}
            with with_launchers(kernels, **other):
                loss, metrics = rk.linear_policy_loss(
                    *operands, *given, cu_seqlens=offsets, chunk_tokens=128, config=config, **ref
                )
            gradients = torch.autograd.grad(loss, operands)
            found.append((loss.detach(), metrics.tensor, *gradients))
        assert_all_equal(*found[-2:])


@each_call
def test_kernels_run_on_the_current_stream(cuda, function):
    call = example(function, cuda, rows=7, size=5003)
    expected = Step(call)()
    # Filled on the other stream, and only after a while: work on any other would see NaN or 0.
    late = moved(call, cuda)
    step = Step(late)
    stream = torch.cuda.Stream(cuda)
    # Gives the stream its memory: an allocation may wait for the device.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.no_grad():
        for t in late.tensors.values():
            t.fill_(torch.nan) if t.is_floating_point() else t.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for t, source in zip(late.tensors.values(), call.tensors.values(), strict=True):
                t.copy_(source)
        actual = step()
        done = stream.record_event()
    assert not done.query()
    torch.cuda.current_stream().wait_event(done)
    assert_all_equal(actual, expected)


@each_call
def test_cuda_graph_replays_with_new_inputs(cuda, function):
    call = example(function, cuda, rows=6, size=4100, dtype=torch.bfloat16)
    step = Step(call)
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        other = example(function, cuda, rows=6, size=4100, dtype=torch.bfloat16, seed=seed)
        expected = Step(other)()
        with torch.no_grad():
            for t, source in zip(call.tensors.values(), other.tensors.values(), strict=True):
                t.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_all_equal(captured, expected)


@each_call
def test_tensors_of_another_device_than_the_current(cuda, function):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    second = torch.device("cuda", 1)
    call = example(function, cuda, rows=5, size=4100)
    expected = run(call)
    with torch.cuda.device(0):
        actual = run(moved(call, second))
    assert all(a.device == second for a in actual)
    assert_all_equal([a.to(cuda) for a in actual], expected)


def _memory(device, gibibytes):
    if device.type != "cuda":
        pytest.skip("needs the memory of a GPU")
    if torch.cuda.get_device_properties(device).total_memory < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB")
    torch.cuda.empty_cache()


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("name", [n for n in ROWWISE if n not in OF_TOKENS])
def test_more_than_2_31_logits(device, name):
    _memory(device, 40)
    vocab = 131_075
    rows = 2**31 // vocab + 20
    function, inputs = rowwise(name, 8, vocab, torch.bfloat16, device)
    # The same eight rows throughout, so that the last, behind 2^31, have a known result.
    expected = function(*(t.clone() for t in inputs))
    last = torch.arange(rows - 8, rows, device=device) % 8
    large = [t.repeat(-(-rows // 8), *[1] * (t.dim() - 1))[:rows] for t in inputs]
    assert large[0].numel() > 2**31
    result = function(*large)
    assert_all_equal([r[-8:] for r in result], [e[last] for e in expected])
    assert_all_equal([r[:8] for r in result], expected)


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("name", OF_TOKENS)
def test_strides_beyond_2_31(device, name):
    _memory(device, 40)
    function, inputs = rowwise(name, 2, 5000, torch.bfloat16, device)
    expected = function(*(t.clone() for t in inputs))
    far = []
    for t in inputs:
        store = torch.empty(2**31 + 5000 + 7, dtype=t.dtype, device=device)
        far.append(store.as_strided(t.shape, (2**31 + 7, 1)).copy_(t))
    assert_all_equal(function(*far), expected)


@pytest.mark.xdist_group("memory")
def test_more_than_2_31_logits_of_a_head(device):
    """In one chunk, whose gradient has 16 bits: the same eight tokens throughout."""
    _memory(device, 40)
    vocab, width = 131_075, 16
    tokens = 2**31 // vocab + 20
    g = torch.Generator().manual_seed(0)
    eight = torch.randn(8, width, generator=g).to(device, torch.bfloat16)
    weight = torch.randn(vocab, width, generator=g).to(device, torch.bfloat16)
    labels = torch.randint(vocab, (8,), generator=g).to(device)

    def run(hidden, labels):
        leaf = hidden.requires_grad_()
        found = rk.linear_token_logprobs(
            leaf, weight, labels, entropy=True, chunk_tokens=len(labels), kept_tokens=len(labels)
        )
        (gradient,) = torch.autograd.grad(found.logprobs.sum() + found.entropy.sum(), leaf)
        return found.logprobs.detach(), found.entropy.detach(), gradient

    expected = run(eight.clone(), labels)
    order = torch.arange(tokens, device=device) % 8
    assert tokens * vocab > 2**31
    for found, e in zip(run(eight[order], labels[order]), expected, strict=True):
        # The library may take another order of sums for so many tokens.
        torch.testing.assert_close(found, e[order], rtol=2e-2, atol=1e-3)
        assert e.abs().max() > 0


def _policy_step(logits, labels, old, advantages, mask):
    new = rk.token_logprobs(logits * 1, labels, temperature=0.9, entropy=True)
    loss = rk.policy_loss(new.logprobs, old, advantages, mask=mask, entropy=new.entropy).loss
    return loss + rk.kl_penalty(new.logprobs, old, estimator="k3").mean()


def _critic_step(rewards, values, old, mask):
    a = rk.gae(rewards, old, mask=mask, gamma=0.99, lam=0.9, whiten=True)
    loss = rk.value_loss(values * 1, old, a.returns, mask=mask, clip_range=0.2).loss
    return loss + (rk.whiten(a.returns, mask=mask) * a.advantages).mean()


def _divergence_step(logits, ref):
    return rk.kl_divergence(logits * 1, ref, temperature=0.9).mean()


# Step -> (what its tensors are, which of them takes a gradient, operations that it needs).
STEPS = {
    _policy_step: (
        ("logits", "labels", "tokens", "tokens", "mask"),
        0,
        {"token_logprobs", "policy_loss", "kl_penalty"},
    ),
    _critic_step: (("tokens",) * 3 + ("mask",), 1, {"gae", "value_loss", "whiten"}),
    _divergence_step: (("logits", "logits"), 0, {"kl_divergence"}),
}


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.__name__)
def test_compiles_once_for_all_lengths(device, kernels, step):
    from torch._dynamo.testing import CompileCounterWithBackend

    kinds, leaf, needed = STEPS[step]
    if missing := needed - set(backends.get(kernels).launchers):
        pytest.skip(f"no kernels yet for {', '.join(sorted(missing))}")
    torch._dynamo.reset()
    # Inductor's C++ would take a minute here, and would show nothing about our kernels.
    counter = CompileCounterWithBackend("aot_eager" if device.type == "cpu" else "inductor")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows, cols, vocab in ((3, 5, 11), (4, 9, 33), (5, 17, 65), (6, 40, 700), (7, 3, 4111)):
        g = torch.Generator().manual_seed(vocab)
        make = {
            "logits": lambda s, g=g, v=vocab: torch.randn(*s, v, generator=g),
            "labels": lambda s, g=g, v=vocab: torch.randint(0, v, s, generator=g),
            "tokens": lambda s, g=g: torch.randn(s, generator=g),
            "mask": lambda s, g=g: torch.rand(s, generator=g) < 0.8,
        }
        inputs = [make[k]((rows, cols)).to(device) for k in kinds]
        inputs[leaf].requires_grad_()
        actual, expected = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(actual, expected)
        (a,), (e,) = (torch.autograd.grad(x, inputs[leaf]) for x in (actual, expected))
        torch.testing.assert_close(a, e)
        assert e.abs().max() > 0
    assert counter.frame_count <= 2
