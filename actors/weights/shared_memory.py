"""Memory that other processes of a node can map: a GPU's by CUDA IPC, the host's by a name below /dev/shm.

torch's reductions for multiprocessing turn a tensor into a handle and back on either, so one code path serves both,
except for the count of readers. The host's memory lasts as long as the tensor that `allocate` returned, or a mapping
of it, does; its name as long as that tensor, so that a reader that is killed leaves nothing behind. If the owner is
killed, torch's shared-memory manager, its child, removes the name, unless it is killed as well.
"""

import os
import pickle
import platform
import shutil
import weakref
from dataclasses import dataclass
from inspect import signature
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
from torch.multiprocessing.reductions import reduce_tensor

from actors.weights.manifest import WeightMismatchError

SHARED_FOLDER = "/dev/shm"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """What a process needs to map a tensor of another one; small, and picklable by anyone."""

    handle: bytes
    node: str
    process: int
    device: str
    """The owner's name for it, such as `cuda:0`."""
    device_id: str
    """The device's identity, the same in every process."""

    def map(self) -> torch.Tensor:
        """The owner's tensor itself, not a copy. Any number of processes may map it, at any time.

        Raises: WeightMismatchError if this process is on another node, does not see the owner's GPU in the owner's
        place, or the owner has ended or freed the memory.
        """
        self._require_reach()
        try:
            rebuild, arguments = pickle.loads(self.handle)
            tensor = rebuild(*arguments)
        except RuntimeError as error:
            raise WeightMismatchError(f"{self} cannot be mapped, its owner has freed it: {error}") from error
        # The reductions assume that a handle is opened once, and have just counted down that reader.
        tensor.untyped_storage()._shared_incref()
        return tensor

    def __str__(self) -> str:
        return f"memory of process {self.process} on {self.node}, {self.device}"

    def _require_reach(self) -> None:
        device, here = torch.device(self.device), platform.node()
        remedy = "set asynchrony.weight_transport to object_store, gloo or nccl"
        if self.node != here:
            raise WeightMismatchError(
                f"{self} was to be mapped on {here}: weight_transport='ipc' needs learner and rollout workers on one "
                f"node; place them there (placement.strategy='STRICT_PACK'), or {remedy}"
            )
        if device.type == "cuda" and (device.index >= torch.cuda.device_count() or device_id(device) != self.device_id):
            raise WeightMismatchError(
                f"{self} was to be mapped by a process whose {device} is not {self.device_id}: weight_transport='ipc' "
                f"needs learner and rollout workers on one GPU; give both a share of it (placement.*.num_gpus), or "
                f"{remedy}"
            )
        if not Path("/proc", str(self.process)).exists():
            raise WeightMismatchError(f"{self} cannot be mapped: that process has ended, and its weights with it")


def device_id(device: torch.device) -> str:
    """Equal for equal devices of a node, whatever their number in this process."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8 on the device, in memory that can be shared.

    Raises: OSError if the host's shared memory has no room for it.
    """
    if device.type == "cpu":
        free = shutil.disk_usage(SHARED_FOLDER).free
        if num_bytes > free:  # the kernel would grant it, and end this process at the first byte that does not fit
            raise OSError(
                f"{SHARED_FOLDER} has {free} bytes free, {num_bytes} of published weights were to go there: enlarge it "
                "(docker: --shm-size), or set asynchrony.weight_transport to another than ipc"
            )
    # The other strategy hands on file descriptors, which go from one process to another through a socket only.
    torch.multiprocessing.set_sharing_strategy("file_system")
    storage = torch.UntypedStorage._new_shared(num_bytes, device=device)
    tensor = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    if device.type == "cpu":
        storage._shared_incref()  # never counted down: torch would wait for the last reader before it unlinks the name
        _, name, _ = storage._share_filename_cpu_()
        weakref.finalize(tensor, Path(SHARED_FOLDER, name.decode().removeprefix("/")).unlink)
    return tensor


def share(tensor: torch.Tensor) -> SharedMemory:
    """How others map a tensor of `allocate`; the caller keeps it as long as they may."""
    rebuild, arguments = reduce_tensor(tensor)
    handle = bytes(ForkingPickler.dumps((rebuild, arguments)))
    # A handle counts as a reader for the reductions, and the memory of one that is never opened would never be freed.
    if tensor.device.type == "cpu":
        tensor.untyped_storage()._shared_decref()
    else:
        counter = dict(zip(signature(rebuild).parameters, arguments, strict=True))
        torch.UntypedStorage._release_ipc_counter(
            counter["ref_counter_handle"], counter["ref_counter_offset"], device=tensor.device
        )
    return SharedMemory(
        handle=handle,
        node=platform.node(),
        process=os.getpid(),
        device=str(tensor.device),
        device_id=device_id(tensor.device),
    )
