"""Reward functions: where they are found, and what is told where they are not."""

import sys

import pytest

from tests.trainer.test_rewards import table
from tests.trainer.trainer_tools import (
    CPU,
    one_thread,  # noqa: F401
)

from rlhf_kernels.trainer.config import ModelConfig, UserError
from rlhf_kernels.trainer.reward_functions import is_function, load_reward
from rlhf_kernels.trainer.rewards import load_rewards

MODULE = """
import dataclasses
import functools
import beside

@dataclasses.dataclass
class Scorer:
    factor: float = beside.FACTOR
    def __call__(self, completions, **_):
        return [self.factor * len(c) for c in completions]
    def method(self, completions, **_):
        return self(completions)
    @staticmethod
    def static(completions, **_):
        return [1.0] * len(completions)

def score(completions, **_):
    return [2.0] * len(completions)

scorer = Scorer()
half = functools.partial(score, more=1)
anonymous = lambda completions, **_: [3.0] * len(completions)
number = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, forgotten afterwards; as a console script has it, not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    before = dict(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def test_functions_are_found(folder):
    (folder / "my_rewards.py").write_text(MODULE)
    (folder / "beside.py").write_text("FACTOR = 2.0\n")
    package = folder / "pack" / "inner"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("from . import __name__ as own\nscore = lambda **_: [own]\n")
    for text in ("my_rewards", "my_rewards.py", "./my_rewards.py", str(folder / "my_rewards.py")):
        for name, value in (
            ("score", 2.0), ("scorer", 4.0), ("scorer.method", 4.0), ("Scorer.static", 1.0),
            ("half", 2.0), ("anonymous", 3.0),
        ):  # fmt: skip
            function = load_reward(f"{text}:{name}")
            assert table(function)[:, 0].tolist() == [value] * 3, (text, name)
    assert table(load_reward("my_rewards.py::score"))[:, 0].tolist() == [2.0] * 3
    # A file that imports from its package, with and without the folder on the path.
    assert load_reward("pack/inner/deep.py:score")() == ["inner"]
    # One module, however it is named.
    assert load_reward("my_rewards:scorer") is load_reward("./my_rewards.py:scorer")
    assert load_reward("pack.inner.deep:score")() == ["pack.inner"]
    paths = ["my_rewards:half", "my_rewards:anonymous", "my_rewards.py:score", "my_rewards:score"]
    loaded = load_rewards(paths, [], default=[], config=ModelConfig(), device=CPU)
    assert loaded.names == ["half", "anonymous", "score", "score_2"]


def test_a_file_below_the_home_folder(folder, monkeypatch):
    (folder / "home").mkdir()
    (folder / "home" / "mine.py").write_text("score = lambda **_: [7.0] * 3\n")
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert load_reward("~/mine.py:score")() == [7.0] * 3


@pytest.mark.parametrize("path", ["mine", "mine.py", "./mine.py", "./mine"])
def test_a_function_that_is_not_named_is_asked_for(folder, path):
    (folder / "mine.py").write_text("")
    with pytest.raises(UserError, match=f"^reward_funcs: .*as in '{path}:score'"):
        load_rewards([path], [], default=[], config=ModelConfig(), device=CPU)


def test_a_file_wins_over_an_installed_module_of_its_name(folder):
    (folder / "json.py").write_text("def score(completions, **_):\n    return [6.0, 6.0, 6.0]\n")
    import json

    assert table(load_reward("json:score"))[:, 0].tolist() == [6.0] * 3
    assert sys.modules["json"] is json and json.loads("1") == 1


@pytest.mark.parametrize(
    ("content", "path", "match"),
    [
        ("", "nowhere:score", "'nowhere:score': no module 'nowhere' in the current folder"),
        ("", "mine.deep:score", "no module 'mine.deep'"),
        ("", "nowhere.py:score", "no file 'nowhere.py'"),
        ("", "a/b:score", "no file 'a/b'"),
        ("", "mine", "expected 'module:function'"),
        ("", "mine:", "expected 'module:function'"),
        ("", ":score", "expected 'module:function'"),
        ("", "mine:a b", "expected 'module:function'"),
        ("x = 1", "mine:score", "no 'score' in .*mine.py"),
        ("score = 1", "mine:score", "expected a function, found int 1"),
        ("class score: pass", "mine:score", "found the class score; name an object of it"),
        ("x = 1\ndef score(:", "mine:score", r"raised SyntaxError: .*\(mine.py, line 2\)"),
        ("\n\n1/0", "mine:score", r"ZeroDivisionError: division by zero \(mine.py, line 3\)"),
        (
            "import no_such_thing",
            "mine:score",
            r"No module named 'no_such_thing' \(mine.py, line 1",
        ),
        ("from json import nothing", "mine:score", "raised ImportError: cannot import name"),
        ("import sys; sys.exit()", "mine:score", "raised SystemExit"),
        ("import asyncio\nasyncio.run(1)", "mine.py:score", "raised ValueError.*line 2"),
        ("\x00", "mine:score", "raised (SyntaxError|ValueError): .*null bytes"),
    ],
)
def test_what_is_not_found_is_told(folder, content, path, match):
    (folder / "mine.py").write_text(content)
    with pytest.raises(UserError, match=f"^reward_funcs: .*{match}"):
        load_reward(path)


def test_paths_of_models_are_not_functions(folder):
    (folder / "a:b").mkdir()
    for path in ("my_org/reward", "./reward", r"C:\models\reward", "C:/models/reward", "a:b"):
        assert not is_function(path), path
    for path in ("a:b_", "a.b:c", r"C:\rewards\mine.py:score", "./x.py:score", "c:score"):
        assert is_function(path), path
