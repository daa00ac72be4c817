"""events.jsonl: what an asynchronous run decided, which is all that a replay needs in addition to its configuration.

A rollout is a function of (weights, request, seed), and an update a function of (weights, batch). So the log holds
which tickets made up a request, which weights sampled it and before which engine step they were loaded, which rollouts
made up a batch, and a digest of every published version, which shows a replay at once if it computes something else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.rollout import Ticket, WeightSteps
from learner.config import LearnerConfig
from orchestration.config import RunConfig
from orchestration.output.strict_json import without_non_finite

REPLAY_MAY_DIFFER = (
    "replay",
    "resume",
    "checkpoint",
    "chaos",
    "recovery",
    "logging",
    "learner.num_steps",
    "asynchrony.request_timeout_s",
    "asynchrony.weight_transport",
    "asynchrony.weight_folder",
    "placement.rollout.count",
    "placement.feature.count",
    "placement.strategy",
    "placement.one_process",
)
"""Keys (or sections) that do not change what a step computes: number of steps, placement, outputs."""
WARMUP = "learner.warmup_frac"
"""Compared in steps."""


@dataclass(frozen=True, slots=True)
class LoggedTicket:
    """One document of a request."""

    ticket_id: int
    document_id: str
    version: int
    """Oldest weights that sampled a token of it."""


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """Tickets that were sampled together."""

    number: int
    tickets: list[LoggedTicket]
    """In order."""
    weight_steps: WeightSteps
    """All weights that it saw."""

    @property
    def oldest_version(self) -> int:
        """Of the weights that it saw."""
        return min(version for _, version in self.weight_steps)

    @property
    def newest_version(self) -> int:
        """Of the weights that it saw."""
        return max(version for _, version in self.weight_steps)


@dataclass(frozen=True, slots=True)
class Recording:
    """A log, read back."""

    path: Path
    config: dict[str, Any]
    requests: list[LoggedRequest]
    """In the order in which they were claimed."""
    batches: list[list[tuple[int, int]]]
    """(ticket id, reuse index) of each step, in order."""
    digests: dict[int, str]
    """Published version -> digest of its weights."""


def header(config: RunConfig) -> dict[str, object]:
    """The log's first row."""
    return {"event": "run", "config": as_logged(config)}


def claimed(request: int, tickets: Sequence[Ticket]) -> dict[str, object]:
    """A request goes to a worker, for the first time or again."""
    documents = [ticket.document.document_id for ticket in tickets]
    return {"event": "claimed", "request": request, "tickets": [t.ticket_id for t in tickets], "documents": documents}


def returned(tickets: Sequence[Ticket], *, error: str) -> dict[str, object]:
    """A request came back unfinished."""
    return {"event": "returned", "tickets": [ticket.ticket_id for ticket in tickets], "error": error}


def failed(ticket: Ticket, *, error: str) -> dict[str, object]:
    """A document is set aside; its ticket is claimed again with another."""
    names = {"ticket": ticket.ticket_id, "document": ticket.document.document_id}
    return {"event": "failed", **names, "error": error}


def rejected(step: int, tickets: Sequence[int], *, error: str) -> dict[str, object]:
    """The step that was begun last could not be applied; the documents that were new in it fail."""
    return {"event": "rejected", "step": step, "tickets": tickets, "error": error}


def sampled(request: int, ticket: Ticket, *, version: int, weight_steps: WeightSteps) -> dict[str, object]:
    """A ticket was sampled and scored; `version`: the oldest weights that sampled a token of it."""
    names = {"request": request, "ticket": ticket.ticket_id, "document": ticket.document.document_id}
    return {"event": "sampled", **names, "version": version, "weights": weight_steps}


def trained(step: int, batch: Sequence[tuple[int, int]]) -> dict[str, object]:
    """A step was begun on (ticket id, reuse index), in this order."""
    tickets, reuse = zip(*batch, strict=True)
    return {"event": "trained", "step": step, "tickets": tickets, "reuse": reuse}


def dropped(ticket: Ticket, *, version: int) -> dict[str, object]:
    """A rollout whose oldest weights are of this version was stale on arrival."""
    return {"event": "dropped", "ticket": ticket.ticket_id, "version": version}


def published(version: int, digest: str) -> dict[str, object]:
    """Weights can be pulled from now on."""
    return {"event": "published", "version": version, "weights": digest}


