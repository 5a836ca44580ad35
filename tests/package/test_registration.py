"""The shape of the package: who imports whom, what is registered, what is public."""

import ast
import graphlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.kernels import backends
from rlhf_kernels.ops import _examples

PACKAGE = Path(rk.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only from lower layers and from its own.
LAYERS = (
    ("core", "config"),
    ("reference", "kernels"),
    ("head",),
    ("ops",),
    # The package itself, which is its public names, and what it adds to the operations.
    ("", "controllers", "testing"),
    ("cli", "__main__", "trainer", "integrations"),
)
RANKS = {area: rank for rank, layer in enumerate(LAYERS) for area in layer}
TRAINER_ONLY = {"transformers", "accelerate", "datasets", "flash_attn", "trl", "verl", "openrlhf"}


def _name(file: Path) -> str:
    """Dotted module name below the package; "" is the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(f): f for f in FILES}


def _imports(file: Path) -> tuple[set[str], set[str]]:
    """Modules of the package (dotted, below it) and other packages that `file` imports anywhere."""
    inside, outside = set(), set()
    package = list(file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join(["rlhf_kernels", *above, *filter(None, [base])])
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in targets:
            if base.split(".")[0] != "rlhf_kernels":
                outside.add(base.split(".")[0])
                continue
            below = base.partition(".")[2]
            submodule = f"{below}.{name}".strip(".")
            inside.add(submodule if name and submodule in MODULES else below)
    return inside, outside


def _area(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    area = _area(module)
    assert area in RANKS, f"{module} is in no layer"
    inside, outside = _imports(MODULES[module])
    for target in inside:
        other = _area(target)
        assert RANKS[other] <= RANKS[area], f"{module} imports {target}"
        if area in ("trainer", "integrations"):
            assert other in ("", "cli", area) or target == "trainer.errors", (
                f"{module} imports {target}, which is not public"
            )
    if area not in ("trainer", "integrations"):
        assert not outside & TRAINER_ONLY


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: _imports(file)[0] - {module} for module, file in MODULES.items()}
    # `from . import x` of a package names the package too; that is no import of its content.
    graph = {m: {t for t in targets if not m.startswith(f"{t}.")} for m, targets in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_package_is_seven_levels_deep_and_sixteen_places_wide():
    places = {module.split(".")[0] for module in MODULES}
    assert len(LAYERS) <= 7 and len(places) <= 16, sorted(places)


def test_import_parser_sees_relative_imports():
    inside, outside = _imports(PACKAGE / "ops" / "logprobs.py")
    assert {"kernels.backends", "core.checks", "reference", "ops._operator"} <= inside
    assert "torch" in outside
    native = PACKAGE / "kernels" / "native"
    assert "kernels.native.boundary" in _imports(native / "logprobs.py")[0]


def test_only_native_code_and_the_boundary_read_addresses():
    users = {
        name
        for name, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert users == {"kernels.native.boundary"}


def test_native_code_includes_no_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    if not (ROOT / "csrc").is_dir():
        pytest.skip("an installed package has no csrc")
    assert len(sources) > 5
    for source in sources:
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)', source.read_text()), source


def test_every_launcher_is_a_registered_operator():
    launchers = set(backends.get("cpu").launchers)
    # Of no use but to the head, whose buffer of logits it overwrites.
    launchers.remove("kl_divergence_backward_inplace")
    assert "token_logprobs" in launchers
    for name in launchers:
        schema = getattr(torch.ops.rlhf_kernels, name).default._schema
        assert (schema.arguments[-1].name, str(schema.arguments[-1].type)) == ("backend", "str")


def _operations() -> dict[str, object]:
    public = {name: getattr(rk, name) for name in rk.__all__}
    return {
        name: f
        for name, f in public.items()
        if inspect.isfunction(f) and re.match(r"rlhf_kernels\.ops\.[a-z]", f.__module__)
    }


def test_every_public_operation_has_an_example_for_warmup_and_doctor():
    assert set(_operations().values()) == set(_examples.EXAMPLES)


@pytest.mark.parametrize("name", rk.__all__)
def test_public_names_are_documented(name):
    doc = inspect.getdoc(getattr(rk, name))
    # A dataclass or NamedTuple without one gets its signature as docstring.
    assert doc and not doc.startswith(f"{name}("), f"{name} has no docstring"


@pytest.mark.parametrize("name", _operations())
def test_options_of_operations_are_keyword_only(name):
    for parameter in inspect.signature(getattr(rk, name)).parameters.values():
        assert parameter.annotation is not parameter.empty, parameter
        # A mask comes after the tensors that it belongs to, by position or by name.
        if parameter.name == "mask":
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter
        elif parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter


def test_all_is_sorted_and_complete():
    assert list(rk.__all__) == sorted(rk.__all__)
    assert all(hasattr(rk, name) for name in rk.__all__)
