"""What the optimizer holds of each parameter, wherever DeepSpeed keeps it: one view of all ZeRO stages.

AdamW steps tensors of its own: the parameters, float32 copies of them, or flat partitions in which a rank holds parts
of many. A `Piece` says where a parameter lies in them on this rank, so that its numbers can be read and replaced in
place.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = ("weight", "exp_avg", "exp_avg_sq")
"""What AdamW holds of each element, in float32: the weight itself, and the means of the gradient and of its square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The part of a parameter that this rank's optimizer steps."""

    start: int
    """Its first element in the flattened parameter."""
    length: int
    """Elements."""
    held: nn.Parameter
    """The tensor of the optimizer that holds it."""
    offset: int
    """Its first element there."""


class OptimizerState:
    """Views of the optimizer's numbers, by the names of the parameters."""

    def __init__(
        self,
        optimizer: Any,
        adamw: torch.optim.AdamW,
        parameters: Mapping[str, nn.Parameter],
        *,
        zero_stage: int,
    ) -> None:
        """`optimizer`: DeepSpeed's around `adamw`; nearly every stage has a class of its own."""
        self._optimizer, self._adamw, self._parameters = optimizer, adamw, parameters
        self._zero_stage = zero_stage
        self._pieces = dict(self._find_pieces())

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds parts of parameters, instead of all of each."""
        return self._zero_stage > 0

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole parameters, in the order of the model."""
        return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in self._parameters.items()}

    def start(self) -> None:
        """Make what AdamW would make at its first step, so that there is something to read and to replace."""
        for piece in self._pieces.values():
            state = self._adamw.state[piece.held]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(piece.held), torch.zeros_like(piece.held)

    def numbers(self, name: str, number: str) -> tuple[int, Tensor]:
        """This rank's part of one of NUMBERS, [element] float32 in place, and its start in the flattened parameter."""
        piece = self._pieces.get(name)
        if piece is None:
            return 0, torch.empty(0, device=self._parameters[name].device)
        held = piece.held.detach() if number == "weight" else self._adamw.state[piece.held][number]
        return piece.start, held.view(-1)[piece.offset : piece.offset + piece.length]

    def step(self, name: str) -> int:
        """How often AdamW has stepped the parameter; 0 where this rank holds nothing of it."""
        piece = self._pieces.get(name)
        return int(self._adamw.state[piece.held]["step"]) if piece else 0

    def set_step(self, name: str, step: int) -> None:
        """Replace that number, for all that share the parameter's tensor in the optimizer."""
        if name in self._pieces:
            self._adamw.state[self._pieces[name].held]["step"].fill_(step)

    @torch.no_grad()
    def apply(self) -> None:
        """Make the network compute with the optimizer's weights, as at the end of a step. Every rank must call it."""
        if not self.is_sharded:
            for name, piece in self._pieces.items():
                self._parameters[name].copy_(piece.held)
        elif self._zero_stage < 3:
            self._optimizer.update_lp_params()
        else:
            self._optimizer._partition_all_parameters()  # what is gathered is old
            for sub_group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)

    def _find_pieces(self) -> Iterator[tuple[str, Piece]]:
        held = [parameter for group in self._adamw.param_groups for parameter in group["params"]]
        for index, (name, parameter) in enumerate(self._parameters.items()):
            if self._zero_stage == 0:
                yield name, Piece(start=0, length=parameter.numel(), held=held[index], offset=0)
            else:
                find = self._in_partition_of_parameter if self._zero_stage == 3 else self._in_partition_of_all
                if (piece := find(parameter)) is not None:
                    yield name, piece

    def _in_partition_of_all(self, parameter: Any) -> Piece | None:
        """ZeRO 1 and 2 lay all parameters end to end and give each rank an equal part of that."""
        if (mapping := parameter._hp_mapping) is None:
            return None
        inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
        held = self._adamw.param_groups[mapping.param_group_index]["params"][0]
        return Piece(start=outside.start, length=outside.numel, held=held, offset=inside.start)

    def _in_partition_of_parameter(self, parameter: Any) -> Piece | None:
        """ZeRO-3 gives each rank an equal part of every parameter, and fills the last ones up."""
        sub_group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = torch.distributed.get_rank() * padded
        length = min(padded, parameter.ds_numel - start)
        held = self._optimizer.fp32_partitioned_groups_flat[sub_group]
        return Piece(start=start, length=length, held=held, offset=offset) if length > 0 else None
