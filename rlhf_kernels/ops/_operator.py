"""Registration of kernels as torch.library operators.

An operator takes the backend's name as its last argument, so that a backward pass uses the backend
of its forward pass. Eager calls on plain tensors skip the dispatcher and call the launcher, because
the dispatcher costs more than a small kernel (3 µs against 1.5 µs per call, torch 2.13). All other
calls (torch.compile, fake tensors, tensor subclasses, transforms of torch.func) use the registered
operator.
"""

import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..config.mismatch import MismatchParams
from ..config.policy_codes import PolicyCodes, PolicyParams
from ..core import tracing
from ..core.pair_options import PairOptions
from ..core.row_options import RowOptions
from ..head.arguments import Batching, Divergence, Operands, PolicyArguments, Targets, Upstream
from ..kernels import backends
from ..kernels.advantages import GeneralScan
from ..kernels.losses import ValueTokens
from ..kernels.mismatch import MismatchRules
from ..kernels.rows import PolicyTokens
from ..kernels.support import Tokens

_LIBRARY = torch.library.Library("rlhf_kernels", "DEF")
# Arguments that a schema has field by field.
_TUPLES = (
    *(RowOptions, Operands, Targets, Upstream, PolicyArguments, Divergence, Batching),
    *(PairOptions, GeneralScan, MismatchRules, PolicyTokens, Tokens, ValueTokens),
)
# The other types of arguments and of their fields.
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    Annotated[int, "SymInt"]: "SymInt",
    float: "float",
    float | None: "float?",
    str: "str",
    torch.dtype: "ScalarType",
    list[bool]: "bool[]",
    list[int]: "int[]",
    list[float]: "float[]",
    PolicyCodes: "int[]",
    PolicyParams: "float[]",
    MismatchParams: "float[]",
}
# Those that are lists in a schema.
_LISTS = (PolicyCodes, PolicyParams, MismatchParams)
# Argument types that a launcher accepts directly.
_PLAIN = frozenset(
    (
        *(Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple, list),
        *(torch.dtype, *_LISTS, *_TUPLES),
    )
)

R = TypeVar("R")


class _Fields:
    """A named tuple among an operator's arguments, which the schema spells field by field.

    Args:
        kind: the named tuple.
        prefix: of the fields' names in the schema.
        optional: whether the argument may be None; every field is then None in the schema.
    """

    def __init__(self, kind: Any, prefix: str, optional: bool) -> None:
        self._kind, self._optional = kind, optional
        #: Whether one of the fields may be a tensor.
        self.has_tensors = False
        self._fields: list[_Fields | Callable[[Any], Any] | None] = []
        schema: list[str] = []
        for name, field in kind.__annotations__.items():
            if field in _TUPLES:
                inner = _Fields(field, prefix, optional)
                self._fields.append(inner)
                schema.append(inner.schema)
                self.has_tensors |= inner.has_tensors
                continue
            self.has_tensors |= field in (Tensor, Tensor | None)
            self._fields.append(_of_sequence(field))
            mark = "?" if optional and not _SCHEMA_TYPES[field].endswith("?") else ""
            schema.append(f"{_SCHEMA_TYPES[field]}{mark} {prefix}{name}")
        self.schema: str = ", ".join(schema)

    def flattened(self, value: Any) -> list[Any]:
        """The schema's arguments of `value`."""
        flat = []
        for field, part in zip(self._fields, value or (None,) * len(self._fields), strict=True):
            if isinstance(field, _Fields):
                flat += field.flattened(part)
            else:
                flat.append(part)
        return flat

    def gathered(self, flat: Iterator[Any]) -> Any:
        """The inverse of `flattened`; takes what belongs to the tuple from `flat`."""
        parts = []
        for field in self._fields:
            if isinstance(field, _Fields):
                parts.append(field.gathered(flat))
            else:
                part = next(flat)
                parts.append(part if field is None else field(part))
        return None if self._optional and parts[0] is None else self._kind(*parts)


def _of_sequence(kind: Any) -> Callable[[Any], Any] | None:
    """Makes a field of a list in the schema's arguments; None for a field that is its argument."""
    return (lambda t: kind(*t)) if kind in _LISTS else None


def _fields_of(name: str, kind: Any) -> _Fields | None:
    """The named tuple that an argument is, or None.

    The schema has the names of its fields, with the argument's name before them if that ends in
    `_`: `ref_: Operands | None` is `Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias`.
    """
    kinds = [k for k in typing.get_args(kind) or (kind,) if k in _TUPLES]
    if not kinds:
        return None
    return _Fields(kinds[0], name if name.endswith("_") else "", optional=kinds[0] is not kind)


def _results_of(kind: Any) -> str:
    """The results in a schema, which has an empty tensor for None."""
    if kind is type(None):
        return "()"
    if kind == list[Tensor]:
        return "Tensor[]"
    if kind is Tensor:
        return "Tensor"
    count = len(getattr(kind, "_fields", ()) or typing.get_args(kind))
    return f"({', '.join(['Tensor'] * count)})"


