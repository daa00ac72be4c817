"""Documents against an independent reading, tokenising and splitting of the same texts."""

import copy
import hashlib
import json
import logging
import math
import re
import shutil
import sysconfig
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import ByT5Tokenizer

from actors.config import DataConfig
from actors.data.documents import DocumentStream, load_documents
from actors.data.texts import Pair, Text, content_place, split_of
from actors.rollout import Document

SPLITS = ("train", "validation", "test")
FRACTIONS = {"held_out_frac": 0.25}
STRIDED = {"document_tokens": 16, "context_tokens": 4, "horizon": 4, "stride": 2, **FRACTIONS}
COMPLETION = {"mode": "completion", "document_tokens": 64, "horizon": 24, **FRACTIONS}
TEXTS = {f"t{i:02}": f"def f{i}(x):\n    return x * {i}  # Größe {'é' * (i % 5)}\n" * (i + 1) for i in range(24)}


def place(text):
    """Of a text that deserves none of its white space: single spaces, none around it."""
    return int(hashlib.sha256(re.sub(r"\s+", " ", text).strip().encode()).hexdigest(), 16) / 2**256


def split_names(texts):
    """Names of each split in the order in which their texts are packed; `texts` by name, all different."""
    ordered = sorted(texts, key=lambda name: place(texts[name]))
    return {
        "test": [name for name in ordered if place(texts[name]) < 0.25],
        "validation": [name for name in ordered if 0.25 <= place(texts[name]) < 0.5],
        "train": [name for name in ordered if place(texts[name]) >= 0.5],
    }


@pytest.fixture
def folder(tmp_path):
    """A folder of text files, written in another order than that of their names."""
    for name in reversed(TEXTS):
        (tmp_path / f"{name}.txt").write_text(TEXTS[name], encoding="utf-8")
    return tmp_path


