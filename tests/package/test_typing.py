"""What a type checker says of a user's script: nothing of a right one, all of a wrong one."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_kernels as rk
from rlhf_kernels.config import options

HERE = Path(__file__).parent / "typing"
ROOT = Path(__file__).parents[2]


def test_the_script_runs():
    done = subprocess.run(
        [sys.executable, HERE / "user.py"], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "6.0", done.stderr[-2000:]


def test_the_options_of_presets_are_the_fields():
    fields = {f.name: f.type for f in dataclasses.fields(rk.PolicyLossConfig)}
    assert options.PolicyLossOptions.__annotations__ == fields


def _mypy(tmp_path):
    """Errors as (file name, line, text), of the package too where it reaches the user."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--no-error-summary",
         "--follow-imports", "silent", "--cache-dir", tmp_path / "cache",
         HERE / "user.py", HERE / "mistakes.py"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^\S*?([\w]+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    return [(name, int(line), text) for name, line, text in found]


def _pyright(tmp_path):
    config = {"include": [str(HERE)], "extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    config |= {"pythonVersion": "3.10", "reportUnusedExpression": False}
    # torch leaves some of its types open; the second rule is basedpyright's own, not pyright's.
    quiet = ("reportUnknownMemberType", "reportUnnecessaryTypeIgnoreComment")
    config |= dict.fromkeys(quiet, False)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "-p", tmp_path,
         "--pythonpath", sys.executable],
        capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [
        (Path(d["file"]).name, d["range"]["start"]["line"] + 1, d["message"])
        for d in found
        if d["severity"] == "error"
    ]


@pytest.mark.parametrize("checker", ("mypy", "basedpyright"))
def test_mistakes_are_found_and_nothing_else(checker, tmp_path):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    found = (_mypy if checker == "mypy" else _pyright)(tmp_path)
    assert [error for error in found if error[0] != "mistakes.py"] == []
    lines = (HERE / "mistakes.py").read_text().splitlines()
    wrong = {i for i, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert {line for _, line, _ in found} == wrong, found
    assert len(wrong) == 35
