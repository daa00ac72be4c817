"""The configuration tree: every rule by a value on each side of it, and parsing of a file and flags into the tree."""

import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from pydantic import BaseModel, ValidationError

from actors.config import Settings
from feature_server.config import VerifierConfig
from orchestration.command_line import key_paths, load, parse_arguments
from orchestration.config import PlacementConfig, RoleConfig, RunConfig, dump_config
from orchestration.evaluation.evaluate_config import EvaluateConfig
from orchestration.simulator.simulate_config import SimulateConfig

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "orchestration" / "configs").glob("*.toml"))
Sections = dict[str, object]


def write(folder: Path, settings: Sections) -> Path:
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def all_sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_sections(field.annotation, f"{path}.{name}".strip("."))


def value_at(tree: BaseModel, path: str) -> object:
    """Of a dotted key."""
    return functools.reduce(getattr, path.split("."), tree)


NUMBERS = [
    (path, tree)
    for tree in (RunConfig, EvaluateConfig, SimulateConfig)
    for path in key_paths(tree)
    if isinstance(value_at(tree(), path), float)
]


@pytest.mark.parametrize(("path", "tree"), NUMBERS, ids=[f"{tree.__name__}.{path}" for path, tree in NUMBERS])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused(path: str, tree: type[Settings], value: float) -> None:
    settings: object = value
    for name in reversed(path.split(".")):
        settings = {name: settings}
    if path == "learner.max_importance_weight" and value > 0:  # where it means that nothing is truncated
        assert value_at(tree.model_validate(settings), path) == value
        return
    with pytest.raises(ValidationError, match=path.replace(".", r"\.")):
        tree.model_validate(settings)


def test_the_upper_bound_of_ratios_may_be_infinite_and_the_lower_may_not() -> None:
    bounds = RunConfig.model_validate({"learner": {"ratio_bounds": [0.5, float("inf")]}}).learner.ratio_bounds
    assert bounds == (0.5, float("inf"))
    for refused in ([float("-inf"), 2.0], [float("nan"), 2.0], [0.5, float("nan")]):
        with pytest.raises(ValidationError, match="ratio_bounds"):
            RunConfig.model_validate({"learner": {"ratio_bounds": refused}})


def test_defaults_are_valid_and_resolve_to_themselves() -> None:
    assert RunConfig.model_validate(RunConfig().model_dump()) == RunConfig()
    assert parse_arguments([]) == RunConfig()


def test_no_section_can_be_changed() -> None:
    for path, section in all_sections(RunConfig):
        assert section.model_config["frozen"], path
        assert section.model_config["extra"] == "forbid", path


def test_every_key_is_described() -> None:
    for path, section in all_sections(RunConfig):
        assert section.__doc__, path
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            assert is_section or field.description, f"{path}.{name} has no docstring"


@pytest.mark.parametrize(("tree", "count"), [(RunConfig, 108), (EvaluateConfig, 49), (SimulateConfig, 34)])
def test_a_key_more_is_a_decision(tree: type[Settings], count: int) -> None:
    assert len(list(key_paths(tree))) == count


@pytest.mark.parametrize(("num_cpus", "threads"), [(0.25, 1), (1.0, 1), (1.9, 1), (4.0, 4)])
def test_a_process_takes_as_many_threads_as_whole_cores_and_at_least_one(num_cpus: float, threads: int) -> None:
    assert RoleConfig(num_cpus=num_cpus).threads == threads


def test_every_process_has_one_thread_unless_more_cores_are_reserved() -> None:
    placement = PlacementConfig()
    roles = (placement.rollout, placement.feature, placement.verifier, placement.learner)
    assert [role.threads for role in roles] == [1, 1, 1, 1]


