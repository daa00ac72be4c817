"""The learner's workload on one CUDA device: `python benchmarks/gpu_floor.py [--parts forward whitening ...]`.

Needs torch with CUDA, transformers and, for the last two parts, DeepSpeed; neither vLLM nor Ray. Each part prints one
JSON object per measurement, and `--output FILE` keeps them:

- `machine`: the device, its driver, and whether a C compiler and Python's headers are there, which Triton needs.
- `forward`: the packed row of a document of P tokens (blocks of 8 tokens, four completions each) through Qwen2.5-1.5B's
  shape with random bfloat16 weights, forward and backward, by dense masks and by FlexAttention: seconds, peak memory,
  graphs compiled so far, how far the packed document's log-probs are from those of the plain forward, and the two
  kernels' from each other [nats].
- `whitening`: second moment, eigendecomposition and map of pooled whitening on the device, by precision.
- `learner`: LearnerWorker with NCCL on one rank in bfloat16: seconds per step and per publication, and agreement of the
  packed log-probs with the plain forward's.
- `ipc`: a publication mapped by another process through CUDA IPC, every checksum compared.
"""

import argparse
import json
import multiprocessing
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402

from actors.data.blocks import strided_anchors  # noqa: E402
from actors.rollout import Document, Rollout  # noqa: E402
from actors.weights.manifest import WeightManifest  # noqa: E402
from feature_server.features.pooled_whitening import pooled_whitening_map, second_moment  # noqa: E402
from feature_server.packing import pack  # noqa: E402
from learner.policy import PackedPolicy, causal_logprobs  # noqa: E402

if TYPE_CHECKING:  # DeepSpeed comes with it
    from learner.worker import LearnerWorker

DOCUMENT_TOKENS = (1024, 1024, 512, 768, 640, 1024)
"""P of consecutive forwards: lengths that a compiler may or may not have seen."""
HORIZON = STRIDE = CONTEXT = 8
COMPLETIONS = 4
TEMPERATURE = 0.6
FEATURES = 4608
"""Dimensions of three layers of 1,536."""

Record = dict[str, object]


def random_rollout(num_tokens: int, *, vocab_size: int, seed: int) -> Rollout:
    """One document with a completion group at every stride, all tokens random."""
    random = np.random.default_rng(seed)
    anchors = strided_anchors(num_tokens, CONTEXT, HORIZON, STRIDE)
    shape = (len(anchors), COMPLETIONS, HORIZON)
    lengths = np.full(shape[:2], HORIZON)
    return Rollout(
        ticket_id=seed,
        document=Document(
            document_id=f"random {seed}",
            token_ids=random.integers(0, vocab_size, num_tokens),
            anchors=anchors,
            horizon=HORIZON,
            ends_with_eos=False,
        ),
        completion_ids=random.integers(0, vocab_size, shape),
        completion_lengths=lengths,
        behavior_logprobs=np.full(shape, -1.0, dtype=np.float32),
        token_versions=np.zeros(shape, dtype=np.int64),
    )


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """The result, and seconds until the device has finished."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def machine() -> Iterator[Record]:
    """Device, driver and build tools."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    yield {
        "gpu": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcc": shutil.which("gcc") is not None,
        "Python.h": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    }


