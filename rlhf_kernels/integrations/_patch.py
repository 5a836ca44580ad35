"""Replaces functions of an installed package by ours and restores them, for all integrations."""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch


class Unsupported(Exception):
    """Raised by a replacement, before any work, for a call that the original must serve."""


class IncompatibleError(RuntimeError):
    """Raised if an integration does not support the installed package; nothing was replaced."""


class Report(NamedTuple):
    """The names that an integration found and replaced in this process, and its calls.

    Attributes:
        package: name of the trainer's package.
        version: installed version, or None.
        active: whether the package is patched.
        replaced: dotted names of replaced functions, and of added registry entries.
        available: dotted names that patch() would replace.
        absent: dotted names that this version lacks, with the reason.
        refused: dotted names with an unknown signature, with both signatures.
        kept: dotted names that other code replaced after us, so that unpatch() left them. If that
            code calls our replacement, it passes every call on to the original.
        served: number of calls that each replacement served.
        fallbacks: for each replacement, the number of calls that the original served, by reason.
    """

    package: str
    version: str | None
    active: bool
    replaced: tuple[str, ...] = ()
    available: tuple[str, ...] = ()
    absent: dict[str, str] = {}  # noqa: RUF012 - never mutated
    refused: dict[str, str] = {}  # noqa: RUF012
    kept: tuple[str, ...] = ()
    served: dict[str, int] = {}  # noqa: RUF012
    fallbacks: dict[str, dict[str, int]] = {}  # noqa: RUF012

    def __str__(self) -> str:
        state = "patched" if self.active else "not patched"
        if self.version is None:
            return f"{self.package}: not installed"
        lines = [f"{self.package} {self.version}: {state}"]
        lines += [f"  replaced   {name}" for name in self.replaced]
        lines += [f"  available  {name}" for name in self.available]
        lines += [f"  absent     {name}: {why}" for name, why in self.absent.items()]
        lines += [f"  refused    {name}: {why}" for name, why in self.refused.items()]
        lines += [f"  kept       {name}: replaced again by something else" for name in self.kept]
        lines += [f"  served     {name}: {count} calls" for name, count in self.served.items()]
        for name, reasons in self.fallbacks.items():
            lines += [f"  fell back  {name}: {n} calls: {why}" for why, n in reasons.items()]
        return "\n".join(lines)


class Hook(NamedTuple):
    """A function or class of the package, with our replacement.

    Attributes:
        module: the module that defines it.
        name: a function, "Class" or "Class.method".
        signatures: parameter names of the known versions, as "a, b, *, c"; for an
            autograd.Function, those of its forward.
        ours: takes the same arguments and raises Unsupported for calls that it cannot serve; for
            an autograd.Function it replaces `apply`.
        everywhere: whether to replace it also in modules of the package that imported it.
        required: whether the package is incompatible without it.
        makes_ours: whether `ours` makes the replacement from the original.
    """

    module: str
    name: str
    signatures: tuple[str, ...]
    ours: Callable[..., Any]
    everywhere: bool = True
    required: bool = False
    makes_ours: bool = False

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


class _Target(NamedTuple):
    hook: Hook
    owner: Any
    original: Any


class _Replacement(NamedTuple):
    owner: Any
    attribute: str
    everywhere: bool
    original: Any
    ours: Any


def _is_function(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.autograd.Function)


def parameters(value: Any) -> str:
    """The parameter names of a function, or of an autograd.Function's forward."""
    names, keyword_only = [], False
    for p in inspect.signature(value.forward if _is_function(value) else value).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            names.append("*")
        keyword_only |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        names.append(stars + p.name)
    return ", ".join(names)


