"""Evaluation of a checkpoint: what is refused, how texts and rollouts are cut, and the command against transformers."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from own_cluster import own_environment
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SmolLM3Config,
)
from warm_process import run_warm

from actors.config import DataConfig, RolloutConfig
from actors.models.pretrained import EMBEDDED_FOLDER
from actors.rollout import Document, Rollout
from feature_server.config import FeatureConfig
from feature_server.features.server import FeatureServer
from orchestration.command_line import readable
from orchestration.config import RunConfig, dump_config
from orchestration.evaluation.checkpoint_evaluation import (
    cfm_against_length,
    cross_entropy,
    cut,
    evaluated_documents,
    evenly_spaced_anchors,
)
from orchestration.evaluation.evaluate_config import EvaluateConfig, parse_evaluation
from orchestration.evaluation.feature_process import FeatureProcess
from orchestration.evaluation.measures import Verdicts, accuracy_measures, as_json, as_table, mean_measure
from orchestration.evaluation.problems import Problem, function_body, program_and_tests, read_problems

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (1, 2, 3)
"""25, 50 and 75% of the embedded model's four."""
COMPLETION = {"mode": "completion", "horizon": 64, "document_tokens": 256}

BROKEN_RULES = [
    pytest.param({"lengths": [4, 2]}, "ascending whole numbers from 1", id="order of lengths"),
    pytest.param({"pass_at": [0, 1]}, "ascending whole numbers from 1", id="k of 0"),
    pytest.param({"pass_at": [1, 17]}, "needs samples_per_problem >= 17, got 16", id="k over m"),
    pytest.param({"lengths": [120]}, "data.document_tokens=128 leaves no room for", id="long completion"),
    pytest.param({"anchors_per_document": 58}, "anchors_per_document=58 after", id="many anchors"),
    pytest.param({"rollout": {"completions_per_context": 1}}, "completions_per_context >= 2", id="no pairs"),
    pytest.param({"verify": True}, "verify=True needs data.mode='completion'", id="nothing to verify"),
    pytest.param({"documents": 0}, "there is nothing to evaluate", id="nothing"),
]
KEPT_RULES = [
    {"lengths": [119], "anchors_per_document": 2},
    {"anchors_per_document": 57},
    {"pass_at": [1, 16]},
    {"data": COMPLETION, "verify": True},
    {"rollout": {"completions_per_context": 1}, "lengths": [], "data": COMPLETION | {"horizon": 4}},
    {"documents": 0, "problems": "problems.jsonl"},
]


@pytest.mark.parametrize(("settings", "message"), BROKEN_RULES)
def test_keys_that_do_not_go_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        EvaluateConfig.model_validate(settings)
    assert message in readable(refusal.value, EvaluateConfig)


@pytest.mark.parametrize("settings", KEPT_RULES)
def test_what_lies_on_the_other_side_of_each_rule_is_accepted(settings: dict[str, object]) -> None:
    EvaluateConfig.model_validate(settings)


MISSING = [
    pytest.param([], "first argument must be the checkpoint", id="no checkpoint"),
    pytest.param(["--documents", "3"], "first argument must be the checkpoint", id="flag in its place"),
    pytest.param(["./gone"], "no checkpoint folder './gone'", id="checkpoint"),
    pytest.param(["embedded", "gone.toml"], "'gone.toml' does not exist", id="file"),
    pytest.param(["embedded", "--problems", "gone.jsonl"], "problems='gone.jsonl' does not exist", id="problems"),
    pytest.param(["embedded", "--output", "gone/out.json"], "must be a new file in a folder", id="output folder"),
    pytest.param(["embedded", "--output", str(ROOT / "README.md")], "must be a new file in a folder", id="overwriting"),
]


@pytest.mark.parametrize(("arguments", "message"), MISSING)
def test_files_that_are_not_there_are_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        parse_evaluation(arguments)
    assert message in str(refusal.value)