def shaped_network(layers: int, attention: str) -> torch.nn.Module:
    """Qwen2.5-1.5B's shape with `layers` of its 28 layers and random bfloat16 weights, equal for equal layers."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)


def forward(layers: int) -> Iterator[Record]:
    """Dense masks against FlexAttention, on the same weights and rows."""
    from torch._dynamo.utils import counters

    reference: list[torch.Tensor] = []
    for attention in ("sdpa", "flex_attention"):
        network = shaped_network(layers, attention)
        policy = PackedPolicy(network, attention=attention).train()
        for index, num_tokens in enumerate(DOCUMENT_TOKENS):
            batch = pack([random_rollout(num_tokens, vocab_size=151_936, seed=index)]).to("cuda")
            torch.cuda.reset_peak_memory_stats()
            (sampled, document), forward_s = timed(lambda p=policy, b=batch: p(b, TEMPERATURE))
            loss = sampled.mean() + document.mean()
            _, backward_s = timed(loss.backward)
            policy.zero_grad(set_to_none=True)
            peak_gib = torch.cuda.max_memory_allocated() / 2**30
            with torch.no_grad():
                plain = causal_logprobs(policy, batch.token_ids[:, :num_tokens])[0]
            record: Record = {
                "attention": attention,
                "document_tokens": num_tokens,
                "row_tokens": batch.token_ids.shape[1],
                "forward_s": round(forward_s, 4),
                "backward_s": round(backward_s, 4),
                "peak_gib": round(peak_gib, 2),
                "graphs": counters["stats"]["unique_graphs"],
                "nats_from_plain_max": float((document.detach() - plain).abs().max()),
            }
            if attention == "sdpa":
                reference.append(sampled.detach())
            else:
                apart = (sampled.detach() - reference[index]).abs()
                record |= {"nats_apart_mean": float(apart.mean()), "nats_apart_max": float(apart.max())}
            yield record
        del network, policy, sampled, document, loss
        torch.cuda.empty_cache()


def whitening() -> Iterator[Record]:
    """Features of 16 documents of 127 groups of 4; their moment has full rank."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows = 16 * 127 * 4
    scales = torch.logspace(0, -3, FEATURES, device="cuda")
    features = torch.randn(rows, FEATURES, device="cuda", generator=generator) * scales
    features = torch.nn.functional.normalize(features, dim=-1)
    moment, moment_s = timed(lambda: second_moment(features))
    yield {"what": "second moment, float64", "rows": rows, "dimensions": FEATURES, "seconds": round(moment_s, 4)}
    exact = None
    for dtype in (torch.float64, torch.float32):
        cast = moment.to(dtype)
        timed(lambda m=cast: torch.linalg.eigh(m[:64, :64]))  # the first call loads the library
        _, eigh_s = timed(lambda m=cast: torch.linalg.eigh(m))
        eigenvalues, eigenvectors = torch.linalg.eigh(cast)
        shift = 0.01 * eigenvalues.sum() / FEATURES
        found = (eigenvectors * (eigenvalues.clamp(min=0) + shift).rsqrt()) @ eigenvectors.mT
        exact = found if exact is None else exact
        error = float(torch.linalg.matrix_norm(found.double() - exact) / torch.linalg.matrix_norm(exact))
        yield {"what": f"eigh, {dtype}".replace("torch.", ""), "seconds": round(eigh_s, 3), "relative_error": error}
    mapping, map_s = timed(lambda: pooled_whitening_map(moment, 0.01))
    yield {"what": "pooled_whitening_map, float64", "seconds": round(map_s, 3)}
    document = features[: 127 * 5]
    for dtype in (torch.float64, torch.float32):
        vectors, matrix = document.to(dtype), mapping.to(dtype)
        timed(lambda v=vectors, m=matrix: v @ m)
        whitened, seconds = timed(lambda v=vectors, m=matrix: v @ m)
        error = float((whitened.double() - document.double() @ mapping).abs().max())
        what = f"map of one document, {dtype}".replace("torch.", "")
        yield {"what": what, "seconds": round(seconds, 6), "max_error": error}


