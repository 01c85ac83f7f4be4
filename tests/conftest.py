"""Every test runs in float64, and shapes never broadcast by accident.

The tests compile many small programs and run each a few times, so XLA is asked to compile fast
rather than well, in one thread, as two workers have the cores: less than half the time on a CPU.
`XLA_FLAGS= pytest` asks for its defaults. Tracing makes many objects and few of them garbage, so
that is looked for less often. What starts other processes lets them share what they compile.
Programs are forgotten when they take too much memory: thousands of them would take gigabytes.
OpenBLAS, which solves a mixture's 2 x 2 systems, is kept from waking threads for each of them, and
so is scikit-learn, whose threads wait by spinning.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib.metadata
import os
import shutil
import tempfile

FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # later versions abort: they know it no more
    FLAGS += " --xla_cpu_parallel_codegen_split_count=1 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 50, 100)

# JAX has read its environment: this is for the processes that tests start, one cache a worker.
CACHE = tempfile.mkdtemp(prefix="jaxdiff-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

SECONDS, SECONDS_OF_SLOW = 300, 3600
"""How long a test may take before it fails: many times what the longest takes."""
KEPT_BYTES = 700 * 2**20
"""How much compiled programs may take before they are forgotten."""
_after_clearing = 0


@pytest.fixture
def as_users_run_it():
    """What a user's process has: float32, and shapes that broadcast."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def pytest_collection_modifyitems(items):
    """Begin with the longest file, so that no worker is left alone with it; none waits for ever."""
    items.sort(key=lambda item: item.path.name != "test_samplers.py")
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        item.add_marker(pytest.mark.timeout(SECONDS_OF_SLOW if slow else SECONDS))


def pytest_runtest_teardown(item, nextitem):
    global _after_clearing
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if _after_clearing and resident - _after_clearing > KEPT_BYTES:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        _after_clearing = 0
    _after_clearing = _after_clearing or resident
