"""Texts and prompt-completion pairs of any source: standard library, local files, Hugging Face dataset or task.

Rows are read one after the other, so a source may be larger than memory. A row that cannot be used is named
by file and row; the run ends there, or continues without it if `skip_broken_rows` is set.
"""

import glob
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from actors.config import TASKS, DataConfig
from actors.data.stdlib_source import stdlib_files, stdlib_pairs
from actors.data.task_source import task_pairs
from actors.data.texts import Pair, Text

_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_Row = tuple[int, tuple[str, ...]]

logger = logging.getLogger(__name__)


def read_texts(config: DataConfig) -> Iterator[Text]:
    """Texts of the source (strided mode), named `file:row` (no suffix) or `dataset:row`, rows from 1.

    Raises: FileNotFoundError for a path that does not exist; ValueError for a source, a column or a row that
    cannot be used.
    """
    _check_keys_have_a_use(config)
    if config.source == "stdlib":
        yield from stdlib_files()
        return
    for name, (text,) in _rows(config, (config.text_column,)):
        yield Text(name=name, text=text)


def read_pairs(config: DataConfig) -> Iterator[Pair]:
    """Pairs of the source (completion mode). Names and errors as `read_texts`, and those of `task_pairs`."""
    _check_keys_have_a_use(config)
    if config.source == "stdlib":
        yield from stdlib_pairs()
        return
    if config.task is not None:
        yield from task_pairs(
            config.task,
            config.task_options,
            size=config.task_size,
            seed=config.task_seed,
            prompt_template=config.prompt_template,
        )
        return
    answer_column = () if config.answer_column is None else (config.answer_column,)
    for name, (prompt, completion, *answer) in _rows(
        config, (config.prompt_column, config.completion_column, *answer_column)
    ):
        yield Pair(name, prompt, completion, answer[0] if answer else None)


def _check_keys_have_a_use(config: DataConfig) -> None:
    # Not a rule of the configuration: a file may hold these keys and leave the source to the command line.
    if config.task is None and config.task_options:
        raise ValueError(
            f"data.task_options={config.task_options} are those of a task, and data.source={config.source!r} is none; "
            f"set data.source='{TASKS}TASK', or leave them out"
        )
    if config.answer_column is not None and (config.task is not None or config.source == "stdlib"):
        raise ValueError(
            f"data.answer_column={config.answer_column!r} needs a source with columns, and data.source="
            f"{config.source!r} has none; leave it out, or give files or a dataset"
        )


class _BrokenRows:
    """What happens to rows that cannot be used: the first ends the run, or all are counted."""

    def __init__(self, *, skip: bool) -> None:
        self._skip = skip
        self.num_skipped = 0
        self.first = ""

    def report(self, place: str, reason: ValueError) -> None:
        """Raises: ValueError with place, reason and remedy, unless broken rows are skipped."""
        message = f"{place}: {reason}"
        if not self._skip:
            raise ValueError(f"{message}; fix it, or pass --data.skip-broken-rows True") from reason
        self.num_skipped += 1
        self.first = self.first or message


