"""Experiments: one module each, run as ``python -m experiments.NAME``."""

import sys

from experiments.common.peek import refuse_if_written

refuse_if_written(sys.orig_argv)
