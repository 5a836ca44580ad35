"""Kills runs at random moments, resumes them, and compares what they end with.

`python killed_runs.py FOLDER MOMENTS STAGE FLAG ...` prints JSON: kills, resumes, ends. Runs are
forked from a process that has the packages imported and warm.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["MKL_CBWR"] = "AUTO,STRICT"

import rlhf_kernels.trainer.run  # noqa: F401 - warm before the forks
from rlhf_kernels import cli
from rlhf_kernels.trainer import checkpoint


def start(folder: Path, name: str, stage: str, flags: list[str]) -> int:
    """The process of a run into `folder/name`."""
    pid = os.fork()
    if pid:
        return pid
    # Other addresses than the other runs'.
    padding = bytearray(len(name) * 100_003)
    code = 1
    try:
        with (folder / f"{name}.out").open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            code = cli.main(["train", stage, *flags, "--output_dir", str(folder / name)])
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        del padding
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> tuple[object, ...]:
    """Metrics without times, weights, and the evaluations of a run that ended."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "tok", "peak"))}
        for line in lines
    ]
    weights = [p.read_bytes() for p in sorted(folder.glob("*/model.safetensors"))]
    assert weights
    summary = json.loads((folder / "summary.json").read_text())
    return rows, weights, summary["held_out_before"], summary["held_out_after"]


def main(folder: Path, moments: int, stage: str, flags: list[str]) -> dict[str, int]:
    draw = random.Random(0)
    assert ended(start(folder, "warm", stage, flags)) == 0
    began = time.monotonic()
    assert ended(start(folder, "whole", stage, flags)) == 0
    length = time.monotonic() - began
    expected = outcome(folder / "whole")
    counts = {"kills": 0, "resumes": 0, "ends": 0}
    number = 0
    while counts["kills"] < moments:
        name = f"killed{number}"
        # Up to four kills of a run; then it may end.
        for kill in (True, True, True, True, False):
            counts["resumes"] += bool(checkpoint.checkpoints(folder / name))
            pid = start(folder, name, stage, [*flags, "--resume"])
            if kill:
                time.sleep(draw.uniform(0.0, length))
                os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            counts["kills"] += code == -signal.SIGKILL
            if code != -signal.SIGKILL:
                assert code == 0, (folder / f"{name}.out").read_text()[-3000:]
                break
        assert outcome(folder / name) == expected, name
        counts["ends"] += 1
        number += 1
    return counts


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    print(json.dumps(found))
