"""Sources: what each kind of file yields, and the error of every broken one."""

import json
import logging
import re

import datasets
import pytest

from actors.config import DataConfig
from actors.data.text_sources import local_files, read_pairs, read_texts
from actors.data.texts import Pair, Text

ROWS = [{"text": "one\n", "n": 1}, {"text": "zwei Größen", "n": 2}, {"text": "three", "n": 3}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def texts(path, **settings):
    return list(read_texts(DataConfig(source=str(path), **settings)))


@pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", write_jsonl), (".json", write_jsonl), (".parquet", write_parquet)]
)
def test_rows_are_named_by_file_and_row_whatever_the_format(tmp_path, suffix, write):
    path = write(tmp_path / f"data{suffix}", ROWS)
    expected = [Text(f"data:{number}", row["text"]) for number, row in enumerate(ROWS, start=1)]
    assert texts(path) == texts(tmp_path) == texts(tmp_path / f"*{suffix}") == expected


def test_a_text_file_is_one_text_and_names_are_relative_to_the_source(tmp_path):
    for name in ("b.txt", "deep/er/a.txt", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"\ufeffof {name}\r\n".encode())
    (tmp_path / "LICENSE").write_text("not data")
    expected = [Text("b:1", "of b.txt\r\n"), Text("deep/er/a:1", "of deep/er/a.txt\r\n")]
    assert texts(tmp_path) == expected
    assert texts(tmp_path / "**" / "*.txt") == expected
    assert texts(tmp_path / "deep") == [Text("er/a:1", "of deep/er/a.txt\r\n")]


def test_pairs_come_from_the_named_columns(tmp_path):
    path = write_jsonl(tmp_path / "qa.jsonl", [{"q": "2+2=", "a": "4"}])
    config = DataConfig(source=str(path), mode="completion", prompt_column="q", completion_column="a")
    assert list(read_pairs(config)) == [Pair("qa:1", "2+2=", "4")]


@pytest.mark.parametrize(("suffix", "write"), [(".jsonl", write_jsonl), (".parquet", write_parquet)])
def test_the_answer_for_the_verifier_comes_from_a_column_of_its_own(tmp_path, suffix, write):
    path = write(tmp_path / f"qa{suffix}", [{"q": "2+2=", "a": "It is 4.", "tests": "4", "n": 4}])
    columns = {"prompt_column": "q", "completion_column": "a"}
    config = DataConfig(source=str(path), mode="completion", answer_column="tests", **columns)
    assert list(read_pairs(config)) == [Pair("qa:1", "2+2=", "It is 4.", "4")]
    with pytest.raises(ValueError, match=r"no column 'absent'.*--data.answer-column"):
        list(read_pairs(DataConfig(source=str(path), mode="completion", answer_column="absent", **columns)))
    with pytest.raises(ValueError, match=r"column 'n' holds 4 \(int\)"):
        list(read_pairs(DataConfig(source=str(path), mode="completion", answer_column="n", **columns)))


BROKEN_LINES = [
    (b"{not json}\n", "not valid JSON"),
    (b'{"text": "\xff"}\n', "not valid JSON"),
    (b"[1]\n", "a JSON list"),
    (b'{"other": "x"}\n', "no column 'text', only ['other']"),
    (b'{"text": null}\n', "holds None (NoneType)"),
    (b'{"text": 7}\n', "holds 7 (int)"),
    (b'{"text": "\\ud800"}\n', "surrogates not allowed"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES)
def test_a_broken_line_is_named_with_reason_and_remedy(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line)
    with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
        texts(path)
    assert f"{path}, line 3: " in str(refusal.value)
    assert "--data.skip-broken-rows True" in str(refusal.value)


def test_skipped_lines_are_counted_and_leave_the_other_names_alone(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(line for line, _ in BROKEN_LINES) + b'{"text": "fine"}\n')
    with caplog.at_level(logging.WARNING, logger="actors.data.text_sources"):
        assert texts(path, skip_broken_rows=True) == [Text("data:8", "fine")]
    (message,) = caplog.messages
    assert "skipped 7 broken rows of 8" in message and f"{path}, line 1: not valid JSON" in message


def test_a_source_of_broken_rows_alone_is_refused_even_when_they_are_skipped(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"all 3 rows .* are broken.*no column 'body', only \['text', 'n'\]"):
        texts(tmp_path, skip_broken_rows=True, text_column="body")


def test_a_broken_parquet_row_is_named_or_skipped(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [ROWS[0], {"text": None, "n": 0}, ROWS[2]])
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 2: column 'text' holds None (NoneType)")):
        texts(path)
    assert texts(path, skip_broken_rows=True) == [Text("data:1", "one\n"), Text("data:3", "three")]
    with pytest.raises(ValueError, match=r"row 1: column 'n' holds 1 \(int\).*--data.skip-broken-rows True"):
        texts(path, text_column="n")


def test_a_text_file_that_is_not_utf8_is_named_or_skipped(tmp_path):
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"bad\.txt, row 1: .*can't decode.*--data.skip-broken-rows True"):
        texts(tmp_path)
    assert texts(tmp_path, skip_broken_rows=True) == [Text("good:1", "fine")]


def test_a_missing_parquet_column_lists_the_others_and_is_not_skipped(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", ROWS)
    with pytest.raises(ValueError, match=r"no column 'body', only \['text', 'n'\]; set --data.text-column"):
        texts(path, text_column="body", skip_broken_rows=True)


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "data.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"data\.parquet: not readable as Parquet"):
        texts(tmp_path)


@pytest.mark.parametrize("source", ["./gone", "/gone/away", "~/gone", "gone.jsonl", "gone.parquet", "gone/*.txt"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"data.source={source!r}")):
        local_files(source)


def test_mixed_unknown_and_absent_kinds_of_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no file"):
        local_files(str(tmp_path))
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"kinds \['\.csv'\]"):
        local_files(str(tmp_path / "a.csv"))
    (tmp_path / "b.txt").write_text("x")
    write_jsonl(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"kinds \['\.jsonl', '\.txt'\].*give a glob that picks one kind"):
        local_files(str(tmp_path))


def test_plain_text_holds_no_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--data\.mode strided"):
        list(read_pairs(DataConfig(source=str(tmp_path), mode="completion")))


def test_a_hub_name_that_cannot_be_loaded_says_so_and_keeps_the_cause():
    with pytest.raises(ValueError, match=r"neither a local path nor loadable.*HF_HUB_OFFLINE") as refusal:
        texts("someone/nothing-of-this-name")
    assert isinstance(refusal.value.__cause__, ConnectionError)


def test_rows_of_a_hub_dataset_are_named_by_dataset_and_row(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([*ROWS, {"text": None, "n": 4}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = {"source": "owner/name", "subset": "small", "train_split": "dev"}
    config = DataConfig(**settings, skip_broken_rows=True)
    assert list(read_texts(config)) == [Text(f"owner/name:{i}", row["text"]) for i, row in enumerate(ROWS, 1)]
    assert asked == [("owner/name", "small", "dev")]
    with pytest.raises(ValueError, match=r"owner/name, row 4: column 'text' holds None"):
        list(read_texts(DataConfig(**settings)))
    with pytest.raises(ValueError, match=r"owner/name has no column 'body', only \['text', 'n'\]"):
        list(read_texts(DataConfig(**settings, text_column="body")))
