"""The weight transports, by their name in asynchrony.weight_transport."""

from actors.config import WeightTransport
from actors.weights.files import FileTransport
from actors.weights.ipc import IpcTransport
from actors.weights.object_store import ObjectStoreTransport
from actors.weights.sent import GlooTransport, NcclTransport
from actors.weights.transport import Transport

TRANSPORTS: dict[WeightTransport, type[Transport]] = {
    "object_store": ObjectStoreTransport,
    "files": FileTransport,
    "ipc": IpcTransport,
    "gloo": GlooTransport,
    "nccl": NcclTransport,
}
