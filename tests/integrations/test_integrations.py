"""What the integrations share, on a package made up here: no trainer is needed."""

import importlib.metadata
import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch

from tests.run_python import run_python

from rlhf_kernels.integrations import NAMES, _patch
from rlhf_kernels.integrations._openrlhf_actor import actor_forward
from rlhf_kernels.integrations._patch import Hook, IncompatibleError, Integration, Unsupported

SOURCE = """
import torch

def area(width, height=1):
    return width * height

class Shape:
    def sides(self, count):
        return ["theirs"] * count

    @staticmethod
    def unit(x):
        return x

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g

REGISTRY = {"area": area, "other": Shape}
"""


@pytest.fixture
def package(monkeypatch):
    """made_up.shapes, and made_up.user, which imported from it under another name."""
    monkeypatch.setitem(sys.modules, "made_up", ModuleType("made_up"))
    shapes, user = ModuleType("made_up.shapes"), ModuleType("made_up.user")
    exec(SOURCE, vars(shapes))
    for name in ("area", "Shape", "Double"):
        getattr(shapes, name).__module__ = shapes.__name__
    user.surface = shapes.area
    for module in (shapes, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["made_up"].__spec__ = object()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.4.2.dev3")
    return shapes, user


def area(width, height=1):
    if height == 0:
        raise Unsupported("no height")
    return ("ours", width, height)


def hook(name="area", signature="width, height", ours=area, **options):
    return Hook("made_up.shapes", name, (signature,), ours, **options)


def test_function_in_every_place(package):
    shapes, user = package
    original = shapes.area
    it = Integration("made_up", ("1.0", "2.0"))
    report = it.patch([hook()])
    assert report.replaced == ("made_up.shapes.area",) and report.active
    assert user.surface is shapes.area is shapes.REGISTRY["area"] is not original
    assert user.surface(3) == ("ours", 3, 1) and user.surface(3, height=0) == 0
    ours = shapes.area
    report = it.unpatch()
    assert user.surface is shapes.area is shapes.REGISTRY["area"] is original
    assert ours(3) == 3
    assert report.served == {"area": 1} and report.fallbacks == {"area": {"no height": 1}}
    assert "1 calls: no height" in str(report)
    it.reset_counts()
    assert not it.report().served


def test_methods_and_autograd_functions(package):
    shapes, _ = package
    sides, unit = shapes.Shape.sides, vars(shapes.Shape)["unit"]
    it = Integration("made_up", ("1.0", "2.0"))
    it.patch(
        [
            hook("Shape.sides", "self, count", lambda self, count: ["ours"] * count),
            hook("Shape.unit", "x", lambda x: -x),
            hook("Double", "ctx, x", lambda double: lambda x: 3 * x, makes_ours=True),
        ]
    )
    assert shapes.Shape().sides(2) == ["ours"] * 2 and shapes.Shape().unit(5) == -5
    assert shapes.Double.apply(torch.ones(())) == 3
    it.unpatch()
    assert shapes.Shape.sides is sides
    restored = vars(shapes.Shape)["unit"]
    assert isinstance(restored, staticmethod) and restored.__func__ is unit.__func__
    assert shapes.Double.apply(torch.ones(())) == 2


def test_all_or_nothing(package):
    shapes, _ = package
    original = shapes.area
    it = Integration("made_up", ("1.0", "2.0"))
    unknown = hook("Shape.sides", "self, number")
    with pytest.raises(IncompatibleError, match=r"are \(self, count\), known are \(self, number\)"):
        it.patch([hook(), unknown])
    assert shapes.area is original and not it.active
    report = it.report([hook(), unknown, hook("volume")])
    assert report.available == ("made_up.shapes.area",)
    assert list(report.refused) == ["made_up.shapes.Shape.sides"]
    assert report.absent == {"made_up.shapes.volume": "not in this version"}
    with pytest.raises(IncompatibleError, match="volume is not in this version"):
        it.patch([hook(), hook("volume", required=True)])
    with pytest.raises(IncompatibleError, match=r"nowhere\.f is cannot be imported"):
        it.patch([Hook("made_up.nowhere", "f", ("x",), area)])
    # A function that an older version lacks is skipped unless it is required.
    assert it.patch([hook(), hook("volume")]).replaced == ("made_up.shapes.area",)
    it.unpatch()


def test_versions(package):
    for bounds in (("1.5", "2.0"), ("1.0", "1.4")):
        with pytest.raises(IncompatibleError, match=r"made_up 1\.4\.2\.dev3: this"):
            Integration("made_up", bounds).patch([hook()])
    with pytest.raises(IncompatibleError, match="never_installed is not installed"):
        Integration("never_installed", ("1.0", "2.0")).patch([hook()])
    assert str(Integration("never_installed", ("1", "2")).report()).endswith("not installed")
    for version, release in (("2.13.0+cpu", (2, 13, 0)), ("1.0rc1", (1, 0)), ("0.9.1", (0, 9, 1))):
        assert _patch._release(version) == release


def test_registry_entries(package):
    shapes, _ = package
    it = Integration("made_up", ("1.0", "2.0"))
    it.patch([hook()])
    it.add("made_up.REGISTRY['new']", shapes.REGISTRY, "new", len)
    it.add("made_up.REGISTRY['new']", shapes.REGISTRY, "new", max)
    assert shapes.REGISTRY["new"] is len and "made_up.REGISTRY['new']" in it.report().replaced
    with pytest.raises(IncompatibleError, match="exists already"):
        it.add("made_up.REGISTRY['other']", shapes.REGISTRY, "other", len)
    it.unpatch()
    assert set(shapes.REGISTRY) == {"area", "other"}


def test_context(package):
    shapes, _ = package
    original = shapes.area
    it = Integration("made_up", ("1.0", "2.0"))

    def patched():
        return it.patched(lambda: it.patch([hook()]), it.unpatch)

    with pytest.raises(KeyError), patched():
        with patched():
            assert shapes.area is not original
        # The inner one found it patched and left it so.
        assert it.active
        raise KeyError
    assert shapes.area is original and not it.active


def test_parameters():
    def f(a, /, b, *args, c=1, **rest):
        pass

    def g(a, *, b):
        pass

    assert _patch.parameters(f) == "a, b, *args, c, **rest"
    assert _patch.parameters(g) == "a, *, b"


def test_a_forward_of_openrlhf_without_a_mask_is_left_to_it():
    forward = actor_forward(area)
    with pytest.raises(Unsupported, match="no attention mask"):
        forward(object(), torch.zeros(1, 2, dtype=torch.long), return_logprobs=True)


def test_nothing_is_imported_before_patch():
    program = (
        "import sys, rlhf_kernels.integrations as i\n"
        "from rlhf_kernels.integrations import openrlhf, trl, verl, verl_plugin\n"
        "names = {'trl', 'verl', 'openrlhf', 'transformers', 'ray'} & set(sys.modules)\n"
        "raise SystemExit(bool(names))"
    )
    run_python("-c", program)


def test_doctor():
    """`--integrations` answers, and quickly, though the trainers cannot be imported."""
    block = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda n, *a: None if n in {NAMES} else find(n, *a)\n"
        "from rlhf_kernels.__main__ import main\n"
        "raise SystemExit(main({}))"
    )
    text = run_python("-c", block.format(["--integrations"])).stdout
    assert text == "trl: not installed\n\nverl: not installed\n\nopenrlhf: not installed\n"
    found = json.loads(run_python("-c", block.format(["--integrations", "--json"])).stdout)
    assert list(found) == list(NAMES) and found["trl"]["version"] is None


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_doctor_finds_trl():
    from rlhf_kernels.integrations import trl

    report = str(trl.report())
    assert "available  trl.trainer.utils.selective_log_softmax" in report