REFUSED = [
    pytest.param(
        {"data": {"stride": 8, "document_tokens": 130, "context_tokens": 8, "horizon": 4}},
        ["document_tokens=130", "context_tokens=8", "horizon=4", "stride=8"],
        id="blocks do not tile the document",
    ),
    pytest.param(
        {"data": {"document_tokens": 8, "context_tokens": 8, "horizon": 4, "stride": 4}},
        ["document_tokens=8", "context_tokens=8", "horizon=4", "document_tokens=12 or 16 would fit"],
        id="document is shorter than one block",
    ),
    pytest.param(
        {"data": {"mode": "completion", "document_tokens": 64, "horizon": 64}},
        ["horizon=64", "document_tokens=64"],
        id="completion leaves no room for a prompt",
    ),
    pytest.param(
        {"feature": {"depth_fracs": [0.5, 1.0]}},
        ["depth_fracs=(0.5, 1.0)", "[0, 1)"],
        id="depth outside of the network",
    ),
    pytest.param({"feature": {"depth_fracs": []}}, ["depth_fracs=()"], id="no depth"),
    pytest.param(
        {"feature": {"pooled_moment": "document"}, "learner": {"whitening": "none"}},
        ["feature.pooled_moment='document'", "learner.whitening='pooled'", "got 'none'"],
        id="a pool that no whitening uses",
    ),
    pytest.param(
        {"learner": {"objective": "rlvr"}},
        ["learner.objective='rlvr'", "data.mode='completion'", "got 'strided'"],
        id="a verifier without whole completions",
    ),
    pytest.param(
        {"learner": {"objective": "self_likelihood"}, "rollout": {"completions_per_context": 1}},
        ["learner.objective='self_likelihood'", "rollout.completions_per_context >= 2", "got 1"],
        id="no sibling to be the baseline",
    ),
    pytest.param(
        {"learner": {"ratio_bounds": [1.1, 1.2]}},
        ["ratio_bounds=(1.1, 1.2)", "low <= 1 <= high"],
        id="bounds that leave out on-policy tokens",
    ),
    pytest.param(
        {"learner": {"objective": "sft", "ess_learning_rate": True}},
        ["learner.ess_learning_rate=True", "learner.objective='sft'", "leave out one"],
        id="weights of nothing sampled",
    ),
    pytest.param(
        {"rollout": {"completions_per_context": 2}, "learner": {"diversity_coef": 0.5}},
        ["rollout.completions_per_context >= 3", "got 2", "learner.diversity_coef=0.5"],
        id="no pair without the completion itself",
    ),
    pytest.param(
        {
            "learner": {"documents_per_step": 10, "micro_batch_documents": 2},
            "placement": {"learner": {"count": 3}},
        },
        ["learner.documents_per_step=10", "placement.learner.count=3", "learner.micro_batch_documents=2", "= 6"],
        id="step does not divide into micro-batches",
    ),
    pytest.param(
        {"placement": {"tensor_parallel_size": 2, "rollout": {"num_gpus": 1}}},
        ["placement.tensor_parallel_size=2", "placement.rollout.num_gpus=2", "got 1"],
        id="engine in two parts on one GPU",
    ),
    pytest.param(
        {"placement": {"rollout": {"num_gpus": 1.5}}},
        ["placement.tensor_parallel_size=1", "placement.rollout.num_gpus=1", "got 1.5"],
        id="GPU and a half",
    ),
    pytest.param(
        {"placement": {"feature": {"num_gpus": 2}}},
        ["placement.feature.num_gpus=2", "placement.feature.count"],
        id="feature server on two GPUs",
    ),
    pytest.param(
        {"placement": {"learner": {"num_gpus": 2}}},
        ["placement.learner.num_gpus=2", "placement.learner.count"],
        id="learner rank on two GPUs",
    ),
]


@pytest.mark.parametrize(("settings", "parts"), REFUSED)
def test_values_that_do_not_go_together_are_refused_with_keys_and_values(
    settings: Sections, parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_arguments([str(write(tmp_path, settings))])
    assert not isinstance(refusal.value, ValidationError), "the library's own text is hard to read"
    for part in parts:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"stride": 8, "document_tokens": 132}},
        {"data": {"document_tokens": 12}},
        {"data": {"mode": "completion", "document_tokens": 65, "horizon": 64, "stride": 7}},
        {"feature": {"depth_fracs": [0.0]}},
        {"learner": {"objective": "sft"}},
        {"learner": {"ess_learning_rate": True}},
        {"learner": {"objective": "rlvr"}, "data": {"mode": "completion"}, "rollout": {"completions_per_context": 2}},
        {"learner": {"objective": "self_likelihood"}, "rollout": {"completions_per_context": 2}},
        {"learner": {"ratio_bounds": [0.0, 1.0], "max_importance_weight": float("inf")}},
        {"rollout": {"completions_per_context": 3}, "learner": {"diversity_coef": 0.5}},
        {"rollout": {"completions_per_context": 2}, "learner": {"diversity_coef": 0}},
        {
            "rollout": {"completions_per_context": 1},
            "learner": {"objective": "sft"},
        },
        {
            "learner": {"documents_per_step": 12, "micro_batch_documents": 2},
            "placement": {"learner": {"count": 3}},
        },
        {"placement": {"tensor_parallel_size": 2, "rollout": {"num_gpus": 2}}},
        {"placement": {"rollout": {"num_gpus": 0.5}}},
        {"placement": {"feature": {"num_gpus": 1}, "learner": {"num_gpus": 1}}},
    ],
)
def test_values_on_the_other_side_of_each_rule_are_accepted(settings: Sections, tmp_path: Path) -> None:
    load(RunConfig, write(tmp_path, settings))


