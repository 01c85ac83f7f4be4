"""Import what the `train` extra brings, or say which extra is missing."""

import functools

from jaxdiff import extras

require = functools.partial(extras.require, name="jaxdiff.data")
"""See :func:`jaxdiff.extras.require`."""
