"""The registry of layers: the word in YAML -> the class. `checked` and `align` are put in by the graph, not by users."""

from cachefs.layers.cache import Cache
from cachefs.layers.cow import Cow

LAYERS = {
    "cow": Cow,
    "cache": Cache,
}
