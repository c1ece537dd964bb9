"""The registry of backends, where bytes live: the word in YAML -> the class."""

from cachefs.backends.file import File
from cachefs.backends.memory import Memory
from cachefs.backends.nbd import Nbd
from cachefs.backends.qcow2 import Qcow2

BACKENDS = {
    "file": File,
    "memory": Memory,
    "nbd": Nbd,
    "qcow2": Qcow2,
}
