"""Engine, weight updates and export of one tiny model: the last three columns of benchmarks/architectures.py.

The rollout worker lives in a process of its own, which is this file run with a folder: vLLM changes classes of
transformers in its process, and may end it. The folder holds the model and two publications of a learner, version 0 and
one in which every tensor was changed; the worker leaves there what it sampled and scored with each.
"""

import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.config import RolloutConfig
from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from actors.models.loading import load_causal_lm
from actors.models.pretrained import num_token_ids
from actors.rollout import Document, Rollout, Ticket
from actors.weights.manifest import Probe, WeightManifest, WeightMismatchError
from actors.weights.object_store import ObjectStoreTransport
from actors.weights.parts import Part, open_parts
from actors.worker import RolloutWorker
from learner.agreement import Agreement
from learner.policy import PackedPolicy
from learner.publish import model_tensors, publish
from orchestration.output.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_TOKEN_IDS = 60
"""Of the tokenizer, as it is made; the networks have more rows, which engine and learner leave out."""
TEMPERATURE = 0.7
MAX_TOKENS = 160
TOLERANCE = 1e-4
"""Nats between engine and model, as in tests/engine: other kernels, all of float32."""
ENGINE_S = 180.0
"""Longest life of an engine's process [s]."""
ENGINE, VERSION_0, UPDATE, PUBLISHED = "engine", "version 0", "update", "published"
"""Files in the folder: what the worker has done, in this order, and what the learner published."""
FAULT = "fault: "
PACKAGES = tuple(
    f"{Path(__file__).resolve().parents[1]}/{package}/"
    for package in ("actors", "feature_server", "learner", "orchestration")
)


TEXTS = [np.random.default_rng(2).integers(1, NUM_TOKEN_IDS, length).tolist() for length in (100, 9)]
"""Token ids; what is scored, and of which a run's probe has the beginnings."""


class Publication(NamedTuple):
    """What a learner publishes."""

    manifest: WeightManifest
    parts: list[Part]


class Reading(NamedTuple):
    """What a worker gave with one version of the weights."""

    scores: list[np.ndarray]
    """[T - 1] log-probs [nats] of each of the texts, at temperature 1."""
    rollout: Rollout


class PlainEngine:
    """The part of the learner's engine that publishing uses, without DeepSpeed."""

    shards_parameters = False
    device = torch.device("cpu")

    def __init__(self, policy: PackedPolicy) -> None:
        self.policy = policy

    def gathered(self, tensors: list[Tensor]) -> AbstractContextManager[None]:
        """They are whole."""
        return nullcontext()


def engine_columns(model: "PreTrainedModel") -> Iterator[tuple[str, str]]:
    """Column and verdict: engine, update, export. `model`: in evaluation mode; what it computes is the truth."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = place / "model"
        model.save_pretrained(folder)
        save_tokenizer(folder)
        base = load_causal_lm(str(folder), dtype="float32")
        own, initial, changed = (as_learner(network, folder) for network in (model, base, changed_everywhere(base)))
        first = published(initial, 0, None)
        publications = [first, published(changed, 1, first.manifest.probe)]
        (place / PUBLISHED).write_bytes(pickle.dumps(publications))
        environment = ENGINE_ENVIRONMENT | CPU_ENGINE_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        _, end = run_alone([__file__, name], seconds=ENGINE_S, environment=environment)
        yield from engine_verdicts(place, own, changed, end)
        yield "export", export_verdict(place, changed.causal_lm, publications)


def as_learner(model: "PreTrainedModel", folder: Path) -> PackedPolicy:
    """With the ids of the tokenizer as it is loaded: transformers adds a token to it for Qwen2."""
    return PackedPolicy(model, attention="sdpa", num_token_ids=num_token_ids(str(folder)))


def engine_verdicts(place: Path, own: PackedPolicy, changed: PackedPolicy, end: str) -> Iterator[tuple[str, str]]:
    """Of the worker's files. `end`: why its process ended before it had written them all."""
    model_type = own.causal_lm.config.model_type
    judge = Agreement(dtype="float32", temperature=TEMPERATURE, configured=None, model_type=model_type)
    if not (place / ENGINE).exists():
        yield from ((ENGINE, end), (UPDATE, "-"))
        return
    found = verdict(own, pickle.loads((place / ENGINE).read_bytes()), judge)
    if found.startswith("no") and not (place / VERSION_0).exists():
        yield from ((ENGINE, f"{found.partition(';')[0]}; {end}"), (UPDATE, "-"))
        return
    yield ENGINE, found
    is_updated = (place / UPDATE).exists()
    yield UPDATE, verdict(changed, pickle.loads((place / UPDATE).read_bytes()), judge) if is_updated else end


