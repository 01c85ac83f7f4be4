"""Weights that tests of commands read once; `test_pretrained_loading` is about reading."""

from jaxdiff import pretrained

LOAD, LOADED = pretrained.load, {}


def load_once(path, *, dtype, place):
    """Load weights as `pretrained.load` does; what was loaded already is given again."""
    if (path, dtype) not in LOADED:
        LOADED[path, dtype] = LOAD(path, dtype=dtype, place=place)
    return LOADED[path, dtype]