def _release(version: str) -> tuple[int, ...]:
    """The release numbers of a version: (1, 16, 0) of "1.16.0.dev0"."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


class Integration:
    """Patches one package.

    Args:
        package: name of the package in imports.
        versions: the first known version, and the first later one that is not known.
        distribution: name of the distribution, if it differs.
    """

    def __init__(self, package: str, versions: tuple[str, str], *, distribution: str = "") -> None:
        self.package = package
        self.distribution = distribution or package
        self.versions = versions
        self.active = False
        self._replacements: dict[str, _Replacement] = {}
        self._added: dict[str, tuple[dict[str, Any], str]] = {}
        self._kept: tuple[str, ...] = ()
        self._served: Counter[str] = Counter()
        self._fallbacks: dict[str, Counter[str]] = {}

    def version(self) -> str | None:
        """The installed version; None if the package is not installed."""
        if importlib.util.find_spec(self.package) is None:
            return None
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            module = importlib.import_module(self.package)
            return str(getattr(module, "__version__", "unknown"))

    def _check_version(self) -> None:
        version, (first, last) = self.version(), self.versions
        if version is None:
            raise IncompatibleError(f"{self.package} is not installed")
        if not _release(first) <= _release(version) < _release(last):
            raise IncompatibleError(
                f"{self.package} {version}: this integration knows versions from {first} to below "
                f"{last}; nothing was replaced"
            )

    def _resolve(
        self, hooks: Iterable[Hook]
    ) -> tuple[list[_Target], dict[str, str], dict[str, str]]:
        """Sorts hooks into replaceable, absent and refused ones; skips those in place."""
        found, absent, refused = [], {}, {}
        for hook in hooks:
            if hook.path in self._replacements:
                continue
            try:
                owner: Any = importlib.import_module(hook.module)
            except Exception as error:
                # The error may come from another package that the module imports.
                absent[hook.path] = f"cannot be imported: {error}"
                continue
            *outer, attribute = hook.name.split(".")
            for part in outer:
                owner = getattr(owner, part, None)
            original = vars(owner).get(attribute) if owner is not None else None
            if original is None:
                absent[hook.path] = "not in this version"
                continue
            if isinstance(original, staticmethod):
                original = original.__func__
            signature = parameters(original)
            if signature in hook.signatures:
                found.append(_Target(hook, owner, original))
            else:
                known = " or ".join(f"({s})" for s in hook.signatures)
                refused[hook.path] = f"its parameters are ({signature}), known are {known}"
        return found, absent, refused

    def patch(self, hooks: Sequence[Hook]) -> Report:
        """Replaces what `hooks` name, all or nothing; existing replacements stay."""
        self._check_version()
        found, absent, refused = self._resolve(hooks)
        if refused:
            reasons = "; ".join(f"{path}: {why}" for path, why in refused.items())
            raise IncompatibleError(
                f"{self.package} {self.version()}: nothing was replaced, since {reasons}"
            )
        missing = [hook.path for hook in hooks if hook.required and hook.path in absent]
        if missing or not (found or self._replacements):
            paths = "; ".join(f"{path} is {absent[path]}" for path in missing or absent)
            raise IncompatibleError(
                f"{self.package} {self.version()}: nothing was replaced, since {paths}"
            )
        self.active = True
        for hook, owner, original in found:
            ours = self._replacement(hook, original)
            attribute = hook.name.split(".")[-1]
            self._replacements[hook.path] = _Replacement(
                owner, attribute, hook.everywhere, original, ours
            )
            _assign(owner, attribute, ours)
            if hook.everywhere:
                self._swap(original, ours)
        self._kept = ()
        return self.report(hooks)

    def original(self, path: str) -> Any:
        """The package's own function under a dotted name, whether it is replaced or not."""
        if path in self._replacements:
            return self._replacements[path].original
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def add(self, path: str, registry: dict[str, Any], key: str, value: Callable[..., Any]) -> None:
        """Adds an entry to a registry of the package, until unpatch(); `path` names it."""
        if path not in self._added:
            if key in registry:
                raise IncompatibleError(f"{path} exists already")
            registry[key] = value
            self._added[path] = (registry, key)

    def unpatch(self) -> Report:
        """Restores the originals, also in modules that imported ours; keeps the counts."""
        self.active = False
        kept = []
        for path, r in self._replacements.items():
            if _plain(vars(r.owner).get(r.attribute)) is r.ours:
                _assign(r.owner, r.attribute, r.original)
            else:
                kept.append(path)
            if r.everywhere:
                self._swap(r.ours, r.original)
        for registry, key in self._added.values():
            registry.pop(key, None)
        self._added.clear()
        self._replacements.clear()
        self._kept = tuple(kept)
        return self.report()

    @contextlib.contextmanager
    def patched(self, patch: Callable[[], Report], unpatch: Callable[[], Report]) -> Iterator[None]:
        """Calls patch() on entry and unpatch() on exit; does nothing if it is patched already."""
        if self.active:
            yield
            return
        patch()
        try:
            yield
        finally:
            unpatch()

    def report(self, hooks: Sequence[Hook] = ()) -> Report:
        """What is replaced, and which of `hooks` could be."""
        version = self.version()
        found, absent, refused = self._resolve(hooks) if version is not None else ([], {}, {})
        return Report(
            self.package,
            version,
            self.active,
            (*self._replacements, *self._added),
            tuple(target.hook.path for target in found),
            absent,
            refused,
            self._kept,
            dict(self._served),
            {name: dict(reasons) for name, reasons in self._fallbacks.items()},
        )

    def reset_counts(self) -> None:
        """Resets the counts of calls."""
        self._served.clear()
        self._fallbacks.clear()

    def fell_back(self, name: str, reason: str) -> None:
        """Counts a call that the original serves."""
        # A compiled graph would guard on the count, and recompile with every call.
        if not torch.compiler.is_compiling():
            self._fallbacks.setdefault(name, Counter())[reason] += 1

    def _replacement(self, hook: Hook, original: Any) -> Any:
        ours = hook.ours(original) if hook.makes_ours else hook.ours
        if not _is_function(original):
            return self.dispatcher(hook.name, original, ours)
        apply = self.dispatcher(hook.name, original.apply, ours)
        forward = staticmethod(original.forward)
        return type(original.__name__, (), {"apply": staticmethod(apply), "forward": forward})

    def dispatcher(
        self, name: str, original: Callable[..., Any], ours: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Makes a function that calls `ours` while patched, and `original` if ours cannot serve."""

        @functools.wraps(original)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            # Modules outside the package may keep this function after unpatch().
            if not self.active:
                return original(*args, **kwargs)
            try:
                result = ours(*args, **kwargs)
            except Unsupported as reason:
                self.fell_back(name, str(reason))
                return original(*args, **kwargs)
            if not torch.compiler.is_compiling():
                self._served[name] += 1
            return result

        return dispatch

    def _swap(self, old: Any, new: Any) -> None:
        """Replaces `old` by `new` in all imported modules of the package and their registries."""
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] != self.package or not isinstance(module, ModuleType):
                continue
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
                elif type(value) is dict and not attribute.startswith("__"):
                    # A dict may be a registry of functions.
                    value.update({key: new for key, entry in value.items() if entry is old})


def _plain(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod) else value


def _assign(owner: Any, attribute: str, value: Any) -> None:
    static = isinstance(owner, type) and isinstance(vars(owner)[attribute], staticmethod)
    setattr(owner, attribute, staticmethod(value) if static else value)
