"""Compare samplers on published weights: their error against the network's own adaptive solution.

All go from the same noise to the cleanest time that the network was trained at, along the
probability flow of the network, guided as asked; there its adaptive solution is the answer. What
is left of that answer's own error is measured too: how far a ten times larger tolerance moves it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.common import command, flows, options
from experiments.common.command import Refusal
from experiments.common.methods import METHODS
from experiments.common.options import Count, CountOrNone, Seed, Within
from experiments.common.tables import write_csv
from experiments.pretrained.conditioning import Asked, Guidance, Guided, condition
from experiments.pretrained.weights import (
    check_alone,
    factor,
    image_size,
    num_channels,
    open_weights,
)
from experiments.solvers import report
from experiments.solvers.padding import pad, skipping
from jaxdiff import files, sample, samplers, timesteps
from jaxdiff.data.stored import fingerprint
from jaxdiff.processes import Process
from jaxdiff.training import parallel
from jaxdiff.typing import Array, Denoiser, PyTree

Row = dict[str, Any]
SIZES = {"full": (4, 8, 16, 32, 64, 128), "smoke": (2, 4)}
SMOKE = ("ddim", "unipc_2", "adaptive")
LOOSER = 10.0
"""How much larger the tolerance is whose solution says how sure the answer is."""
COARSE = 1e-3
"""The tolerance of the adaptive sampler among the others."""
MAX_STEPS = 2**15
GRIDS: dict[str, Callable[..., Array]] = {
    "uniform": timesteps.uniform,
    "log_snr": timesteps.log_snr,
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How samplers are compared."""

    num: Count = 8
    """How many images, each of its own noise."""
    height: CountOrNone = None
    """Of an image in pixels, or of what the network sees where no autoencoder lies beside it; by
    default as the network was trained."""
    width: CountOrNone = None
    """Likewise."""
    grid: Literal["uniform", "log_snr"] = "uniform"
    """Times: equal steps of t, or of log-SNR."""
    tolerance: Annotated[float, Within(1e-14, 1e-3)] = 1e-8
    """Relative and absolute tolerance of the answer. What rounding leaves of it is said."""
    seed: Seed = 0
    """Of the noise that all start from."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of parameters and networks. There is no bfloat16: its rounding would be measured."""


class Answer(NamedTuple):
    """The adaptive solution.

    Attributes:
        x: (N, ...).
        calls: of the network, the most of any image.
        moved: the relative distance of the solution to a looser tolerance.
    """

    x: np.ndarray
    calls: int
    moved: float


