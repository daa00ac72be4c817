"""The rollout engine: one vLLM engine that samples the groups of a document and tells their log-probabilities.

The contexts of a text are nested prefixes of it, so with the prefix cache on the engine computes each document once.
A rollout is a function of (weights, document, seed): every context has a seed of its own, derived from the ticket's.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch

from actors.config import RolloutConfig
from actors.rollout import Rollout, Ticket, constant_versions
from actors.weights import WEIGHT_RECEIVER, WeightMismatchError

CPU_ENGINE_ENVIRONMENT = {
    # The engine inside the worker's process: weights reach it by reference, and it starts in 3 s instead of 25.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins every engine of a machine to the same core
    "TORCHDYNAMO_DISABLE": "1",  # the first request with log-probs would compile for 16 s
}
"""Environment of a process that holds an engine on CPU; must be set before vLLM is imported."""

ENGINE_ENVIRONMENT = {
    # The engine inside the worker's process: weights reach it by reference, and it starts in 3 s instead of 25.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment of a process that holds an engine on any device."""


def context_seed(ticket_seed: int, block: int) -> int:
    """Seed of one context's group: distinct for each (ticket, block), independent of how requests are batched."""
    return int(np.random.SeedSequence([ticket_seed, block]).generate_state(1)[0])


class Sampler:
    """A vLLM engine behind four verbs: sample, complete, score_tokens, load.

    Not thread-safe; weights change only between two calls.
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
            max_num_batched_tokens=max(config.max_num_batched_tokens, max_tokens),
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
            gpu_memory_utilization=min(0.9, gpu_share),
            enable_prefix_caching=True,
            enable_chunked_prefill=False,  # a split prefill breaks seeded sampling on CPU
            logprobs_mode="processed_logprobs",  # after temperature: the policy that really sampled
            worker_extension_cls=WEIGHT_RECEIVER,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            generation_config="vllm",  # no sampling defaults from the checkpoint
            block_size=config.block_size,
        )
        self.startup_s = {"imports": imported - start, "engine": time.perf_counter() - imported}

    def sample(self, tickets: Sequence[Ticket], *, policy_version: int) -> list[Rollout]:
        """The n completions of every anchor of every ticket's document, in the order of the tickets."""
        start = time.perf_counter()
        prompts, params = [], []
        for ticket in tickets:
            for block in range(len(ticket.document.anchors)):
                prompts.append({"prompt_token_ids": ticket.document.context_ids(block).tolist()})
                params.append(self._sampling_params(ticket, block))
        outputs = iter(self._llm.generate(prompts, params, use_tqdm=False))
        groups = [[next(outputs).outputs for _ in ticket.document.anchors] for ticket in tickets]
        seconds = (time.perf_counter() - start) / len(tickets)
        return [
            self._rollout(ticket, group_outputs, policy_version, seconds)
            for ticket, group_outputs in zip(tickets, groups, strict=True)
        ]

    def complete(
        self, prompts: Sequence[list[int]], *, max_tokens: int, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[list[list[int]]]:
        """Token ids of n completions of each prompt, each ended by EOS, which it keeps, or by max_tokens.

        Temperature 0 takes the most probable token each time (n must be 1). Otherwise the completions of prompt i are a
        function of (weights, prompt, n, seed, i).
        """
        params = [
            self._vllm.SamplingParams(
                n=n,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                detokenize=False,
                seed=context_seed(seed, index),
            )
            for index in range(len(prompts))
        ]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [
            [list(c.token_ids) for c in sorted(output.outputs, key=lambda completion: completion.index)]
            for output in outputs
        ]

    def score_tokens(self, token_ids: Sequence[list[int]]) -> list[np.ndarray]:
        """[T - 1] log-probabilities [nats, temperature 1] that the engine gives tokens 1..T-1 of each text."""
        params = self._vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0)
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=False)
        return [
            np.array(
                [position[token].logprob for position, token in zip(o.prompt_logprobs[1:], ids[1:], strict=True)],
                dtype=np.float32,
            )
            for o, ids in zip(outputs, token_ids, strict=True)
        ]

    def load(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights by these named tensors and forget every cached prefix.

        Raises: WeightMismatchError if the engine keeps its prefix cache: keys and values of the old weights.
        """
        self._llm.collective_rpc("receive_weights", args=(tensors,))
        if not self._llm.reset_prefix_cache():
            raise WeightMismatchError("the engine refused to drop its prefix cache; are requests still running?")

    def _sampling_params(self, ticket: Ticket, block: int) -> object:
        document = ticket.document
        return self._vllm.SamplingParams(
            n=ticket.completions_per_context,
            max_tokens=document.horizon,
            temperature=self._temperature,
            top_p=1.0,
            top_k=0,
            ignore_eos=not document.ends_with_eos,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            seed=context_seed(ticket.seed, block),
        )

    def _rollout(self, ticket: Ticket, groups: list, policy_version: int, sample_s: float) -> Rollout:
        shape = (len(groups), ticket.completions_per_context, ticket.document.horizon)
        completion_ids = np.zeros(shape, dtype=np.int64)
        logprobs = np.zeros(shape, dtype=np.float32)
        lengths = np.zeros(shape[:2], dtype=np.int64)
        for block, completions in enumerate(groups):
            for completion in completions:
                ids = completion.token_ids
                lengths[block, completion.index] = len(ids)
                completion_ids[block, completion.index, : len(ids)] = ids
                logprobs[block, completion.index, : len(ids)] = _logprobs(completion, ticket=ticket, group=block)
        return Rollout(
            ticket_id=ticket.ticket_id,
            document=ticket.document,
            completion_ids=completion_ids,
            completion_lengths=lengths,
            # Rounding may lift a certain token just above 0; anything more is refused by the message itself.
            behavior_logprobs=np.where(logprobs < 1e-5, np.minimum(logprobs, 0), logprobs),
            token_versions=constant_versions(lengths, shape[2], policy_version),
            sample_s=sample_s,
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
