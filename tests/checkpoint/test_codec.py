"""Messages to a file and back: the same bits, of objects drawn at random and of real rollouts."""

import json
import math
import random
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.rollout import Document, Rollout, Ticket
from feature_server.features.gram import gram_statistics
from feature_server.scored_rollout import ScoredRollout, no_features
from orchestration.checkpoint.codec import load_objects, save_objects


@dataclass(frozen=True, kw_only=True)
class Leaf:
    flag: bool
    count: int
    number: float
    text: str
    array: np.ndarray
    tensor: Tensor


@dataclass(frozen=True, kw_only=True)
class Tree:
    leaf: Leaf
    other: Leaf | None
    leaves: list[Leaf]
    pairs: tuple[tuple[int, float], ...]
    mixed: tuple[str, int, bool | None]
    maybe: float | None
    shaped: Float[Tensor, " n"] | None
    numbers: list[int] | None = None


def same(one: Any, other: Any) -> bool:
    """Equal in type and in every bit."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        if one.dtype == other.dtype == torch.bfloat16:
            one, other = one.view(torch.int16), other.view(torch.int16)
        return one.dtype == other.dtype and same(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return struct.pack("d", one) == struct.pack("d", other) if isinstance(one, float) else one == other


NUMBERS = [0.0, -0.0, 0.1, 1e-320, 2.0**1023, math.inf, -math.inf, math.nan, 1 / 3]
TEXTS = ["", "plain", 'quo"te\n\\', "Grüße", "\0", "\U0001f600", "\ud800"]
INTEGERS = [0, -1, 2**63, -(10**30), 7]
ARRAYS = [np.bool_, np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64]
TENSORS = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (4, 1, 2)]


class Draw:
    """Random objects of a seed."""

    def __init__(self, seed: int) -> None:
        self._random, self._numpy = random.Random(seed), np.random.default_rng(seed)

    def array(self) -> np.ndarray:
        """Of any bits, NaN among them; in any layout; of memory that may not be written, as Ray hands it out."""
        dtype, shape = np.dtype(self._random.choice(ARRAYS)), self._random.choice(SHAPES)
        data = self._numpy.bytes(dtype.itemsize * math.prod(shape))
        array = np.frombuffer(bytes(b & 1 for b in data) if dtype.kind == "b" else data, dtype=dtype).reshape(shape)
        return array.T if self._random.random() < 0.3 else array

    def tensor(self) -> Tensor:
        values = 3 * self._numpy.normal(size=self._random.choice(SHAPES))
        tensor = torch.as_tensor(values).to(self._random.choice(TENSORS))
        return tensor.mT if tensor.dim() > 1 and self._random.random() < 0.5 else tensor

    def leaf(self) -> Leaf:
        choose = self._random.choice
        return Leaf(
            flag=choose([True, False]),
            count=choose(INTEGERS),
            number=choose(NUMBERS),
            text=choose(TEXTS),
            array=self.array(),
            tensor=self.tensor(),
        )

    def tree(self) -> Tree:
        choose = self._random.choice
        return Tree(
            leaf=self.leaf(),
            other=choose([None, self.leaf()]),
            leaves=[self.leaf() for _ in range(choose([0, 1, 3]))],
            pairs=tuple((choose(INTEGERS), choose(NUMBERS)) for _ in range(choose([0, 2]))),
            mixed=(choose(TEXTS), choose(INTEGERS), choose([None, True, False])),
            maybe=choose([None, *NUMBERS]),
            shaped=choose([None, torch.randn(3, generator=torch.Generator().manual_seed(1))]),
            numbers=choose([None, [], INTEGERS]),
        )


@pytest.mark.parametrize("seed", range(60))
def test_random_objects_come_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    draw = Draw(seed)
    objects = [draw.tree() for _ in range(seed % 4)]
    with warnings.catch_warnings(action="error"):
        save_objects(tmp_path / "objects", objects)
        found = load_objects(tmp_path / "objects", Tree)
    assert same(found, objects)


@pytest.mark.parametrize("seed", range(20))
def test_control_any_other_value_is_seen(seed: int) -> None:
    draw = Draw(seed)
    tree = draw.tree()
    assert same(tree, replace(tree))
    assert not same(tree, replace(tree, leaf=replace(tree.leaf, count=tree.leaf.count + 1)))
    assert not same(tree, replace(tree, leaf=replace(tree.leaf, array=np.zeros(5))))
    assert not same(0.0, -0.0) and not same(1, 1.0) and not same(True, 1)


def scored_rollouts(make_rollout: Callable[..., Rollout]) -> list[ScoredRollout]:
    rollout = make_rollout(num_tokens=12, anchors=[2, 5], lengths=[[4, 1, 2], [3, 4, 1]], horizon=4, seed=1)
    rollout = replace(rollout, sample_s=1.25, weight_steps=((0, 3), (17, 4)))
    features = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    raw = gram_statistics(features, features[:, 0])
    verified = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    return [
        ScoredRollout(rollout=rollout, raw=raw, whitened=raw, score_s=0.5),
        ScoredRollout(rollout=rollout, raw=raw, whitened=None, verified=verified, score_s=0.0),
        ScoredRollout(rollout=rollout, raw=no_features(), whitened=None, verified=verified, score_s=0.0),
    ]


def test_scored_rollouts_come_back_bit_for_bit(tmp_path: Path, make_rollout: Callable[..., Rollout]) -> None:
    scored = scored_rollouts(make_rollout)
    save_objects(tmp_path / "scored", scored)
    found = load_objects(tmp_path / "scored", ScoredRollout)
    assert same(found, scored)
    found[0].rollout.completion_ids[0, 0, 0] += 1  # of its own memory, which can be written
    assert same(load_objects(tmp_path / "scored", ScoredRollout), scored)


def test_tickets_and_documents_come_back_bit_for_bit(tmp_path: Path, make_document: Callable[[int], Document]) -> None:
    documents = [make_document(index) for index in range(3)]
    documents.append(replace(documents[0], answer="42", prompt="", origin="a/b", text_starts=np.array([0, 3, 5])))
    tickets = [
        Ticket(
            ticket_id=index,
            document=document,
            seed=2**63 + index,
            completions_per_context=4,
            min_policy_version=index,
            max_policy_version=index or None,
            weight_steps=((0, 1),) * index,
        )
        for index, document in enumerate(documents)
    ]
    save_objects(tmp_path / "tickets", tickets)
    save_objects(tmp_path / "documents", documents)
    assert same(load_objects(tmp_path / "tickets", Ticket), tickets)
    assert same(load_objects(tmp_path / "documents", Document), documents)


def test_a_saved_array_is_not_changed_by_what_happens_to_the_object(tmp_path: Path) -> None:
    leaf = Leaf(flag=True, count=1, number=1.0, text="", array=np.zeros(3), tensor=torch.zeros(3))
    save_objects(tmp_path / "leaf", [leaf, leaf])
    leaf.array[0], leaf.tensor[0] = 1, 1
    for found in load_objects(tmp_path / "leaf", Leaf):
        assert found.array.sum() == found.tensor.sum() == 0


LEAF = Leaf(flag=True, count=1, number=1.0, text="", array=np.zeros(3), tensor=torch.zeros(3))


@dataclass(frozen=True, kw_only=True)
class Heavier(Leaf):
    more: int


@dataclass(frozen=True, kw_only=True)
class Holder:
    leaf: Leaf


@dataclass(frozen=True, kw_only=True)
class Pair:
    numbers: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Unwritable:
    names: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Ambiguous:
    value: int | str


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (replace(LEAF, count=1.5), r"\[1\]\.count is annotated int and holds float 1\.5"),
        (replace(LEAF, count=True), r"\[1\]\.count is annotated int and holds bool True"),
        (replace(LEAF, count=np.int64(3)), r"\[1\]\.count is annotated int and holds int64"),
        (replace(LEAF, number=1), r"\[1\]\.number is annotated float and holds int 1"),
        (replace(LEAF, flag=None), r"\[1\]\.flag is annotated bool and holds NoneType None"),
        (replace(LEAF, array=torch.zeros(2)), r"\[1\]\.array is annotated ndarray and holds Tensor"),
        (replace(LEAF, array=np.zeros(2, dtype=">f4")), r"\[1\]\.array is an array of >f4, which cannot be written"),
        (replace(LEAF, array=np.array([None])), r"\[1\]\.array is an array of object, which cannot be written"),
        (Holder(leaf=Heavier(**vars(LEAF), more=1)), r"\[1\]\.leaf is annotated Leaf and holds Heavier"),
        (Pair(numbers=(1, 2, 3)), r"\[1\]\.numbers is annotated tuple\[int, int\] and holds 3 values"),
        (Pair(numbers=(1, None)), r"\[1\]\.numbers\[1\] is annotated int and holds NoneType None"),
        (Pair(numbers=[1, 2]), r"\[1\]\.numbers is annotated tuple and holds list"),
        (Ambiguous(value=1), r"\[1\]\.value is annotated int \| str, which cannot be written"),
        (Unwritable(names={}), r"\[1\]\.names is annotated dict\[str, int\], which cannot be written"),
    ],
)
def test_what_is_not_as_annotated_is_refused_by_file_and_field(tmp_path: Path, value: object, message: str) -> None:
    path = tmp_path / "objects"
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        save_objects(path, [LEAF, value])
    assert not path.exists()


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Write the file anew after a change of its JSON and its tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(metadata, tensors)
    save_file(tensors, path, metadata={name: json.dumps(values) for name, values in metadata.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda json, _: json["objects"][0].pop("count"), r"\[0\] is to have the fields of Leaf; not so count"),
        (lambda json, _: json["objects"][0].update(extra=1), r"\[0\] is to have the fields of Leaf; not so extra"),
        (lambda json, _: json["objects"][0].update(count="1"), r"\[0\]\.count is annotated int and holds '1'"),
        (lambda json, _: json["objects"][0].update(number=1.0), r"\[0\]\.number is annotated float and holds 1\.0"),
        (lambda json, _: json["objects"][0].update(text=None), r"\[0\]\.text is annotated str and holds None"),
        (lambda _, tensors: tensors.pop("[0].array"), r"\[0\]\.array is annotated ndarray, and the file has no array"),
        (lambda json, _: json.update(kinds=["Ticket"]), "it holds Ticket, not Leaf"),
        (lambda json, _: json.clear(), "it holds no messages, for it lacks kinds and objects in its metadata"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_file_and_field(
    tmp_path: Path, change: Callable[[Any, Any], object], message: str
) -> None:
    path = tmp_path / "leaf"
    save_objects(path, [LEAF])
    changed(path, change)
    with pytest.raises(ValueError, match=f"^{path}: {message}.*; it is damaged, or of another version"):
        load_objects(path, Leaf)


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "leaf"
    save_objects(path, [LEAF])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"^{path}: .*; it is damaged"):
        load_objects(path, Leaf)


def test_checks_of_the_messages_name_the_file(tmp_path: Path, make_document: Callable[[int], Document]) -> None:
    save_objects(tmp_path / "documents", [make_document(1)])
    changed(tmp_path / "documents", lambda json, _: json["objects"][0].update(horizon=0))
    with pytest.raises(ValueError, match=f"^{tmp_path}/documents: .* horizon must be at least 1"):
        load_objects(tmp_path / "documents", Document)