def test_lengths_beyond_the_horizon_of_a_completion_are_left_out() -> None:
    pairs = EvaluateConfig.model_validate({"data": COMPLETION | {"horizon": 6}})
    assert pairs.cfm_lengths == (1, 2, 4)
    assert EvaluateConfig.model_validate({"data": {"horizon": 4}}).cfm_lengths == (1, 2, 4, 8, 16, 32, 64)


def test_a_file_and_flags_make_one_configuration(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.toml"
    path.write_text(tomli_w.dumps({"documents": 7, "data": {"context_tokens": 16}, "lengths": [1, 8]}))
    checkpoint, config = parse_evaluation(["embedded", str(path), "--documents", "5", "--data.source", "x.jsonl"])
    assert (checkpoint, config.documents, config.data.context_tokens) == ("embedded", 5, 16)
    assert (config.lengths, config.data.source) == ((1, 8), "x.jsonl")
    path.write_text("documnts = 7\n")
    with pytest.raises(ValueError, match="documnts: there is no such key; the nearest is documents;"):
        parse_evaluation(["embedded", str(path)])
    path.write_text("documents =\n")
    with pytest.raises(ValueError, match="is not TOML"):
        parse_evaluation(["embedded", str(path)])


def test_the_configuration_file_of_a_run_configures_the_evaluation_of_its_checkpoint(tmp_path: Path) -> None:
    run = RunConfig(data=DataConfig(context_tokens=12), rollout=RolloutConfig(temperature=0.5), seed=3)
    (tmp_path / "config.toml").write_text(dump_config(run))
    _, config = parse_evaluation(["embedded", str(tmp_path / "config.toml")])
    assert (config.data, config.rollout.temperature, config.seed) == (run.data, 0.5, 3)
    (tmp_path / "config.toml").write_text("[rollout]\ntemperatur = 0.5\n[learner]\nnum_steps = 3\n")
    with pytest.raises(
        ValueError, match=r"rollout\.temperatur: there is no such key; the nearest is rollout\.temperat"
    ):
        parse_evaluation(["embedded", str(tmp_path / "config.toml")])


@pytest.mark.parametrize("flag", ["--rollout.documents-per-request", "--feature.whitening-shrinkage"])
def test_keys_of_a_run_that_no_evaluation_reads_are_no_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_evaluation(["embedded", flag, "1"])
    assert flag in capsys.readouterr().err


def test_every_key_is_described() -> None:
    sections = ("data", "rollout", "feature", "verifier")
    assert not [name for name, f in EvaluateConfig.model_fields.items() if name not in sections and not f.description]


@pytest.mark.parametrize("arguments", [["embedded", "--verify", "True"], ["./gone"]])
def test_the_command_refuses_without_importing_torch(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["evaluate.py", *{arguments}]
from orchestration import evaluate
try:
    status = evaluate.main()
finally:
    assert not {{"torch", "ray", "transformers"}} & set(sys.modules)
sys.exit(status)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, arguments[-2 if len(arguments) > 1 else 0].strip("-") in result.stderr) == (2, True)


BODIES = [
    ("\n    return 1\n\ndef g():\n    pass", "\n    return 1\n"),
    ("\n    return 1\nprint(f())", "\n    return 1"),
    ("\n    return [\n        1,\n]\n# next", "\n    return [\n        1,\n]"),
    (" + 1\n@decorator", " + 1"),
    ("x\n\n    return x\n", "x\n\n    return x\n"),  # the prompt's last line continues
    ("\n\nif True:", "\n"),
    ("", ""),
]


@pytest.mark.parametrize(("completion", "body"), BODIES)
def test_a_body_ends_before_the_next_top_level_statement(completion: str, body: str) -> None:
    assert function_body(completion) == body


PROBLEM = Problem(
    task_id="Toy/0",
    prompt='def double(x):\n    """Twice x."""\n',
    entry_point="double",
    canonical_solution="    return 2 * x\n",
    test="def check(candidate):\n    assert candidate(4) == 8\n",
)


@pytest.mark.parametrize(
    ("completion", "is_right"),
    [("\n    return 2 * x\n\nbroken(", True), ("\n    return x", False), ("\n    return (", False)],
)
def test_program_and_tests_run_through_if_the_body_is_right(completion: str, is_right: bool) -> None:
    program = "".join(program_and_tests(PROBLEM, prompt=PROBLEM.prompt.rstrip(), completion=completion))
    assert (subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0) == is_right


def as_line(problem: Problem) -> str:
    return json.dumps({name: getattr(problem, name) for name in Problem.__slots__} | {"extra": 1}) + "\n"


def test_problems_are_read_packed_or_not_and_broken_ones_are_named(tmp_path: Path) -> None:
    plain, packed = tmp_path / "toy.jsonl", tmp_path / "toy.jsonl.gz"
    plain.write_text(as_line(PROBLEM) + "\n")
    with gzip.open(packed, "wt") as file:
        file.write(as_line(PROBLEM))
    assert read_problems(plain) == read_problems(packed) == [PROBLEM]
    for text, message in [
        (as_line(PROBLEM) + '{"task_id": "b", "prompt": 3}\n', r"line 2: \['prompt', 'entry_point'"),
        ("not json\n", "line 1: not valid JSON"),
        ("[]\n", "line 1: .*must be strings"),
        (2 * as_line(PROBLEM), "holds 2 problems; each needs a task_id of its own"),
        ("", "holds 0 problems"),
    ]:
        plain.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_problems(plain)


def packed_document(text_starts: Sequence[int], *, num_tokens: int) -> Document:
    return Document(
        document_id="validation/0",
        token_ids=np.arange(num_tokens),
        anchors=np.array([5]),
        horizon=1,
        ends_with_eos=False,
        text_starts=np.array(text_starts),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 9, 100])
