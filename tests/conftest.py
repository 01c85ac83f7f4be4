"""Every test runs in float64, and shapes never broadcast by accident.

The tests compile many small programs and run each a few times, so XLA is asked to compile fast
rather than well: less than half the time on a CPU. `XLA_FLAGS= pytest` asks for its defaults.
Programs are forgotten every so many tests: thousands of them would take gigabytes.
OpenBLAS, which solves a mixture's 2 x 2 systems, is kept from waking threads for each of them.
"""

import importlib.metadata
import itertools
import os

FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # later versions abort: they know it no more
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

PROGRAMS_OF = 150
"""How many tests' programs are kept."""
_count = itertools.count(1)


def pytest_runtest_teardown(item, nextitem):
    if next(_count) % PROGRAMS_OF == 0:
        jax.clear_caches()
