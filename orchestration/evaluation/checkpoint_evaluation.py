"""Measures a checkpoint without Ray: the engine in this process, the feature model in another one.

Guarantee: documents, problems and the seed of every completion depend on the configuration alone, so two checkpoints
are compared on the same documents with common random numbers.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.config import DataConfig, RolloutConfig
from actors.data.blocks import anchors_within_texts, anchors_without
from actors.data.documents import chosen_documents, load_documents
from actors.engine.sampler import Sampler
from actors.models.loading import require_complete
from actors.models.pretrained import load_tokenizer, require_same_tokenizer, resolve_model
from actors.rollout import Completions, Document, Rollout, Ticket
from feature_server.config import FeatureConfig
from feature_server.features.server import FeatureServer
from feature_server.verifiers.server import VerifierServer
from learner.objective.reward import cfm_unbiased
from orchestration.evaluation.evaluate_config import EvaluateConfig
from orchestration.evaluation.feature_process import FeatureProcess
from orchestration.evaluation.ground_truth import checked_documents, warn_of_unearned
from orchestration.evaluation.measures import Measure, Verdicts, accuracy_measures, mean_measure
from orchestration.evaluation.problem_solving import PromptedProblem, prompted_problems, solved_problems

logger = logging.getLogger(__name__)


def evaluate_checkpoint(checkpoint: str, config: EvaluateConfig) -> list[Measure]:
    """Everything that the configuration asks for, in the order of the table.

    Raises: ValueError or FileNotFoundError for a model or a source that cannot be used.
    """
    model = resolve_model(checkpoint)
    tokenizer = load_tokenizer(model)
    documents = evaluated_documents(config, tokenizer)
    problems = prompted_problems(config, tokenizer)
    measures_cfm = bool(documents and config.cfm_lengths)
    feature_model = resolve_model(config.feature_model) if measures_cfm else model
    if config.feature.foreign_tokenizer == "refuse":
        require_same_tokenizer(model, feature_model)
    require_complete(model)  # the engine itself would leave some missing tensors as they were allocated
    verifier = VerifierServer(model=model, config=config.verifier) if config.verify else None
    # Before the feature model: on a GPU, the engine needs the memory that it may fill to be free.
    sampler = Sampler(
        model,
        RolloutConfig(**config.rollout.model_dump()),
        dtype=config.dtype,
        max_tokens=_most_tokens(config, problems),
        seed=config.seed,
    )
    logger.info("%s: %d documents, %d problems", model, len(documents), len(problems))
    measures = []
    if documents:
        measures += cross_entropy(documents, sampler)
    if measures_cfm:
        rollouts = sample_contexts(documents, sampler, config)
        with _feature_process(config, model=feature_model, policy=model) as server:
            measures += cfm_against_length(rollouts, server, lengths=config.cfm_lengths)
    if verifier is not None:
        measures += verified_answers(documents, sampler, verifier, config)
    if problems:
        measures += solved_problems(problems, sampler, config, tokenizer)
    return measures


def _feature_process(config: EvaluateConfig, *, model: str, policy: str) -> FeatureProcess:
    return FeatureProcess(
        model=model,
        policy=policy,
        config=FeatureConfig(**config.feature.model_dump()),
        dtype=config.dtype,
        max_tokens=config.data.document_tokens + config.cfm_lengths[-1],
    )


def evaluated_documents(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The documents, at equal distances over the split: neighbours come from the same text and would be redundant.

    Raises: ValueError if the split holds fewer than requested.
    """
    if not config.documents:
        return []
    return chosen_documents(load_documents(config.data, tokenizer), config.split, config.documents, key="documents")


def cross_entropy(documents: Sequence[Document], sampler: Sampler) -> list[Measure]:
    """Mean over each document's tokens, at temperature 1: all that have a context, and those after the prompt."""
    logger.info("cross-entropy of %d documents", len(documents))
    texts = [[text for text in np.split(d.token_ids, d.text_starts[1:]) if len(text) > 1] for d in documents]
    scored = iter(sampler.score_tokens([text.tolist() for of_document in texts for text in of_document]))
    logprobs = [np.concatenate([next(scored) for _ in of_document]).astype(np.float64) for of_document in texts]
    all_tokens: dict[str, float] = {}
    answers: dict[str, float] = {}
    for d, values in zip(documents, logprobs, strict=True):
        positions = np.setdiff1d(np.arange(len(d.token_ids)), d.text_starts)  # those that have a log-prob
        all_tokens[d.document_id] = float(-values[~np.isin(positions, d.bos_positions)].mean())
        answers[d.document_id] = float(-values[np.isin(positions, d.predicted_positions)].mean())
    clusters = _clusters(documents)
    return [
        mean_measure("cross_entropy/all_tokens", unit="nats/token", values=all_tokens, clusters=clusters),
        mean_measure("cross_entropy/answer_tokens", unit="nats/token", values=answers, clusters=clusters),
    ]


