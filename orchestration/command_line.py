"""From a TOML file and flags to a frozen configuration tree, with errors that name the key."""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from actors.config import Settings
from orchestration.config import RunConfig
from orchestration.start_up import HELP_ON_LOGS

Tree = TypeVar("Tree", bound=Settings)


def parse_arguments(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a run: `parse`."""
    return parse(RunConfig, arguments)


def parse(tree: type[Tree], arguments: Sequence[str], *, prog: str | None = None) -> Tree:
    """`[config.toml] [--section.key value ...]`: the file's values over the defaults, the overrides over both.

    Raises: ValueError naming each refused key, its value and the rule; FileNotFoundError if the file is missing.
    An unknown flag ends the process with status 2 and the flags that are near it.
    """
    arguments = list(arguments)
    try:
        base = tree()
        if arguments and not arguments[0].startswith("-"):
            base = load(tree, Path(arguments.pop(0)))
        return tyro.cli(
            tree,
            prog=prog,
            description=f"{tree.__doc__}\n\n{HELP_ON_LOGS}",
            default=base,
            args=arguments,
            config=(tyro.conf.FlagConversionOff,),
        )
    except ValidationError as error:
        raise ValueError(readable(error, tree)) from error


def load(tree: type[Tree], path: Path) -> Tree:
    """Read a TOML file over the defaults. Keys that a run has and this tree lacks are ignored.

    Raises: FileNotFoundError, or ValueError that names the line or the key and the rule it breaks.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"configuration file {str(path)!r} does not exist; configs ship in orchestration/configs/"
        )
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"configuration file {str(path)!r} is not TOML: {error}") from error
    return tree.model_validate(_over(tree(), _without_keys_of_a_run(settings, tree, RunConfig)))


def readable(error: ValidationError, tree: type[Settings]) -> str:
    """One line for each refused key of a tree: its path, the rule and the value."""
    return "; ".join(_line(detail, tree) for detail in error.errors())


def key_paths(tree: type[Settings]) -> Iterator[str]:
    """Dotted path of every key, sections left out."""
    for name in tree.model_fields:
        section = _section(tree, name)
        if section is None:
            yield name
        else:
            yield from (f"{name}.{path}" for path in key_paths(section))


def _section(tree: type[Settings], name: str) -> type[Settings] | None:
    """The tree of a section; None for a key, or for an unknown name."""
    annotation = tree.model_fields[name].annotation if name in tree.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def _over(section: Settings, values: Mapping[str, object]) -> dict[str, object]:
    """The section's values with these in their place. A key that is not named keeps what this section gives it, which
    may differ from what its class gives it: the roles of a placement reserve unequal shares.
    """
    merged: dict[str, object] = dict(section)
    for name, value in values.items():
        default = merged.get(name)
        merged[name] = _over(default, value) if isinstance(default, Settings) and isinstance(value, dict) else value
    return merged


def _without_keys_of_a_run(
    settings: Mapping[str, object], tree: type[Settings], run: type[Settings]
) -> dict[str, object]:
    kept: dict[str, object] = {}
    for name, value in settings.items():
        if name in run.model_fields and name not in tree.model_fields:
            continue
        section, of_a_run = _section(tree, name), _section(run, name)
        if section is not None and of_a_run is not None and isinstance(value, dict):
            value = _without_keys_of_a_run(value, section, of_a_run)
        kept[name] = value
    return kept


def _line(detail: ErrorDetails, tree: type[Settings]) -> str:
    path = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"{path}: there is no such key; the nearest is {_nearest(path, tree)}; see --help for all keys"
    if detail["type"] == "value_error":
        message = str(detail.get("ctx", {})["error"])
        return f"{path}: {message}" if path else message
    return f"{path}={detail['input']!r}: {detail['msg']}"


def _nearest(path: str, tree: type[Settings]) -> str:
    """The key or section most like this one; one of the same name in another section before all others."""
    keys = list(key_paths(tree))
    names = keys + sorted({key.rpartition(".")[0] for key in keys} - {""})
    namesakes = [name for name in names if name.rpartition(".")[2] == path.rpartition(".")[2]]
    return difflib.get_close_matches(path, namesakes or names, n=1, cutoff=0)[0]
