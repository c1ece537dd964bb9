"""The registry of layers: the word in YAML -> the class. `checked` and `align` are put in by the graph, not by users."""

from cachefs.layers.cache import Cache
from cachefs.layers.coalesce import Coalesce
from cachefs.layers.cow import Cow
from cachefs.layers.extents import Extents

LAYERS = {
    "cow": Cow,
    "cache": Cache,
    "extents": Extents,
    "coalesce": Coalesce,
}