@pytest.mark.parametrize("text_starts", [[0], [0, 20], [0, 3, 8, 30]])
def test_anchors_are_evenly_spaced_over_all_places_with_a_context_and_a_ground_truth(
    text_starts: list[int], count: int
) -> None:
    data = DataConfig(document_tokens=40, context_tokens=4)
    anchors = evenly_spaced_anchors(packed_document(text_starts, num_tokens=40), count=count, data=data, horizon=10)
    ends = [*text_starts[1:], 40]
    possible = [
        anchor
        for start, end in zip(text_starts, ends, strict=True)
        for anchor in range(start, end)
        if anchor - start >= 4 and end - anchor >= 10
    ]
    assert len(anchors) == min(count, len(possible)) and set(anchors.tolist()) <= set(possible)
    assert anchors.tolist() == sorted(set(anchors.tolist()))
    if len(anchors) > 1:
        assert (anchors[0], anchors[-1]) == (possible[0], possible[-1])
        gaps = np.diff([possible.index(anchor) for anchor in anchors])
        assert gaps.max() - gaps.min() <= 1


def test_no_anchor_fits_in_texts_that_are_too_short() -> None:
    data = DataConfig(document_tokens=40, context_tokens=4)
    document = packed_document([0, 13, 26], num_tokens=39)
    assert len(evenly_spaced_anchors(document, count=2, data=data, horizon=10)) == 0
    assert len(evenly_spaced_anchors(document, count=2, data=data, horizon=9)) == 2


def test_a_cut_rollout_keeps_the_beginning_of_everything(make_rollout: Callable[..., Rollout]) -> None:
    rollout = make_rollout(num_tokens=12, anchors=[3, 9], lengths=[[1, 4, 6], [6, 2, 3]], horizon=6)
    short = cut(rollout, 3)
    assert short.completion_lengths.tolist() == [[1, 3, 3], [3, 2, 3]]
    assert short.completion_ids.tolist() == rollout.completion_ids[:, :, :3].tolist()
    assert [short.document.ground_truth_ids(group).tolist() for group in (0, 1)] == [
        rollout.document.token_ids[3:6].tolist(),
        rollout.document.token_ids[9:12].tolist(),
    ]
    assert cut(rollout, 6).completion_lengths.tolist() == rollout.completion_lengths.tolist()


