"""Before a run starts: is a packed forward of this model what its own forward computes, at full length?

One document of random tokens with two texts, and blocks at the ends of both: behind the longest context that the run
will see, whatever windows, chunks or scaled positions the model has.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from actors.rollout import Completions, Document

CHECK_SEED = 20260312
MAX_ERROR = {"float32": 1e-4, "bfloat16": 0.1}
"""Mean error that rounding may make, of a log-prob [nats] or relative to a feature's norm; in bfloat16 two attention
kernels differ by 0.03 nats (docs/gpu.md)."""


def check_rollout(*, num_tokens: int, vocab_size: int) -> Completions:
    """Its longest sequence, context and completion, has `num_tokens` tokens; the same for the same arguments."""
    random = np.random.default_rng(CHECK_SEED)
    horizon = max(1, min(8, num_tokens // 4))
    first_text = max(2, num_tokens // 4)
    length = first_text + num_tokens
    return Completions(
        document=Document(
            document_id="forward check",
            token_ids=random.integers(0, vocab_size, length),
            anchors=np.array([first_text - 1, first_text + num_tokens // 2, length - horizon]),
            horizon=horizon,
            ends_with_eos=False,
            text_starts=np.array([0, first_text]),
        ),
        completion_ids=random.integers(0, vocab_size, (3, 1, horizon)),
        completion_lengths=np.full((3, 1), horizon),
    )


def separate_sequences(completions: Completions) -> list[tuple[int, Tensor]]:
    """Of each completion, in packed order: length of its context, and context and completion as one sequence."""
    document = completions.document
    sequences: list[tuple[int, Tensor]] = []
    spans = zip(document.context_starts.tolist(), document.anchors.tolist(), strict=True)
    for group, (start, anchor) in enumerate(spans):
        context = document.token_ids[start:anchor]
        for ids, length in zip(completions.completion_ids[group], completions.completion_lengths[group], strict=True):
            sequences.append((len(context), torch.from_numpy(np.concatenate([context, ids[:length]]))))
    return sequences


def require_rounding(errors: Float[Tensor, " token"], *, model_type: str, dtype: str, what: str) -> None:
    """Raises: ValueError, naming the model type, if the errors of the tokens are more than rounding makes."""
    error = float(errors.mean())
    if not error <= MAX_ERROR[dtype]:  # a NaN is refused as well
        raise ValueError(
            f"model type {model_type!r}: {what} of packed rows differ from those of the model's own forward by "
            f"{error:.2g} on average, and rounding in {dtype} makes {MAX_ERROR[dtype]:g} at most; part of this model "
            "depends on where a token lies in its row (for example ALiBi, or positions scaled by the row's length). "
            "Choose another model, or a data.document_tokens below the length at which its positions are scaled"
        )
