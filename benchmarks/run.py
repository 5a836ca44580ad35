"""Runs the benchmark suite and writes results/<name>.json, <name>.md and <name>.png.

Without a name the results are called after the date and the machine. Arguments behind "--" go to
pytest: `python benchmarks/run.py gae-only -- -k gae`.
"""

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def default_name(device: str, quick: bool) -> str:
    """<date>-<CPU model or device>, with "quick" in front where shapes are small."""
    model = device
    if device == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            model = next(x.split(":")[1] for x in lines if x.startswith("model name"))
        except (OSError, StopIteration):
            model = platform.machine()
    model = re.sub(r"\((R|TM)\)|processor|cpu @.*", "", model, flags=re.IGNORECASE)
    words = re.findall(r"[a-z0-9]+", model.lower()) or [platform.machine()]
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return "-".join([*(["quick"] if quick else []), date, *words])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="name of the results; default: date and machine")
    parser.add_argument("--device", default="cpu", help="device of the tensors")
    parser.add_argument("--backend", help="backend of ours; default: the device's first kernels")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--providers", help="only these of eager,compile,trl,verl,...")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args, rest = parser.parse_args(words[:at]), words[at + 1 :]

    args.out.mkdir(parents=True, exist_ok=True)
    name = args.name or default_name(args.device, args.quick)
    json_file = args.out.resolve() / f"{name}.json"
    # What lies there is of an earlier run, and must not pass for this one's.
    json_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(HERE), "--device", args.device]
    command += ["--benchmark-json", str(json_file), "--benchmark-columns=median,rounds"]
    command += ["--benchmark-group-by=group", "-p", "no:cacheprovider", "--show-capture=no"]
    command += ["--quick"] if args.quick else []
    for option in ("backend", "providers"):
        value = getattr(args, option)
        command += [f"--{option}", value] if value else []
    # Without PYTEST_*: started from a pytest-xdist worker, pytest-benchmark would measure nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # Peers must find nothing to download.
    environment["HF_HUB_OFFLINE"] = "1"
    status = subprocess.run([*command, *rest], cwd=HERE.parent, env=environment).returncode
    if not json_file.exists():
        return status or 1
    report = subprocess.run([sys.executable, str(HERE / "report.py"), str(json_file)])
    return status or report.returncode


if __name__ == "__main__":
    sys.exit(main())