class TokensAsLogprobs:
    """An engine that gives token t the log-prob -t."""

    def score_tokens(self, token_ids: Sequence[list[int]]) -> list[np.ndarray]:
        return [-np.array(ids[1:], dtype=np.float32) for ids in token_ids]


def test_cross_entropy_leaves_out_what_has_no_context_and_what_is_prompt() -> None:
    separate = packed_document([0, 3, 4, 7], num_tokens=9)  # the texts 0 1 2, 3, 4 5 6 and 7 8
    pair = Document(
        document_id="pair",
        token_ids=np.arange(9),
        anchors=np.array([6]),
        horizon=3,
        ends_with_eos=True,
        num_prompt_tokens=6,
    )
    all_tokens, answer_tokens = cross_entropy([separate, pair], TokensAsLogprobs())
    assert all_tokens.values == {"validation/0": (1 + 2 + 5 + 6 + 8) / 5, "pair": sum(range(1, 9)) / 8}
    assert answer_tokens.values == {"validation/0": all_tokens.values["validation/0"], "pair": (6 + 7 + 8) / 3}


@pytest.fixture(scope="module")
def embedded() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def embedded_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)


def slow_feature(model: PreTrainedModel, context: Sequence[int], window: Sequence[int], pooling: str) -> Tensor:
    """Of one window behind its context, from a sequence of its own, in float64."""
    hidden = model(torch.tensor([[*context, *window]]), output_hidden_states=True).hidden_states
    tokens = []
    for place in range(len(context), len(context) + len(window)):
        joined = torch.cat([hidden[layer][0, place].double() for layer in LAYERS])
        tokens.append(joined / joined.norm())
    return tokens[-1] if pooling == "last" else sum(tokens) / len(tokens)


def slow_cfm(completions: Sequence[Tensor], ground_truth: Tensor) -> float:
    """|phi_y|^2 - 2 mean <phi_j, phi_y> + the mean of <phi_j, phi_k> over ordered pairs of two completions."""
    n = len(completions)
    pairs = [completions[j] @ completions[k] for j in range(n) for k in range(n) if j != k]
    alignments = [completion @ ground_truth for completion in completions]
    return float(ground_truth @ ground_truth - 2 * sum(alignments) / n + sum(pairs) / len(pairs))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_cfm_at_each_length_is_that_of_separate_shorter_sequences(
    make_rollout: Callable[..., Rollout], embedded: PreTrainedModel, pooling: str
) -> None:
    rollouts = [
        make_rollout(num_tokens=15, anchors=[3, 10], lengths=[[8, 2, 5], [1, 8, 8]], horizon=8, vocab_size=512, seed=s)
        for s in (0, 1)
    ]
    server = FeatureServer(model="embedded", config=FeatureConfig(pooling=pooling), dtype="float32", max_tokens=64)
    measures = cfm_against_length(rollouts, server, lengths=(1, 3, 8))
    assert [measure.name for measure in measures] == ["cfm/length_1", "cfm/length_3", "cfm/length_8"]
    for measure, length in zip(measures, (1, 3, 8), strict=True):
        for rollout in rollouts:
            tokens, groups = rollout.document.token_ids.tolist(), []
            for group, anchor in enumerate((3, 10)):
                sizes = np.minimum(rollout.completion_lengths[group], length)
                completions = [rollout.completion_ids[group, j, : sizes[j]].tolist() for j in range(3)]
                features = [slow_feature(embedded, tokens[:anchor], c, pooling) for c in completions]
                truth = slow_feature(embedded, tokens[:anchor], tokens[anchor : anchor + length], pooling)
                groups.append(slow_cfm(features, truth))
            assert measure.values[rollout.document.document_id] == pytest.approx(sum(groups) / 2, abs=2e-5)
    # The negative control: the lengths tell the values apart by far more than the tolerance.
    assert abs(measures[0].interval.mean - measures[1].interval.mean) > 1e-2


