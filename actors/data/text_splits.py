"""The texts of a source, split and ordered by their contents, on disk rather than in memory."""

import hashlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pyarrow as pa

from actors.config import DataConfig
from actors.data.text_sources import read_pairs, read_texts
from actors.data.texts import Pair, Split, Text, split_of

TEXTS_PER_BATCH = 64
"""Texts held in memory at once."""
Columns = Mapping[str, list[str] | list[str | None] | list[int] | list[float] | list[bytes] | list[np.ndarray]]
"""Rows of a dataset by column."""

_PLACE_FIELDS = {"place": pa.float64(), "digest": pa.binary()}
_TEXT_SCHEMA = pa.schema({"name": pa.string(), "text": pa.large_string(), **_PLACE_FIELDS})
_PAIR_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "prompt": pa.large_string(),
        "completion": pa.large_string(),
        "answer": pa.large_string(),  # null where the completion is the answer
        **_PLACE_FIELDS,
    }
)

logger = logging.getLogger(__name__)


def split_texts(config: DataConfig) -> dict[Split, datasets.Dataset]:
    """Texts or pairs of each split, ordered by hashes of their contents; columns are those of `Text` or `Pair`.

    Of equal texts one is kept, and the others are counted in the log. Equal pairs are all kept, side by side in the
    order of their names.

    Raises: as `read_texts`.
    """
    strided = config.mode == "strided"
    schema = _TEXT_SCHEMA if strided else _PAIR_SCHEMA
    items = read_texts(config) if strided else read_pairs(config)
    rows = stored_rows(_item_columns(items, names=schema.names), schema=schema)
    places, digests = list(rows["place"]), list(rows["digest"])
    keys = list(zip(places, digests, rows["name"], strict=True))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    if strided:
        order = _without_repetitions(order, digests, source=config.source)
    indices: dict[Split, list[int]] = {split: [] for split in get_args(Split)}
    for index in order:
        indices[split_of(places[index], held_out_frac=config.held_out_frac)].append(index)
    return {split: _selected(rows, chosen) for split, chosen in indices.items()}


def stored_rows(batches: Iterable[Columns], *, schema: pa.Schema) -> datasets.Dataset:
    """Rows in a temporary Arrow file, memory-mapped and unlinked: its space is freed with the dataset.

    The dataset cannot be pickled to another process, which would look for the file.
    """
    with tempfile.TemporaryDirectory(prefix="async-ebft-") as folder:
        path = Path(folder) / "rows.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for columns in batches:
                writer.write_batch(pa.record_batch([columns[name] for name in schema.names], schema=schema))
        return datasets.Dataset.from_file(str(path))


def digest(rows: datasets.Dataset) -> str:
    """Of the contents of stored rows."""
    contents = hashlib.blake2b(digest_size=16)
    for batch in rows.data.to_batches():
        for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None):
            contents.update(buffer)
    return contents.hexdigest()


def column_batches(rows: datasets.Dataset, batch_size: int) -> Iterator[dict[str, list[Any]]]:
    """Values by column, `batch_size` rows at a time."""
    for batch in rows.iter(batch_size=batch_size):
        assert isinstance(batch, dict)  # datasets declares the union of what its formats yield
        yield batch


def _without_repetitions(order: list[int], digests: list[bytes], *, source: str) -> list[int]:
    """The first of each run of equal texts, which `order` has brought together."""
    kept = [index for at, index in enumerate(order) if at == 0 or digests[index] != digests[order[at - 1]]]
    if len(kept) < len(order):
        logger.info("%s: left out %d of %d texts: each repeats another", source, len(order) - len(kept), len(order))
    return kept


def _selected(rows: datasets.Dataset, indices: list[int]) -> datasets.Dataset:
    selected = rows.select(indices)
    assert isinstance(selected, datasets.Dataset)  # datasets declares that it may be a dictionary of splits
    return selected


def _item_columns(items: Iterator[Text] | Iterator[Pair], *, names: list[str]) -> Iterator[Columns]:
    while batch := list(islice(items, TEXTS_PER_BATCH)):
        yield {name: [getattr(item, name) for item in batch] for name in names}
