"""What a data source yields, and which split it belongs to (pure).

A split is a function of names alone: to add a text, or to read files in another order, moves no other text.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Text:
    """One text to be packed with others (strided mode)."""

    name: str
    """Unique within its source, and the same on every machine that has the source."""
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and the ground truth that continues it (completion mode)."""

    name: str
    """As `Text.name`; `origin::rest` where several pairs come from one file."""
    prompt: str
    completion: str
    answer: str | None = None
    """What a verifier is given: the expected answer, or a test program. None: the completion."""


def hash_fraction(name: str) -> float:
    """Place of a name in [0, 1): uniform over names, exact in a float, the same on every machine."""
    return (int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") >> 3) / 2**53


def split_fraction(name: str) -> float:
    """Place in [0, 1) that decides the split. Only what precedes `::` counts: a file is never split."""
    return hash_fraction(name.partition("::")[0])


def split_of(name: str, *, held_out_frac: float) -> Split:
    """The split of a text: the lowest places are `test`, as many of the next `validation`, the rest `train`."""
    place = split_fraction(name)
    if place < held_out_frac:
        return "test"
    return "validation" if place < 2 * held_out_frac else "train"
