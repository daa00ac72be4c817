"""What an engine does with new weights, tensor by tensor: read by a loader or skipped, filled or left as it was, kept
or changed afterwards.

vLLM's models skip names that they do not know, and keep a parameter that no tensor filled; both are silent. Copies are
counted here, not names: several tensors may fill one parameter (query, key and value; the experts of a layer), and one
tensor may be cut over the processes of an engine. Like the worker extension, it imports nothing of this project.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

COPY = torch.ops.aten.copy_.default
FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)
"""With which loaders clear rows of padding."""
COMPARED_ROWS = 16
"""Of each piece of a parameter: a stale or misplaced one differs in all of them, and comparing more takes as long as
loading."""


class LoadAccount(TorchDispatchMode):
    """As a context it sees all copies; `handed_out` replaces the tensors that the model loads."""

    def __init__(self, model: nn.Module, tensors: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._model, self._tensors = model, tensors
        self._aliases = _aliases(model)
        self._name_of = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors}
        self._in_hand: str | None = None
        self._read: set[str] = set()
        self._targets: dict[int, _Target] = {}
        self._pieces: list[_Piece] = []

    def handed_out(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in order. The first is asked for when vLLM has put empty parameters in place of the old ones."""
        self._targets = {
            _storage(parameter): _Target(name, parameter.numel())
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
        }
        for name, tensor in self._tensors:
            self._in_hand = name
            yield name, tensor
        self._in_hand = None

    def unread(self) -> list[str]:
        """Names of tensors of which nothing was copied."""
        return [name for name, _ in self._tensors if name not in self._read]

    def unfilled(self) -> list[str]:
        """Parameters of which a part, or all, was not written; a tied one by its first name."""
        targets = list(self._targets.values())
        filled = {self._aliases[target.name] for target in targets if target.is_filled}
        return sorted({self._aliases[target.name] for target in targets} - filled)

    def changed(self) -> list[str]:
        """Parameters that do not hold, after all that vLLM did with them, what was copied into them.

        Some rows are compared, of those parameters alone that are still laid out as they were loaded.
        """
        held = dict(self._model.named_parameters(remove_duplicate=False))
        return sorted({piece.parameter for piece in self._pieces if piece.differs_in(held.get(piece.parameter))})

    def __torch_dispatch__(
        self,
        func: object,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        assert callable(func)
        if func in FILLS:
            self._note_written(args[0])
        elif func is COPY and not _is_same_memory(args[0], args[1]):  # vLLM puts kept tensors back onto themselves
            self._note_read(args[1])
            self._note_written(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note_read(self, source: object) -> None:
        """By its memory, for models that ask for all tensors first; and that in hand, for those that reorder it."""
        assert isinstance(source, Tensor)
        if source.device.type != "meta":
            self._read.add(self._name_of.get(source.untyped_storage().data_ptr(), ""))
        self._read.add(self._in_hand or "")

    def _note_written(self, destination: object, source: object = None) -> None:
        assert isinstance(destination, Tensor)
        target = self._targets.get(_storage(destination))
        if target is None:
            return
        target.written[(int(destination.storage_offset()), destination.shape)] = destination.numel()
        # What a loader computed from a tensor is not kept: it would be a second copy of the weights.
        if isinstance(source, Tensor) and source.untyped_storage().data_ptr() in self._name_of:
            self._pieces.append(
                _Piece(parameter=target.name, numel=target.numel, destination=destination, source=source)
            )


@dataclass(slots=True)
class _Target:
    """A parameter that is to be filled."""

    name: str
    numel: int
    written: Counter[tuple[int, torch.Size]] = field(default_factory=Counter)
    """Elements of each piece, by offset and shape: a loader may write a piece more than once."""

    @property
    def is_filled(self) -> bool:
        return self.written.total() >= self.numel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A copy from one of the tensors into a part of a parameter."""

    parameter: str
    numel: int
    """Of the whole parameter, as it was loaded."""
    destination: Tensor
    source: Tensor

    def differs_in(self, held: Tensor | None) -> bool:
        """Whether some rows of the source are not in the parameter where they were copied to."""
        laid_out = self.destination
        if held is None or (held.numel(), held.dtype) != (self.numel, laid_out.dtype):
            return False
        if not held.is_contiguous() or held.storage_offset():
            return False
        place = held.data.as_strided(laid_out.shape, laid_out.stride(), int(laid_out.storage_offset()))
        rows = slice(None, None, max(1, len(place) // COMPARED_ROWS)) if place.dim() else ...
        return not torch.equal(place[rows], self.source[rows].to(place))


def _storage(tensor: Tensor) -> int:
    """The same for a tensor and its views, on any device."""
    return tensor.untyped_storage()._cdata


def _is_same_memory(destination: object, source: object) -> bool:
    assert isinstance(destination, Tensor) and isinstance(source, Tensor)
    return _storage(destination) == _storage(source)


def _aliases(model: nn.Module) -> dict[str, str]:
    """From every name of a parameter to the first name of the same parameter."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
