"""From the command line to the frozen configuration tree, with errors that name the key."""

from collections.abc import Sequence
from pathlib import Path

import tyro
from pydantic import ValidationError

from orchestration.config import RunConfig, load_config


def parse_arguments(arguments: Sequence[str]) -> RunConfig:
    """`[config.toml] [--section.key value ...]`: the file's values over the defaults, the overrides over both.

    Raises: ValueError naming each refused key, its value and the rule; FileNotFoundError if the file is missing.
    An unknown flag ends the process with status 2 and the flags that are near it.
    """
    arguments = list(arguments)
    try:
        base = RunConfig()
        if arguments and not arguments[0].startswith("-"):
            base = load_config(Path(arguments.pop(0)))
        return tyro.cli(RunConfig, default=base, args=arguments, config=(tyro.conf.FlagConversionOff,))
    except ValidationError as error:
        raise ValueError(readable(error)) from error


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
