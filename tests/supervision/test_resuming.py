"""Which checkpoint a run goes on from, which it refuses by name, and which other runs may not go on from it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from run_states import make_buffer, run_state
from transformers import PreTrainedTokenizerFast

from actors.config import DataConfig
from actors.data.documents import load_documents
from actors.rollout import Document
from orchestration.buffer.event_log import as_logged
from orchestration.checkpoint.store import MANIFEST, CheckpointStore
from orchestration.command_line import key_paths, parse_arguments
from orchestration.config import LoggingConfig, RunConfig, dump_config
from orchestration.output.report import RunReport
from orchestration.output.run_folder import make_run_folder
from orchestration.supervision.resuming import CHECKPOINTS, Start, require_same_run, start_of
from orchestration.supervision.run_state import RunState

RUN_NAME = "first"


def config(output_dir: Path, resume: str | Path | None = None) -> RunConfig:
    logging = LoggingConfig(output_dir=str(output_dir), run_name=RUN_NAME)
    return RunConfig(resume=str(resume) if resume is not None else None, logging=logging)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run."""
    return make_run_folder(config(tmp_path))


def checkpoint(run: Path, step: int) -> Path:
    store = CheckpointStore(run / CHECKPOINTS, keep_last=9)
    folder = store.begin(step)
    (folder / "run.safetensors").write_bytes(bytes([step % 256]) * 100)
    return store.commit(step, score=None)


def half_write(path: Path) -> str:
    data = (path / "run.safetensors").read_bytes()
    (path / "run.safetensors").write_bytes(data[:50])
    return "run.safetensors has 50 bytes, it was written with 100"


def flip(path: Path) -> str:
    data = bytearray((path / "run.safetensors").read_bytes())
    data[70] ^= 1
    (path / "run.safetensors").write_bytes(data)
    return "run.safetensors was changed after it was written"


def test_without_resume_a_run_begins_in_a_new_folder(tmp_path: Path) -> None:
    assert start_of(config(tmp_path)) == Start(tmp_path / RUN_NAME, None)
    with pytest.raises(FileExistsError, match=r"choose another logging\.run_name.*--resume auto"):
        start_of(config(tmp_path))


def test_auto_begins_where_there_is_no_folder(tmp_path: Path) -> None:
    assert start_of(config(tmp_path, "auto")) == Start(tmp_path / RUN_NAME, None)
    assert (tmp_path / RUN_NAME / "metrics.jsonl").exists()


