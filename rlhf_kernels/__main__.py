"""The doctor, `python -m rlhf_kernels`: what is installed, what runs, and whether it is right."""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from . import __version__
from .core.env import BACKEND_NAMES
from .kernels import backends as kernel_backends
from .kernels import native
from .ops._availability import OperationName, supports
from .ops._calls import OPERATIONS
from .testing import ROUNDINGS, check_operation

# Variables that affect how kernels are selected or run.
_VARIABLES = re.compile(r"(RLHF_KERNELS|OMP|GOMP|KMP|MKL|TRITON|CUDA_VISIBLE)_\w+$")
_PACKAGES = ("triton", "numpy", "transformers", "accelerate", "flash-attn")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def openmp_runtimes() -> list[str] | None:
    """Files of the OpenMP runtimes loaded in this process; None if they cannot be found out.

    There should be one. Two runtimes have separate threads and settings.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|i?omp5?)[-.]\S*)", maps)))


def _cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _backend_line(name: str, state: dict[str, Any], cuda: dict[str, Any] | None) -> str:
    if name != "cuda" or cuda is None:
        return "available" if state["available"] else f"missing: {state['reason']}"
    what = f"CUDA {cuda['cuda']}, {' '.join(cuda['architectures'])}"
    if cuda["driver"] is not None:
        what += f"; driver for CUDA {cuda['driver']}"
    return f"{'available' if state['available'] else state['reason']} ({what})"


def devices() -> list[torch.device]:
    """The CPU, and the accelerator if torch has one."""
    found = [torch.device("cpu")]
    available = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if available else None
    return found if accelerator is None else [*found, accelerator]


def _selected(operation: str, device: torch.device) -> str:
    backend, reason = supports(cast(OperationName, operation), device=device)
    return f"none: {reason}" if backend is None else backend


def _checked(
    function: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    backend = _selected(function.__name__, device)
    return check_operation(function, device, dtype) | {"backend": backend}


def report() -> dict[str, Any]:
    """The whole report, ready for JSON."""
    cpu, cuda = native.module("cpu"), native.module("cuda")
    backends = {}
    for name in BACKEND_NAMES[1:]:
        reason = kernel_backends.unavailable_reason(name)
        backends[name] = {"available": reason is None, "reason": reason}
    backends["cuda"]["built"] = cuda is not None
    checks = [
        _checked(function, device, dtype)
        for device in devices()
        for function in OPERATIONS
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return {
        "versions": {
            "rlhf_kernels": __version__,
            "python": platform.python_version(),
            # Unlike the metadata, this names the build (+cpu, +cu130).
            "torch": torch.__version__,
            **{p: v for p in _PACKAGES if (v := _version(p)) is not None},
        },
        "platform": {"system": platform.platform(), "cpu": _cpu_name(), "cores": os.cpu_count()},
        "cpu_extension": None
        if cpu is None
        else {
            "file": cpu.__file__,
            "isa": cpu.isa(),
            "isas": list(cpu.isa_names()),
            "openmp": bool(cpu.openmp),
            "freed_pages_leave": cpu.freed_pages_leave(),
        },
        "cuda_extension": None
        if cuda is None
        else {
            "file": cuda.__file__,
            "architectures": list(cuda.architectures),
            "cuda": _cuda_version(cuda.runtime_version()),
            "driver": _cuda_version(cuda.driver_version()),
        },
        "threads": {"torch": torch.get_num_threads(), "openmp_runtimes": openmp_runtimes()},
        "backends": backends,
        "forced_backend": kernel_backends.current_backend(),
        "selected": {
            str(device): {f.__name__: _selected(f.__name__, device) for f in OPERATIONS}
            for device in devices()
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if _VARIABLES.match(k)},
        "self_check": checks,
        "ok": all(c["ok"] for c in checks),
    }


def _section(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def render(r: dict[str, Any]) -> str:
    """The report as text."""
    extension, runtimes = r["cpu_extension"], r["threads"]["openmp_runtimes"]
    machine = [*r["platform"].items(), ("torch threads", r["threads"]["torch"])]
    if runtimes is not None:
        machine.append(("OpenMP runtimes", ", ".join(runtimes) or "none"))
        if len(runtimes) > 1:
            machine.append(("", "warning: more than one; thread settings may not be shared"))
    if extension is not None:
        isas = ", ".join(f"[{i}]" if i == extension["isa"] else i for i in extension["isas"])
        machine += [("instruction sets", f"{isas}  (in brackets: in use)")]
        machine += [("extension", extension["file"])]
        if not extension["openmp"]:
            machine.append(("", "built without OpenMP: kernels run on one thread"))
        if extension["freed_pages_leave"]:
            machine.append(("huge pages", "not asked for: the hypervisor takes freed pages back"))
    backends = [
        (name, _backend_line(name, b, r["cuda_extension"])) for name, b in r["backends"].items()
    ]
    if r["forced_backend"] != "auto":
        backends.append(("forced", r["forced_backend"]))
    checks = [
        (
            f"{c['operation']} {c['dtype']} {c['device']}",
            f"{'ok  ' if c['ok'] else 'FAIL'}  {c['backend']}, "
            + c.get("message", f"largest error {c['error']} of {ROUNDINGS} roundings"),
        )
        for c in r["self_check"]
    ]
    sections = [
        _section("versions", list(r["versions"].items())),
        _section("machine", machine),
        _section("backends", backends),
        *(
            _section(f"selected for {device} tensors", list(operations.items()))
            for device, operations in r["selected"].items()
        ),
        _section("environment", list(r["environment"].items()) or [("(no variables set)", "")]),
        _section("self-check against fp64, forward and gradient", checks),
    ]
    verdict = "All is well." if r["ok"] else "The self-check FAILED: do not trust results here."
    return "\n\n".join([*sections, verdict])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report, or that of the integrations; returns 1 if the self-check failed."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--integrations",
        action="store_true",
        help="say instead what of TRL, verl and OpenRLHF is here, replaceable and replaced",
    )
    options = parser.parse_args(argv)
    if options.integrations:
        # The integrations import the trainers, so they are imported only here.
        reports = importlib.import_module("rlhf_kernels.integrations").reports()
        if options.json:
            print(json.dumps({name: r._asdict() for name, r in reports.items()}, indent=2))
        else:
            print("\n\n".join(map(str, reports.values())))
        return 0
    found = report()
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
