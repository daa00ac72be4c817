"""The rollout engine: one vLLM engine that samples the groups of documents and reports the log-prob of every token.

The contexts of a text are nested prefixes of it, so with the prefix cache on the engine computes each document once.
A rollout is a function of (weights, request, seed): every context has a seed of its own, derived from the ticket's, and
no request finds a prefix that another one cached. Which thread steps the engine, and when weights change, is decided in
`actors/engine/engine_loop.py`; what vLLM returns is read in `actors/engine/engine_outputs.py`.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from actors.config import Dtype, RolloutConfig
from actors.engine.engine_loop import EngineLoop
from actors.engine.engine_outputs import FinishedRequest, prompt_logprobs, rollout_of
from actors.engine.request_batch import Engine, EngineRequest
from actors.engine.weight_load import WeightLoad
from actors.engine.worker_extension import WEIGHT_RECEIVER
from actors.models.pretrained import num_token_ids
from actors.rollout import Rollout, Ticket
from actors.weights.manifest import ProbeError, WeightManifest, WeightMismatchError, agreed_probe_error

logger = logging.getLogger(__name__)

CPU_ENGINE_ENVIRONMENT = {
    # The engine inside the worker's process: weights reach it by reference, and it starts in 3 s instead of 25.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins every engine of a machine to the same core
    "TORCHDYNAMO_DISABLE": "1",  # the first request with log-probs would compile for 16 s
    # Keep memory freed by an update for the next one: fresh pages from the system cost as much as several copies of the
    # weights. glibc reads this when the process starts, and keeps large blocks only in the heap of all threads.
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

FIXED_ENGINE_ARGUMENTS = {
    "enable_prefix_caching": True,
    "enable_chunked_prefill": False,  # a split prefill breaks seeded sampling on CPU
    "logprobs_mode": "processed_logprobs",  # after temperature: the policy that really sampled
    "worker_extension_cls": WEIGHT_RECEIVER,
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
    "load_format": "safetensors",  # no pickle, whatever else lies in the folder
    "generation_config": "vllm",  # no sampling defaults from the checkpoint
}
"""Arguments of `vllm.LLM` that rollouts and weight updates rely on, whatever the configuration."""


def context_seed(ticket_seed: int, block: int) -> int:
    """Seed of one context's group: distinct for each (ticket, block), independent of how requests are batched."""
    return int(np.random.SeedSequence([ticket_seed, block]).generate_state(1)[0])


def engine_arguments(config: RolloutConfig, *, max_tokens: int) -> dict[str, Any]:
    """What the settings of sampling, and texts of that length, mean for vLLM."""
    return FIXED_ENGINE_ARGUMENTS | {
        "max_model_len": max_tokens,
        "enforce_eager": config.enforce_eager,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(ENGINE_STEP_TOKENS, max_tokens),  # every prompt is processed in one piece
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "block_size": CACHE_BLOCK_TOKENS,
        # A step that is under way while weights change would belong to neither version. None: vLLM's choice.
        "async_scheduling": None if config.in_flight_updates == "wait" else False,
    }


