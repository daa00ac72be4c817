"""The report of a run: a table in the log, summary.json and samples.md."""

import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.models.pretrained import load_tokenizer
from actors.rollout import Rollout
from orchestration.evaluation.evaluation import Change, Evaluation, paired_change
from orchestration.output.strict_json import strict_json

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
"""Name of the file that is written when a run ends."""
SAMPLE_DOCUMENTS, SAMPLES_PER_DOCUMENT = 3, 2
SHOWN_CONTEXT_TOKENS = 48


class RunReport:
    """Collects what was measured and writes it as soon as it is known."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        self._model = model
        self._startup: dict[str, dict[str, float]] = {}
        self._first: Evaluation | None = None
        self._last: Evaluation | None = None

    def startup(self, who: str, stages: dict[str, float]) -> None:
        """Seconds of each stage of the start-up of a process, the documents, or the run."""
        self._startup[who] = stages
        logger.info("start-up of %s: %s", who, ", ".join(f"{stage} {s:.1f} s" for stage, s in stages.items()))

    @property
    def first(self) -> Evaluation | None:
        """The evaluation that later ones are compared with."""
        return self._first

    def continues(self, first: Evaluation | None) -> None:
        """The run was begun before, with this evaluation."""
        self._first = self._last = first

    def evaluated(self, evaluation: Evaluation) -> None:
        """Note an evaluation and write its sample completions."""
        self._first = self._first or evaluation
        self._last = evaluation
        logger.info(
            "evaluation at version %d: cross-entropy %.4f nats/token, CFM %.4f (%d documents, %.1f s)",
            evaluation.policy_version,
            evaluation.cross_entropy.mean(),
            evaluation.cfm_loss.mean(),
            len(evaluation.cfm_loss),
            evaluation.seconds,
        )
        self._write_samples(evaluation)

    def finish(self, *, seconds: float) -> None:
        """Log the before-and-after table and write summary.json."""
        summary: dict[str, object] = {"seconds": seconds, "startup_s": self._startup}
        if self._first is not None and self._last is not None and self._last is not self._first:
            changes = {
                name: paired_change(getattr(self._first, name), getattr(self._last, name), self._last.clusters)
                for name in ("cross_entropy", "cfm_loss")
            }
            summary |= {name: _as_dict(change) for name, change in changes.items()}
            for name, change in changes.items():
                logger.info(
                    "held-out %-13s %.4f -> %.4f   change %+.4f +- %.4f, 95%% interval [%+.4f, %+.4f]"
                    " (paired over %d documents of %d texts)",
                    name, change.before, change.after, change.delta, change.standard_error, change.low, change.high,
                    change.num_documents, change.num_texts,
                )  # fmt: skip
        (self._folder / SUMMARY).write_text(strict_json(summary, indent=2) + "\n")
        logger.info("done in %.0f s; results in %s", seconds, self._folder)

    def _write_samples(self, evaluation: Evaluation) -> None:
        tokenizer = load_tokenizer(self._model)
        parts = [f"# Completions at policy version {evaluation.policy_version}\n"]
        parts += [_sample_text(rollout, tokenizer) for rollout in evaluation.rollouts[:SAMPLE_DOCUMENTS]]
        with (self._folder / "samples.md").open("a") as file:
            file.write("\n".join(parts) + "\n")


def _sample_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    document, group = rollout.document, len(rollout.document.anchors) // 2
    anchor = int(document.anchors[group])
    context = _text(document.context_ids(group)[-SHOWN_CONTEXT_TOKENS:], tokenizer)
    truth = _text(document.ground_truth_ids(group), tokenizer)
    lines = [f"## {document.document_id}, token {anchor}\n", "```", context, "```\n", f"- ground truth: `{truth!r}`"]
    for index in range(min(SAMPLES_PER_DOCUMENT, rollout.completion_ids.shape[1])):
        ids = rollout.completion_ids[group, index, : rollout.completion_lengths[group, index]]
        lines.append(f"- completion {index}: `{_text(ids, tokenizer)!r}`")
    return "\n".join(lines) + "\n"


def _text(token_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(token_ids)
    assert isinstance(text, str)  # a list of texts is for a list of lists
    return text


def _as_dict(change: Change) -> dict[str, float]:
    return asdict(change)
