"""What the step loop and an update in the middle of a request cost, by rollout.in_flight_updates.

    python benchmarks/in_flight_updates.py [--model embedded] [--documents 2] [--repeats 30]

Printed: median time of a request by vLLM's own `LLM.generate` and by the step loop, one after the other with the same
prompts and seeds; then, for each mode, medians of requests that receive an update (to the same weights) after
their second step: the request, and the stages in the receipt.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
import tyro  # noqa: E402

from actors.config import DataConfig, InFlightUpdates, RolloutConfig  # noqa: E402
from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT  # noqa: E402
from actors.rollout import Ticket  # noqa: E402
from actors.weights.manifest import Probe, WeightManifest, as_bytes, checksum  # noqa: E402
from actors.weights.object_store import ArrayPart  # noqa: E402
from actors.worker import RolloutWorker, WeightReceipt  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Time requests and updates."""

    model: str = "embedded"
    """As `model.policy`."""
    documents: int = 2
    """Documents per request."""
    repeats: int = 30
    """Requests behind each median."""


def requests_of(settings: Measurement, data: DataConfig) -> list[list[Ticket]]:
    """Tickets of held-out documents, no document twice."""
    from actors.data.documents import load_documents
    from actors.models.pretrained import load_tokenizer, resolve_model

    documents = load_documents(data, load_tokenizer(resolve_model(settings.model))).test
    tickets = [
        Ticket(ticket_id=i, document=documents[i], seed=i, completions_per_context=4, min_policy_version=0)
        for i in range((settings.repeats + 1) * settings.documents)
    ]
    return [tickets[i : i + settings.documents] for i in range(0, len(tickets), settings.documents)]


def published(settings: Measurement, worker: RolloutWorker) -> tuple[WeightManifest, ArrayPart]:
    """The model's own weights, with the engine's log-probs of two texts as those of the learner."""
    from transformers import AutoModelForCausalLM

    from actors.models.pretrained import resolve_model

    parameters = dict(AutoModelForCausalLM.from_pretrained(resolve_model(settings.model)).float().named_parameters())
    buffers = [as_bytes(parameter) for parameter in parameters.values()]
    texts = [list(range(1, 60)), list(range(60, 120))]
    manifest = WeightManifest(
        policy_version=0,
        names=list(parameters),
        dtypes=["float32"] * len(parameters),
        shapes=[tuple(parameter.shape) for parameter in parameters.values()],
        checksums=[checksum(buffer) for buffer in buffers],
        probe=Probe(token_ids=texts, logprobs=worker._sampler.score_tokens(texts)),
    )
    return manifest, ArrayPart(buffers)


def compare_loops(worker: RolloutWorker, requests: list[list[Ticket]]) -> None:
    """Print the time of a request by vLLM's own loop and by ours; both hold every request once."""
    sampler = worker._sampler
    times: dict[str, list[float]] = {"LLM.generate": [], "step loop": []}
    for tickets in requests:
        prepared = [r for ticket in tickets for r in sampler._requests(ticket)]
        prompts = [{key: r.prompt[key] for key in ("prompt_token_ids", "cache_salt")} for r in prepared]
        start = time.perf_counter()
        sampler._llm.generate(prompts, [r.params for r in prepared], use_tqdm=False)
        middle = time.perf_counter()
        worker.sample(tickets)
        times["LLM.generate"].append(middle - start)
        times["step loop"].append(time.perf_counter() - middle)
    for name, seconds in times.items():
        print(f"{name:12s} {median(seconds[1:]) * 1e3:6.1f} ms per request of {len(requests[0])} documents")


def with_an_update(
    worker: RolloutWorker, tickets: list[Ticket], receive: Callable[[], WeightReceipt], pool: ThreadPoolExecutor
) -> tuple[float, WeightReceipt]:
    """Time [s] of a request at whose second step an update arrives, and the update's receipt."""
    engine, lock = worker._sampler._llm.llm_engine, worker._sampler._loop._lock
    step, receiving = engine.step, []

    def step_and_update() -> list:
        outputs = step()
        if len(receiving) == 1:
            receiving.append(pool.submit(receive))
            with lock._changed:
                lock._changed.wait_for(lambda: lock.load is not None)
        elif not receiving:
            receiving.append(None)
        return outputs

    engine.step = step_and_update
    start = time.perf_counter()
    worker.sample(tickets)
    seconds = time.perf_counter() - start
    engine.step = step
    return seconds, receiving[1].result()


def main(settings: Measurement) -> None:
    """Print the medians."""
    os.environ.update(ENGINE_ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENGINE_ENVIRONMENT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    data = DataConfig()
    worker = RolloutWorker(
        model=settings.model,
        config=RolloutConfig(in_flight_updates="keep"),
        dtype="float32",
        max_tokens=data.longest_tokens,
    )
    requests = requests_of(settings, data)
    compare_loops(worker, requests)
    manifest, part = published(settings, worker)
    with ThreadPoolExecutor(1) as pool:
        for mode in get_args(InFlightUpdates):
            worker._sampler._loop._in_flight_updates = mode
            found = [
                with_an_update(worker, tickets, lambda: worker.receive_weights(manifest, part), pool)
                for tickets in requests
            ]
            receipts = [receipt for _, receipt in found[1:]]
            parts = {name: median(getattr(r, name) for r in receipts) for name in ("verify_s", "pause_s", "probe_s")}
            stages = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in parts.items())
            print(f"{mode:12s} {median(seconds for seconds, _ in found[1:]) * 1e3:6.1f} ms per request; {stages}")


if __name__ == "__main__":
    main(tyro.cli(Measurement))