def sample_contexts(documents: Sequence[Document], sampler: Sampler, config: EvaluateConfig) -> list[Rollout]:
    """Completions of the longest requested length, of each document that has room for them."""
    longest = config.cfm_lengths[-1]
    placed = [_placed(document, config) for document in documents]
    roomy = [document for document in placed if len(document.anchors)]
    if not roomy:
        raise ValueError(f"no text in any document has {longest} tokens after a context; leave out lengths={longest}")
    n = config.rollout.completions_per_context
    logger.info("sampling %d completions of %d tokens in each context of %d documents", n, longest, len(roomy))
    return sampler.sample(_tickets(roomy, n=n, seed=config.seed))


def _placed(document: Document, config: EvaluateConfig) -> Document:
    """The document with the places at which completions of the longest length start."""
    longest = config.cfm_lengths[-1]
    if config.data.mode == "completion":
        return replace(document, horizon=longest)
    anchors = evenly_spaced_anchors(document, count=config.anchors_per_document, data=config.data, horizon=longest)
    return replace(document, anchors=anchors, horizon=longest)


def evenly_spaced_anchors(document: Document, *, count: int, data: DataConfig, horizon: int) -> np.ndarray:
    """At most `count` anchors [B] at equal distances, each with its context and `horizon` tokens of its own text."""
    size = len(document.token_ids)
    anchors = anchors_within_texts(
        anchors_without(document.bos_positions, np.arange(data.context_tokens, size - horizon + 1), horizon=horizon),
        document.text_starts,
        document_tokens=size,
        context_tokens=data.context_tokens,
        horizon=horizon,
    )
    places = np.linspace(0, len(anchors) - 1, min(count, len(anchors))).round().astype(np.int64)
    return anchors[places]


def cut(rollout: Rollout, length: int) -> Rollout:
    """The rollout that would have been sampled with a horizon of `length`: completions and ground truth end there."""
    return replace(
        rollout,
        document=replace(rollout.document, horizon=length),
        completion_ids=rollout.completion_ids[:, :, :length],
        completion_lengths=np.minimum(rollout.completion_lengths, length),
        behavior_logprobs=rollout.behavior_logprobs[:, :, :length],
        token_versions=rollout.token_versions[:, :, :length],
    )


def cfm_against_length(
    rollouts: Sequence[Rollout], server: FeatureServer | FeatureProcess, *, lengths: Sequence[int]
) -> list[Measure]:
    """Unbiased CFM of raw features for each length of completions and ground truth; mean over a document's groups."""
    clusters = _clusters([rollout.document for rollout in rollouts])
    measures = []
    for length in lengths:
        logger.info("CFM of completions of %d tokens", length)
        scored = server.score([cut(rollout, length) for rollout in rollouts])
        values = {s.rollout.document.document_id: float(cfm_unbiased(s.raw).mean()) for s in scored}
        measures.append(mean_measure(f"cfm/length_{length}", unit="features squared", values=values, clusters=clusters))
    return measures


def verified_answers(
    documents: Sequence[Document], sampler: Sampler, verifier: VerifierServer, config: EvaluateConfig
) -> list[Measure]:
    """Accuracy and pass@k by the verifier, which calls a completion correct with a reward of 1 or more."""
    checked = checked_documents(documents)
    warn_of_unearned(verifier.unearned(checked), num_checked=len(checked), verifier=config.verifier.name)
    logger.info("verifying 1 + %d completions of %d documents", config.samples_per_problem, len(documents))
    contexts = [document.context_ids(0).tolist() for document in documents]
    greedy = sampler.complete(contexts, max_tokens=config.data.horizon, seed=config.seed)
    most_likely = [_single_completion(d, ids) for d, (ids,) in zip(documents, greedy, strict=True)]
    sampled = sampler.sample(_tickets(documents, n=config.samples_per_problem, seed=config.seed))
    verdicts = {
        document.document_id: Verdicts(greedy=bool(one[0, 0] >= 1), sampled=(many[0] >= 1).tolist())
        for document, one, many in zip(documents, verifier.verify(most_likely), verifier.verify(sampled), strict=True)
    }
    return accuracy_measures("answers", verdicts, pass_at=config.pass_at, clusters=_clusters(documents))


def _clusters(documents: Sequence[Document]) -> dict[str, str]:
    return {document.document_id: document.cluster for document in documents}


def _most_tokens(config: EvaluateConfig, problems: Sequence[PromptedProblem]) -> int:
    """What the engine must hold: a document and one token more, or a prompt and the longest completion of it."""
    of_document = config.data.document_tokens + (config.data.horizon if config.data.mode == "completion" else 1)
    of_problem = max((len(problem.prompt_ids) + config.problem_tokens for problem in problems), default=0)
    return max(of_document if config.documents else 0, of_problem)


def _tickets(documents: Sequence[Document], *, n: int, seed: int) -> list[Ticket]:
    return [
        Ticket(
            ticket_id=index,
            document=document,
            seed=(seed << 32) + index,
            completions_per_context=n,
            min_policy_version=0,
        )
        for index, document in enumerate(documents)
    ]


def _single_completion(document: Document, completion_ids: list[int]) -> Completions:
    return Completions(
        document=document,
        completion_ids=np.array([[completion_ids]], dtype=np.int64),
        completion_lengths=np.array([[len(completion_ids)]], dtype=np.int64),
    )
