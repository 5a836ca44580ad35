"""Runs the benchmark suite and writes results/<name>.json, <name>.md and <name>.svg.

The default name is that of the machine. Arguments after "--" go to pytest:
`python -m benchmarks.run gae-only -- -k gae`.
"""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import RESULTS, ROOT, divided, make_parser


def cpu_model() -> str:
    """The name of the CPU according to the system."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def default_name(device: str, quick: bool) -> str:
    """<CPU model or device>-<cores>, preceded by "quick" for small shapes."""
    model = cpu_model() if device == "cpu" else device
    model = re.sub(r"\((R|TM)\)|processor|cpu @.*", "", model, flags=re.IGNORECASE)
    words = re.findall(r"[a-z0-9]+", model.lower()) or [platform.machine()]
    if device == "cpu":
        usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        words += [str(len(usable(0))), "cores"]
    return "-".join([*(["quick"] if quick else []), *words])


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` and the points of `old` that it lacks; ValueError if the machines differ."""
    machine, commit = new["machine_info"], new["commit_info"]
    for key, value in old["machine_info"].items():
        if key != "full" and value != machine.get(key):
            raise ValueError(f"{key} was {value}, now {machine.get(key)}")
    full = machine.get("full") or old["machine_info"].get("full", False)
    dirty = commit.get("dirty") or old["commit_info"].get("dirty")
    kinds = ("benchmarks", "failures")
    fresh = {x["name"] for kind in kinds for x in new[kind]}
    points = {k: [x for x in old[k] if x["name"] not in fresh] + new[k] for k in kinds}
    stamps = {"machine_info": machine | {"full": full}, "commit_info": commit | {"dirty": dirty}}
    return new | stamps | points


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("name", nargs="?", help="name of the results; default: the machine")
    parser.add_argument("--device", default="cpu", help="device of the tensors")
    parser.add_argument("--backend", help="backend of ours; default: the device's first kernels")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--full", action="store_true", help="the points marked full too")
    parser.add_argument("--add", action="store_true", help="to the results of that name")
    parser.add_argument("--providers", help="only these of eager,compile,trl,verl,...")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    own, rest = divided(sys.argv[1:])
    args = parser.parse_args(own)

    args.out.mkdir(parents=True, exist_ok=True)
    name = args.name or default_name(args.device, args.quick)
    json_file = args.out.resolve() / f"{name}.json"
    adds = args.add and json_file.exists()
    # A file of an earlier run must not be mistaken for the result of this one.
    fresh = json_file.with_suffix(".part.json") if adds else json_file
    fresh.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "benchmarks/points", "--device", args.device]
    command += ["--benchmark-json", str(fresh), "--benchmark-columns=median,rounds"]
    command += ["--benchmark-group-by=group", "-p", "no:cacheprovider", "--show-capture=no"]
    command += [f"--{option}" for option in ("quick", "full") if getattr(args, option)]
    for option in ("backend", "providers"):
        value = getattr(args, option)
        command += [f"--{option}", value] if value else []
    # PYTEST_* is removed: in a pytest-xdist worker pytest-benchmark would measure nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # Peers must not download anything.
    environment["HF_HUB_OFFLINE"] = "1"
    status = subprocess.run([*command, *rest], cwd=ROOT, env=environment).returncode
    if not fresh.exists():
        return status or 1
    if adds:
        try:
            whole = merged(*(json.loads(f.read_text()) for f in (json_file, fresh)))
        except ValueError as error:
            sys.exit(f"{fresh.name} cannot be added to {json_file.name}: {error}")
        json_file.write_text(json.dumps(whole, indent=1) + "\n")
        fresh.unlink()
    if args.full and not args.quick and args.device == "cpu":
        peaks = [sys.executable, "-m", "benchmarks.studies.memory", str(json_file)]
        status = subprocess.run(peaks, cwd=ROOT, env=environment).returncode or status
    report = [sys.executable, "-m", "benchmarks.reports.suite", str(json_file)]
    return status or subprocess.run(report, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
