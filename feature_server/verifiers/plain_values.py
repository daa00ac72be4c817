"""Values that cross between a program's process and that of its tests, as JSON.

Plain values are copied: numbers, text, bytes, None, and lists, tuples, sets and dicts of them. A subclass of these
arrives as the plain type, so no method of the other side's comes along. All else stays where it is, and the other side
is given a number for it. Nothing is unpickled.

Standard library only.
"""

import builtins
from collections.abc import Callable
from importlib import import_module
from typing import Any

Packed = Any
"""What JSON can hold."""

CONTAINERS: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}
AS_TEXT = {"Fraction": "fractions", "Decimal": "decimal"}
"""Numbers that cross as text: type and module."""
SHARED_TYPES = (int, float, complex, bool, str, bytes, bytearray, list, tuple, set, frozenset, dict, range)
"""Types that mean the same on both sides, and do no harm when they are called."""
LARGE_BITS = 4096
"""Of integers: beyond, Python limits the length of decimal texts."""


def pack(value: object, other: Callable[[object], Packed]) -> Packed:
    """The value for JSON; `other` packs what is not plain."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < LARGE_BITS else {"int": hex(value)}
    if isinstance(value, list):
        return [pack(item, other) for item in value]
    if isinstance(value, dict):
        return {"dict": [[pack(key, other), pack(item, other)] for key, item in value.items()]}
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [pack(item, other) for item in value]}
    return _pack_rarer(value, other)


def _pack_rarer(value: object, other: Callable[[object], Packed]) -> Packed:
    name = type(value).__name__
    if isinstance(value, (bytes, bytearray)):
        return {name if name in ("bytes", "bytearray") else "bytes": value.decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if name in AS_TEXT and type(value).__module__ == AS_TEXT[name]:
        return {name: str(value)}
    if isinstance(value, type) and any(value is shared for shared in SHARED_TYPES):
        return {"type": value.__name__}
    return other(value)


def unpack(packed: Packed, other: Callable[[str, Packed], object]) -> object:
    """The value; `other(kind, content)` unpacks what is not plain.

    Raises: ValueError, TypeError or KeyError for what `pack` does not write.
    """
    if isinstance(packed, list):
        return [unpack(item, other) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "dict":
        return {unpack(key, other): unpack(item, other) for key, item in content}
    if kind in CONTAINERS:
        return CONTAINERS[kind](unpack(item, other) for item in content)
    return _unpack_rarer(kind, content, other)


def _unpack_rarer(kind: str, content: Packed, other: Callable[[str, Packed], object]) -> object:
    match kind:
        case "int":
            return int(content, 16)
        case "bytes" | "bytearray":
            return getattr(builtins, kind)(content, "latin-1")
        case "complex" | "range":
            return getattr(builtins, kind)(*content)
        case "Fraction" | "Decimal":
            return getattr(import_module(AS_TEXT[kind]), kind)(content)
        case "type":
            return {shared.__name__: shared for shared in SHARED_TYPES}[content]
        case _:
            return other(kind, content)
