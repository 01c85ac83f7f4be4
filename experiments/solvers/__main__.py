"""Compare every sampler: error against the exact flow, and quality, by network calls.

    python -m experiments.solvers mixture --run-dir runs/solvers
    python -m experiments.solvers digits  --run-dir runs/solvers_digits --trained-run runs/digits
    python -m experiments.solvers imported --run-dir runs/solvers_sd --weights DIR --prompt "a cat"

On a mixture in one dimension the denoiser is exact and so is the answer: the probability flow
moves quantiles, x_s = F_s^-1(F_t(x_t)) with F the distribution function of the diffused mixture.
For a trained run the answer is that of a solver with many steps; for published weights that of
the adaptive one: see `imported`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from experiments import digits
from experiments.common import command
from experiments.common.methods import METHODS, Method
from experiments.common.one_dimension import make_mixture, quantile
from experiments.common.optimization import FREE
from experiments.common.tables import write_csv
from experiments.images import data as image_data
from experiments.images.generator import make_generator
from experiments.images.model import build_model, open_images, to_record
from experiments.solvers import report as solvers_report
from experiments.solvers.imported import imported
from experiments.solvers.padding import pad
from jaxdiff import data, metrics, processes, sample, timesteps
from jaxdiff.processes import Process
from jaxdiff.samplers import Sampler
from jaxdiff.training.run import config_hash, read_record
from jaxdiff.typing import Array, Denoiser, Key

Row = dict[str, Any]
END_LOG_SNR = 2.0
"""Where the flow's error is measured: the data are half uncovered, and no last step is special."""
SIZES = {"full": (4, 8, 16, 32, 64, 128, 256, 512), "smoke": (8, 16, 32)}
FEW = 64
"""Steps at most where quality is measured."""
SMOKE = ("ddim", "unipc_2", "ancestral")
PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": processes.vp,
    "edm": processes.edm,
    "flow": processes.flow,
}


def published_3m(process: Process, denoise: Denoiser) -> Sampler:
    """Make DPM-Solver++(3M) as published, whose second-difference term is half of the quadratic's.

    Source: Lu et al. 2022 (arXiv:2211.01095), the multistep third-order update of its code.
    """

    def step(key: Key, state: Any, t: Array, s: Array) -> Any:
        x, outputs, levels, count = state
        here, there = 0.5 * process.log_snr(t), 0.5 * process.log_snr(s)
        h, output = there - here, denoise(x, t)
        h_0 = jnp.where(count > 0, here - levels[0], 1.0)
        h_1 = jnp.where(count > 1, levels[0] - levels[1], 1.0)
        r_0, r_1 = h_0 / h, h_1 / h
        near, far = (output - outputs[0]) / r_0, (outputs[0] - outputs[1]) / r_1
        first = near + r_0 / (r_0 + r_1) * (near - far)
        second = (near - far) / (r_0 + r_1)
        phi_1 = jnp.expm1(-h)
        phi_2 = phi_1 / h + 1.0
        phi_3 = phi_2 / h - 0.5
        third = phi_2 * first - phi_3 * second
        change = jnp.where(count > 1, third, jnp.where(count > 0, -0.5 * phi_1 * near, 0.0))
        x_s = process.sigma(s) / process.sigma(t) * x - process.alpha(s) * phi_1 * output
        x_s += process.alpha(s) * change
        new = (x_s, jnp.stack([output, outputs[0]]), jnp.stack([here, levels[0]]), count + 1)
        return jax.tree.map(lambda a, b: jnp.where(t == s, b, a.astype(b.dtype)), new, state)

    def init(x: Array) -> Any:
        return x, jnp.zeros((2, *x.shape), x.dtype), jnp.zeros(2, x.dtype), jnp.zeros((), int)

    return Sampler(init, step, lambda state: state[0], calls=lambda t, s: jnp.ones_like(t, int))


