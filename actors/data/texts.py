"""What a data source yields, and which split it belongs to (pure).

A split is a function of contents alone: to rename, move, reorder or add texts moves no other text, and equal texts
share a split whatever they are called. So do texts that differ in white space or in the form of Unicode alone.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Text:
    """One text to be packed with others (strided mode)."""

    name: str
    """Unique within its source, and the same on every machine that has the source."""
    text: str

    @property
    def place(self) -> float:
        """Place in [0, 1) that decides its split."""
        return content_place(self.text)

    @property
    def digest(self) -> bytes:
        """Equal for equal texts alone."""
        return _digest(self.text)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and the ground truth that continues it (completion mode)."""

    name: str
    """As `Text.name`."""
    prompt: str
    completion: str
    answer: str | None = None
    """What a verifier is given: the expected answer, or a test program. None: the completion."""
    file_place: float | None = None
    """`place` of the file that it is a part of; None: it stands for itself."""

    @property
    def place(self) -> float:
        """Place in [0, 1) that decides its split: that of its file, so that no file is divided, or of its prompt."""
        return content_place(self.prompt) if self.file_place is None else self.file_place

    @property
    def digest(self) -> bytes:
        """Equal for pairs whose texts are all equal."""
        return _digest(*(_digest(text).hex() for text in (self.prompt, self.completion, self.answer or "")))


def content_place(text: str) -> float:
    """Place of a text in [0, 1) by its content; white space does not count, nor how accents are encoded."""
    return hash_fraction(" ".join(unicodedata.normalize("NFC", text).split()))


def hash_fraction(text: str) -> float:
    """Place in [0, 1): uniform over texts, exact in a float, the same on every machine."""
    return (int.from_bytes(_digest(text)[:7], "big") >> 3) / 2**53


def split_of(place: float, *, held_out_frac: float) -> Split:
    """The split of that place: the lowest are `test`, as many of the next `validation`, the rest `train`."""
    if place < held_out_frac:
        return "test"
    return "validation" if place < 2 * held_out_frac else "train"


def _digest(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()