def read_recording(path: Path) -> Recording:
    """Read a log; one that ends early replays as far as it goes.

    Raises: ValueError if a row is broken.
    """
    rows = read_rows(path)
    if not rows or rows[0].get("event") != "run":
        raise ValueError(f"{path} is not the log of a run: its first row must be the configuration")
    by_kind = {kind: [row for row in rows if row["event"] == kind] for kind in ("sampled", "published")}
    requests: dict[int, list[dict[str, Any]]] = {}
    for row in by_kind["sampled"]:
        requests.setdefault(row["request"], []).append(row)
    return Recording(
        path=path,
        config=rows[0]["config"],
        requests=[_request(number, requests[number]) for number in sorted(requests)],
        batches=_applied(rows),
        digests={row["version"]: row["weights"] for row in by_kind["published"]},
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a log. Raises: ValueError if one is broken."""
    return [_row(path, number, line) for number, line in enumerate(path.read_text().splitlines(), start=1)]


def require_same_configuration(recording: Recording, config: RunConfig) -> None:
    """Refuse to replay a run of another configuration.

    Raises: ValueError naming every key that differs, with both values, another warm-up, or the step at which the log
    ends too early.
    """
    if differing := differing_keys(recording.config, config, may_differ=REPLAY_MAY_DIFFER):
        raise ValueError(
            f"{recording.path} is the log of another configuration: {'; '.join(differing)}; replay it with the "
            "config.toml in its folder"
        )
    require_same_warmup(recording.config, config.learner)
    if config.learner.num_steps > len(recording.batches):
        raise ValueError(
            f"{recording.path} holds {len(recording.batches)} steps, learner.num_steps={config.learner.num_steps} asks "
            "for more; lower it to replay the logged ones"
        )


def differing_keys(logged: Mapping[str, Any], config: RunConfig, *, may_differ: Sequence[str]) -> list[str]:
    """Every key with another value, with both values; but those that may differ (or sections), and the warm-up."""
    before, present = _flat(logged), _flat(as_logged(config))
    return [
        f"{key}={present.get(key)!r} (logged: {before.get(key)!r})"
        for key in sorted(before.keys() | present.keys())
        if before.get(key) != present.get(key) and not key.startswith((*may_differ, WARMUP))
    ]


def require_same_warmup(logged: Mapping[str, Any], learner: LearnerConfig) -> None:
    """In steps: of another number of steps it is another share.

    Raises: ValueError with the share that has as many.
    """
    of_log = {name: logged["learner"][name] for name in ("warmup_frac", "num_steps")}
    steps = LearnerConfig.model_validate(of_log).warmup_steps
    if learner.num_steps and learner.warmup_steps != steps:
        same = max(0.0, steps - 0.5) / learner.num_steps
        raise ValueError(
            f"learner.warmup_frac={learner.warmup_frac:g} of learner.num_steps={learner.num_steps} is a warm-up of "
            f"{learner.warmup_steps} steps (logged: {steps}); set learner.warmup_frac={same:.6g} for the same"
        )


def require_same_weights(recording: Recording, version: int, digest: str) -> None:
    """Stop a replay that does not compute what the run computed.

    Raises: RuntimeError naming the first version that differs.
    """
    logged = recording.digests.get(version)
    if logged is not None and logged != digest:
        raise RuntimeError(
            f"the replay's weights of version {version} differ from those in {recording.path} (digest {digest}, logged "
            f"{logged}): another machine, library version or number of threads computes other bits; all earlier "
            "versions were equal"
        )


def _applied(rows: Sequence[Mapping[str, Any]]) -> list[list[tuple[int, int]]]:
    batches: list[list[tuple[int, int]]] = []
    for row in rows:
        if row["event"] == "trained":
            batches.append(list(zip(row["tickets"], row["reuse"], strict=True)))
        elif row["event"] == "rejected":  # it left no trace in the weights
            batches.pop()
    return batches


def _request(number: int, rows: list[dict[str, Any]]) -> LoggedRequest:
    tickets = [LoggedTicket(row["ticket"], row["document"], row["version"]) for row in rows]
    return LoggedRequest(number, tickets, tuple((step, version) for step, version in rows[0]["weights"]))


def as_logged(config: RunConfig) -> dict[str, object]:
    """As a log gives it back: JSON has no infinity, which max_importance_weight may be."""
    logged = without_non_finite(config.model_dump(mode="json"))
    assert isinstance(logged, dict)
    return logged


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, row {number} is not JSON: {error}; was the run killed while it wrote?") from error


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
