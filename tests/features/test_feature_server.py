"""Pooled whitening in the server: over which completions its second moment is taken, and what each choice sees."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.rollout import Rollout
from feature_server.config import FeatureConfig
from feature_server.features.feature_model import FeatureModel
from feature_server.features.gram import GramStatistics
from feature_server.features.server import FeatureServer
from feature_server.scored_rollout import ScoredRollout
from learner.objective.reward import cfm_plug_in
from learner.objective.whitening import unwhitened

SHRINKAGE = 0.1
SMALL = {"depth_fracs": (0.5,), "whitening_shrinkage": SHRINKAGE}
"""One layer: 32 dimensions."""
MOMENTS = ["initial", "document"]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_causal_lm: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> str:
    path: Path = tmp_path_factory.mktemp("feature-model")
    make_causal_lm("qwen2", num_layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def rollouts(make_rollout: Callable[..., Rollout]) -> list[Rollout]:
    """18, 36 and 3 completions: fewer and more than dimensions, and a single group."""
    shapes = [(14, range(2, 8), 3), (16, range(2, 11), 4), (9, [6], 3)]
    made = []
    for seed, (num_tokens, anchors, n) in enumerate(shapes):
        lengths = [[1 + (group + j + seed) % 3 for j in range(n)] for group in range(len(anchors))]
        made.append(make_rollout(num_tokens=num_tokens, anchors=list(anchors), lengths=lengths, horizon=3, seed=seed))
    return made


def server(folder: str, pooled_moment: str, **settings: object) -> FeatureServer:
    config = FeatureConfig(pooled_moment=pooled_moment, **(SMALL | settings))
    return FeatureServer(model=folder, config=config, dtype="float32", max_tokens=64)


def features(folder: str, rollouts: Sequence[Rollout]) -> list[tuple[Tensor, Tensor]]:
    """Of completions and ground truth of each rollout, in float64."""
    model = FeatureModel(folder, FeatureConfig(**SMALL), dtype="float32", max_tokens=64)
    return [tuple(part[0].double() for part in model([rollout])) for rollout in rollouts]


def slow_moment(completions: Tensor) -> Tensor:
    rows = completions.flatten(0, 1)
    return sum(torch.outer(row, row) for row in rows) / len(rows)


def slow_map(moment: Tensor) -> Tensor:
    shift = SHRINKAGE * sum(float(moment[i, i]) for i in range(len(moment))) / len(moment)
    eigenvalues, axes = torch.linalg.eigh(moment)
    mean_square = sum(max(0.0, float(value)) / (float(value) + shift) for value in eigenvalues)
    return sum(
        torch.outer(axis, axis) / math.sqrt((float(value) + shift) * mean_square)
        for value, axis in zip(eigenvalues, axes.T, strict=True)
    )


def slow_statistics(completions: Tensor, ground_truth: Tensor, root: Tensor) -> GramStatistics:
    groups, n, _ = completions.shape
    gram, products = torch.zeros(groups, n, n).double(), torch.zeros(groups, n).double()
    for group in range(groups):
        mapped, target = [root @ row for row in completions[group]], root @ ground_truth[group]
        for j in range(n):
            products[group, j] = mapped[j] @ target
            for k in range(n):
                gram[group, j, k] = mapped[j] @ mapped[k]
    norms = torch.stack([(root @ target).square().sum() for target in ground_truth])
    return GramStatistics(gram=gram, ground_truth_products=products, ground_truth_norm_sq=norms)


def assert_close(found: GramStatistics | None, expected: GramStatistics, atol: float) -> None:
    assert found is not None
    for name in ("gram", "ground_truth_products", "ground_truth_norm_sq"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=atol, msg=name)


def largest_difference(one: ScoredRollout, other: ScoredRollout) -> float:
    return float((one.whitened.gram - other.whitened.gram).abs().max())


def scale_network(feature_server: FeatureServer, factor: float) -> None:
    with torch.inference_mode():
        for parameter in feature_server._model._model.parameters():
            parameter *= factor


def test_each_document_is_whitened_by_its_own_completions(folder: str, rollouts: list[Rollout]) -> None:
    scored = server(folder, "document", micro_batch_documents=1).score(rollouts)
    for one, (completions, ground_truth) in zip(scored, features(folder, rollouts), strict=True):
        root = slow_map(slow_moment(completions))
        assert_close(one.whitened, slow_statistics(completions, ground_truth, root), atol=1e-9)
        assert_close(one.raw, slow_statistics(completions, ground_truth, torch.eye(32).double()), atol=1e-9)
        squares = one.whitened.gram.diagonal(dim1=-2, dim2=-1)
        assert float(squares.mean()) == pytest.approx(1, abs=1e-9)


def test_a_document_whitened_by_itself_does_not_depend_on_others(folder: str, rollouts: list[Rollout]) -> None:
    together = server(folder, "document", micro_batch_documents=3).score(rollouts)
    for one, rollout in zip(together, rollouts, strict=True):
        (alone,) = server(folder, "document").score([rollout])
        assert_close(one.whitened, alone.whitened, atol=1e-5)


def test_a_document_whitened_by_itself_takes_no_fitted_moment(folder: str, rollouts: list[Rollout]) -> None:
    one = server(folder, "document")
    with pytest.raises(RuntimeError, match="takes no fitted moment"):
        one.fit_whitening(*rollouts)
    with pytest.raises(RuntimeError, match="takes no fitted moment"):
        one.set_whitening(torch.eye(32).double())


def test_initial_moment_stays(folder: str, rollouts: list[Rollout]) -> None:
    one = server(folder, "initial")
    one.fit_whitening(*rollouts)
    before = one.score(rollouts[:1])[0]
    one.score(rollouts[1:])
    assert largest_difference(before, one.score(rollouts[:1])[0]) == 0


def test_nothing_is_whitened_before_the_fit(folder: str, rollouts: list[Rollout]) -> None:
    one = server(folder, "initial")
    assert [scored.whitened for scored in one.score(rollouts)] == [None] * 3
    with pytest.raises(ValueError, match=r"of 32 dimensions .* 1 documents gave 18; .*whitening_documents to 2 or"):
        one.fit_whitening(*rollouts[:1])
    assert one.score(rollouts[:1])[0].whitened is None


@pytest.mark.parametrize("pooled_moment", MOMENTS)
def test_one_completion_in_a_group(
    pooled_moment: str, folder: str, rollouts: list[Rollout], make_rollout: Callable[..., Rollout]
) -> None:
    one = server(folder, pooled_moment)
    if pooled_moment != "document":
        one.fit_whitening(*rollouts)
    alone = make_rollout(num_tokens=9, anchors=[6], lengths=[[2]], horizon=3, seed=9)
    (scored,) = one.score([alone])
    assert scored.raw.gram.shape == scored.whitened.gram.shape == (1, 1, 1)
    assert (
        torch.isfinite(scored.whitened.ground_truth_products).all()
        and torch.isfinite(cfm_plug_in(scored.whitened)).all()
    )
    if pooled_moment == "document":
        assert float(scored.whitened.gram) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("pooled_moment", MOMENTS)
def test_a_silent_network(pooled_moment: str, folder: str, rollouts: list[Rollout]) -> None:
    """All features zero: zero statistics under a given map, and no moment of their own to whiten or to fit by."""
    one = server(folder, pooled_moment)
    if pooled_moment != "document":
        one.fit_whitening(*rollouts)
    scale_network(one, 0.0)
    if pooled_moment == "document":
        with pytest.raises(ValueError, match=r"document 'document 0': the second moment must not be zero"):
            one.score(rollouts)
        return
    for scored in one.score(rollouts):
        for statistics in (scored.raw, scored.whitened):
            assert torch.equal(statistics.gram, torch.zeros_like(statistics.gram))
            assert torch.equal(statistics.ground_truth_norm_sq, torch.zeros_like(statistics.ground_truth_norm_sq))
            cosine = unwhitened(statistics, alignment="cosine").alignment
            assert torch.equal(cosine, torch.zeros_like(cosine))
    with pytest.raises(ValueError, match="the second moment must not be zero"):
        one.fit_whitening(*rollouts)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("pooled_moment", MOMENTS)
def test_features_that_are_not_finite_name_their_document_and_enter_no_moment(
    pooled_moment: str, broken: float, folder: str, rollouts: list[Rollout]
) -> None:
    one = server(folder, pooled_moment)
    if pooled_moment != "document":
        one.fit_whitening(*rollouts)
    before = one.score(rollouts[:1])[0]
    weights = next(one._model._model.parameters())
    healthy = weights.clone()
    with torch.inference_mode():
        weights.fill_(broken)
    with pytest.raises(ValueError, match=r"document 'document 0': completion features must be finite, got .* group 0"):
        one.score(rollouts)
    with torch.inference_mode():
        weights.copy_(healthy)
    assert largest_difference(before, one.score(rollouts[:1])[0]) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"pooled_moment": "batch"},
        {"pooled_moment": "running"},
        {"whitening_shrinkage": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        FeatureConfig(**settings)