class Operator(Generic[R]):
    """A registered operator, callable as `op(*args, backend)`; R is the type of its result.

    RowOptions, Operands and the like are single arguments of this call; the schema has one argument
    per field.
    """

    def __init__(
        self,
        name: str,
        fake: Callable[..., R],
        algorithm: Callable[..., R] | None,
        mutates: str | None,
    ) -> None:
        self.name, self._algorithm = name, algorithm
        kinds = typing.get_type_hints(fake, include_extras=True)
        of_result = kinds.pop("return")
        results = _results_of(of_result)
        # The dispatcher returns a tuple without names.
        self._named = of_result if hasattr(of_result, "_fields") else None
        # By position; None where an argument is no named tuple.
        self._fields = [_fields_of(*argument) for argument in kinds.items()]
        self._with_tensors = [at for at, g in enumerate(self._fields) if g and g.has_tensors]
        flat = []
        for (argument, kind), fields in zip(kinds.items(), self._fields, strict=True):
            mark = "(a!)" if argument == mutates else ""
            flat.append(fields.schema if fields else f"{_SCHEMA_TYPES[kind]}{mark} {argument}")
        _LIBRARY.define(f"{name}({', '.join(flat)}) -> {results}")
        _LIBRARY.impl(name, self._traceable(self._run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"rlhf_kernels::{name}", self._traceable(fake), lib=_LIBRARY)
        self._registered = getattr(torch.ops.rlhf_kernels, name).default

    def _run(self, *args: Any) -> R:
        backend = backends.get(args[-1])
        if self._algorithm is None:
            launchers: Mapping[str, Any] = backend.launchers
            found: R = launchers[self.name](*args[:-1])
            return found
        return self._algorithm(backend.kernels, *args[:-1])

    def _traceable(self, f: Callable[..., R]) -> Callable[..., R]:
        """`f` with the schema's arguments, which it gathers into tuples, and the schema's results.

        A schema has no place for a result that is None; an empty tensor stands for it.
        """

        def run(*flat: Any) -> Any:
            rest = iter(flat)
            found = f(*[next(rest) if g is None else g.gathered(rest) for g in self._fields])
            if not isinstance(found, tuple):
                return found
            like = next(t for t in found if t is not None)
            return tuple(like.new_empty(0) if t is None else t for t in found)

        return run

    def __call__(self, *args: Any, plain: bool = False) -> R:
        """The result for `args`; `plain`: whether `checks.plain` has found all its tensors so."""
        # In this order: torch.compile does not trace the count of modes.
        if not (plain or self._eager(args)) or tracing.dispatch_modes():
            return self._dispatch(args)
        if self._algorithm is not None:
            return self._run(*args)
        launchers: Mapping[str, Any] = backends.get(args[-1]).launchers
        found: R = launchers[self.name](*args[:-1])
        return found

    def _eager(self, args: tuple[Any, ...]) -> bool:
        """Whether no transform is in force and a launcher takes the arguments as they are."""
        if tracing.compiling() or tracing.transform() is not None:
            return False
        eager = _PLAIN.issuperset(map(type, args))
        for at in self._with_tensors:
            eager = eager and _PLAIN.issuperset(map(type, args[at] or ()))
        return eager

    def _dispatch(self, args: tuple[Any, ...]) -> R:
        flat: list[Any] = []
        for fields, argument in zip(self._fields, args, strict=True):
            flat += [argument] if fields is None else fields.flattened(argument)
        result: Any = self._registered(*flat)
        named: R = result if self._named is None else self._named(*result)
        return named


#: Operations over a head -> the row kernel that each uses; they have no kernel of their own.
ROW_KERNELS = {
    "linear_kl_divergence": "kl_divergence",
    "linear_policy_loss": "token_logprobs",
    "linear_token_logprobs": "token_logprobs",
}


def select(op: str, device: torch.device) -> str:
    """The backend for a public operation on `device`; errors as `backends.select`."""
    return backends.select(op, device, ROW_KERNELS.get(op, op))


def head_gradients_fake(operands: Operands, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a head's operands; empty where not needed."""

    def empty(t: Tensor | None, need: bool) -> Tensor:
        return t.new_empty(t.shape) if need and t is not None else hidden.new_empty(0)

    hidden, weight, bias = operands
    of_hidden, of_weight, of_bias = needs
    return empty(hidden, of_hidden), empty(weight, of_weight), empty(bias, of_bias)


class _Registering(Protocol):
    def __call__(self, fake: Callable[..., R]) -> Operator[R]: ...


def define(
    name: str, algorithm: Callable[..., Any] | None = None, *, mutates: str | None = None
) -> _Registering:
    """Registers `rlhf_kernels::<name>`, whose arguments and results are those of what it decorates.

    That returns empty results with the right shapes and dtypes, and None for a result that the
    launcher does not return. The schema is made of its annotations: torch.library.infer_schema
    knows no named tuple, and takes every integer to be symbolic.

    Args:
        name: operator name, also the key of its launcher in each backend.
        algorithm: runs instead of a launcher; takes the backend's `Kernels`, then the arguments.
        mutates: the argument that the operator overwrites.
    """

    def registered(fake: Callable[..., R]) -> Operator[R]:
        return Operator(name, fake, algorithm, mutates)

    return registered
