"""Options of the benchmark suite, and the description of the machine in its JSON."""

import contextlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_kernels as rk

from ..harness import Case, Point, Settings
from ..harness.clocks import device_name
from ..harness.measure import measure, peak_alone

_FAILURES = pytest.StashKey[list]()
_PEERS = ("trl", "verl", "transformers", "liger-kernel", "flash-attn", "cut-cross-entropy")
_PEERS += ("quack-kernels", "triton")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rlhf_kernels")
    group.addoption("--quick", action="store_true", help="small shapes, few rounds")
    group.addoption("--device", default="cpu", help="device of the tensors")
    group.addoption("--providers", help="comma-separated: measure only these beside ours")
    group.addoption("--seconds", type=float, help="of a point; its least rounds are run anyway")
    group.addoption("--points", choices=("cpu", "gpu"), help="shapes; default: by the device")
    group.addoption("--full", action="store_true", help="the CPU points marked full too")
    group.addoption(
        "--records", type=Path, help="append each point as a line of JSON; skip those already there"
    )
    group.addoption(
        "--peak", nargs=2, metavar=("PROVIDER", "FILE"), help="only its peak memory, to a JSON file"
    )
    group.addoption("--backend", help="backend of ours; default: the device's first kernel backend")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FAILURES] = []


def _backend(config: pytest.Config) -> str:
    """The backend to measure; the reference has no kernels, so it must be named explicitly."""
    named = config.getoption("--backend")
    if named is not None:
        return named
    first = rk.available_backends(config.getoption("--device"))[0]
    if first == "reference":
        raise pytest.UsageError("no kernel backend is built here; see `python -m rlhf_kernels`")
    return first


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kind = config.getoption("--points")
    if kind is None:
        kind = "cpu" if config.getoption("--device") == "cpu" else "gpu"
    full = config.getoption("--full") or kind == "gpu"

    def is_chosen(item: pytest.Item) -> bool:
        marks = {m.name for m in item.iter_markers()}
        return ("gpu" in marks) == (kind == "gpu") and (full or "full" not in marks)

    chosen = [i for i in items if is_chosen(i)]
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen


def _recorded(file: Path | None) -> list[dict[str, Any]]:
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    """Device, backend and size of this run; forcing the backend prevents a fallback."""
    rk.use_backend(_backend(request.config))
    device = torch.device(request.config.getoption("--device"))
    only = request.config.getoption("--providers")
    providers = None if only is None else {"ours", *only.split(",")}
    options = request.config.option
    return Settings(device, options.quick, providers, options.seconds)


@pytest.fixture(autouse=True)
def _not_again(request: pytest.FixtureRequest) -> None:
    own = {"point": request.node.name, "backend": _backend(request.config)}
    if any(own.items() <= r.items() for r in _recorded(request.config.option.records)):
        pytest.skip("recorded by an earlier run")


@pytest.fixture
def point(benchmark: Any, settings: Settings, request: pytest.FixtureRequest) -> Point:
    """Measures a case and records it."""
    torch.manual_seed(0)
    options, name = request.config.option, request.node.name
    if options.peak is not None:
        provider, out = options.peak

        def peak(case: Case) -> None:
            Path(out).write_text(json.dumps(peak_alone(case, provider, settings.device)))

        return Point(settings, peak)
    failures = request.config.stash[_FAILURES]

    def recorded(case: Case) -> None:
        before = len(failures)
        try:
            measure(benchmark, settings, failures, case)
        finally:
            # Record each point immediately, because the run may be interrupted.
            failed = [f | {"name": name} for f in failures[before:]]
            failures[before:] = failed
            found = failed or ([benchmark.extra_info] if benchmark.extra_info else [])
            if options.records is not None and found:
                line = {"point": name, "backend": _backend(request.config), "failed": bool(failed)}
                with options.records.open("a") as out:
                    out.write(json.dumps({**line, **found[0]}) + "\n")

    return Point(settings, recorded)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PEERS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# The next three hooks remove what could identify this machine or its user from the JSON.
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    cpu = machine_info.get("cpu", {})
    device = torch.device(config.getoption("--device"))
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", platform.machine()),
        cores=cpu.get("count"),
        threads=torch.get_num_threads(),
        device=device_name(device),
        backend=_backend(config),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        rlhf_kernels=rk.__version__,
        peers=_versions(),
        quick=config.getoption("--quick"),
        full=config.getoption("--full"),
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    kept = {k: commit_info[k] for k in ("id", "dirty", "time") if k in commit_info}
    commit_info.clear()
    commit_info.update(kept)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    # Points for which ours was wrong or raised have no time.
    output_json["failures"] = config.stash[_FAILURES]
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        entry["commit"] = str(output_json["commit_info"].get("id"))
