"""The registry of backends, where bytes live: the word in YAML -> the class."""

from cachefs.backends.file import File
from cachefs.backends.memory import Memory

BACKENDS = {
    "file": File,
    "memory": Memory,
}
