"""Weights cut into parts, on disk and in memory: the same bytes come out, or the fault is named."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from actors.weights.files import WeightFile, write_part
from actors.weights.manifest import WeightMismatchError
from actors.weights.object_store import ArrayPart
from actors.weights.parts import in_parts, open_parts


@pytest.fixture
def buffers() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, size, dtype=np.uint8) for size in (5, 100, 1, 40, 40, 40, 0, 7)]


@pytest.mark.parametrize("part_bytes", [1, 41, 80, 10_000])
def test_parts_keep_order_and_size(part_bytes: int, buffers: list[np.ndarray]) -> None:
    parts = list(in_parts(iter(buffers), part_bytes=part_bytes))
    assert [id(buffer) for part in parts for buffer in part] == [id(buffer) for buffer in buffers]
    for part, following in itertools.pairwise(parts):
        assert len(part) == 1 or sum(buffer.nbytes for buffer in part) <= part_bytes
        assert sum(buffer.nbytes for buffer in part) + following[0].nbytes > part_bytes, "cut too early"


def test_parts_are_made_while_the_arrays_are(buffers: list[np.ndarray]) -> None:
    made = []

    def arrays():
        for buffer in buffers:
            made.append(buffer.nbytes)
            yield buffer

    next(in_parts(arrays(), part_bytes=80))
    assert made == [5, 100]


@pytest.mark.parametrize("part_bytes", [50, 10_000])
def test_every_transport_gives_equal_bytes(part_bytes: int, buffers: list[np.ndarray], tmp_path: Path) -> None:
    parts = list(in_parts(buffers, part_bytes=part_bytes))
    files = [write_part(part, tmp_path / "version 3" / f"{index}.safetensors") for index, part in enumerate(parts)]
    arrays = [ArrayPart(part) for part in parts]
    for way in (arrays, files, [arrays[0], *files[1:]]):
        opened = open_parts(way)
        assert [buffer.tobytes() for buffer in opened] == [buffer.tobytes() for buffer in buffers]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_that_is_missing_or_cut_is_named(buffers: list[np.ndarray], tmp_path: Path) -> None:
    whole = write_part(buffers, tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(whole.path).read_bytes()[:-20])
    for path, count in ((tmp_path / "none.safetensors", 8), (cut, 8)):
        with pytest.raises(WeightMismatchError, match=f"{path.name}.*weight_folder must be on a disk"):
            open_parts([WeightFile(str(path), count)])
    with pytest.raises(WeightMismatchError, match=r"whole\.safetensors holds 8 tensors, 9 were published"):
        open_parts([WeightFile(whole.path, 9)])