@pytest.mark.parametrize(
    ("frac", "num_steps", "expected"),
    [
        (0.03, 100, 3),
        (0.03, 2, 1),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.0, 100, 0),
        (0.03, 0, 0),
        (1e-9, 5, 1),
    ],
)
def test_warm_up_is_a_share_of_the_steps_rounded_up(frac: float, num_steps: int, expected: int) -> None:
    """0.07 x 100 is more than 7 in binary."""
    learner = {"warmup_frac": frac, "num_steps": num_steps}
    assert RunConfig.model_validate({"learner": learner}).learner.warmup_steps == expected


def test_lengths_suggested_by_a_refusal_are_accepted(tmp_path: Path) -> None:
    def with_tokens(document_tokens: int) -> RunConfig:
        data = {"document_tokens": document_tokens, "context_tokens": 5, "horizon": 6, "stride": 7}
        return load(RunConfig, write(tmp_path, {"data": data}))

    for document_tokens in (3, 30, 31, 1000):
        with pytest.raises(ValueError, match="would fit") as refusal:
            with_tokens(document_tokens)
        suggested = re.search(r"document_tokens=(\d+) or (\d+) would fit", str(refusal.value))
        assert suggested is not None
        for value in map(int, suggested.groups()):
            assert with_tokens(value).data.document_tokens == value


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"learner": {"max_lagg": 3}}, "learner.max_lagg"),
        ({"placement": {"rollout": {"gpu": 1}}}, "placement.rollout.gpu"),
        ({"lerner": {"num_steps": 3}}, "lerner"),
        ({"asynchrony": {"max_lag": -1}}, "asynchrony.max_lag=-1"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature=0"),
        ({"data": {"mode": "packed"}}, "data.mode='packed'"),
        ({"model": {"dtype": "float16"}}, "model.dtype='float16'"),
        ({"learner": {"learning_rate": float("nan")}}, "learner.learning_rate=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, f"seed={2**32}"),
    ],
)
def test_a_refused_key_is_named_by_its_path(settings: Sections, path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_arguments([str(write(tmp_path, settings))])
    assert str(refusal.value).startswith(f"{path}:")


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"learner": {"num_stepz": 3}}, "learner.num_steps"),
        ({"lerner": {"num_steps": 3}}, "learner"),
        ({"num_steps": 3}, "learner.num_steps"),
        ({"learner": {"attention": "sdpa"}}, "model.attention"),
        ({"data": {"test_frac": 0.2}}, "data.held_out_frac"),
        ({"placement": {"rollout": {"threads": 2}}}, "placement.rollout"),
        ({"evaluation": {"completions_per_context": 8}}, "rollout.completions_per_context"),
    ],
)
def test_the_nearest_key_is_named_in_another_section_too(settings: Sections, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_arguments([str(write(tmp_path, settings))])
    assert f"there is no such key; the nearest is {nearest}" in str(refusal.value)


def test_several_mistakes_are_all_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"learner": {"max_lagg": 3, "num_steps": -1}, "data": {"horizon": 0}})
    with pytest.raises(ValueError) as refusal:
        parse_arguments([str(path)])
    for part in ("learner.max_lagg:", "learner.num_steps=-1:", "data.horizon=0:"):
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--learner.max-lagg", "3"], "--learner.max-lagg"),
        (["--learner.num-steps", "many"], "--learner.num-steps"),
        (["--rollout.completions-per-context", "2"], "rollout.completions_per_context >= 3"),
    ],
)
def test_a_refused_flag_ends_the_process_with_status_2(
    arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(arguments)
    assert end.value.code == 2
    assert shown in " ".join(capsys.readouterr().err.split())


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, {"seed": 3, "learner": {"num_steps": 7, "learning_rate": 0.5}})
    config = parse_arguments([str(path), "--learner.num-steps", "9", "--placement.rollout.count", "2"])
    assert config.model_dump(exclude_defaults=True) == {
        "seed": 3,
        "learner": {"num_steps": 9, "learning_rate": 0.5},
        "placement": {"rollout": {"count": 2}},
    }


def test_a_table_keeps_what_it_does_not_name_as_the_defaults_have_it(tmp_path: Path) -> None:
    """The roles of a placement differ from the defaults of their class."""
    whole = RunConfig().model_dump()
    for section, values in whole.items():
        for name in values if isinstance(values, dict) else ():
            path = write(tmp_path, {section: {name: values[name]} if values[name] is not None else {}})
            assert load(RunConfig, path).model_dump() == whole, f"{section}.{name}"
    for role, shares in whole["placement"].items():
        if isinstance(shares, dict):
            path = write(tmp_path, {"placement": {role: {"count": 4}}})
            assert load(RunConfig, path).model_dump()["placement"] == whole["placement"] | {role: shares | {"count": 4}}


