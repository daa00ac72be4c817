"""Calls between a program's process and that of its tests, in both directions, over a pair of pipes.

Guarantee: a side does for the other what its `serve` does, and nothing else. Whatever bytes arrive, they become a
value, an exception, or the loss of the other side.

Used by program_roles.py. Standard library only.
"""

import builtins
import json
import operator
from collections.abc import Callable
from typing import IO, Any

from feature_server.verifiers.plain_values import Packed, pack, unpack

CHANGEABLE = (list, dict, set, bytearray)
Message = dict[str, Packed]


class LostError(BaseException):
    """The other side is gone; no `except Exception` of a test takes that for an answer."""


class Border:
    """One side's end."""

    def __init__(self, reading: int, writing: int, serve: Callable[..., object]) -> None:
        """`serve(what, *arguments, **named)` answers the other side; what it raises is raised there."""
        self._reading: IO[bytes] = open(reading, "rb")  # noqa: SIM115  both end with the process
        self._writing: IO[bytes] = open(writing, "wb")  # noqa: SIM115
        self._serve = serve
        self._given: dict[int, object] = {}
        self._exceptions: dict[tuple[str, ...], type[BaseException]] = {}
        self.is_lost = False
        """The other side was found to be gone."""

    def ask(self, what: str, *arguments: object, **named: object) -> object:
        """The other side's answer; serves what it asks for meanwhile.

        Lists, dicts and sets among the arguments become what the other side made of them.
        Raises: what was raised there, as Python's own exception that it is or derives from; LostError.
        """
        self._send({"ask": what, "arguments": self._pack(arguments), "named": self._pack(named)})
        message = self.receive("answer")
        for index, changed in message["changed"]:
            _replace(arguments[index], self._unpack(changed))
        if "raised" in message:
            names, text = message["raised"]
            raise self._exception(tuple(names))(text)
        return self._unpack(message["answer"])

    def tell(self, key: str, value: Packed) -> None:
        """A message that answers nothing."""
        self._send({key: value})

    def receive(self, key: str) -> Message:
        """The next message with this key, or with what was raised; requests before it are answered.

        Raises: LostError.
        """
        while True:
            message = self._next()
            if key in message or "raised" in message:
                return message
            self._answer(message)

    def _next(self) -> Message:
        line = self._reading.readline()
        try:
            message = json.loads(line)
            if isinstance(message, dict):
                return message
        except ValueError:  # cut short, or nothing that this side's counterpart would write
            pass
        self.is_lost = True
        raise LostError

    def _send(self, message: Message) -> None:
        try:
            self._writing.write(json.dumps(message).encode() + b"\n")
            self._writing.flush()
        except OSError as error:
            self.is_lost = True
            raise LostError from error

    def _answer(self, message: Message) -> None:
        arguments = self._unpack(message["arguments"])
        named = self._unpack(message["named"])
        assert isinstance(arguments, tuple) and isinstance(named, dict)
        before = [self._contents(argument) for argument in arguments]
        try:
            reply = {"answer": self._pack(self._serve(message["ask"], *arguments, **named))}
        except LostError:
            raise
        except BaseException as error:  # noqa: BLE001  whatever it is, it belongs to who asked
            reply = {"raised": [_names(type(error)), str(error)]}
        after = [self._contents(argument) for argument in arguments]
        self._send({**reply, "changed": [[i, new] for i, new in enumerate(after) if new != before[i]]})

    def _contents(self, argument: object) -> Packed:
        return self._pack(argument) if isinstance(argument, CHANGEABLE) else None

    def _pack(self, value: object) -> Packed:
        return pack(value, self._pack_own)

    def _pack_own(self, value: object) -> Packed:
        if isinstance(value, Handle):
            return {"yours": value._number}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": _names(value)}
        self._given[id(value)] = value  # kept, so that no other object gets its number
        return {"mine": id(value)}

    def _unpack(self, packed: Packed) -> object:
        return unpack(packed, self._unpack_other)

    def _unpack_other(self, kind: str, content: Packed) -> object:
        match kind:
            case "yours":
                return self._given[content]
            case "mine":
                return Handle(self, content)
            case "exception":
                return self._exception(tuple(content))
            case _:
                raise ValueError(f"nothing is packed as {kind!r}")

    def _exception(self, names: tuple[str, ...]) -> type[BaseException]:
        """Python's own exception of the first name, or a class of that name over the next."""
        own = getattr(builtins, names[0], None)
        if isinstance(own, type) and issubclass(own, BaseException):
            return own
        if names not in self._exceptions:
            self._exceptions[names] = type(names[0], (self._exception(names[1:]),), {})
        return self._exceptions[names]


class Handle:
    """An object of the other side.

    What is done to it is done there. But its operators with a plain value are not: an object that says of itself that
    it equals 6, or is less than 1e-6, would pass any test.
    """

    __slots__ = ("_border", "_number")
    _border: Border
    _number: int

    def __init__(self, border: Border, number: int) -> None:
        object.__setattr__(self, "_border", border)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: object, **named: object) -> object:
        return self._border.ask("__call__", self, *arguments, **named)

    def __getattr__(self, name: str) -> object:
        return self._border.ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._border.ask("setattr", self, name, value)


def _is_instance(kind: type, value: object) -> bool:
    return isinstance(value, kind)


ALONE: dict[str, Callable[..., object]] = {
    **{f"__{f.__name__}__": f for f in (len, iter, next, bool, str, repr, hash, reversed, int, float)},
    **{f"__{f.__name__}__": f for f in (operator.getitem, operator.setitem, operator.delitem)},
    "__instancecheck__": _is_instance,
}
"""What Python asks of an object by these methods is done to it where it is."""
AMONG_HANDLES: dict[str, Callable[..., object]] = {
    f"__{name}__": getattr(operator, name)
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "matmul")
}
DONE_TO_HANDLES: dict[str, Callable[..., object]] = {
    "__call__": operator.call,
    "getattr": getattr,
    "setattr": setattr,
    **ALONE,
    **AMONG_HANDLES,
}
"""All that a side may be asked to do to what it gave away, if it serves everything."""


def _forward(name: str) -> Callable[..., object]:
    def ask(self: Handle, *others: object) -> object:
        if name in AMONG_HANDLES and not isinstance(others[0], Handle):
            return NotImplemented
        return self._border.ask(name, self, *others)

    return ask


for _name in (*ALONE, *AMONG_HANDLES):
    setattr(Handle, _name, _forward(_name))


def _names(kind: type[BaseException]) -> list[str]:
    """The exception's class and those that it derives from, down to the first that is Python's own."""
    names = []
    for base in kind.__mro__:
        names.append(base.__name__)
        if getattr(builtins, base.__name__, None) is base:
            break
    return names


def _replace(value: object, new: Any) -> None:
    """Make the contents of a changeable argument those of its copy."""
    if isinstance(value, (list, bytearray)):
        value[:] = new
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(new)
