"""Reads settings from a YAML file and command-line flags; every mistake raises a UserError."""

import difflib
import re
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from .errors import UserError, require

# What help shows for a value of each type.
_VALUES = {"int": "N", "float": "X", "string_to_bool": "BOOL"}
_KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


class _Loader(yaml.SafeLoader):
    """Loads every scalar as a string or None, so that the same rules apply to files and flags.

    YAML 1.1 itself would read `no` as False and `1e-4` as a string.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in its base class.
        first: [(tag, pattern) for tag, pattern in found if tag.endswith((":null", ":merge"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Like the base class, but a repeated key is an error; otherwise the last one would win."""
        keys = [str(key.value).replace("-", "_") for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                line = node.value[i][0].start_mark.line + 1
                raise UserError(f"{key!r} is set twice, the second time in line {line}")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


class _Help(ArgumentDefaultsHelpFormatter):
    """One line a setting where it fits; no default where the text says what unset means."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: Action) -> str:
        if action.dest == "help":
            return super()._format_action_invocation(action)
        # A dash for an underscore is accepted too, and not shown.
        kind = getattr(action.type, "__name__", "")
        values = self._format_args(action, _VALUES.get(kind, "TEXT"))
        return f"{action.option_strings[0]} {values}".rstrip()

    def _get_help_string(self, action: Action) -> str | None:
        unset = action.default is None or action.default == []
        return action.help if unset else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Raises UserError instead of printing the usage and exiting."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=_Help, **options)
        # Before Python 3.14 argparse mistakes -1e-3 and -inf for flags.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument --(\w+)[^:]*: (.*)", message, re.DOTALL)
        if found is None:
            raise UserError(message)
        name, what = found.groups()
        if value := re.match(r"invalid (\w+) value: (.*)", what, re.DOTALL):
            kind = _KINDS.get(value[1], value[1])
            raise UserError(f"{name}: expected {kind}, found {value[2][:80]}")
        if choice := re.match(r"invalid choice: (.*) \(choose from (.*)\)", what, re.DOTALL):
            # The choices have quotes before Python 3.12.
            known = choice[2].replace("'", "")
            raise UserError(f"{name}: expected one of {known}, found {choice[1][:80]}")
        if "Truthy value expected" in what:
            value = re.search(r"got (.*) but expected", what)
            found_text = repr(value[1])[:80] if value else what
            raise UserError(f"{name}: expected true or false, found {found_text}")
        expected = {
            "expected one argument": "a value after it, found none",
            "expected at least one argument": "at least one value after it, found none",
        }
        raise UserError(f"{name}: expected {expected[what]}" if what in expected else message)


def _unknown(name: str, known: Sequence[str], help_command: str) -> UserError:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"unknown setting {name!r}; {hint}{help_command} lists all")


def _kinds(classes: Sequence[type]) -> dict[str, Any]:
    """The type of every setting, by name."""
    return {
        one.name: hints[one.name]
        for made, hints in ((made, get_type_hints(made)) for made in classes)
        for one in fields(made)
    }


def _read_yaml(path: str) -> Any:
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError("no such file") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from error
    try:
        # _Loader is a subclass of SafeLoader.
        return yaml.load(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "").split())
        raise UserError(f"not YAML{where}: {problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not YAML: {' '.join(str(error).split())[:200]}") from error


def _as_flags(content: Any, kinds: Mapping[str, Any], help_command: str) -> list[str]:
    """Converts a mapping of settings to command-line flags."""
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"expected a mapping of settings, found {repr(content)[:80]}")
    flags: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if isinstance(value, dict):
            raise UserError(f"{key}: expected a flat mapping of settings, found another mapping")
        if name not in kinds:
            raise _unknown(str(key), list(kinds), help_command)
        many = getattr(kinds[name], "__origin__", None) is list
        if value in (None, []):
            continue
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise UserError(f"{name}: expected plain values, found {repr(value)[:80]}")
        if isinstance(value, list) and not many:
            raise UserError(f"{name}: expected one value, found {repr(value)[:80]}")
        if many:
            flags += [f"--{name}", *items]
        else:
            words = {"on": "true", "off": "false"} if kinds[name] is bool else {}
            flags.append(f"--{name}={words.get(value.lower(), value)}")
    return flags


def _parser(
    classes: Sequence[type], prog: str, defaults: Mapping[str, Any], implied: Mapping[str, Any]
) -> _Parser:
    usage = f"{prog} [--config FILE.yaml] [--setting value ...] [--traceback]"
    parser = _Parser(classes, prog=prog, usage=usage)
    parser.set_defaults(**defaults)
    for action in parser._actions:
        if action.default is None and implied.get(action.dest) is not None:
            action.help = f"{action.help} (default: {implied[action.dest]})"
        if action.option_strings[0].startswith("--no_"):
            action.help = f"the same as --{action.dest} false"
            action.default = None
    # Help shows what a run writes after what it does.
    parser._action_groups.sort(key=lambda group: group.title == "run and output")
    parser.add_argument("--config", action="append", help="YAML file of the settings below")
    return parser


def parse_config(
    classes: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    defaults: Mapping[str, Any],
    implied: Mapping[str, Any] = {},
) -> tuple[Any, ...]:
    """Makes dataclass instances from `--config file.yaml` and flags; flags override the file.

    Args:
        classes: dataclasses with disjoint field names.
        argv: arguments after the subcommand.
        prog: name shown by `--help`.
        defaults: defaults of this subcommand that differ from the dataclasses'.
        implied: what it takes for settings that are unset; `--help` shows these.

    Raises:
        UserError: names the setting, and the file if the value comes from it.
    """
    parser, kinds = _parser(classes, prog, defaults, implied), _kinds(classes)
    help_command = f"{prog} --help"
    given, rest = parser.parse_known_args(argv)
    if rest:
        if rest[0].startswith("-"):
            raise _unknown(rest[0].lstrip("-").partition("=")[0], list(kinds), help_command)
        raise UserError(f"expected a setting, --name value, found {rest[0][:80]!r}")
    paths = given.config or []
    if len(paths) > 1:
        raise UserError(f"config: expected one file, found {len(paths)}")
    flags: list[str] = []
    for path in paths:
        require(bool(path.strip()) and "\0" not in path, "config", "a YAML file", path)
        try:
            flags = _as_flags(_read_yaml(path), kinds, help_command)
            parser.parse_known_args(flags)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    found = parser.parse_args_into_dataclasses([*flags, *argv], look_for_args_file=False)
    return found[: len(classes)]