class Sampler:
    """A vLLM engine behind four methods: sample, complete, score_tokens, load.

    One thread may load weights while another samples; rollout.in_flight_updates says what the running request does.
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        dtype: Dtype,
        max_tokens: int,
        tensor_parallel_size: int = 1,
        gpu_share: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Start the engine; `gpu_share` is the part of each device that this engine may fill."""
        start = time.perf_counter()
        import vllm.sampling_params  # heavy (10 s), and reads its environment when imported

        imported = time.perf_counter()
        final = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self._params = partial(vllm.SamplingParams, top_p=1.0, top_k=0, detokenize=False, output_kind=final)
        self._vllm, self._temperature = vllm, config.temperature
        self._llm = vllm.LLM(
            model=model_path,
            dtype=dtype,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=min(0.9, gpu_share),
            **engine_arguments(config, max_tokens=max_tokens),
        )
        (num_left_out, *_) = self._llm.collective_rpc("limit_vocabulary", args=(num_token_ids(model_path),))
        if num_left_out:
            logger.info("%s: %d ids beyond its tokenizer's are never sampled", model_path, num_left_out)
        engine = cast(Engine[FinishedRequest], self._llm.llm_engine)  # all requests are to sample, none is to pool
        self._loop = EngineLoop(engine, in_flight_updates=config.in_flight_updates)
        self._salts = map(str, itertools.count())
        self._held: dict[int, WeightLoad[FinishedRequest]] = {}
        self.startup_s = {"imports": imported - start, "engine": time.perf_counter() - imported}

    @property
    def policy_version(self) -> int | None:
        """Version of the weights that the next request begins with; None: the last ones failed their checks."""
        return self._loop.policy_version

    def sample(self, tickets: Sequence[Ticket]) -> list[Rollout]:
        """The n completions of every anchor of every ticket's document, in the order of the tickets.

        Raises: RuntimeError if a ticket does not allow the current weights, or these failed their checks, or if weights
        that the tickets plan are not held; WeightMismatchError if new ones failed their checks meanwhile.
        """
        planned = {step_and_version for ticket in tickets for step_and_version in ticket.weight_steps[1:]}
        requests = [request for ticket in tickets for request in self._requests(ticket)]

        def admits(step: int, version: int) -> bool:
            return (step, version) in planned if planned else all(ticket.allows(version) for ticket in tickets)

        with self._loop.locked() as policy_version:
            for ticket in tickets:
                ticket.require_allowed(policy_version)
            start = time.perf_counter()
            outputs, weight_steps = self._loop.run(
                requests, admits=admits, planned=(self._held_load(version) for _, version in sorted(planned))
            )
            seconds = time.perf_counter() - start
        remaining = iter(outputs)
        return [
            rollout_of(
                ticket,
                list(itertools.islice(remaining, len(ticket.document.anchors))),
                sample_s=seconds / len(tickets),
                weight_steps=weight_steps,
            )
            for ticket in tickets
        ]

    def complete(
        self, prompts: Sequence[list[int]], *, max_tokens: int, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[list[list[int]]]:
        """Token ids of n completions of each prompt, each ended by EOS, which it keeps, or by max_tokens.

        Temperature 0 takes the most probable token each time (n must be 1). Otherwise the completions of prompt i are a
        function of (weights, prompt, n, seed, i).
        """
        params = partial(self._params, n=n, max_tokens=max_tokens, temperature=temperature)
        requests = [
            self._request(ids, next(self._salts), params(seed=context_seed(seed, index)))
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
        return [prompt_logprobs(output) for output in outputs]

    def load(
        self, manifest: WeightManifest, tensors: list[tuple[str, torch.Tensor]], *, allowed: ProbeError
    ) -> WeightLoad[FinishedRequest]:
        """Replace the weights by these verified tensors, forget what the old ones computed, and score the probe texts.

        Waits for the request that is being sampled, or for its next step (rollout.in_flight_updates).

        Raises: WeightMismatchError if engine and learner disagree on the probe; no sampling then until a good load.
        """
        load = self._weight_load(manifest, tensors, allowed)
        self._loop.load(load)
        return load

    def hold(self, manifest: WeightManifest, tensors: list[tuple[str, torch.Tensor]], *, allowed: ProbeError) -> None:
        """Keep these verified tensors for the request whose tickets plan them (`Ticket.weight_steps`)."""
        self._held[manifest.policy_version] = self._weight_load(manifest, tensors, allowed)

    def _held_load(self, policy_version: int) -> WeightLoad[FinishedRequest]:
        if policy_version not in self._held:
            raise RuntimeError(
                f"a ticket has to see weights of version {policy_version} while it is sampled, and this worker holds "
                f"{sorted(self._held)}; send them first"
            )
        return self._held.pop(policy_version)

    def _weight_load(
        self, manifest: WeightManifest, tensors: list[tuple[str, torch.Tensor]], allowed: ProbeError
    ) -> WeightLoad[FinishedRequest]:
        return WeightLoad(
            policy_version=manifest.policy_version,
            install=lambda: self._install(manifest.policy_version, tensors),
            probes=self._scoring_requests(manifest.probe.token_ids),
            probe_error_of=lambda outputs: agreed_probe_error(
                manifest, [prompt_logprobs(output) for output in outputs], allowed=allowed
            ),
        )

    def _install(self, policy_version: int, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Raises: WeightMismatchError naming tensors that the engine skipped, or its parameters that none filled, or
        that hold something else."""
        for unread, unfilled, changed in self._llm.llm_engine.collective_rpc("receive_weights", args=(tensors,)):
            if changed:
                raise WeightMismatchError(
                    f"version {policy_version}: the engine holds other values than it was sent in "
                    f"{', '.join(changed)}; it would sample with weights of no version"
                )
            if unread or unfilled:
                raise WeightMismatchError(
                    f"version {policy_version}: published tensors that the engine skipped: "
                    f"{', '.join(unread) or 'none'}; parameters of the engine that nothing filled: "
                    f"{', '.join(unfilled) or 'none'}. It would sample with weights of no version: vLLM names the "
                    "tensors of this architecture otherwise than transformers does; train a model of another"
                )

    def quarantine(self) -> None:
        """Refuse to sample until weights are loaded and agree; a request that is being sampled raises."""
        self._loop.quarantine()

    def _requests(self, ticket: Ticket) -> list[EngineRequest]:
        """One for each context; cached prefixes are shared among them and with no other ticket."""
        document, salt = ticket.document, next(self._salts)
        return [
            self._request(
                document.context_ids(block).tolist(),
                salt,
                self._params(
                    seed=context_seed(ticket.seed, block),
                    n=ticket.completions_per_context,
                    max_tokens=document.horizon,
                    temperature=self._temperature,
                    ignore_eos=not document.ends_with_eos,
                    logprobs=0,
                    flat_logprobs=True,
                ),
            )
            for block in range(len(document.anchors))
        ]

    def _scoring_requests(self, token_ids: Sequence[list[int]]) -> list[EngineRequest]:
        return [
            self._request(ids, next(self._salts), self._params(max_tokens=1, prompt_logprobs=0, temperature=0))
            for ids in token_ids
        ]

    def _request(self, prompt_ids: list[int], salt: str, params: object) -> EngineRequest:
        return EngineRequest(prompt=self._vllm.inputs.tokens_input(prompt_ids, cache_salt=salt), params=params)