@pytest.mark.parametrize(
    ("name", "arguments", "num_cpus"),
    [("one_gpu", (), 1.75), ("smoke", ("--placement.learner.count", "2"), 2.25)],
)
def test_a_shipped_file_reserves_the_default_cores(name: str, arguments: tuple[str, ...], num_cpus: float) -> None:
    path = next(path for path in SHIPPED if path.stem == name)
    placement = parse_arguments([str(path), *arguments]).placement
    assert sum(role.count * role.num_cpus for role in (placement.rollout, placement.feature, placement.learner)) == (
        num_cpus
    )


def test_a_dictionary_in_a_file_replaces_the_default_one(tmp_path: Path) -> None:
    options = {"max_terms": 3}
    assert load(RunConfig, write(tmp_path, {"data": {"task_options": options}})).data.task_options == options


def test_flags_are_checked_across_sections_like_the_file() -> None:
    arguments = ["--rollout.completions-per-context", "2", "--learner.diversity-coef", "0"]
    assert parse_arguments(arguments).rollout.completions_per_context == 2


def test_dumped_configuration_reads_back_equal(tmp_path: Path) -> None:
    changed = {
        "seed": 2**31,
        "model": {"policy": 'a "quoted" \\ name', "feature_model": "ä", "dtype": "bfloat16"},
        "data": {"source": "hub/name", "subset": "python", "skip_broken_rows": True, "held_out_frac": 0.123456789},
        "rollout": {"probe_tolerance": 1e-7, "temperature": 1 / 3},
        "feature": {"depth_fracs": [0.9, 0.1]},
        "learner": {"adam_betas": [0.8, 0.99], "learning_rate": 3e-6, "zero_stage": 3},
        "asynchrony": {"max_lag": 4},
        "placement": {"feature": {"num_gpus": 0.25}, "strategy": "SPREAD"},
        "evaluation": {"every_steps": 0, "split": "test"},
        "logging": {"run_name": "lag 4", "wandb": "offline"},
    }
    for config in (RunConfig(), RunConfig.model_validate(changed)):
        path = tmp_path / "dumped.toml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load(RunConfig, path) == config
        assert parse_arguments([str(path)]) == config
    resolved = tomllib.loads(dump_config(RunConfig()))
    assert resolved["learner"]["num_steps"] == RunConfig().learner.num_steps, "defaults are written too"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere/run\.toml' does not exist.*orchestration/configs"):
        parse_arguments(["nowhere/run.toml"])


def test_a_broken_file_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("seed = 1\n[learner\n")
    with pytest.raises(ValueError, match=r"broken\.toml' is not TOML: .*line 2"):
        parse_arguments([str(path)])


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_configuration_loads(path: Path) -> None:
    config = load(RunConfig, path)
    assert parse_arguments([str(path)]) == config


def test_the_published_setting_is_that_of_the_paper() -> None:
    """arXiv:2603.12248 and the authors' configuration for unstructured code."""
    published, asynchronous = (
        load(RunConfig, path) for path in SHIPPED if path.stem in ("published", "published_asynchronous")
    )
    assert published.model_dump() == asynchronous.model_dump() | {"asynchrony": published.asynchrony.model_dump()}
    assert (published.asynchrony.max_lag, asynchronous.asynchrony.max_lag) == (0, 1)
    data, learner, rollout = published.data, published.learner, published.rollout
    assert (data.document_tokens, data.context_tokens, data.horizon, data.stride) == (1024, 8, 8, 8)
    assert data.source != "stdlib" and data.mode == "strided" and not data.separate_texts
    assert (rollout.completions_per_context, rollout.temperature) == (4, 0.6)
    assert (learner.documents_per_step, learner.learning_rate, learner.zero_stage) == (16, 1e-6, 2)
    assert (learner.adam_betas, learner.max_grad_norm, learner.diversity_coef) == ((0.9, 0.95), 1.0, 1.0)
    assert learner.cross_entropy_coef in (0, 0.03, 0.1) and learner.whitening == "sample_mixing"
    two_passes = 2 * 20e6 / (learner.documents_per_step * data.document_tokens)
    assert learner.num_steps == pytest.approx(two_passes, abs=2)
    assert published.feature.depth_fracs == (0.25, 0.5, 0.75)


def test_a_verifier_in_a_file_is_found_from_any_folder() -> None:
    assert VerifierConfig(name="judge.py:reward").name == f"{Path.cwd() / 'judge.py'}:reward"
    assert VerifierConfig(name="judges.mine:reward").name == "judges.mine:reward"
    assert VerifierConfig().name == "exact"