@command.writes
def imported(
    weights: str,
    run_dir: str,
    asked: tyro.conf.OmitArgPrefixes[Asked],
    guiding: tyro.conf.OmitArgPrefixes[Guidance],
    comparison: tyro.conf.OmitArgPrefixes[Comparison],
    preset: Literal["full", "smoke"] = "full",
) -> None:
    """Measure every sampler on published weights, by network calls.

    Args:
        weights: A folder in the layout of diffusers, a file of DiT or SiT, or a hub id.
        run_dir: Folder of the results.
        asked: What the images are of.
        guiding: How far they lean towards it.
        comparison: How samplers are compared.
        preset: How many samplers and steps.
    """
    options.judge(comparison)
    with jax.enable_x64(comparison.dtype == "float64"):
        loaded = open_weights(weights, decodes=False, dtype=comparison.dtype)
        guided = Guided(loaded._replace(clip=None), guiding, guiding.scale(loaded))
        asked.check(loaded, guided.scale)
        check_alone(loaded)
        size = image_size(loaded, comparison.height, comparison.width)
        acts = guided.scale != 1.0
        config = {
            "experiment": "solvers imported",
            "preset": preset,
            "weights": fingerprint(loaded.params),
            **dataclasses.asdict(asked),
            "guidance": guiding.record_of(guided.scale) if acts else None,
            **dataclasses.asdict(comparison),
            "size": list(size),
        }
        directory = command.open_run(run_dir, config)
        if directory is None:
            return
        conditioning = condition(loaded, asked, size)
        by = factor(loaded)
        world = World(
            guided,
            guided.shared(conditioning.null),
            conditioning.rows(conditioning.labels(comparison.num)),
            (comparison.num, size[0] // by, size[1] // by, num_channels(loaded)),
            comparison,
        )
        try:
            rows = world.measure(METHODS if preset == "full" else SMOKE, SIZES[preset])
        except flows.Unsolved as reason:
            raise Refusal(f"The adaptive solution is not known: {reason}.") from reason
        write(directory, Path(weights).name, asked, world, rows)
    print(f"Report: {directory / command.REPORT}")


class World:
    """A network, the noise that all start from, and its answers.

    Attributes:
        guided: the denoiser.
        shared: its parameters.
        cond: what it is given (N, ...).
        shape: of the noise, (N, ...).
        comparison: how samplers are compared.
        t_end: where errors are measured.
        answers: by the start, as far as they were asked for.
    """

    def __init__(
        self,
        guided: Guided,
        shared: PyTree,
        cond: PyTree,
        shape: tuple[int, ...],
        comparison: Comparison,
    ) -> None:
        self.guided, self.shared, self.cond = guided, shared, cond
        self.shape, self.comparison = shape, comparison
        self.t_end = flows.cleanest(self.process)
        self.answers: dict[float, Answer] = {}

    @property
    def process(self) -> Process:
        """The forward process."""
        return self.guided.loaded.model.process

    def measure(self, names: Iterable[str], sizes: Sequence[int]) -> list[Row]:
        """Return a row for each sampler that follows the flow and each number of steps.

        Raises:
            flows.Unsolved: where the adaptive solver does not come to an end.
        """
        rows: list[Row] = []
        for name in names:
            method = METHODS[name]
            if not method.deterministic:
                continue
            start = method.start(self.process, self.guided.loaded.model.needs_signal)
            answer = self.answer(start).x
            if method.calls(1) is None:
                x, calls = self.adapted(start, COARSE)
                rows.append(Row(sampler=name, calls=calls, error=relative(x, answer)))
                continue
            solve = self.solver(method.make)
            for n in sizes:
                x, _ = solve(start, pad(self.grid(n, start), sizes))
                rows.append(
                    Row(
                        sampler=name,
                        steps=n,
                        calls=method.calls(n, to_data=False),
                        error=relative(x, answer),
                    )
                )
        return rows

    def grid(self, num_steps: int, start: Any) -> Array:
        """Return the times of so many steps from a start to where errors are measured."""
        return GRIDS[self.comparison.grid](self.process, num_steps, self.t_end, start)

    def answer(self, start: Any) -> Answer:
        """Return the adaptive solution from a start, which is solved for once.

        Raises:
            flows.Unsolved: where the solver does not come to an end.
        """
        if float(start) not in self.answers:
            tolerance = self.comparison.tolerance
            x, calls = self.adapted(start, tolerance)
            looser, _ = self.adapted(start, LOOSER * tolerance)
            self.answers[float(start)] = Answer(x, calls, relative(looser, x))
        return self.answers[float(start)]

    def adapted(self, start: Any, tolerance: float) -> tuple[np.ndarray, int]:
        """Return the adaptive solution to a tolerance, and the most calls of any image."""
        ts = self.grid(1, start)
        x, calls = self._adapt(start, ts, jnp.asarray(tolerance, float))
        return x, int(calls.max())

    @functools.cached_property
    def _adapt(self) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
        """The solver of :meth:`adapted`, one program for any start and tolerance."""

        def make(
            process: Process, denoise: Denoiser, cond: PyTree, tolerance: Any
        ) -> samplers.Sampler:
            return samplers.adaptive(process, denoise, tolerance, tolerance, MAX_STEPS, cond=cond)

        return self.solver(make)

    def solver(
        self, make: Callable[..., samplers.Sampler]
    ) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
        """Compile a sampler.

        Args:
            make: (process, denoise, cond, *options) -> sampler.

        Returns:
            ``solve(start, ts, *options)`` -> (x (N, ...), calls (N,) where the rows decide, else
            0).
        """

        def of_rows(shared: PyTree, noise: Array, cond: PyTree) -> tuple[Array, Array]:
            params, start, ts, given = shared
            x_T = self.process.sigma(start) * noise  # noqa: N806
            sampler = skipping(make(self.process, self.guided.denoiser(params), cond, *given))
            x, known = sample(jax.random.key(0), sampler, x_T, ts, collect=sampler.info)
            return x, known["calls"][-1] if known else jnp.zeros(len(x), int)

        spread = parallel.map_rows(of_rows)
        noise = jax.random.normal(jax.random.key(self.comparison.seed), self.shape)

        def solve(start: Any, ts: Array, *given: Array) -> tuple[np.ndarray, np.ndarray]:
            shared = self.shared, jnp.asarray(start, float), ts, given
            with flows.solving("give a larger --tolerance, or --dtype float64"):
                return spread(shared, noise, self.cond)

        return solve


def relative(x: np.ndarray, answer: np.ndarray) -> float:
    """Return the root mean square of the difference over that of the answer."""
    return float(np.sqrt(np.mean((x - answer) ** 2) / np.mean(answer**2)))


def write(directory: files.Path, name: str, asked: Asked, world: World, rows: list[Row]) -> None:
    """Write results.csv, the figure and, last, the report."""
    write_csv(directory / "results.csv", rows, ("sampler", "steps", "calls", "error"))
    level = math.exp(-0.5 * float(world.process.log_snr(world.t_end)))
    scale, given = world.guided.scale, asked.prompt if asked.prompt is not None else asked.label
    num, *sizes = world.shape
    words = [f"{num} examples of {' x '.join(map(str, sizes))}"]
    words += [] if given is None else [f"given {given!r}"]
    words += [] if scale == 1.0 else [f"guided by {scale:g}"]
    said = {
        "what": ", ".join(words),
        "t_end": f"t = {float(world.t_end):.4g}, where sigma / alpha is {level:.3g}",
        "grid": "t" if world.comparison.grid == "uniform" else "log-SNR",
        "tolerance": f"{world.comparison.tolerance:g}",
        "dtype": world.comparison.dtype,
        "calls": str(max(answer.calls for answer in world.answers.values())),
    }
    floor = max(answer.moved for answer in world.answers.values())
    report.write_imported(directory, name, rows, said, floor)
