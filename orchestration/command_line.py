"""From a TOML file and flags to a frozen configuration tree, with errors that name the key."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro
from pydantic import ValidationError

from actors.config import Settings
from orchestration.config import RunConfig

Tree = TypeVar("Tree", bound=Settings)


def parse_arguments(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a run: `parse`."""
    return parse(RunConfig, arguments)


def parse(
    tree: type[Tree], arguments: Sequence[str], *, prog: str | None = None, passed_over: Sequence[str] = ()
) -> Tree:
    """`[config.toml] [--section.key value ...]`: the file's values over the defaults, the overrides over both.

    `passed_over` are sections of the file that this tree does not have and need not know.

    Raises: ValueError naming each refused key, its value and the rule; FileNotFoundError if the file is missing.
    An unknown flag ends the process with status 2 and the flags that are near it.
    """
    arguments = list(arguments)
    try:
        base = tree()
        if arguments and not arguments[0].startswith("-"):
            base = load(tree, Path(arguments.pop(0)), passed_over=passed_over)
        return tyro.cli(tree, prog=prog, default=base, args=arguments, config=(tyro.conf.FlagConversionOff,))
    except ValidationError as error:
        raise ValueError(readable(error)) from error


def load(tree: type[Tree], path: Path, *, passed_over: Sequence[str] = ()) -> Tree:
    """Read a TOML file over the defaults.

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
    return tree.model_validate({key: value for key, value in settings.items() if key not in passed_over})


def readable(error: ValidationError) -> str:
    """One line for each refused key: its path, the rule and the value."""
    return "; ".join(_line(detail) for detail in error.errors())


def _line(detail: dict) -> str:
    path = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"{path}: there is no such key; see --help for all keys"
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return f"{path}: {message}" if path else message
    return f"{path}={detail['input']!r}: {detail['msg']}"