def flow_errors(process: Process, method: Method, sizes: Sequence[int]) -> list[float]:
    """Return the largest error against the exact flow map for each number of steps."""
    mixture = make_mixture()
    q = jnp.linspace(0.02, 0.98, 49)
    t_end = process.time_of_log_snr(jnp.asarray(END_LOG_SNR))
    grids = [timesteps.log_snr(process, n, t_end, method.start(process)) for n in sizes]
    first, last = (quantile(mixture, process, t, q)[:, None] for t in (grids[0][0], t_end))

    @jax.jit
    def error(ts: Array) -> Array:
        made = method.make(process, mixture.denoiser(process))
        return jnp.abs(sample(jax.random.key(0), made, first, ts) - last).max()

    return [float(error(pad(ts, sizes))) for ts in grids]


def distances(
    process: Process, method: Method, sizes: Sequence[int], seed: int, num: int
) -> list[float]:
    """Return the Wasserstein-1 distance of samples from the mixture for each number of steps.

    They start from evenly spaced quantiles of the prior, so that all randomness is the method's.
    """
    mixture = make_mixture()
    q = (jnp.arange(num) + 0.5) / num
    exact = quantile(mixture, processes.edm(), jnp.asarray(0.0), q)
    start = method.start(process)
    x_T = process.sigma(start) * ndtri(q)[:, None]  # noqa: N806

    @jax.jit
    def draw(ts: Array) -> Array:
        made = method.make(process, mixture.denoiser(process))
        return jnp.abs(jnp.sort(sample(jax.random.key(seed), made, x_T, ts)[:, 0]) - exact).mean()

    return [float(draw(pad(timesteps.quadratic(process, n, t_start=start), sizes))) for n in sizes]


@command.writes
def mixture(run_dir: str, preset: Literal["full", "smoke"] = "full", seed: int = 0) -> None:
    """Measure orders of convergence and quality of every sampler on a mixture.

    Args:
        run_dir: Folder of the results.
        preset: How many samplers, steps and draws.
        seed: Of the noise.
    """
    command.check_seed(seed)
    config = {"experiment": "solvers mixture", "preset": preset, "seed": seed}
    directory = command.open_run(run_dir, config)
    if directory is None:
        return
    full = preset == "full"
    methods = {name: METHODS[name] for name in (METHODS if full else SMOKE)}
    methods = {name: method for name, method in methods.items() if method.calls(1) is not None}
    published = {"dpm_solver_pp_3 as published": Method(published_3m, 2)} if full else {}
    num = 10_000 if full else 2_000
    with jax.enable_x64(True):
        rows: list[Row] = []
        for name in PROCESSES if full else ["vp"]:
            infinite_step = name == "flow"  # of which the published update has no limit
            for sampler, method in (methods | ({} if infinite_step else published)).items():
                rows += errors_by_calls(name, sampler, method, SIZES[preset])
        for sampler, method in methods.items():
            sizes = [n for n in SIZES[preset] if n <= FEW]
            found = distances(PROCESSES["vp"](), method, sizes, seed, num)
            rows += [
                Row(process="vp", sampler=sampler, steps=n, calls=method.calls(n), distance=value)
                for n, value in zip(sizes, found, strict=True)
            ]
        floor = draw_floor(seed, num)
    columns = ("process", "sampler", "steps", "calls", "error", "order", "distance")
    write_csv(directory / "results.csv", rows, columns)
    expected = {name: method.order for name, method in (methods | published).items()}
    solvers_report.write_mixture(directory, rows, expected, floor)
    print(f"Report: {directory / command.REPORT}")


def errors_by_calls(
    process_name: str, sampler: str, method: Method, sizes: Sequence[int]
) -> list[Row]:
    """Return a row for each number of steps: the error against the exact flow, if it follows it."""
    if method.order is None:
        return []
    errors = flow_errors(PROCESSES[process_name](), method, sizes)
    order = math.log2(errors[-2] / errors[-1])
    return [
        Row(
            process=process_name,
            sampler=sampler,
            steps=n,
            calls=method.calls(n, to_data=False),
            error=error,
            order=order,
        )
        for n, error in zip(sizes, errors, strict=True)
    ]