def write_pairs(folder, pairs):
    rows = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs)
    (folder / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return str(folder / "pairs.jsonl")


def as_plain(documents):
    return [(d.document_id, d.token_ids.tolist(), d.anchors.tolist(), d.num_prompt_tokens) for d in documents]


@pytest.mark.parametrize("texts_per_batch", [1, 5, 64])
def test_packed_rows_are_the_texts_in_hash_order_with_eos_between(folder, tokenizer, texts_per_batch, monkeypatch):
    monkeypatch.setattr("actors.data.documents.TEXTS_PER_BATCH", texts_per_batch)
    splits = load_documents(DataConfig(source=str(folder), **STRIDED), tokenizer)
    for split, names in split_names(TEXTS).items():
        stream = []
        for name in names:
            stream += [*tokenizer.encode(TEXTS[name], add_special_tokens=False), tokenizer.eos_token_id]
        documents = getattr(splits, split)
        assert [d.document_id for d in documents] == [f"{split}/{row}" for row in range(len(stream) // 16)]
        assert np.concatenate([d.token_ids for d in documents]).tolist() == stream[: len(stream) // 16 * 16]
        for document in documents:
            assert document.anchors.tolist() == [4, 6, 8, 10, 12]
            assert (document.horizon, document.ends_with_eos, document.num_prompt_tokens) == (4, False, 0)
            assert document.token_ids.dtype == document.anchors.dtype == np.int64


def test_separate_texts_keep_the_blocks_that_stay_within_one_text(folder, tokenizer, caplog, monkeypatch):
    """Texts of many lengths, some shorter than a block, and one that holds the EOS token without ending there."""
    texts_by_name = TEXTS | {"zz": "a<eos>b"} | {f"short{index}": f"x = {index}" for index in range(40)}
    for name, text in texts_by_name.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    assert tokenizer.eos_token_id in tokenizer.encode("a<eos>b", add_special_tokens=False)
    monkeypatch.setattr("actors.data.documents.TEXTS_PER_BATCH", 5)
    config = DataConfig(source=str(folder), separate_texts=True, **STRIDED)
    with caplog.at_level(logging.INFO, logger="actors"):
        splits = load_documents(config, tokenizer)
    num_dropped = num_crossing = 0
    for split, names in split_names(texts_by_name).items():
        stream = []  # (number of the text, token)
        for number, name in enumerate(names):
            ids = tokenizer.encode(texts_by_name[name], add_special_tokens=False)
            stream += [(number, token) for token in [*ids, tokenizer.eos_token_id]]
        expected = []
        for row in range(len(stream) // 16):
            texts, ids = zip(*stream[row * 16 : row * 16 + 16], strict=True)
            anchors = [a for a in (4, 6, 8, 10, 12) if len(set(texts[a - 4 : a + 4])) == 1]
            starts = [0] + [p for p in range(1, 16) if texts[p] != texts[p - 1]]
            num_dropped += not anchors
            num_crossing += 0 < len(anchors) < 5
            if anchors:
                expected.append((f"{split}/{row}", list(ids), anchors, starts))
        documents = getattr(splits, split)
        found = [(d.document_id, d.token_ids.tolist(), d.anchors.tolist(), d.text_starts.tolist()) for d in documents]
        assert found == expected
    assert num_dropped > 0 and num_crossing > 0
    assert f"left out {num_dropped} packed rows: {num_dropped} without a block within one text" in caplog.text


def test_one_text_is_the_default(folder, tokenizer):
    splits = load_documents(DataConfig(source=str(folder), **STRIDED), tokenizer)
    assert all(document.text_starts.tolist() == [0] for split in SPLITS for document in getattr(splits, split))


@pytest.mark.parametrize("texts_per_batch", [1, 64])
def test_a_row_is_of_the_text_that_most_of_its_tokens_are_of(texts_per_batch, tmp_path, tokenizer, monkeypatch):
    """Each text repeats a letter of its own, so a row's tokens tell whose they are; EOS belongs to the text before."""
    monkeypatch.setattr("actors.data.documents.TEXTS_PER_BATCH", texts_per_batch)
    for index, letter in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        (tmp_path / f"{letter}{index}.txt").write_text(letter * (9 + index % 7 * 8), encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    config = DataConfig(source=str(tmp_path), **STRIDED)
    origins, mixed = {}, 0
    for split in SPLITS:
        last = None
        for document in getattr(load_documents(config, tokenizer), split):
            counts = Counter()
            for token in document.token_ids.tolist():
                last = last if token == tokenizer.eos_token_id else tokenizer.decode([token]).strip()[0]
                counts[last] += 1
            mixed += len(counts) > 1
            assert counts[document.origin[0]] == max(counts.values())
            assert document.cluster == document.origin
            origins[document.document_id] = document.origin
    assert mixed > 3
    separate = load_documents(config.model_copy(update={"separate_texts": True}), tokenizer)
    kept = [document for split in SPLITS for document in getattr(separate, split)]
    assert len(kept) > 3
    assert [document.origin for document in kept] == [origins[document.document_id] for document in kept]


def test_pairs_of_one_file_and_pairs_of_one_prompt_are_one_cluster(tmp_path, tokenizer, monkeypatch):
    rows = [{"prompt": f"question {index // 2}", "completion": f"answer {index}"} for index in range(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = DataConfig(
        source=str(tmp_path / "pairs.jsonl"), mode="completion", document_tokens=64, horizon=32, held_out_frac=0.2
    )
    found = [d for split in SPLITS for d in getattr(load_documents(source, tokenizer), split)]
    assert len(found) == 200
    prompts = {d.document_id: tokenizer.decode(d.token_ids[: d.num_prompt_tokens]) for d in found}
    for one in found:
        for other in found:
            assert (one.cluster == other.cluster) == (prompts[one.document_id] == prompts[other.document_id])
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::4]
    (tmp_path / "stdlib").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "stdlib")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    code = DataConfig(source="stdlib", mode="completion", document_tokens=128, horizon=64)
    for document in load_documents(code, tokenizer).validation:
        assert document.cluster == document.document_id.partition("::")[0]
        assert document.cluster.endswith(".py")


def test_texts_too_short_for_any_block_are_refused(tmp_path, tokenizer):
    for index in range(200):
        (tmp_path / f"{index}.txt").write_text(chr(945 + index // 20) + chr(945 + index % 20))
    load_documents(DataConfig(source=str(tmp_path), **STRIDED), tokenizer)
    with pytest.raises(ValueError, match=r"hold no block within one text \(rows left out so far: \d+\); give"):
        load_documents(DataConfig(source=str(tmp_path), separate_texts=True, **STRIDED), tokenizer)


def test_local_formats_give_the_same_documents(folder, tmp_path_factory, tokenizer):
    expected = load_documents(DataConfig(source=str(folder), **STRIDED), tokenizer)
    jsonl, parquet = tmp_path_factory.mktemp("jsonl"), tmp_path_factory.mktemp("parquet")
    for name, text in TEXTS.items():
        (jsonl / f"{name}.jsonl").write_text(json.dumps({"text": text}))
        datasets.Dataset.from_list([{"text": text}]).to_parquet(parquet / f"{name}.parquet")
    for other in (jsonl, parquet):
        splits = load_documents(DataConfig(source=str(other), **STRIDED), tokenizer)
        for split in SPLITS:
            assert as_plain(getattr(splits, split)) == as_plain(getattr(expected, split))


def test_an_empty_text_adds_nothing(folder, tokenizer):
    before = load_documents(DataConfig(source=str(folder), **STRIDED), tokenizer)
    for index in range(10):
        (folder / f"empty{index}.txt").write_text("")
    after = load_documents(DataConfig(source=str(folder), **STRIDED), tokenizer)
    for split in SPLITS:
        assert as_plain(getattr(after, split)) == as_plain(getattr(before, split))


def test_documents_are_a_sequence(folder, tokenizer):
    train = load_documents(DataConfig(source=str(folder), **STRIDED), tokenizer).train
    assert as_plain([train[-1]]) == as_plain([train[len(train) - 1]])
    assert as_plain(train[1:4]) == as_plain([train[1], train[2], train[3]])
    with pytest.raises(IndexError):
        train[len(train)]


def test_splits_are_disjoint_and_stable_when_texts_are_added(tmp_path, tokenizer):
    pairs = [(f"f({i})", f" = {i}") for i in range(40)]
    config = DataConfig(source=write_pairs(tmp_path, pairs), **COMPLETION)
    few = load_documents(config, tokenizer)
    write_pairs(tmp_path, pairs + [(f"g({i})", f" = {i}") for i in range(40)])
    many = load_documents(config, tokenizer)
    ids = {split: [d.document_id for d in getattr(few, split)] for split in SPLITS}
    assert ids == split_names({f"pairs:{row}": prompt for row, (prompt, _) in enumerate(pairs, start=1)})
    for split in SPLITS:
        assert set(ids[split]) < {d.document_id for d in getattr(many, split)}


def test_splits_are_stable_when_texts_are_renamed_moved_reordered_and_added(folder, tmp_path_factory, tokenizer):
    def texts_of(source):
        documents = load_documents(DataConfig(source=str(source), **STRIDED), tokenizer)
        return {s: b"".join(d.token_ids.tobytes() for d in getattr(documents, s)) for s in SPLITS}

    before = texts_of(folder)
    for index, name in enumerate(sorted(TEXTS)):
        (folder / f"{name}.txt").rename(folder / f"moved{-index % 7}_{index}.txt")
    assert texts_of(folder) == before
    rows = tmp_path_factory.mktemp("rows") / "one_file.jsonl"
    rows.write_text("".join(json.dumps({"text": TEXTS[name]}) + "\n" for name in sorted(TEXTS, reverse=True)))
    assert texts_of(rows) == before
    (folder / "added.txt").write_text("x = 1\n")
    (changed,) = [s for s, tokens in texts_of(folder).items() if tokens != before[s]] or [None]
    assert changed in (None, "test" if place("x = 1") < 0.25 else "validation" if place("x = 1") < 0.5 else "train")


def test_a_text_under_many_names_is_kept_once(folder, tokenizer, caplog):
    """200 copies among 24 others: by their names they would be in all three splits."""
    copied = "def copied(y):\n    return y * 0.5  # the same everywhere\n" * 3
    for index in range(200):
        (folder / f"copy{index:03}.txt").write_text(copied)
    shutil.copytree(folder, folder / "again")
    with caplog.at_level(logging.INFO, logger="actors"):
        found = load_documents(DataConfig(source=str(folder), **STRIDED), tokenizer)
    assert "left out 423 of 448 texts: each repeats another" in caplog.text
    needle = tokenizer.encode(copied, add_special_tokens=False)[4:-4]
    stream = {s: tokenizer.decode(np.concatenate([d.token_ids for d in getattr(found, s)])) for s in SPLITS}
    counts = {s: text.count(tokenizer.decode(needle)) for s, text in stream.items()}
    assert sorted(counts.values()) == [0, 0, 1]


def test_texts_that_differ_in_white_space_share_a_split(tmp_path, tokenizer):
    texts = [f"def f{i}(x):\n\treturn {i}\n" for i in range(40)]
    assert [Text("a", text).place for text in texts] == pytest.approx([place(text) for text in texts], abs=1e-15)
    for text in texts:
        others = (text.replace("\n", "\r\n"), f"\n{text}", text.expandtabs(), text.rstrip())
        assert {Text(str(index), other).place for index, other in enumerate(others)} == {Text("a", text).place}
        assert len({Text("a", other).digest for other in others}) == 4, "they are not the same text"


def test_texts_that_differ_in_the_form_of_unicode_share_a_split():
    for index in range(40):
        text = f"Größe {index}: é, Å, 가"
        forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
        assert len(set(forms)) == 2 and len({Text("a", form).place for form in forms}) == 1


def test_a_file_whose_name_holds_colons_is_not_one_text(tmp_path, tokenizer):
    """As those of functions of one module do, behind its `.py`."""
    path = tmp_path / "set::v2.jsonl"
    rows = [json.dumps({"prompt": f"question {index}", "completion": f"answer {index}"}) for index in range(60)]
    path.write_text("\n".join(rows), encoding="utf-8")
    splits = load_documents(DataConfig(source=str(path), **COMPLETION), tokenizer)
    found = [document for split in SPLITS for document in getattr(splits, split)]
    assert len({document.cluster for document in found}) == len(found) == 60


def test_a_prompt_with_several_answers_stays_in_one_split_with_all_of_them(tmp_path, tokenizer):
    """By the names of their rows, the answers of one prompt would be in several splits."""
    pairs = [(f"f({i}){' ' * (j % 3)}", f" = {j} * {i}") for j in range(5) for i in range(30)]
    splits = load_documents(DataConfig(source=write_pairs(tmp_path, pairs), **COMPLETION), tokenizer)
    rows = {s: [int(d.document_id.partition(":")[2]) - 1 for d in getattr(splits, s)] for s in SPLITS}
    prompts = {s: {pairs[row][0].strip() for row in rows[s]} for s in SPLITS}
    assert sum(map(len, rows.values())) == 150 and sum(map(len, prompts.values())) == 30
    assert all(len(rows[s]) == 5 * len(prompts[s]) for s in SPLITS)
    assert prompts == {
        s: {f"f({i})" for i in names} for s, names in split_names({i: f"f({i})" for i in range(30)}).items()
    }


def test_a_place_on_a_border_belongs_to_the_split_above_it() -> None:
    place = content_place("a")
    assert split_of(place, held_out_frac=place) == "validation"
    assert split_of(place, held_out_frac=math.nextafter(place, 1)) == "test"
    assert split_of(place, held_out_frac=place / 2) == "train"
    assert split_of(place, held_out_frac=math.nextafter(place / 2, 1)) == "validation"


def test_functions_of_one_file_share_its_split_and_a_prompt_of_two_files_is_held_out(tmp_path, tokenizer, monkeypatch):
    """Every file has a function of its own, and all have the same short one: only the most held-out file keeps it."""
    places = {f"{name}.py": place(f"file {name}") for name in range(200)}

    def pairs(config):
        for name, file_place in places.items():
            for i in range(3):
                yield Pair(f"{name}::f{i}:{i}", f"def f{i}_{name[:-3]}():", f" {i}", file_place=file_place)
            yield Pair(f"{name}::same:9", "def same():", f" {name[:-3]}", file_place=file_place)

    monkeypatch.setattr("actors.data.text_splits.read_pairs", pairs)
    splits = load_documents(DataConfig(source=str(tmp_path), **COMPLETION), tokenizer)
    expected = {
        "test": {name for name in places if places[name] < 0.25},
        "validation": {name for name in places if 0.25 <= places[name] < 0.5},
        "train": {name for name in places if places[name] >= 0.5},
    }
    assert all(len(names) > 30 for names in expected.values())
    for split, names in expected.items():
        ids = {d.document_id for d in getattr(splits, split)}
        own = {f"{name}::f{i}:{i}" for name in names for i in range(3)}
        assert ids == own | ({f"{name}::same:9" for name in names} if split == "test" else set())


def test_completion_documents_have_one_anchor_and_misfits_are_counted(tmp_path, tokenizer, caplog):
    good = [(f"def f{i}(x):\n", f"    return {i}") for i in range(30)]
    misfits = [good[3], ("p ", "  "), ("  ", "body"), ("x = 1\n" * 60, "y = 2"), ("short", " z = 3\n" * 6)]
    config = DataConfig(source=write_pairs(tmp_path, good + misfits), **COMPLETION)
    with caplog.at_level(logging.INFO, logger="actors"):
        splits = load_documents(config, tokenizer)
    documents = [document for split in SPLITS for document in getattr(splits, split)]
    decoded = sorted(tokenizer.decode(document.token_ids[:-1]) for document in documents)
    assert decoded == sorted(prompt + completion for prompt, completion in good)
    for document in documents:
        assert document.anchors.tolist() == [document.num_prompt_tokens]
        assert document.ends_with_eos and document.token_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(document.token_ids[: document.num_prompt_tokens]).endswith("):")
    (message,) = [message for message in caplog.messages if "left out" in message]
    assert "left out 5 pairs" in message
    for reason in (
        "1 empty",
        "1 no prompt",
        "1 over 64 tokens",
        "1 completion over 24 tokens",
        "1 duplicate",
    ):
        assert reason in message


def test_answers_reach_their_documents(tmp_path, tokenizer, monkeypatch):
    def pairs(config):
        for i in range(30):
            yield Pair(f"t:{i}", f"f({i})", f" = {i}", answer=f"assert f({i}) == {i}" if i % 3 else None)
        yield Pair("t:long", "f(99)", " = 99\n" * 30, answer="left out")

    monkeypatch.setattr("actors.data.text_splits.read_pairs", pairs)
    splits = load_documents(DataConfig(source=str(tmp_path), **COMPLETION), tokenizer)
    answers = {d.document_id: d.answer for split in SPLITS for d in getattr(splits, split)}
    assert answers == {f"t:{i}": f"assert f({i}) == {i}" if i % 3 else None for i in range(30)}


def test_of_equal_pairs_the_one_whose_name_comes_first_is_kept(tmp_path, tokenizer):
    pairs = [(f"f({i})", f" = {i}") for i in range(30)]
    splits = load_documents(DataConfig(source=write_pairs(tmp_path, pairs * 2), **COMPLETION), tokenizer)
    kept = {document.document_id for split in SPLITS for document in getattr(splits, split)}
    assert kept == {min(f"pairs:{row}", f"pairs:{row + 30}") for row in range(1, 31)}


def test_of_equal_tokens_the_most_held_out_pair_is_kept(tmp_path, tokenizer):
    """The same text cut in two places: its two prompts may be in different splits."""
    pairs = [(f"f({i})", f" = {i}") for i in range(30)] + [(f"f({i}) =", f" {i}") for i in range(30)]
    splits = load_documents(DataConfig(source=write_pairs(tmp_path, pairs), **COMPLETION), tokenizer)
    kept = {document.document_id for split in SPLITS for document in getattr(splits, split)}
    order = {f"pairs:{row}": place(prompt) for row, (prompt, _) in enumerate(pairs, start=1)}
    assert kept == {
        min(f"pairs:{row}", f"pairs:{row + 30}", key=lambda n: min(2, int(order[n] * 4)) * 10 + order[n])
        for row in range(1, 31)
    }


def test_limits_count_eos_and_are_inclusive(tmp_path, tokenizer):
    pairs = [(f"f({i:02})", f" = {i:02}") for i in range(40)]
    completions = [len(tokenizer.encode(f"{p}{c}")) - len(tokenizer.encode(p)) + 1 for p, c in pairs]
    horizon, whole = max(completions), max(len(tokenizer.encode(f"{p}{c}")) + 1 for p, c in pairs)
    settings = {"source": write_pairs(tmp_path, pairs), "mode": "completion", **FRACTIONS}

    def count(**limits):
        splits = load_documents(DataConfig(**settings, **limits), tokenizer)
        return sum(len(getattr(splits, split)) for split in SPLITS)

    assert count(horizon=horizon, document_tokens=whole) == 40
    assert count(horizon=horizon, document_tokens=999) == 40
    with pytest.raises(ValueError, match=r"raise --data\.document-tokens or --data\.horizon"):
        count(horizon=min(completions) - 1, document_tokens=whole)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["xy"], {}, r"the test split of .* has no document: 0 of its 1 distinct texts.*give more texts"),
        (
            [chr(945 + i) for i in range(50)],
            {"document_tokens": 128},
            r"of its 50 distinct texts.*document_tokens=128.*lower --data.document-tokens",
        ),
        (
            [f"x{i}" * 99 for i in range(9)],
            {"held_out_frac": 1e-9},
            r"the test split.*raise --data.held-out-frac",
        ),
    ],
)
def test_an_empty_split_is_refused_with_the_remedy(tmp_path, texts, settings, message, tokenizer):
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_documents(DataConfig(source=str(tmp_path), **{**STRIDED, **settings}), tokenizer)


def test_tokenizers_that_cannot_be_used_are_refused(folder, tokenizer):
    without_eos = copy.deepcopy(tokenizer)
    without_eos.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        load_documents(DataConfig(source=str(folder), **STRIDED), without_eos)
    with pytest.raises(ValueError, match=r"no character offsets.*--data\.mode strided"):
        load_documents(DataConfig(source=str(folder), **COMPLETION), ByT5Tokenizer())


def test_long_texts_raise_no_warning(folder, tokenizer, caplog):
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 8
    transformers_logger = logging.getLogger("transformers.tokenization_utils_base")
    transformers_logger.addHandler(caplog.handler)  # transformers does not propagate to the root
    try:
        load_documents(DataConfig(source=str(folder), **STRIDED), short)
        assert not caplog.messages
        short("x = 1\n" * 20)
        assert "longer than" in caplog.text
    finally:
        transformers_logger.removeHandler(caplog.handler)


@pytest.fixture
def numbered():
    """Seven documents whose only token that matters is their number."""
    return [
        Document(
            document_id=str(i),
            token_ids=np.array([i, 0]),
            anchors=np.array([1]),
            horizon=1,
            ends_with_eos=False,
        )
        for i in range(7)
    ]


def test_each_epoch_is_another_permutation_and_depends_on_the_seed(numbered):
    stream = DocumentStream(numbered, seed=3)
    epochs = [[d.document_id for d in stream.take(7)] for _ in range(4)]
    assert all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert stream.position == 28
    assert [d.document_id for d in DocumentStream(numbered, seed=4).take(7)] != epochs[0]


@pytest.mark.parametrize("position", range(22))
def test_a_stream_resumes_at_any_position(numbered, position):
    whole = [d.document_id for d in DocumentStream(numbered, seed=3).take(30)]
    stream = DocumentStream(numbered, seed=3, position=position)
    taken = stream.take(3) + stream.take(0) + stream.take(5)
    assert [d.document_id for d in taken] == whole[position : position + 8]
    assert stream.position == position + 8


def test_a_stream_of_nothing_is_refused(numbered):
    with pytest.raises(ValueError, match="got 0 and 0"):
        DocumentStream([], seed=0)
    with pytest.raises(ValueError, match="got 7 and -1"):
        DocumentStream(numbered, seed=0, position=-1)