def connected_worker(attention: str, zero_stage: int, *, weight_transport: str = "object_store") -> "LearnerWorker":
    """The embedded model, one rank, bfloat16, NCCL."""
    from learner.config import LearnerConfig
    from learner.worker import LearnerWorker

    config = LearnerConfig(
        documents_per_step=4,
        micro_batch_documents=2,
        whitening="none",
        cross_entropy_coef=0.3,
        zero_stage=zero_stage,
    )
    worker = LearnerWorker(
        model="embedded",
        config=config,
        dtype="bfloat16",
        temperature=1.0,
        seed=0,
        max_tokens=64,
        attention=attention,
        weight_transport=weight_transport,
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    worker.connect(rank=0, world_size=1, address="127.0.0.1", port=port, timeout_s=60)
    return worker


def published(worker: "LearnerWorker", *, part_bytes: int) -> tuple[list, WeightManifest]:
    """All parts of the current weights, and their manifest."""
    generator = worker.publish([[5, 6, 7, 8] * 8], part_bytes=part_bytes)
    parts = []
    while True:
        try:
            parts.append(next(generator))
        except StopIteration as end:
            return parts, end.value


def scored_rollouts(count: int) -> list:
    """Random rollouts of 128 tokens with the Gram statistics of random features."""
    from feature_server.features.gram import gram_statistics
    from feature_server.scored_rollout import ScoredRollout

    generator = torch.Generator().manual_seed(0)
    scored = []
    for seed in range(count):
        rollout = random_rollout(128, vocab_size=1000, seed=seed)
        groups, n = rollout.completion_lengths.shape
        features = torch.randn(groups, n + 1, 16, generator=generator)
        raw = gram_statistics(features[:, :n], features[:, n])
        scored.append(ScoredRollout(rollout=rollout, raw=raw, whitened=None, score_s=0.0))
    return scored


def learner() -> Iterator[Record]:
    """Steps and publications."""
    for attention, zero_stage in (("sdpa", 2), ("sdpa", 1), ("sdpa", 3), ("flex_attention", 2)):
        worker = connected_worker(attention, zero_stage)
        for step in range(4):
            metrics, step_s = timed(lambda w=worker, s=step: w.train_step(*scored_rollouts(4), lags=[s] * 4))
            (_, manifest), publish_s = timed(lambda w=worker: published(w, part_bytes=2**28))
            yield {
                "attention": attention,
                "zero_stage": zero_stage,
                "step": step,
                "step_s": round(step_s, 3),
                "publish_s": round(publish_s, 3),
                "grad_norm": metrics["optim/grad_norm"],
                "published_dtype": manifest.dtypes[0],
                "version": manifest.policy_version,
            }


def open_elsewhere(parts: list, manifest: object, answers: multiprocessing.Queue) -> None:
    """In another process: map, compare every checksum."""
    from actors.weights.manifest import verified_tensors
    from actors.weights.parts import open_parts

    torch.cuda.init()
    start = time.perf_counter()
    tensors = verified_tensors(manifest, open_parts(parts))
    answers.put({"tensors": len(tensors), "map_and_verify_s": round(time.perf_counter() - start, 3)})


def ipc() -> Iterator[Record]:
    """Two processes, one device."""
    worker = connected_worker("sdpa", 2, weight_transport="ipc")
    (parts, manifest), publish_s = timed(lambda: published(worker, part_bytes=2**22))
    context = multiprocessing.get_context("spawn")
    for reader in range(2):
        answers = context.Queue()
        process = context.Process(target=open_elsewhere, args=(parts, manifest, answers))
        process.start()
        yield {"reader": reader, "parts": len(parts), "publish_s": round(publish_s, 3)} | answers.get(timeout=120)
        process.join()
    worker.discard_weights(0)


PARTS = {"machine": machine, "forward": forward, "whitening": whitening, "learner": learner, "ipc": ipc}


def main() -> int:
    """Exit status: 0 all parts ran, 1 one of them failed; the others still ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=28, help="layers of the network of `forward`")
    parser.add_argument("--output", type=Path, help="file for the records, one JSON object per line")
    settings = parser.parse_args()
    failed = False
    for part in settings.parts:
        start = time.perf_counter()
        try:
            for record in forward(settings.layers) if part == "forward" else PARTS[part]():
                line = json.dumps({"part": part} | record)
                print(line, flush=True)
                if settings.output is not None:
                    with settings.output.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            failed = True
            print(f"{part} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        print(f"-- {part}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