def _rows(config: DataConfig, columns: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    broken = _BrokenRows(skip=config.skip_broken_rows)
    num_read = 0
    for name, rows in _files_or_dataset(config, columns, broken):
        for number, values in rows:
            num_read += 1
            yield f"{name}:{number}", values
    if broken.num_skipped and not num_read:
        raise ValueError(f"all {broken.num_skipped} rows of {config.source!r} are broken; the first is {broken.first}")
    if broken.num_skipped:
        logger.warning(
            "%s: skipped %d broken rows of %d; the first is %s",
            config.source,
            broken.num_skipped,
            broken.num_skipped + num_read,
            broken.first,
        )


def _files_or_dataset(
    config: DataConfig, columns: tuple[str, ...], broken: _BrokenRows
) -> Iterator[tuple[str, Iterator[_Row]]]:
    files = local_files(config.source)
    if files is None:
        yield config.source, _dataset_rows(_load_from_hub(config), columns, config.source, broken)
        return
    if files[0][1].suffix == ".txt" and len(columns) > 1:
        raise ValueError(
            f"data.source={config.source!r} is plain text, and data.mode='completion' needs the columns "
            f"{columns}; give .jsonl or .parquet, or set --data.mode strided"
        )
    readers: dict[str, Callable[[Path, tuple[str, ...], _BrokenRows], Iterator[_Row]]] = {
        ".txt": _text_rows,
        ".parquet": _parquet_rows,
    }
    for name, path in files:
        yield name, readers.get(path.suffix, _json_rows)(path, columns, broken)


def local_files(source: str) -> list[tuple[str, Path]] | None:
    """(name, path) of the files of a local source in the order of their paths; None if `source` is not local.

    A name is the path without suffix, relative to the folder or to the part of a glob before its first
    wildcard: it stays the same when the data is moved or converted to another format. Of a folder, hidden
    files and files of other kinds are not read.

    Raises: FileNotFoundError for a path or glob that matches nothing; ValueError for files of an unknown kind
    or of several kinds.
    """
    path = Path(source).expanduser()
    if path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root = path
        files = [file for file in path.rglob("*") if _is_data(file.relative_to(path)) and file.is_file()]
    elif glob.has_magic(source):
        wildcard = next(index for index, part in enumerate(path.parts) if glob.has_magic(part))
        root = Path(*path.parts[:wildcard])
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    elif source.startswith((".", "/", "~")) or path.suffix in _SUFFIXES:
        raise FileNotFoundError(f"data.source={source!r} does not exist (looked for {path.absolute()}); check the path")
    else:
        return None
    _check_kinds(files, source=source)
    return [(file.relative_to(root).with_suffix("").as_posix(), file) for file in sorted(files)]


def _check_kinds(files: list[Path], *, source: str) -> None:
    if not files:
        raise FileNotFoundError(f"data.source={source!r} holds no file of the kinds {_SUFFIXES}; check the path")
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1 or suffixes[0] not in _SUFFIXES:
        raise ValueError(
            f"data.source={source!r} holds files of the kinds {suffixes}; all must be of one of {_SUFFIXES}: "
            "convert them, or give a glob that picks one kind, such as 'folder/*.jsonl'"
        )


def _is_data(path: Path) -> bool:
    return path.suffix in _SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _text_rows(path: Path, columns: tuple[str, ...], broken: _BrokenRows) -> Iterator[_Row]:
    try:
        yield 1, (path.read_bytes().decode("utf-8-sig"),)
    except UnicodeDecodeError as error:
        broken.report(f"{path}, row 1", error)


def _json_rows(path: Path, columns: tuple[str, ...], broken: _BrokenRows) -> Iterator[_Row]:
    # `datasets` reads JSON too, but does not say which row it could not read.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = _values(_json_object(line), columns)
            except ValueError as error:
                broken.report(f"{path}, line {number}", error)
                continue
            yield number, values


def _json_object(line: bytes) -> Mapping[str, object]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error}); each line must hold one object") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__} instead of an object with the columns, one per line")
    return record


def _parquet_rows(path: Path, columns: tuple[str, ...], broken: _BrokenRows) -> Iterator[_Row]:
    try:
        dataset = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error}); write the file again") from error
    return _dataset_rows(dataset, columns, str(path), broken)


def _load_from_hub(config: DataConfig) -> datasets.Dataset:
    try:
        return datasets.load_dataset(config.source, config.subset, split=config.train_split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"data.source={config.source!r} (subset={config.subset!r}, train_split={config.train_split!r}) "
            f"is neither a local path nor loadable from the Hugging Face hub: {error}; check names and "
            "network (HF_HUB_OFFLINE may be set), or give a local path or 'stdlib'"
        ) from error


def _dataset_rows(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: tuple[str, ...],
    place: str,
    broken: _BrokenRows,
) -> Iterator[_Row]:
    existing = dataset.column_names or []
    missing = [column for column in columns if column not in existing]
    if missing:
        raise ValueError(_missing_column(missing[0], existing, place=place))
    for number, record in enumerate(dataset.select_columns(list(columns)), start=1):
        assert isinstance(record, Mapping)  # datasets declares the union of what its formats yield
        try:
            values = _values(record, columns)
        except ValueError as error:
            broken.report(f"{place}, row {number}", error)
            continue
        yield number, values


def _values(record: Mapping[str, object], columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_string(record, column) for column in columns)


def _string(record: Mapping[str, object], column: str) -> str:
    if column not in record:
        raise ValueError(_missing_column(column, list(record), place="the row"))
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {value!r:.40} ({type(value).__name__}) instead of a string")
    value.encode()  # half a surrogate pair passes JSON, but no tokenizer
    return value


def _missing_column(column: str, existing: list[str], *, place: str) -> str:
    return (
        f"{place} has no column {column!r}, only {existing}; "
        "set --data.text-column, or --data.prompt-column, --data.completion-column and --data.answer-column"
    )
