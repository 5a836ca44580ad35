"""The shape of the package: who imports whom, what is registered, what is public."""

import ast
import graphlib
import inspect
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from tests.cases import calls as cases

import rlhf_kernels as rk
from rlhf_kernels.kernels import backends, rows
from rlhf_kernels.kernels.launchers import Launchers
from rlhf_kernels.ops import _calls

PACKAGE = Path(rk.__file__).parent
ROOT = PACKAGE.parent
HERE = ROOT / "tests"
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
            # The rules of preference losses are the stage's too.
            assert other in ("", "cli", area) or target in (
                "trainer.errors",
                "config.preference",
            ), f"{module} imports {target}, which is not public"
    if area not in ("trainer", "integrations"):
        assert not outside & TRAINER_ONLY


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: _imports(file)[0] - {module} for module, file in MODULES.items()}
    # `from . import x` of a package names the package too; that is no import of its content.
    graph = {m: {t for t in targets if not m.startswith(f"{t}.")} for m, targets in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_package_is_seven_levels_deep_and_sixteen_places_wide():
    """As the imports have it, whatever LAYERS says; and no folder imports one that imports it."""
    places = {_area(module): set() for module in MODULES}
    for module, file in MODULES.items():
        # A program, `python -m rlhf_kernels.trainer`, of no other content than the command's.
        if module != "trainer.__main__":
            places[_area(module)] |= {_area(t) for t in _imports(file)[0]} - {_area(module)}
    # `from . import x` of the package names the package too.
    for place in places.keys() - {"__main__", "trainer", "integrations"}:
        places[place].discard("")
    levels = {}
    for place in graphlib.TopologicalSorter(places).static_order():
        levels[place] = 1 + max((levels[below] for below in places[place]), default=0)
    assert max(levels.values()) <= 7 and len(places) <= 16, levels
    assert levels["ops"] > levels["head"] > levels["kernels"] > levels["core"]


def test_only_operations_call_the_reference():
    """Kernels and the head compute everything themselves."""
    users = {module for module, file in MODULES.items() if "reference" in _imports(file)[0]}
    outside = {module for module in users if _area(module) not in ("ops", "reference", "")}
    assert users and not outside


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


# What families share has a name that begins with `_`.
SHARED = {
    "ops": {"_autograd", "_availability", "_calls", "_heads", "_metrics", "_operator"},
    "native": {"_tokens"},
    "triton": {"_launch", "_math", "_maxima", "_rows", "_strided", "_tiles", "_tokens"},
    "reference": {"_common"},
}


def _families(*parts: str, suffix: str = ".py") -> set[str]:
    """The first words of the names of files in a folder, but for those that families share."""
    names = {file.name.removesuffix(suffix) for file in ROOT.joinpath(*parts).glob(f"*{suffix}")}
    shared = {name for name in names if name.startswith("_")} - {"__init__"}
    assert shared == SHARED.get(parts[-1], set())
    return {name.partition("_")[0] for name in names} - {""}


# For each folder: its path, the suffix of its files, and the names that are no families.
FOLDERS = (
    (("rlhf_kernels", "reference"), ".py", {"head", "shard"}),
    (("rlhf_kernels", "ops"), ".py", {"linear", "model"}),
    (("rlhf_kernels", "kernels", "native"), ".py", {"architectures", "boundary"}),
    (("rlhf_kernels", "kernels", "triton"), ".py", set()),
    (("csrc", "bind"), ".h", {"arguments", "dlpack", "tensor"}),
    (("csrc", "cpu"), ".h", {"all", "kernels", "memory", "parallel", "rows", "tokens", "vec"}),
    (("csrc", "cuda"), ".cu", {"device"}),
    (("benchmarks", "points"), ".py", {"conftest", "head"}),
)
FAMILIES = {"logprobs", "kl", "advantages", "policy", "value", "support", "mismatch"}


@pytest.mark.parametrize(
    ("folder", "suffix", "others"), FOLDERS, ids=["/".join(folder) for folder, *_ in FOLDERS]
)
def test_a_family_has_one_name_in_every_folder(folder, suffix, others):
    if not ROOT.joinpath(*folder).is_dir():
        pytest.skip("an installed package has the Python files alone")
    # Without a kernel of its own.
    plain = {"preference"} & _families(*folder, suffix=suffix)
    assert _families(*folder, suffix=suffix) == FAMILIES | plain | others


def test_a_family_has_its_tests_and_the_head_its_families():
    tests = {name.name.split("_")[1].removesuffix(".py") for name in HERE.glob("ops/test_*.py")}
    assert tests >= FAMILIES | {"preference"}
    for family in ("logprobs", "kl", "policy"):
        assert f"head.{family}" in MODULES and f"ops.linear_{family}" in MODULES


def test_the_public_functions_are_the_last_of_their_file():
    """In a file of ops: checks, the autograd Function, what it gives, then what a user calls."""
    for name in (m for m in MODULES if re.match(r"ops\.[a-z]", m)):
        ranks = []
        for node in ast.parse(MODULES[name].read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in rk.__all__:
                ranks.append((2, node.name))
            elif isinstance(node, ast.ClassDef) and "Function" in map(_last_word, node.bases):
                ranks.append((1, node.name))
            elif isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith("check"):
                ranks.append((0, node.name))
            elif isinstance(node, ast.FunctionDef) and ranks:
                # Any other helper stands before the first public function.
                ranks.append((min(ranks[-1][0], 1), node.name))
        assert ranks == sorted(ranks, key=lambda rank: rank[0]), (name, ranks)


def _last_word(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def test_benchmarks_import_no_tests():
    for file in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert "tests" not in {name.partition(".")[0] for name in names}, file


@pytest.mark.parametrize("name", ("cpu", "cuda", "triton"))
def test_launchers_have_the_signatures_of_the_table(name):
    """What the type checker compares, in the functions that run: bound to an extension, made once.

    The head's kernels have those of `Rows` too.
    """
    table = backends.get(name).launchers
    if not table:
        pytest.skip(f"{name} is not available")
    types = get_type_hints(Launchers)
    assert table.keys() <= types.keys() and "token_logprobs" in table
    for operator, launcher in table.items():
        call = types[operator]
        if isinstance(call, type):  # a protocol
            wanted = _annotations(call.__call__)[1:]
        else:
            arguments, result = get_args(call)
            wanted = [*arguments, result]
        *taken, result = _annotations(launcher)
        assert result == wanted.pop(), operator
        # One launcher may pass on what another names.
        if taken[-1] is Any:
            taken.pop()
            wanted = wanted[: len(taken)]
        assert taken == wanted, operator
    kernels = {n: f for c in rows.Rows.__mro__ for n, f in vars(c).items() if n[0] != "_"}
    assert "policy_loss" in kernels and "kl_divergence" in kernels
    for operator in kernels.keys() & table.keys():
        kernel = kernels[operator]
        if isinstance(kernel, property):  # of a protocol's type
            kernel = _annotations(kernel.fget)[-1].__call__
        _, *given, _ = _annotations(kernel)
        assert _annotations(table[operator])[: len(given)] == given, operator


def _annotations(function) -> list:
    """Of the parameters, then of the result."""
    signature = inspect.signature(function)
    return [p.annotation for p in signature.parameters.values()] + [signature.return_annotation]


def test_what_launches_triton_kernels_is_typed():
    """mypy allows functions without types there, because kernels are such."""
    kernels = typed = 0
    for file in (PACKAGE / "kernels" / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            names = {ast.unparse(d).partition("(")[0] for d in node.decorator_list}
            if names & {"kernel", "triton.jit"}:
                kernels += 1
                continue
            a, typed = node.args, typed + 1
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
            bare = [t.arg for t in arguments if t is not None and t.annotation is None]
            assert not set(bare) - {"self"} and node.returns, f"{file.name}: {node.name} {bare}"
    assert kernels > 60 and typed > 50


def test_every_launcher_is_a_registered_operator():
    launchers = set(backends.get("cpu").launchers)
    # Only the head uses these, because it says where the gradient goes.
    launchers -= {"kl_divergence_backward_into", "token_logprobs_backward_into"}
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
    assert set(_operations().values()) == set(_calls.OPERATIONS)


def _tensor_arguments(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if "Tensor" in str(p.annotation)}


def test_every_tensor_argument_is_made_and_given_by_some_call_of_the_tests():
    for op, function in cases.FUNCTIONS.items():
        wanted = _tensor_arguments(function)
        assert wanted <= set(_calls.ARGUMENTS), op
        given = {name for call in cases.calls(op) for name in call.tensors}
        given = {"support" if name in _calls.SUPPORT else name for name in given}
        assert given == wanted, op


@pytest.mark.parametrize("name", rk.__all__)
def test_public_names_are_documented(name):
    doc = inspect.getdoc(getattr(rk, name))
    # A dataclass or NamedTuple without one gets its signature as docstring.
    assert doc and not doc.startswith(f"{name}("), f"{name} has no docstring"


@pytest.mark.parametrize("name", _operations())
def test_options_of_operations_are_keyword_only(name):
    for parameter in inspect.signature(getattr(rk, name)).parameters.values():
        assert parameter.annotation is not parameter.empty, parameter
        # Tensors come by position or by name: a mask, and the references of pairs.
        if parameter.name in ("mask", "ref_chosen_logprobs", "ref_rejected_logprobs"):
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter
        elif parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter


def test_all_is_sorted_and_complete():
    assert list(rk.__all__) == sorted(rk.__all__)
    assert all(hasattr(rk, name) for name in rk.__all__)
