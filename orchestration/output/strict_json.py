"""JSON that every parser reads: the standard has no NaN and no infinity, which Python writes all the same."""

import json
import math
from collections.abc import Mapping, Sequence


def without_non_finite(value: object) -> object:
    """The same tree with null in place of each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: without_non_finite(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [without_non_finite(part) for part in value]
    return value


def strict_json(value: object, *, indent: int | None = None) -> str:
    """JSON of a tree of mappings, lists and scalars; numbers that are not finite become null."""
    return json.dumps(without_non_finite(value), indent=indent, allow_nan=False)