def draw_floor(seed: int, num: int, repeats: int = 20) -> tuple[float, float]:
    """Return mean and spread of the Wasserstein-1 distance of so many exact draws."""
    mixture = make_mixture()
    exact = quantile(mixture, processes.edm(), jnp.asarray(0.0), (jnp.arange(num) + 0.5) / num)

    @jax.jit
    def distance(key: Key) -> Array:
        return jnp.abs(jnp.sort(mixture.sample(key, num)[:, 0]) - exact).mean()

    keys = jax.random.split(jax.random.key(seed + 1), repeats)
    found = np.array([float(distance(key)) for key in keys])
    return float(found.mean()), float(found.std(ddof=1))


@command.writes
def digits_run(
    run_dir: str, trained_run: str, preset: Literal["full", "smoke"] = "full", seed: int = 0
) -> None:
    """Measure every sampler on a trained run of experiments.digits.

    Args:
        run_dir: Folder of the results.
        trained_run: Folder of the run, as `experiments.digits train` made it.
        preset: How many samplers, steps and images.
        seed: Of the noise; all samplers start from the same.
    """
    from sklearn.svm import SVC

    command.check_seed(seed)
    config, restored, params = digits.restore(
        command.path_of(trained_run, "--trained-run"), option="--trained-run"
    )
    split = image_data.recorded_split(read_record(command.path_of(trained_run, "--trained-run")))
    train, held_out = (open_images(config, each, recorded=True) for each in ("train", split))
    if train.labels is None or held_out.labels is None:
        raise command.Refusal(f"--trained-run {trained_run} has images without labels to read.")
    asked = {"experiment": "solvers digits", "preset": preset, "seed": seed}
    trained = {"hash": config_hash(to_record(config), free=FREE), "step": restored.step}
    directory = command.open_run(run_dir, asked | {"trained_run": trained})
    if directory is None:
        return
    full = preset == "full"
    model = build_model(config, train)
    labels = np.arange(512 if full else 16) % (train.num_classes or 1)
    real, held = flat(train), flat(held_out)
    reader = SVC(gamma="scale").fit(real, train.labels)

    def draw(name: str, num_steps: int) -> np.ndarray:
        generate = make_generator(model, train.shape, name, num_steps)
        x0, _ = generate(params, jax.random.key(seed), labels)
        return x0.reshape(len(labels), -1)

    reference = draw("unipc_3", 200 if full else 8)
    rows: list[Row] = []
    for name in METHODS if full else SMOKE:
        method = METHODS[name]
        own_steps = method.calls(1) is None
        for n in (5, 10, 20, 50) if full else (4,):
            x = draw(name, n)
            row = Row(sampler=name, readable=float((reader.predict(x) == labels).mean()))
            row["frechet"] = metrics.frechet(x, held)
            row |= {} if own_steps else {"steps": n, "calls": method.calls(n)}
            if method.deterministic and not method.needs_signal:
                row["error"] = float(np.sqrt(np.mean((x - reference) ** 2)))
            rows.append(row)
            if own_steps:
                break
    order = np.random.default_rng(seed).permutation(len(real))
    as_many = order[: len(order) // len(labels) * len(labels)].reshape(-1, len(labels))
    limits = {
        "readable": float((reader.predict(held) == held_out.labels).mean()),
        "frechet": float(np.mean([metrics.frechet(real[part], held) for part in as_many])),
    }
    columns = ("sampler", "steps", "calls", "error", "readable", "frechet")
    write_csv(directory / "results.csv", rows, columns)
    solvers_report.write_digits(directory, rows, limits, config.num_steps, len(labels))
    print(f"Report: {directory / command.REPORT}")


def flat(images: data.Images) -> np.ndarray:
    """Return images as rows of numbers in [-1, 1]."""
    values = data.centers(jnp.asarray(images.levels), images.num_levels)
    return np.asarray(values).reshape(len(images), -1)


def main(argv: list[str]) -> int:
    """Run the command line."""
    commands: dict[str, Callable[..., None]] = {
        "mixture": mixture,
        "digits": digits_run,
        "imported": imported,
    }
    return command.run("solvers", commands, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
