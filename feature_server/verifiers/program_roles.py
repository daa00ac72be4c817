"""The two processes of a program and its tests.

The program runs in one process, its tests in another, where nothing of the program is; the tests ask the first for what
the program defined. So the program can neither end the tests, nor patch what they use, nor read what they expect, nor
speak for them: their process alone has the descriptor on which the verdict is written.

Plain values are judged in the tests' process. On objects of its own classes the program has the last word, when tests
compare two of them or call a method that says that all is well.

Forked by fork_server.py. Standard library only.
"""

import builtins
import json
import sys
import types
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from feature_server.verifiers.border import DONE_TO_HANDLES, Border, LostError

MAX_DETAIL_CHARS = 1000
PASSED = ("passed", "")
ENDINGS = ("failed", "memory", "forbidden", "crashed")

Ending = tuple[str, str]
"""Status and detail."""


def run_program(source: str, reading: int, writing: int) -> None:
    """Run the program as a fresh `__main__`, tell how it ended, then serve the tests until they are done."""
    main = _fresh_main()
    names = vars(main)

    def serve(what: str, *arguments: Any, **named: object) -> object:
        return names[arguments[0]] if what == "name" else DONE_TO_HANDLES[what](*arguments, **named)

    border = Border(reading, writing, serve)
    ending = _ending(source, names, "<program>")
    modules = [name for name, value in names.items() if value is sys.modules.get(name)]
    border.tell("ended", [ending, list(names), modules])
    border.receive("no more")


def run_tests(source: str, reading: int, writing: int) -> bytes | None:
    """Run the tests once the program has ended; returns the verdict, or None if the program's process was lost."""
    border = Border(reading, writing, _call)
    try:
        (status, detail), defined, modules = border.receive("ended")["ended"]
        if status == PASSED[0]:
            names = _NamesOfBoth(border, defined=defined, modules=modules)
            status, detail = _ending(source, names, "<tests>")
        elif status not in ENDINGS:
            status = "failed"
    except LostError:
        return None
    return None if border.is_lost else json.dumps([status, str(detail)[:MAX_DETAIL_CHARS]]).encode()


ROLES = (run_program, run_tests)


class _NamesOfBoth(dict[str, object]):
    """The tests' own names; then Python's; then those that the program defined.

    Python's come first: else a program could define the `abs` with which the tests compare.
    """

    def __init__(self, border: Border, *, defined: Sequence[str], modules: Sequence[str]) -> None:
        super().__init__(__name__="__main__", __builtins__=builtins)
        self._border, self._defined = border, frozenset(defined)
        self._modules = sys.stdlib_module_names.intersection(modules)

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name) or name not in self._defined:
            raise KeyError(name)
        return import_module(name) if name in self._modules else self._border.ask("name", name)


def _call(what: str, called: Callable[..., object], *arguments: object, **named: object) -> object:
    """All that the program may do to what the tests gave it."""
    if what != "__call__":
        raise TypeError("a program can only call what its tests hand over, and hand it back")
    return called(*arguments, **named)


def _fresh_main() -> types.ModuleType:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv[:] = ["-c"]
    return main


def _ending(source: str, names: dict[str, Any], file: str) -> Ending:
    """Run it, to its last line or to what it raises."""
    try:
        exec(compile(source, file, "exec"), names)
    except LostError:
        raise
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:  # noqa: BLE001  whatever it raises is its ending
        return _status(error), f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARS]
    return PASSED


def _status(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "crashed"
    return "forbidden" if isinstance(error, PermissionError) else "failed"