@pytest.mark.engine
def test_the_feature_model_is_not_the_class_that_an_engine_changed(
    make_rollout: Callable[..., Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's transformers backend leaves a model's class: it wants an engine's configuration, and has one to run."""
    rollout = make_rollout(num_tokens=15, anchors=[3, 10], lengths=[[8, 2, 5], [1, 8, 8]], horizon=8, vocab_size=512)
    settings = {"model": "embedded", "policy": "embedded", "config": FeatureConfig(), "dtype": "float32"}
    settings |= {"max_tokens": 64}
    (expected,) = FeatureServer(**settings).score([rollout])

    def changed(self: object, *args: object, **kwargs: object) -> None:
        raise AssertionError("no vllm_config was given")

    monkeypatch.setattr(LlamaModel, "__init__", changed)
    monkeypatch.setattr(LlamaModel, "__call__", changed)
    with pytest.raises(AssertionError, match="no vllm_config"):
        FeatureServer(**settings)
    with FeatureProcess(**settings) as server:
        (found,) = server.score([rollout])
    for name in ("gram", "ground_truth_products", "ground_truth_norm_sq"):
        assert torch.equal(getattr(found.raw, name), getattr(expected.raw, name)), name
    with pytest.raises(OSError, match="no model folder"):
        FeatureProcess(**settings | {"model": "/nowhere"})


OWN = {name: name for name in ("a", "b", "only")}
"""Each is the only one of its text."""


def test_the_accuracy_of_answers_to_one_prompt_counts_as_one_trial() -> None:
    verdicts = {str(index): Verdicts(greedy=index >= 20, sampled=[index >= 20]) for index in range(40)}
    shared = {name: str(int(name) // 4) for name in verdicts}
    apart, together = (
        accuracy_measures("answers", verdicts, pass_at=(1,), clusters=clusters)
        for clusters in ({name: name for name in verdicts}, shared)
    )
    for one, other in zip(apart, together, strict=True):
        assert one.interval.mean == other.interval.mean == 0.5
        assert other.interval.high - other.interval.low > 1.7 * (one.interval.high - one.interval.low)


def test_measures_are_shown_and_kept_by_name() -> None:
    verdicts = {"a": Verdicts(greedy=True, sampled=[True, False]), "b": Verdicts(greedy=False, sampled=[False, False])}
    accuracy, at_1, at_2 = accuracy_measures("answers", verdicts, pass_at=(1, 2), clusters=OWN)
    assert (accuracy.values, at_1.values, at_2.values) == ({"a": 1, "b": 0}, {"a": 0.5, "b": 0}, {"a": 1, "b": 0})
    assert accuracy.interval.low == pytest.approx(0.0945, abs=1e-4)  # Wilson, 1 of 2
    lonely = mean_measure("cfm/length_1", unit="features squared", values={"only": 0.25}, clusters=OWN)
    config = EvaluateConfig()
    kept = json.loads(json.dumps(as_json([at_1, lonely], checkpoint="x", config=config), allow_nan=False))
    assert kept["measures"]["answers/pass_at_1"]["values"] == {"a": 0.5, "b": 0}
    assert kept["measures"]["answers/pass_at_1"]["clusters"] == {"a": "a", "b": "b"}
    assert kept["measures"]["cfm/length_1"]["low"] is None and kept["measures"]["cfm/length_1"]["mean"] == 0.25
    assert EvaluateConfig.model_validate(kept["config"]) == config
    assert as_table([at_1, lonely], checkpoint="x").row_count == 2


@pytest.mark.engine
def test_a_model_that_vllm_runs_by_its_transformers_backend(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """SmolLM3, of which vLLM has no implementation of its own."""
    folder = tmp_path / "smollm3"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(SmolLM3Config(**sizes, **heads, max_position_embeddings=256)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = ["orchestration/evaluate.py", str(folder), "--feature-model", str(folder), "--documents", "2"]
    settings = ["--lengths", "1", "4", "--rollout.kv-cache-gib", "0.1", "--output", str(tmp_path / "out.json")]
    result = run_warm(*command, *settings, environment=own_environment())
    assert result.returncode == 0, result.output[-3000:]
    measures = json.loads((tmp_path / "out.json").read_text())["measures"]
    documents = evaluated_documents(EvaluateConfig(documents=2), tokenizer)
    for document in documents:
        expected = slow_cross_entropy(model, document.token_ids.tolist(), first=1)
        assert measures["cross_entropy/all_tokens"]["values"][document.document_id] == pytest.approx(expected, abs=1e-4)
    assert measures["cfm/length_4"]["values"].keys() == {document.document_id for document in documents}


HORIZON = 10
NUM_ROWS = 16
SAFE_GAP = 0.1
"""Between the two largest logits: at a temperature of 0.01 the second is then sampled once in 20,000 times."""
SETTINGS = {
    "documents": 5,
    "split": "train",
    "verify": True,
    "data": {
        "mode": "completion",
        "horizon": HORIZON,
        "prompt_column": "p",
        "completion_column": "c",
        "answer_column": "told",
        "held_out_frac": 0.2,
    },
    "rollout": {"temperature": 0.01, "kv_cache_gib": 0.1},
    "verifier": {"name": "exact"},
    "lengths": [1, 4],
    "pass_at": [1, 4],
    "samples_per_problem": 4,
    "problem_tokens": 3,
}
RIGHT = Problem(
    task_id="Toy/right",
    prompt="def double(x):\n    return 2 * x  # twice the",  # whatever follows is a comment
    entry_point="double",
    canonical_solution=" number\n",
    test=PROBLEM.test,
)
WRONG = replace(RIGHT, task_id="Toy/wrong", test="def check(candidate):\n    assert candidate(4) == 9\n")


@dataclass
class Greedy:
    """What transformers writes with the most probable tokens, and the margin [logits] of each over the next."""

    ids: list[int]
    gaps: list[float]

    def is_sure(self, num_tokens: int) -> bool:
        return min(self.gaps[:num_tokens]) > SAFE_GAP


def greedy(model: PreTrainedModel, prompt: Sequence[int], *, max_tokens: int) -> Greedy:
    ids, gaps = [], []
    while len(ids) < max_tokens and (not ids or ids[-1] != model.config.eos_token_id):
        best = model(torch.tensor([[*prompt, *ids]])).logits[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return Greedy(ids, gaps)


def slow_cross_entropy(model: PreTrainedModel, tokens: Sequence[int], *, first: int) -> float:
    logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    of_tokens = [float(logprobs[place - 1, tokens[place]]) for place in range(first, len(tokens))]
    return -sum(of_tokens) / len(of_tokens)


@dataclass
class Row:
    """One line of the toy data, as tokens, and what transformers writes after its prompt."""

    prompt: list[int]
    tokens: list[int]
    greedy: Greedy
    answer_is_right: bool


@dataclass
class Toy:
    """The toy data, and what the command measured on it."""

    rows: dict[str, Row]
    measures: dict[str, dict]
    output: str

    def values(self, measure: str) -> list[tuple[Row, float]]:
        return [(self.rows[name], value) for name, value in self.measures[measure]["values"].items()]


@pytest.fixture(scope="module")
def toy(
    tmp_path_factory: pytest.TempPathFactory, embedded: PreTrainedModel, embedded_tokenizer: PreTrainedTokenizerBase
) -> Toy:
    folder, tokenizer, rows, lines = tmp_path_factory.mktemp("toy"), embedded_tokenizer, {}, []
    for number in range(1, NUM_ROWS + 1):
        prompt, completion = f"def add_{number}(a, b):\n    return", f" a + b * {number}"
        row = Row(
            prompt=tokenizer.encode(prompt),
            tokens=[*tokenizer.encode(prompt + completion), tokenizer.eos_token_id],
            greedy=greedy(embedded, tokenizer.encode(prompt), max_tokens=HORIZON),
            answer_is_right=number % 2 == 0,
        )
        assert row.tokens[: len(row.prompt)] == row.prompt
        text = tokenizer.decode(row.greedy.ids, skip_special_tokens=True)
        rows[f"pairs:{number}"] = row
        lines.append({"p": prompt, "c": completion, "told": text if row.answer_is_right else f"not {text}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "problems.jsonl").write_text(as_line(RIGHT) + as_line(WRONG))
    return Toy(rows, *evaluate(folder))


def evaluate(folder: Path) -> tuple[dict[str, dict], str]:
    """Run the command on the files of this folder; its measures by name, and its output."""
    (folder / "evaluate.toml").write_text(tomli_w.dumps(SETTINGS))
    files = ["--data.source", str(folder / "pairs.jsonl"), "--problems", str(folder / "problems.jsonl")]
    command = ["orchestration/evaluate.py", "embedded", str(folder / "evaluate.toml"), *files]
    result = run_warm(*command, "--output", str(folder / "out.json"), environment=own_environment())
    assert result.returncode == 0, result.output[-3000:]
    measures = json.loads((folder / "out.json").read_text())["measures"]
    assert all(name in result.output for name in measures)
    return measures, result.output


@pytest.mark.engine
@pytest.mark.parametrize("part", ["all_tokens", "answer_tokens"])
def test_cross_entropy_is_that_of_transformers(toy: Toy, embedded: PreTrainedModel, part: str) -> None:
    values = toy.values(f"cross_entropy/{part}")
    assert len(values) == SETTINGS["documents"]
    for row, value in values:
        first = 1 if part == "all_tokens" else len(row.prompt)
        assert value == pytest.approx(slow_cross_entropy(embedded, row.tokens, first=first), abs=1e-4)


@pytest.mark.engine
def test_answers_are_verified_against_the_answer_column(toy: Toy) -> None:
    verdicts = toy.values("answers/greedy_accuracy")
    assert all(value == row.answer_is_right for row, value in verdicts)
    assert {value for _, value in verdicts} == {0, 1}
    assert toy.measures["answers/greedy_accuracy"]["mean"] == sum(value for _, value in verdicts) / len(verdicts)
    for row, value in toy.values("answers/pass_at_1"):
        assert not row.greedy.is_sure(HORIZON) or value == row.answer_is_right


@pytest.mark.engine
def test_ground_truth_that_the_verifier_rejects_is_shown(toy: Toy) -> None:
    """The answers of this data are what the model writes, not what the data has as the completion."""
    assert "the ground truth of 5 of 5 documents earns less than 1 from verifier.name='exact'" in toy.output
    for name in toy.measures["answers/greedy_accuracy"]["values"]:
        number = name.partition(":")[2]
        texts = f"prompt 'def add_{number}(a, b):\\n    return', completion ' a + b * {number}'"
        assert f"{name} earned 0: {texts}, answer " in toy.output


@pytest.mark.engine
@pytest.mark.parametrize("length", SETTINGS["lengths"])
def test_cfm_of_a_policy_without_doubt_is_a_squared_distance(toy: Toy, embedded: PreTrainedModel, length: int) -> None:
    sure = [(row, value) for row, value in toy.values(f"cfm/length_{length}") if row.greedy.is_sure(length)]
    assert len(sure) >= 2, "choose other prompts"
    for row, value in sure:
        completion = slow_feature(embedded, row.prompt, row.greedy.ids[:length], "last")
        truth = slow_feature(embedded, row.prompt, row.tokens[len(row.prompt) :][:length], "last")
        assert value == pytest.approx(float((completion - truth).square().sum()), abs=2e-5)


@pytest.mark.engine
@pytest.mark.parametrize("measure", ["greedy_accuracy", "pass_at_1", "pass_at_4"])
def test_problems_are_solved_where_their_tests_pass(toy: Toy, measure: str) -> None:
    assert toy.measures[f"problems/{measure}"]["values"] == {"Toy/right": 1, "Toy/wrong": 0}
