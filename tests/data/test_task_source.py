"""Procedural tasks as data: what becomes of a problem, that it is the same anywhere, and what is refused."""

import json
import re
import sys
import tomllib

import pytest
import tomli_w

from actors.config import DataConfig
from actors.data.documents import load_documents
from actors.data.text_sources import read_pairs
from orchestration.command_line import parse_arguments

reasoning_gym = pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")

TASK = {"source": "reasoning_gym/chain_sum", "mode": "completion", "document_tokens": 128, "horizon": 16}


def pairs(**settings):
    return list(read_pairs(DataConfig(**{**TASK, "task_size": 20, **settings})))


def test_a_problem_becomes_question_answer_and_what_its_scorer_needs():
    made = pairs(task_seed=7, prompt_template="Q: {question}\nA: {", task_options={"max_terms": 3})
    expected = reasoning_gym.create_dataset("chain_sum", size=20, seed=7, max_terms=3)
    assert len(made) == 20
    for index, (pair, entry) in enumerate(zip(made, expected, strict=True)):
        assert pair.name == f"reasoning_gym/chain_sum/7:{index}"
        assert pair.prompt == f"Q: {entry['question']}\nA: {{"
        assert pair.completion == entry["answer"] == str(eval(entry["metadata"]["expression"]))
        problem = json.loads(pair.answer)
        told = {"source_dataset": "chain_sum"} | {key: entry[key] for key in ("question", "answer", "metadata")}
        assert problem == json.loads(json.dumps(told))  # a tuple has become a list
        score = reasoning_gym.get_score_answer_fn(problem["source_dataset"])
        assert score(answer=pair.completion, entry=problem) == 1
        assert score(answer="nothing", entry=problem) < 1


def test_the_same_settings_make_the_same_problems_and_others_make_others():
    assert pairs() == pairs()
    prompts = {pair.prompt for pair in pairs()}
    assert prompts.isdisjoint(pair.prompt for pair in pairs(task_seed=20))
    # The warning of data.task_seed: neighbouring seeds share all problems but one.
    assert len(prompts & {pair.prompt for pair in pairs(task_seed=1)}) == 19


def test_repeated_problems_never_reach_two_splits(tokenizer):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    made = pairs(task_size=600, task_options=options)
    splits = load_documents(DataConfig(**TASK, task_size=600, task_options=options), tokenizer)
    tokens = [d.token_ids.tobytes() for split in (splits.train, splits.validation, splits.test) for d in split]
    assert len(made) > len(tokens) == len(set(tokens)) == len({(pair.prompt, pair.completion) for pair in made})
    by_name = {pair.name: pair for pair in made}
    for document in splits.test:
        assert document.answer == by_name[document.document_id].answer
        text = tokenizer.decode(document.token_ids[: document.anchors[0]])
        assert text == by_name[document.document_id].prompt.rstrip()


def test_options_come_from_a_file_and_from_the_command_line(tmp_path):
    options = {"max_terms": 3, "allow_negation": True}
    flags = ["--data.source", TASK["source"], "--data.mode", "completion"]
    given = parse_arguments([*flags, "--data.task-options", "max_terms", "3", "allow_negation", "True"])
    assert given.data.task_options == options
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({"data": {"source": TASK["source"], "mode": "completion", "task_options": options}}))
    assert tomllib.loads(path.read_text())["data"]["task_options"] == options
    assert parse_arguments([str(path)]) == given
    changed = parse_arguments([str(path), "--data.task-options.max-terms", "4"])
    assert changed.data.task_options == options | {"max_terms": 4}
    for value in given.data.task_options.values():
        assert type(value) in (int, bool)


REFUSED = [
    pytest.param({"source": "reasoning_gym/chainsum"}, r"'reasoning_gym/chainsum' names no task", id="task"),
    pytest.param({"task_options": {"max_term": 3}}, r"'max_term': 3}.*unexpected keyword.*ChainSumConfig", id="option"),
    pytest.param({"task_options": {"max_terms": 1}}, r"'max_terms': 1}: max_terms must be >= min_terms", id="value"),
    pytest.param({"task_options": {"max_terms": "x"}}, r"'max_terms': 'x'}: .*not supported", id="type"),
    pytest.param({"task_options": {"size": 9}}, r"multiple values.*'size'", id="option that has a key of its own"),
    pytest.param({"source": "reasoning_gym/rush_hour"}, r"'rush_hour' comes with the answer None", id="no answer"),
    pytest.param({"answer_column": "a"}, r"'a' needs a source with columns", id="column"),
    pytest.param({"source": "stdlib", "answer_column": "a"}, r"'stdlib' has none", id="column of stdlib"),
    pytest.param({"source": "stdlib", "task_options": {"a": 1}}, r"data.source='stdlib' is none", id="no task"),
    pytest.param({"source": "reasoning_gym/arc_agi"}, r"'arc_agi' gives its own answer 0.05 instead of 1", id="scorer"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refusals_of_the_package_are_reported_readably(settings, message):
    with pytest.raises(ValueError, match=message):
        pairs(**settings)


KEYS_THAT_DISAGREE = [
    pytest.param({"mode": "strided", "horizon": 4}, "mode='completion', got 'strided'", id="task without answers"),
    pytest.param({"prompt_template": "Solve!"}, "prompt_template='Solve!' must contain '{question}'", id="no question"),
    pytest.param(
        {"source": "x.jsonl", "mode": "strided", "horizon": 4, "answer_column": "a"},
        "answer_column='a' needs mode='completion', got 'strided'",
        id="answers to no prompts",
    ),
]


@pytest.mark.parametrize(("settings", "message"), KEYS_THAT_DISAGREE)
def test_keys_that_disagree_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(**{**TASK, **settings})


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # an import of it now fails as if it were not there
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install reasoning-gym==0.1.25")):
        pairs()
