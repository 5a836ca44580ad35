"""What the Triton kernels promise, checked without a GPU.

They compile for every GPU we name without spilling; they launch what their design says, and are not
compiled anew for another length or coefficient.
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.cases import combinations
from tests.run_python import run_python

from rlhf_kernels import PolicyLossConfig
from rlhf_kernels.kernels import backends

pytest.importorskip("triton", reason="the package triton is not installed (it needs Linux)")

TOOL = ("-m", "tools.triton_aot")
ROOT = str(Path(__file__).parents[2])
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def run_tool(directory: Path, *arguments: str) -> dict:
    out = directory / "out.json"
    done = run_python(*TOOL, "--json", str(out), *arguments, check=False, PYTHONPATH=ROOT)
    assert out.exists(), f"{done.stdout}\n{done.stderr}"
    result = json.loads(out.read_text())
    assert done.returncode == (1 if result["problems"] else 0)
    return result


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Every launch of every case, by the real launchers with the tiles of a GPU."""
    return run_tool(tmp_path_factory.mktemp("launches"), "--record", "--target", "sm_90")


def values(variants: list[tuple[str, str]]) -> set[tuple[str, str, bool]]:
    """What (kernel, label) says of its arguments, and what it does not say but others do."""
    said: dict[str, set[str]] = {}
    for kernel, label in variants:
        said.setdefault(kernel, set()).update(label.split())
    return {(k, word, word in label.split()) for k, label in variants for word in said[k]}


# With the compiler of each vendor every value of every argument; for its other GPUs the largest
# kernels of each dtype.
@pytest.mark.parametrize(
    "target, extent",
    [("gfx942", "--cover"), ("sm_90", "--cover"), ("sm_80", "--brief"), ("sm_100", "--brief")],
)
def test_every_kernel_compiles_without_spills(target, extent, tmp_path):
    result = run_tool(tmp_path, "--target", target, "--processes", "1", extent)
    assert result["problems"] == []
    resources = result["resources"]
    assert {r["kernel"] for r in resources} == set(result["kernels"])
    assert all(r["registers"] > 0 for r in resources)
    recorded, compiled = result["variants"], [(r["kernel"], r["variant"]) for r in resources]
    # The slow test compiles combinations.
    assert len(compiled) < len(recorded) / 2
    missed = values(recorded) - values(compiled)
    if extent == "--brief":
        missed = {(k, word, has) for k, word, has in missed if has and ":*" in word}
    assert missed == set()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_combination_compiles_without_spills(target, tmp_path):
    assert run_tool(tmp_path, "--full", "--target", target)["problems"] == []


def test_the_gate_refuses_bad_kernels(tmp_path):
    """Each kernel of triton_bad_kernels.py is refused for what is wrong with it."""
    cases = "tests.kernels.triton_bad_kernels"
    result = run_tool(tmp_path, "--cases", cases, "--target", "sm_90", "--target", "gfx942")
    problems = [p.removeprefix("triton_bad_kernels.") for p in result["problems"]]
    for kernel, target, reason in (
        ("spilling_kernel", "sm_90", "spilled"),
        ("spilling_kernel", "gfx942", "spilled"),
        ("crowding_kernel", "sm_90", "1 blocks a multiprocessor, expected 2"),
        ("narrow_kernel", "sm_90", "loads of 32 bits from aligned rows"),
        ("narrow_kernel", "gfx942", "loads of 32 bits from aligned rows"),
        ("broken_kernel", "sm_90", "does not compile: CompilationError"),
        ("atomic_kernel", "sm_90", "1 atomic operations"),
        ("atomic_kernel", "gfx942", "1 atomic operations"),
    ):
        start = f"{kernel} on {target}: "
        assert any(p.startswith(start) and reason in p for p in problems), (start, problems)
    assert "forgotten_kernel is never launched" in problems
    # A helper is no kernel.
    assert not any("helper" in name for name in result["kernels"])
    # What two options do together is seen where every two values meet.
    assert not any(p.startswith("meeting_kernel") for p in problems)
    result = run_tool(tmp_path, "--cases", cases, "--target", "sm_90", "--full")
    found = [p for p in result["problems"] if "meeting_kernel on sm_90" in p and "spilled" in p]
    assert found and all("A=True B=True" in p for p in found)


