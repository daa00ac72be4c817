"""Our messages in one safetensors file and back: the same values, bits and dtypes, and nothing that is executed.

A message is a dataclass whose fields are annotated with what can be written: None, bool, int, float, str, numpy arrays,
tensors, tuples and lists of them, and dataclasses again. Its annotations say how it is read, so the file need not.
Arrays are tensors of the file; all else is JSON in its metadata, in which an array is the name of its tensor.
"""

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")
KINDS = (bool, int, float, str, tuple, list, np.ndarray, Tensor)


def save_objects(path: Path, objects: Sequence[object]) -> None:
    """Write messages of one kind.

    Raises: ValueError naming the file and the field of a value that is not what its annotation says or that cannot be
    written exactly; OSError if the disk is full or cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    try:
        nodes = [_encoded(one, type(one), f"[{index}]", tensors) for index, one in enumerate(objects)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    kinds = sorted({type(one).__name__ for one in objects})
    metadata = {"kinds": json.dumps(kinds), "objects": json.dumps(nodes)}
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # it does not report a full disk as an OSError
        raise OSError(errno.EIO, str(error), str(path)) from error


def load_objects(path: Path, kind: type[T]) -> list[T]:
    """Read what `save_objects` wrote.

    Raises: ValueError naming the file, and the field that is not there, is unknown, or does not fit.
    """
    try:
        kinds, nodes, tensors = _read(path)
        if kinds not in ([], [kind.__name__]):
            raise ValueError(f"it holds {', '.join(kinds)}, not {kind.__name__}")
        return [_decoded(node, kind, f"[{index}]", tensors) for index, node in enumerate(nodes)]
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}; it is damaged, or of another version") from error


def _read(path: Path) -> tuple[list[str], list[object], dict[str, Tensor]]:
    """Names of the classes of its objects, their JSON, and the arrays, each in memory of its own."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if missing := {"kinds", "objects"} - metadata.keys():
            raise ValueError(f"it holds no messages, for it lacks {' and '.join(sorted(missing))} in its metadata")
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return json.loads(metadata["kinds"]), json.loads(metadata["objects"]), tensors


def _encoded(value: Any, annotation: Any, where: str, tensors: dict[str, Tensor]) -> object:
    """The JSON of a value; its arrays are added to the tensors."""
    kind = _kind(annotation, where)
    if value is None and NoneType in get_args(annotation):
        return None
    # A message of a subclass has fields of its own, and a bool is an int to Python.
    if type(value) is not kind and (not isinstance(value, kind) or isinstance(value, bool) or is_dataclass(kind)):
        raise ValueError(f"{where} is annotated {kind.__name__} and holds {type(value).__name__} {value!r:.60}")
    if kind in (np.ndarray, Tensor):
        tensors[where] = _exact(value, where)
        return where
    if kind is float:
        return float(value).hex()  # JSON has neither NaN nor infinity
    if kind in (tuple, list):
        return [_encoded(one, *place, tensors) for one, place in _with_places(value, annotation, where)]
    if is_dataclass(kind):
        return {name: _encoded(getattr(value, name), of, f"{where}.{name}", tensors) for name, of in _fields(kind)}
    return value


def _decoded(node: Any, annotation: Any, where: str, tensors: Mapping[str, Tensor]) -> Any:
    """The value of which `_encoded` made this JSON."""
    kind = _kind(annotation, where)
    if node is None and NoneType in get_args(annotation):
        return None
    if type(node) is not _json_kind(kind):
        raise ValueError(f"{where} is annotated {kind.__name__} and holds {node!r:.60}")
    if kind in (np.ndarray, Tensor):
        if (tensor := tensors.get(node)) is None:
            raise ValueError(f"{where} is annotated {kind.__name__}, and the file has no array {node!r:.60}")
        return tensor.numpy() if kind is np.ndarray else tensor
    if kind is float:
        return float.fromhex(node)
    if kind in (tuple, list):
        return kind(_decoded(one, *place, tensors) for one, place in _with_places(node, annotation, where))
    if is_dataclass(kind):
        if different := dict(_fields(kind)).keys() ^ node.keys():
            raise ValueError(f"{where} is to have the fields of {kind.__name__}; not so {', '.join(sorted(different))}")
        return kind(**{name: _decoded(node[name], of, f"{where}.{name}", tensors) for name, of in _fields(kind)})
    return node


def _json_kind(kind: type) -> type:
    """What stands in JSON for a value of this class."""
    if kind in (tuple, list):
        return list
    if is_dataclass(kind):
        return dict
    return str if kind in (float, np.ndarray, Tensor) else kind


def _kind(annotation: Any, where: str) -> type:
    """The class that an annotation stands for, None aside: that of the array if it states a shape."""
    annotation = _without_none(annotation)
    kind = get_origin(annotation) or getattr(annotation, "array_type", annotation)
    if kind not in KINDS and not is_dataclass(kind):
        raise ValueError(f"{where} is annotated {annotation}, which cannot be written")
    return kind


def _without_none(annotation: Any) -> Any:
    others = [one for one in get_args(annotation) if one is not NoneType]
    return others[0] if isinstance(annotation, UnionType) and len(others) == 1 else annotation


def _with_places(values: Sequence[Any], annotation: Any, where: str) -> Iterator[tuple[Any, tuple[Any, str]]]:
    """Each element of a tuple or list, with its annotation and its place."""
    annotation = _without_none(annotation)
    each = get_args(annotation)
    if get_origin(annotation) is list or each[1:] == (...,):
        each = each[:1] * len(values)
    if len(each) != len(values):
        raise ValueError(f"{where} is annotated {annotation} and holds {len(values)} values")
    for index, (value, of) in enumerate(zip(values, each, strict=True)):
        yield value, (of, f"{where}[{index}]")


@cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    """Name and annotation of each field of a dataclass."""
    annotations = get_type_hints(kind)
    return tuple((field.name, annotations[field.name]) for field in fields(kind))


def _exact(array: np.ndarray | Tensor, where: str) -> Tensor:
    """A copy on the host, which no other array shares."""
    if isinstance(array, Tensor):
        return array.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is an array of {array.dtype}, which cannot be written") from error