@torch.no_grad()
def verdict(policy: PackedPolicy, found: Reading, judge: Agreement) -> str:
    """Yes, or by how much not, and whether the learner would refuse it at a step whose weights the worker has."""
    scored, sampled = scored_errors(policy, found), sampled_errors(policy, found.rollout)
    error = float(torch.cat([scored, sampled]).max())
    refusal = "in silence"
    try:
        judge.judge(float(sampled.sum()), len(sampled), step=1 + found.rollout.max_policy_version)
    except WeightMismatchError as mismatch:
        refusal = f"refused: {first_clause(str(mismatch))}"
    return f"yes ({error:.0e})" if error < TOLERANCE else f"no ({error:.1e}); {refusal}"


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words; `<eos>` is its only special token, with id 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0} | {f"w{index}": index for index in range(1, NUM_TOKEN_IDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


@torch.no_grad()
def changed_everywhere(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy after a large update of everything that a checkpoint holds."""
    changed = copy.deepcopy(model)
    torch.manual_seed(1)
    for _, tensor in model_tensors(changed):
        tensor += 0.1 * torch.randn_like(tensor)
    return changed


def published(policy: PackedPolicy, policy_version: int, initial_probe: Probe | None) -> Publication:
    """As the learner publishes; views of the model's memory."""
    from orchestration.parts import PROBE_TOKENS  # imports Ray

    publishing = publish(
        PlainEngine(policy),
        policy_version=policy_version,
        probe_ids=[ids[:PROBE_TOKENS] for ids in TEXTS],
        rank=0,
        part_bytes=2**16,
        transport=ObjectStoreTransport(device=PlainEngine.device, folder=None),
        initial_probe=initial_probe,
    )
    parts: list[Part] = []
    while True:
        try:
            parts.append(next(publishing))
        except StopIteration as end:
            return Publication(end.value, parts)


def ticket() -> Ticket:
    """Four nested contexts of up to 90 tokens, beyond several blocks of the cache; three completions of each."""
    document = Document(
        document_id="document",
        token_ids=np.random.default_rng(3).integers(1, NUM_TOKEN_IDS, 96),
        anchors=np.array([3, 40, 72, 90]),
        horizon=6,
        ends_with_eos=False,
    )
    return Ticket(ticket_id=0, document=document, seed=4, completions_per_context=3, min_policy_version=0)


def sequences(rollout: Rollout) -> list[tuple[int, Tensor]]:
    """Anchor and tokens of every completion behind its own copy of its context."""
    found = []
    for group, anchor in enumerate(rollout.document.anchors.tolist()):
        for ids, length in zip(rollout.completion_ids[group], rollout.completion_lengths[group], strict=True):
            tokens = np.concatenate([rollout.document.token_ids[:anchor], ids[:length]])
            found.append((anchor, torch.from_numpy(tokens)))
    return found


def text_logprobs(
    model: "PreTrainedModel", tokens: Tensor, *, temperature: float, num_token_ids: int | None = None
) -> Tensor:
    """[T - 1] log-probs [nats] of tokens 1..T-1, by a plain forward; over the first `num_token_ids` ids, or all."""
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1, :num_token_ids]
    return (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def plain_logprobs(policy: PackedPolicy, tokens: Tensor, temperature: float) -> Tensor:
    """`text_logprobs` over the tokenizer's ids."""
    ids = policy.num_token_ids
    return text_logprobs(policy.causal_lm, tokens, temperature=temperature, num_token_ids=ids)


def scored_errors(policy: PackedPolicy, found: Reading) -> Tensor:
    """[token] |worker - model| log-prob of the texts [nats]."""
    pairs = zip(TEXTS, found.scores, strict=True)
    errors = [plain_logprobs(policy, torch.tensor(ids), 1.0) - torch.from_numpy(scores) for ids, scores in pairs]
    return torch.cat(errors).abs()


def sampled_errors(policy: PackedPolicy, rollout: Rollout) -> Tensor:
    """[token] |worker - model| log-prob of what was sampled [nats]."""
    behavior = torch.from_numpy(rollout.behavior_logprobs).flatten(0, 1)
    errors = []
    for (anchor, tokens), found in zip(sequences(rollout), behavior, strict=True):
        own = plain_logprobs(policy, tokens, TEMPERATURE)[anchor - 1 :]
        errors.append(own - found[: len(own)])
    return torch.cat(errors).abs()


@torch.no_grad()
def export_verdict(place: Path, changed: "PreTrainedModel", publications: list[Publication]) -> str:
    """Is version 0 the base, tensor by tensor, and the changed version the changed model?"""
    folders = [
        save_checkpoint(
            place / f"checkpoint {manifest.policy_version}",
            manifest=manifest,
            buffers=open_parts(parts),
            base_model=str(place / "model"),
        )
        for manifest, parts in publications
    ]
    base, saved = (load_file(folder / "model.safetensors") for folder in (place / "model", folders[0]))
    if names := base.keys() ^ saved.keys():
        return f"no: the base and its export differ in the names {', '.join(sorted(names)[:3])}"
    if unequal := [name for name, tensor in base.items() if not torch.equal(tensor, saved[name])]:
        return f"no: the base and its export differ in {', '.join(unequal[:3])}"
    loaded, ids = load_causal_lm(str(folders[1]), dtype="auto"), torch.tensor(TEXTS[:1])
    found, expected = (network(input_ids=ids, use_cache=False).logits.log_softmax(-1) for network in (loaded, changed))
    error = float((found - expected).abs().max())
    return f"yes ({error:.0e})" if error < TOLERANCE else f"no ({error:.1e})"


def run_alone(arguments: list[str], *, seconds: float, environment: dict[str, str]) -> tuple[str, str]:
    """What a Python process printed, and why it ended early; empty if it did not."""
    command = [sys.executable, *arguments]
    try:
        process = subprocess.run(
            command, env=os.environ | environment, timeout=seconds, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(), f"no: not done after {seconds:.0f} s"
    sys.stderr.write(process.stderr)
    if process.returncode == 0:
        return process.stdout, ""
    if process.returncode < 0:
        return process.stdout, f"no: ended by {signal.Signals(-process.returncode).name}"
    _, is_reported, fault = process.stderr.rpartition(FAULT)  # behind "[rank0]: " where torch has ranks
    return process.stdout, fault.splitlines()[0] if is_reported else f"no: ended with {process.returncode}"


def report_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook: a last line for `run_alone`. What this project's code raised is a refusal."""
    sys.__excepthook__(kind, error, trace)
    raised_in = traceback.extract_tb(trace)[-1].filename
    word = "refused" if raised_in.startswith(PACKAGES) else "no"
    print(f"{FAULT}{word}: {first_clause(str(error) or kind.__name__)}", file=sys.stderr, flush=True)


def first_clause(message: str) -> str:
    """Of an error, on one line and fit for a cell of a table."""
    clause = re.split(r"; |, (?:allowed|and|so|which) ", " ".join(message.split()))[0]
    return (clause if len(clause) <= 150 else clause[:150].rsplit(" ", 1)[0] + " ...").replace("|", "\\|")


def run_engine(place: Path) -> None:
    """Start a worker, and give it version 0 and the changed one; leave a file after each."""
    worker = RolloutWorker(
        model=str(place / "model"),
        config=RolloutConfig(temperature=TEMPERATURE, max_num_seqs=16, kv_cache_gib=0.1),
        dtype="float32",
        max_tokens=MAX_TOKENS,
    )
    first, changed = pickle.loads((place / PUBLISHED).read_bytes())
    (place / ENGINE).write_bytes(pickle.dumps(reading(worker)))
    worker.receive_weights(first.manifest, *first.parts)
    (place / VERSION_0).touch()
    worker.receive_weights(changed.manifest, *changed.parts)
    (place / UPDATE).write_bytes(pickle.dumps(reading(worker)))


def reading(worker: RolloutWorker) -> Reading:
    """With the weights it has."""
    (rollout,) = worker.sample([ticket()])
    return Reading(worker._sampler.score_tokens(TEXTS), rollout)


if __name__ == "__main__":
    from benchmarks import architecture_engine  # under the name by which the other process unpickles

    sys.excepthook = report_fault
    architecture_engine.run_engine(Path(sys.argv[1]))
