"""Settings as text: from command line and YAML to frozen dataclasses and back, and the hash that names a configuration.

It knows dataclasses and jsonargparse; never what any option means.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fedmpi.errors import ConfigError

T = TypeVar("T")
RECIPES = Path(__file__).parent / "recipes"
KINDS = {"int": "a whole number", "float": "a finite number", "bool": "true or false", "tuple": "a list", "NoneType": "null"}
_MISMATCH = re.compile(r'Parser key "(.+?)": (.+?)(?: Given value type: \S+ \S+)? (?:Given|Got) value: (.*)')


def parse(kind: type[T], arguments: Sequence[str], program: str, about: str, extra: Mapping[str, type] = {}) -> Any:
    """Read `--config FILE` and dotted overrides into a namespace for `kind` (and one group per `extra` dataclass)."""
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser  # type: ignore[attr-defined]

    parser = ArgumentParser(prog=program, description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML recipe, or builtin:NAME for a packaged one")
    parser.add_class_arguments(kind, sub_configs=False)
    for group, dataclass in extra.items():
        parser.add_class_arguments(dataclass, group)
    try:
        return _printable(parser.instantiate(parser.parse_args([_packaged(argument) for argument in arguments])))
    except (ArgumentError, TypeError, ValueError, AttributeError) as error:  # the last three: recipes that are no mappings
        raise ConfigError(
            _MISMATCH.sub(_plainly, _one_line(str(error))) + _guess(str(error), list(parser._option_string_actions))
        ) from None


def _printable(settings: Any) -> Any:
    """The same settings; no path or name may hold the one character that no file system takes."""
    for key, value in vars(settings).items():
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{key} {value!r} holds a NUL character")
        if dataclasses.is_dataclass(value):
            _printable(value)
    return settings


def peek(argument: str) -> dict[str, Any]:
    """The plain content of a recipe, before anything is checked; nothing where it cannot be read (the parser says why)."""
    try:
        found = yaml.safe_load(Path(_packaged(argument)).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _packaged(argument: str) -> str:
    """builtin:NAME as the path of a recipe inside the package."""
    prefix, name = ("--config=", argument.removeprefix("--config="))
    wrapped = argument.startswith(prefix)
    if not (wrapped and name.startswith("builtin:")) and not argument.startswith("builtin:"):
        return argument
    path = RECIPES / f"{name.removeprefix('builtin:')}.yaml"
    if not path.exists():
        return argument  # a value such as --model.path builtin:tiny
    return f"{prefix}{path}" if wrapped else str(path)


def _guess(message: str, options: Sequence[str]) -> str:
    """What an option on the command line, or a key of a recipe, that does not exist may have been meant to be."""
    wrong = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    if key := re.search(r"(?:Group '(.+)' does not accept o|^O)ption '(.+?)'", message):
        wrong = ["--" + ".".join(filter(None, key.groups()))]
    near = [match for word in wrong for match in difflib.get_close_matches(word, options, n=1)]
    tails = [option for word in wrong for option in options if option.endswith("." + word.lstrip("-"))]
    meant = list(dict.fromkeys([*tails, *near]))
    return f" (did you mean {' or '.join(meant[:3])}?)" if meant and ("unrecognized" in message or key) else ""


def _one_line(message: str) -> str:
    return " ".join(message.replace("tip: ", "").split())


def _plainly(mismatch: re.Match[str]) -> str:
    """A value that does not fit its option, in the words of a recipe: jsonargparse lists Python's types."""
    key, expected, given = mismatch.groups()
    types = re.findall(r"<class '(\w+)'>|Literal\[(.+?)\]", expected.partition("Errors:")[0])
    allowed = [KINDS.get(kind, kind) if kind else f"one of {names}".replace("'", "") for kind, names in types]
    return f"{key} is {given}: it must be {' or '.join(allowed)}" if allowed else mismatch[0]


def as_dict(settings: Any) -> dict[str, Any]:
    """Nested plain values (tuples become lists), ready for YAML and JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return plain


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as a recipe that can be run again."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=110)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, as `train.lr 0.1 there, 0.2 here`."""
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        left, right = old.get(key), new.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} {left!r} there, {right!r} here")
    return found


def digest(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