def test_every_two_values_of_two_options_meet():
    sizes = {"a": 5, "b": 3, "c": 4, "d": 2, "e": 6}
    axes = {name: tuple(range(size)) for name, size in sizes.items()}
    rows = list(combinations.pairs(**axes))
    for a, b in itertools.combinations(sizes, 2):
        assert len({(row[a], row[b]) for row in rows}) == sizes[a] * sizes[b]
    # Not a product in disguise: the two largest axes need 30.
    assert len(rows) <= 45
    assert rows == list(combinations.pairs(**axes))


def test_main_kernels_keep_to_the_limits_of_their_machine_code():
    done = run_python("-m", "tools.triton_sass", "--ours", check=False, PYTHONPATH=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("| ours | sm_90 |") == done.stdout.count("| ours | sm_100 |") == 11


def test_what_exceeds_a_limit_is_reported():
    script = """
from tools.triton_sass import POINTS, Figures
point = POINTS[0]
issued, registers, in_flight = point.limit
for figures in (
    Figures(issued, 1.0, registers, 4, 6, in_flight),
    Figures(issued + 0.1, 1.0, registers + 1, 4, 6, in_flight - 8),
):
    print(len(figures.problems(point, 90)))
"""
    done = run_python("-c", script, PYTHONPATH=ROOT)
    assert done.stdout.split() == ["0", "3"]


def test_every_operation_is_recorded(recorded):
    """An operation whose example launches nothing would be served by the reference."""
    assert recorded["problems"] == []
    launched = {name.split("/")[1] for name, passes in recorded["launches"].items() if passes[0]}
    operators = set(LAUNCHES)
    assert operators <= launched
    # The losses share a backward.
    assert operators | {"loss"} == {
        op.removesuffix("_inplace").removesuffix("_into").removesuffix("_backward")
        for op in backends.triton.launchers()
    }


#: Kernels that an operation launches, forward and backward, whatever its options but for `extras`.
LAUNCHES = {
    "token_logprobs": (
        ["logprobs.partial_kernel", "logprobs.combine_kernel"],
        ["logprobs_backward.coefficients_kernel", "logprobs_backward.backward_kernel"],
    ),
    "token_logprobs_support": (
        ["support.check_kernel", "support.rows_kernel"],
        ["support.gradient_kernel"],
    ),
    # Two sums: the gradients of hidden, and of weight and bias.
    "linear_token_logprobs_support": (
        ["support.check_kernel", "support_products.products_kernel", "support.rows_kernel"],
        ["support.gradient_kernel", "support_products.sums_kernel", "support_products.sums_kernel"],
    ),
    "kl_divergence": (
        ["kl.partial_kernel", "kl.combine_kernel"],
        ["kl.coefficients_kernel", "kl.backward_kernel"],
    ),
    "kl_penalty": (["kl_penalty.penalty_kernel"], ["kl_penalty.penalty_kernel"]),
    "gae": (["advantages.scan_kernel"], []),
    "general_gae": (["advantages_general.general_kernel"], []),
    "discounted_returns": (["advantages.scan_kernel"], []),
    "ppo_advantages": (["advantages.scan_kernel"], []),
    "whiten": (
        [
            "advantages_moments.moments_kernel",
            "advantages_moments.combine_kernel",
            "advantages_moments.apply_kernel",
        ],
        [],
    ),
    "group_advantages": (["advantages_groups.group_kernel"], []),
    "mismatch_weights": (
        ["mismatch.tile_kernel", "mismatch_judge.judge_kernel", "mismatch.finish_kernel"],
        [],
    ),
    "policy_loss": (
        ["policy.policy_kernel", "policy_combine.combine_kernel"],
        ["policy_backward.backward_kernel"],
    ),
    "value_loss": (
        ["value.value_kernel", "value.combine_kernel"],
        ["policy_backward.backward_kernel"],
    ),
}
SCANS = ("gae", "discounted_returns", "ppo_advantages")


def extras(op: str, name: str) -> tuple[list[str], list[str]]:
    """What the call `name` launches before and behind the kernels that `op` always launches."""
    if op == "group_advantages":
        return [], ["advantages_groups.batch_kernel"] if "scale=batch" in name else []
    if op == "kl_divergence":
        of_mixture = ("constants_kernel", "mixture_kernel", "mixture_combine_kernel")
        return [], [f"kl_mixture.{kernel}" for kernel in of_mixture] if "jsd" in name else []
    if op == "general_gae":
        return ["advantages_general.offsets_kernel"] if "packed" in name else [], []
    if op not in SCANS:
        return [], []
    # A row of several tiles, or rows of unknown length.
    several = "long" in name or "packed" in name
    chosen = re.search(r"whiten=(True|False)", name)
    # The default, but for what `warmup` runs.
    default = op == "ppo_advantages" or (op, name.split("/")[0]) == ("gae", "example")
    whitens = chosen[1] == "True" if chosen else default
    return (
        ["advantages.aggregate_kernel"] if several else [],
        ["advantages_moments.combine_kernel", "advantages_moments.apply_kernel"] if whitens else [],
    )


def expected_launches(op: str, name: str) -> tuple[list[str], list[str]]:
    """What the call `name` launches, forward and backward."""
    forward, backward = LAUNCHES[op]
    if not op.endswith("_loss"):
        before, behind = extras(op, name)
        return before + forward + behind, backward
    *_, last = name.split("/")
    options = dict(re.findall(r"(\w+)=\(?([^,]+)", last))
    # A preset has no list of options, but its name.
    preset = getattr(PolicyLossConfig, last)() if hasattr(PolicyLossConfig, last) else None
    level = preset.ratio_level if preset else options.get("ratio_level", "token")
    aggregation = preset.aggregation if preset else options.get("aggregation")
    by_sequence = aggregation == "seq-mean-token-mean" or level != "token"
    sums = options.get("correction") in ("'sequence'", "'geometric'") or "opsm" in last
    if by_sequence or sums:
        forward = ["_tokens.statistics_kernel", *forward]
    if level in ("sequence", "clipped-sequence"):
        forward = [*forward[:-1], "policy.pooled_kernel", forward[-1]]
    return forward, [] if options.get("grad") == "False" else backward


@pytest.mark.parametrize("op", LAUNCHES)
def test_launches(op, recorded):
    seen = {
        name: tuple([kernel for kernel, _ in part] for part in passes)
        for name, passes in recorded["launches"].items()
        if op in name.split("/")
    }
    assert f"example/{op}/dtype=float32" in seen
    wrong = {n: launches for n, launches in seen.items() if launches != expected_launches(op, n)}
    assert wrong == {}


@pytest.mark.parametrize("op", LAUNCHES)
def test_nothing_is_compiled_anew(op, recorded):
    """One kernel for all lengths, batch sizes, strides, temperatures and coefficients."""
    keys: dict[tuple[str, int, int, str], dict[str, list[str]]] = {}
    calls: dict[str, int] = {}
    for name, passes in recorded["launches"].items():
        if name.startswith(f"sweep/{op}/"):
            kind = name.split("/")[2]
            calls[kind] = calls.get(kind, 0) + 1
            # A kernel that runs forward and backward, or for two results, is two.
            for part, launches in enumerate(passes):
                ran = Counter[str]()
                for kernel, key in launches:
                    at = (kind, part, ran[kernel], kernel)
                    keys.setdefault(at, {}).setdefault(key, []).append(name)
                    ran[kernel] += 1
    assert calls and min(calls.values()) >= 3
    assert {k: list(v.values()) for k, v in keys.items() if len(v) != 1} == {}
    launched = {(part, kernel) for _, part, _, kernel in keys}
    assert launched >= {(part, k) for part, ks in enumerate(LAUNCHES[op]) for k in ks}
