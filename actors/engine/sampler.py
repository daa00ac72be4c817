"""The rollout engine: one vLLM engine that samples the groups of a document and tells their log-probabilities.

The contexts of a text are nested prefixes of it, so with the prefix cache on the engine computes each document once.
A rollout is a function of (weights, request, seed): every context has a seed of its own, derived from the ticket's, and
no request meets a prefix that another one cached. Who steps the engine, and when weights change, is
`actors/engine/engine_loop.py`'s business.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from actors.config import RolloutConfig
from actors.engine.engine_loop import EngineLoop, EngineRequest, WeightLoad
from actors.engine.worker_extension import WEIGHT_RECEIVER
from actors.rollout import Rollout, Ticket, WeightSteps
from actors.weights.manifest import WeightManifest, agreed_probe_error

CPU_ENGINE_ENVIRONMENT = {
    # The engine inside the worker's process: weights reach it by reference, and it starts in 3 s instead of 25.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins every engine of a machine to the same core
    "TORCHDYNAMO_DISABLE": "1",  # the first request with log-probs would compile for 16 s
    # Memory that an update is done with stays for the next one: to ask the system for fresh pages costs several copies
    # of the weights. glibc reads this when the process starts, and keeps large blocks only in the heap of all threads.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""Environment of a process that holds an engine on CPU; must be set before vLLM is imported."""