def test_auto_begins_again_where_no_checkpoint_was_written(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert start_of(config(run.parent, "auto")) == Start(run, None)
    begun = CheckpointStore(run / CHECKPOINTS, keep_last=1).begin(10)
    assert start_of(config(run.parent, "auto")) == Start(run, None)
    assert begun.exists(), "looking changes nothing"


def test_auto_does_not_begin_again_a_run_that_has_ended(run: Path) -> None:
    """With fewer steps than lie between two checkpoints."""
    RunReport(run, "model").finish(seconds=1.0)
    with pytest.raises(FileExistsError, match=rf"{run} has ended, without a checkpoint.*another logging\.run_name"):
        start_of(config(run.parent, "auto"))
    path = checkpoint(run, 10)
    assert start_of(config(run.parent, "auto")) == Start(run, path)


def test_the_newest_checkpoint_is_gone_on_from(run: Path, tmp_path: Path) -> None:
    paths = [checkpoint(run, step) for step in (9, 10, 1000000)]
    assert start_of(config(run.parent, "auto")) == Start(run, paths[2])
    assert start_of(config(tmp_path / "elsewhere", run)) == Start(run, paths[2])
    assert not (tmp_path / "elsewhere").exists(), "it goes on in its own folder"


def test_a_checkpoint_is_gone_on_from_by_its_path(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [checkpoint(run, step) for step in (10, 20)]
    assert [start_of(config(run, path)) for path in paths] == [Start(run, path) for path in paths]
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("HOME", str(run.parent))
    for given in (f"{RUN_NAME}/checkpoints/step-000010/", f"~/{RUN_NAME}/checkpoints/step-000010"):
        assert start_of(config(run, given)) == Start(run, paths[0])


@pytest.mark.parametrize(
    "place", ["", "gone", "first", "first/checkpoints", "first/checkpoints/step-000010", "gone/checkpoints/step-000010"]
)
def test_where_there_is_nothing_that_is_said_and_nothing_is_made(place: str, run: Path) -> None:
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(FileNotFoundError, match="no checkpoint is there; give the folder of a run") as refusal:
        start_of(config(run.parent, run.parent / place))
    assert str(run.parent / place) in str(refusal.value)
    assert sorted(run.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["step-000010.partial", "step-000010.abandoned", "last"])
def test_a_folder_that_is_no_checkpoint_is_refused(name: str, run: Path) -> None:
    path = checkpoint(run, 10)
    other = path.rename(path.with_name(name))
    with pytest.raises(FileNotFoundError, match=rf"{name}': no checkpoint is there"):
        start_of(config(run.parent, other))


@pytest.mark.parametrize("damage", [half_write, flip])
@pytest.mark.parametrize("by", ["auto", "run", "path"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used_when_asked_for(
    by: str, damage: Callable[[Path], str], run: Path
) -> None:
    paths = [checkpoint(run, step) for step in (10, 20, 30)]
    what = damage(paths[2])
    given = {"auto": "auto", "run": run, "path": paths[2]}[by]
    with pytest.raises(ValueError, match=rf"{paths[2]}/{what}.*resume from {paths[1]}"):
        start_of(config(run.parent, given))
    assert start_of(config(run.parent, paths[1])) == Start(run, paths[1])
    store = CheckpointStore(run / CHECKPOINTS, keep_last=1)
    store.set_aside_after(20)
    names = [path.name for path in sorted((run / CHECKPOINTS).iterdir())]
    assert names == ["step-000010", "step-000020", "step-000030.abandoned"]
    assert start_of(config(run.parent, "auto")) == Start(run, paths[1])


def test_without_an_earlier_one_that_is_said(run: Path) -> None:
    what = flip(checkpoint(run, 10))
    with pytest.raises(ValueError, match=rf"{what}.*there is no earlier checkpoint; start anew"):
        start_of(config(run.parent, run))


def test_a_checkpoint_that_was_never_finished_is_refused_by_its_path(run: Path) -> None:
    path = checkpoint(run, 10)
    (path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"{path}/{MANIFEST} is missing: the checkpoint was never finished"):
        start_of(config(run.parent, path))


LOGGED = RunConfig.model_validate({"learner": {"num_steps": 100, "warmup_frac": 0.05}})


@pytest.fixture
def state(make_document: Callable[[int], Document]) -> RunState:
    """At step 40 of a run of LOGGED."""
    buffer, _ = make_buffer([make_document(0)]).state()
    return run_state(replace(buffer, step=40), config=json.dumps(as_logged(LOGGED)))


def require(state: RunState, wanted: RunConfig, *, data_digest: str = "digest") -> None:
    require_same_run(state, wanted, data_digest=data_digest, checkpoint=Path("runs/first/checkpoints/step-000040"))


def changed(overrides: dict[str, object], of: RunConfig = LOGGED) -> RunConfig:
    """With other values of these dotted keys."""
    tree = of.model_dump()
    for path, value in overrides.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return RunConfig.model_validate(tree)


def test_the_same_run_goes_on(state: RunState) -> None:
    require(state, LOGGED)
    infinite = changed({"learner.max_importance_weight": math.inf})
    require(replace(state, config=json.dumps(as_logged(infinite))), infinite)


MAY_DIFFER = {
    "resume": "runs/first",
    "chaos": "7:2.5",
    "logging.output_dir": "elsewhere",
    "logging.run_name": "second",
    "logging.worker_output": True,
    "logging.wandb": "offline",
    "checkpoint.every_steps": 7,
    "checkpoint.keep": 5,
    "checkpoint.hugging_face": True,
    "recovery.max_replacements": 0,
    "recovery.max_learner_restarts": 0,
    "placement.rollout.count": 3,
    "placement.rollout.num_cpus": 0.5,
    "placement.feature.count": 2,
    "placement.feature.num_cpus": 2.0,
    "placement.verifier.count": 2,
    "placement.verifier.num_cpus": 2.0,
    "placement.learner.count": 2,
    "placement.learner.num_cpus": 2.0,
    "placement.strategy": "SPREAD",
    "placement.one_process": True,
    "evaluation.every_steps": 7,
    "learner.num_steps": 101,
    "asynchrony.request_timeout_s": 77.0,
    "asynchrony.weight_transport": "files",
    "asynchrony.weight_folder": "/shared",
}

TOGETHER = {
    "learner.num_steps": {"learner.warmup_frac": 4.5 / 101},  # as many steps of warm-up
    "asynchrony.weight_transport": {"asynchrony.weight_folder": "/shared"},
    "asynchrony.weight_folder": {"asynchrony.weight_transport": "files"},
}


@pytest.mark.parametrize("key", MAY_DIFFER)
def test_what_may_differ_is_accepted(key: str, state: RunState) -> None:
    other = changed({key: MAY_DIFFER[key], **TOGETHER.get(key, {})})
    require(state, other)


def some_other(value: object, key: str) -> object:
    """Another JSON value."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}, once"
        case list():
            return [*value, 1]
    return f"a {key}"


def in_other_sections(key: str) -> bool:
    sections = ("placement.", "logging.", "checkpoint.", "recovery.")
    return key not in MAY_DIFFER and key != "replay" and not key.startswith(sections) and "warmup" not in key


@pytest.mark.parametrize("key", [key for key in key_paths(RunConfig) if in_other_sections(key)])
def test_every_other_key_is_named_with_both_values(key: str, state: RunState) -> None:
    """The logged value is another: as this code wrote it, whatever rules another value would break."""
    logged = json.loads(state.config)
    *sections, name = key.split(".")
    node = logged
    for section in sections:
        node = node[section]
    present, node[name] = node[name], some_other(node[name], key)
    with pytest.raises(ValueError, match="is of another configuration") as refusal:
        require(replace(state, config=json.dumps(logged)), LOGGED)
    expected = f"configuration: {key}={present!r} (logged: {node[name]!r}); resume it with the config.toml"
    assert expected in str(refusal.value)


def test_all_that_differ_are_named_at_once(state: RunState) -> None:
    with pytest.raises(ValueError, match=r"rollout\.temperature=0\.5 \(logged: 1\.0\); seed=1") as refusal:
        require(state, changed({"seed": 1, "rollout.temperature": 0.5, "placement.rollout.count": 2}))
    assert "placement" not in str(refusal.value)


def test_a_key_that_the_logged_run_did_not_know_is_named(state: RunState) -> None:
    logged = json.loads(state.config)
    del logged["seed"]
    logged["former"] = 3
    with pytest.raises(ValueError, match=r"former=None \(logged: 3\); seed=0 \(logged: None\)"):
        require(replace(state, config=json.dumps(logged)), LOGGED)


def test_more_steps_need_as_many_steps_of_warm_up(state: RunState) -> None:
    longer = changed({"learner.num_steps": 200})
    with pytest.raises(ValueError, match=r"is a warm-up of 10 steps \(logged: 5\); set learner\.warmup_frac=0\.0225"):
        require(state, longer)
    require(state, changed({"learner.warmup_frac": 0.0225}, of=longer))


def test_fewer_steps_than_are_done_are_refused(state: RunState) -> None:
    require(state, changed({"learner.num_steps": 40, "learner.warmup_frac": 0.12}))
    with pytest.raises(ValueError, match=r"has done 40 steps, learner\.num_steps=39; raise it"):
        require(state, changed({"learner.num_steps": 39, "learner.warmup_frac": 0.12}))


def test_other_data_are_refused_by_digest(state: RunState, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def digest(folder: str, text: str) -> str:
        path = tmp_path / folder / "rows.jsonl"
        path.parent.mkdir()
        rows = [{"text": f"{number} {text} {number}\n" * 20} for number in range(20)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shape = {"document_tokens": 16, "context_tokens": 4, "horizon": 4, "stride": 2}
        return load_documents(DataConfig(source=str(path), **shape), tokenizer).digest

    one, again, other = digest("one", "x = 1"), digest("again", "x = 1"), digest("other", "x = 2")
    assert one == again != other
    trained = replace(state, data_digest=one)
    require(trained, LOGGED, data_digest=again)
    with pytest.raises(ValueError, match=rf"on other data: .* is {one}, that of data\.source=.* is now {other}"):
        require(trained, LOGGED, data_digest=other)


def test_the_configuration_in_the_folder_of_a_run_can_be_resumed_with(state: RunState, tmp_path: Path) -> None:
    """Also where `auto` began it: the file names no run to continue."""
    begun = changed({"resume": "auto", "logging.run_name": RUN_NAME, "chaos": "7"})
    (tmp_path / "config.toml").write_text(dump_config(begun.without_run_name))
    again = parse_arguments([str(tmp_path / "config.toml"), "--resume", str(tmp_path)])
    assert again == changed({"resume": str(tmp_path), "chaos": "7"})
    require(state, again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resume": "runs/first", "replay": "events.jsonl"}, "resume continues one; give one of the two"),
        ({"resume": "auto"}, "the run that logging.run_name names, which is not given"),
    ],
)
def test_what_cannot_be_resumed_is_refused_before_a_start(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(settings))
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(tmp_path / "run.toml")])