ENGINE_ENVIRONMENT = {
    # The engine inside the worker's process: weights reach it by reference, and it starts in 3 s instead of 25.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment of a process that holds an engine on any device."""

ENGINE_STEP_TOKENS = 16384
"""Tokens the engine processes in one step, prompt and decode together, unless a single prompt is longer."""

CACHE_BLOCK_TOKENS = 32
"""Tokens in a block of the key-value cache: prefixes are shared in whole blocks."""


def context_seed(ticket_seed: int, block: int) -> int:
    """Seed of one context's group: distinct for each (ticket, block), independent of how requests are batched."""
    return int(np.random.SeedSequence([ticket_seed, block]).generate_state(1)[0])


class Sampler:
    """A vLLM engine behind four verbs: sample, complete, score_tokens, load.

    One thread may load weights while another samples; rollout.in_flight_updates says what the latter's request does.
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        dtype: str,
        max_tokens: int,
        tensor_parallel_size: int = 1,
        gpu_share: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Start the engine; `gpu_share` is the part of each device that this engine may fill."""
        start = time.perf_counter()
        import vllm  # heavy (10 s), and reads its environment when imported

        imported = time.perf_counter()
        self._vllm = vllm
        self._temperature = config.temperature
        self._llm = vllm.LLM(
            model=model_path,
            dtype=dtype,
            max_model_len=max_tokens,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=config.enforce_eager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(ENGINE_STEP_TOKENS, max_tokens),  # every prompt is processed in one piece
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
            gpu_memory_utilization=min(0.9, gpu_share),
            enable_prefix_caching=True,
            enable_chunked_prefill=False,  # a split prefill breaks seeded sampling on CPU
            logprobs_mode="processed_logprobs",  # after temperature: the policy that really sampled
            worker_extension_cls=WEIGHT_RECEIVER,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            generation_config="vllm",  # no sampling defaults from the checkpoint
            block_size=CACHE_BLOCK_TOKENS,
            # A step that is under way while weights change would belong to neither version. None: vLLM's choice.
            async_scheduling=None if config.in_flight_updates == "wait" else False,
        )
        self._loop = EngineLoop(self._llm.llm_engine, in_flight_updates=config.in_flight_updates)
        self._salts = map(str, itertools.count())
        self._held: dict[int, Callable[[], WeightLoad]] = {}
        # Elsewhere captured graphs hold on to the model's own memory, and other processes take calls one at a time.
        self._loads_aside = vllm.platforms.current_platform.is_cpu() and tensor_parallel_size == 1
        self.startup_s = {"imports": imported - start, "engine": time.perf_counter() - imported}

    @property
    def policy_version(self) -> int | None:
        """Version of the weights that the next request begins with; None: the last ones failed their checks."""
        return self._loop.policy_version

    def sample(self, tickets: Sequence[Ticket]) -> list[Rollout]:
        """The n completions of every anchor of every ticket's document, in the order of the tickets.

        Raises: RuntimeError if a ticket does not allow the present weights, or these failed their checks, or if weights
        that the tickets have to meet are not held; WeightMismatchError if new ones failed their checks meanwhile.
        """
        planned = {step_and_version for ticket in tickets for step_and_version in ticket.weight_steps[1:]}
        requests = [request for ticket in tickets for request in self._requests(ticket, salt=next(self._salts))]
        with self._loop.locked() as policy_version:
            for ticket in tickets:
                ticket.require_allowed(policy_version)
            start = time.perf_counter()
            found, weight_steps = self._loop.run(
                requests,
                admits=lambda step, version: (
                    (step, version) in planned if planned else all(ticket.allows(version) for ticket in tickets)
                ),
                planned=(self._held_load(version) for _, version in sorted(planned)),
            )
            seconds = (time.perf_counter() - start) / max(len(tickets), 1)
        outputs = iter(found)
        groups = [[next(outputs).outputs for _ in ticket.document.anchors] for ticket in tickets]
        return [
            _rollout(ticket, of_ticket, seconds, weight_steps)
            for ticket, of_ticket in zip(tickets, groups, strict=True)
        ]

    def complete(
        self, prompts: Sequence[list[int]], *, max_tokens: int, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[list[list[int]]]:
        """Token ids of n completions of each prompt, each ended by EOS, which it keeps, or by max_tokens.

        Temperature 0 takes the most probable token each time (n must be 1). Otherwise the completions of prompt i are a
        function of (weights, prompt, n, seed, i).
        """
        limits = {"n": n, "max_tokens": max_tokens, "temperature": temperature}
        requests = [
            self._request(ids, salt=next(self._salts), seed=context_seed(seed, index), **limits)
            for index, ids in enumerate(prompts)
        ]
        with self._loop.locked():
            outputs, _ = self._loop.run(requests)
        return [
            [list(c.token_ids) for c in sorted(output.outputs, key=lambda completion: completion.index)]
            for output in outputs
        ]

    def score_tokens(self, token_ids: Sequence[list[int]]) -> list[np.ndarray]:
        """[T - 1] log-probabilities [nats, temperature 1] that the engine gives tokens 1..T-1 of each text."""
        with self._loop.locked():
            outputs, _ = self._loop.run(self._scoring_requests(token_ids))
        return [_prompt_logprobs(output) for output in outputs]

    def load(
        self, manifest: WeightManifest, tensors: list[tuple[str, torch.Tensor]], *, probe_tolerance: float
    ) -> WeightLoad:
        """Replace the weights by these verified tensors, forget what the old ones computed, and score the probe texts.

        Waits for the request that is being sampled, or for its next step (rollout.in_flight_updates).

        Raises: WeightMismatchError if engine and learner disagree on the probe; nobody samples then until a good load.
        """
        load = self._weight_load(manifest, tensors, probe_tolerance)
        self._loop.load(load)
        return load

    def hold(
        self, manifest: WeightManifest, tensors: list[tuple[str, torch.Tensor]], *, probe_tolerance: float
    ) -> None:
        """Keep these verified tensors for the request that has to meet them (`Ticket.weight_steps`)."""
        self._held[manifest.policy_version] = partial(self._weight_load, manifest, tensors, probe_tolerance)

    def _held_load(self, policy_version: int) -> WeightLoad:
        if policy_version not in self._held:
            raise RuntimeError(
                f"a ticket has to meet weights of version {policy_version} while it is sampled, and this worker holds "
                f"{sorted(self._held)}; send them first"
            )
        return self._held.pop(policy_version)()

    def _weight_load(
        self, manifest: WeightManifest, tensors: list[tuple[str, torch.Tensor]], probe_tolerance: float
    ) -> WeightLoad:
        start = time.perf_counter()
        install = self._prepared(tensors)
        return WeightLoad(
            policy_version=manifest.policy_version,
            install=install,
            prepare_s=time.perf_counter() - start,
            probes=self._scoring_requests(manifest.probe.token_ids),
            judge=lambda outputs: agreed_probe_error(
                manifest, [_prompt_logprobs(output) for output in outputs], tolerance=probe_tolerance
            ),
        )

    def _prepared(self, tensors: list[tuple[str, torch.Tensor]]) -> Callable[[], None]:
        """What puts these tensors into the engine; on CPU all of the work is done before, while the engine goes on."""
        engine = self._llm.llm_engine
        if not self._loads_aside:
            return lambda: engine.collective_rpc("receive_weights", args=(tensors,))
        engine.collective_rpc("prepare_weights", args=(tensors,))
        return lambda: engine.collective_rpc("exchange_weights")

    def quarantine(self) -> None:
        """Let nobody sample until weights were loaded and agree; a request that is being sampled raises."""
        self._loop.quarantine()

    def _requests(self, ticket: Ticket, *, salt: str) -> list[EngineRequest]:
        """One for each context; they share the prefixes that they cache with each other and with nobody else."""
        document = ticket.document
        return [
            self._request(
                document.context_ids(block).tolist(),
                salt=salt,
                seed=context_seed(ticket.seed, block),
                n=ticket.completions_per_context,
                max_tokens=document.horizon,
                temperature=self._temperature,
                ignore_eos=not document.ends_with_eos,
                logprobs=0,
                flat_logprobs=True,
            )
            for block in range(len(document.anchors))
        ]

    def _scoring_requests(self, token_ids: Sequence[list[int]]) -> list[EngineRequest]:
        return [
            self._request(ids, salt=next(self._salts), max_tokens=1, prompt_logprobs=0, temperature=0)
            for ids in token_ids
        ]

    def _request(self, prompt_ids: list[int], *, salt: str, **params: object) -> EngineRequest:
        return EngineRequest(
            prompt=self._vllm.inputs.tokens_input(prompt_ids, cache_salt=salt),
            params=self._vllm.SamplingParams(
                top_p=1.0,
                top_k=0,
                detokenize=False,
                output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
                **params,
            ),
        )


def _prompt_logprobs(output: object) -> np.ndarray:
    """[T - 1] float32, nats, of the tokens behind the first of a finished vLLM request's prompt."""
    positions = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return np.array([position[token].logprob for position, token in positions], dtype=np.float32)


def _rollout(ticket: Ticket, groups: list, sample_s: float, weight_steps: WeightSteps) -> Rollout:
    """The record of one ticket from the completions of each of its groups."""
    shape = (len(groups), ticket.completions_per_context, ticket.document.horizon)
    completion_ids, token_versions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    logprobs = np.zeros(shape, dtype=np.float32)
    lengths = np.zeros(shape[:2], dtype=np.int64)
    for block, completions in enumerate(groups):
        for completion in completions:
            ids, place = completion.token_ids, (block, completion.index)
            lengths[place] = len(ids)
            completion_ids[place][: len(ids)] = ids
            logprobs[place][: len(ids)] = _logprobs(completion, ticket=ticket, group=block)
            for span in completion.weight_versions:
                token_versions[place][span.start : span.end] = int(span.version)
    return Rollout(
        ticket_id=ticket.ticket_id,
        document=ticket.document,
        completion_ids=completion_ids,
        completion_lengths=lengths,
        # Rounding may lift a certain token just above 0; anything more is refused by the message itself.
        behavior_logprobs=np.where(logprobs < 1e-5, np.minimum(logprobs, 0), logprobs),
        token_versions=token_versions,
        sample_s=sample_s,
        weight_steps=weight_steps,
    )


def _logprobs(completion: object, *, ticket: Ticket, group: int) -> Sequence[float]:
    """Log-probabilities [nats] of a vLLM completion's tokens.

    Raises: ValueError if the engine left them out, or some of them.
    """
    num_tokens = len(completion.token_ids)
    if completion.logprobs is None or len(completion.logprobs.logprobs) != num_tokens:
        found = "none" if completion.logprobs is None else len(completion.logprobs.logprobs)
        raise ValueError(
            f"ticket {ticket.ticket_id}: completion {completion.index} of group {group} has {num_tokens} tokens and "
            f"{found} log-probs from the engine; every sampled token needs its own, so use an engine that honours "
            "logprobs=0 and flat_logprobs=True"
        )
    return completion.logprobs.logprobs
