"""Compare every sampler: error against the exact flow, and quality, by network calls.

    python -m experiments.solvers mixture --run-dir runs/solvers
    python -m experiments.solvers digits  --run-dir runs/solvers_digits --trained-run runs/digits

On a mixture in one dimension the denoiser is exact and so is the answer: the probability flow
moves quantiles, x_s = F_s^-1(F_t(x_t)) with F the distribution function of the diffused mixture.
For a trained run the answer is that of a solver with many steps.
"""

import csv
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from experiments import command, digits, solvers_report
from experiments.image_model import build_model, make_generator, open_images
from experiments.methods import METHODS, Method
from jaxdiff import Mixture, data, processes, sample, timesteps
from jaxdiff.processes import Process
from jaxdiff.samplers import Sampler
from jaxdiff.typing import Array, Denoiser, Key

Row = dict[str, Any]
MEANS, VARIANCES, WEIGHTS = (-1.0, 0.8), (0.05, 0.1), (0.3, 0.7)
END_LOG_SNR = 2.0
"""Where the flow's error is measured: the data are half uncovered, and no last step is special."""
SIZES = {"full": (4, 8, 16, 32, 64, 128, 256), "smoke": (8, 16, 32)}
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

    return Sampler(init, step, lambda state: state[0])


@jax.jit
def quantile(mixture: Mixture, process: Process, t: Array, q: Array) -> Array:
    """Return the quantiles q (N,) of the diffused mixture in one dimension, by bisection."""
    diffused = mixture.diffuse(process, t)
    stds = jnp.sqrt(diffused.covariances[:, 0, 0])

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = 0.5 * (ends[0] + ends[1])
        z = (middle[:, None] - diffused.means[None, :, 0]) / stds[None]
        below = norm.cdf(z) @ diffused.weights < q
        return jnp.where(below, middle, ends[0]), jnp.where(below, ends[1], middle)

    ends = jnp.full(q.shape, -500.0), jnp.full(q.shape, 500.0)
    return jax.lax.fori_loop(0, 80, halve, ends)[0]


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


def pad(ts: Array, sizes: Sequence[int]) -> Array:
    """Add steps of no length, which change nothing, so that one program serves all sizes."""
    return jnp.pad(ts, (0, 1 + max(sizes) - len(ts)), mode="edge")


def distances(
    process: Process, method: Method, sizes: Sequence[int], seed: int, num: int
) -> list[float]:
    """Return the Wasserstein-1 distance of samples from the mixture for each number of steps."""
    mixture = make_mixture()
    exact = quantile(mixture, processes.edm(), jnp.asarray(0.0), (jnp.arange(num) + 0.5) / num)
    key_start, key_path = jax.random.split(jax.random.key(seed))
    x_T = process.prior_sample(key_start, (num, 1))  # noqa: N806

    @jax.jit
    def draw(ts: Array) -> Array:
        made = method.make(process, mixture.denoiser(process))
        return jnp.abs(jnp.sort(sample(key_path, made, x_T, ts)[:, 0]) - exact).mean()

    start = method.start(process)
    return [float(draw(pad(timesteps.quadratic(process, n, t_start=start), sizes))) for n in sizes]


def make_mixture() -> Mixture:
    """Return the data: two Gaussians in one dimension."""
    means, variances = jnp.array(MEANS)[:, None], jnp.array(VARIANCES)[:, None, None]
    return Mixture(jnp.array(WEIGHTS), means, variances)


def mixture(run_dir: str, preset: Literal["full", "smoke"] = "full", seed: int = 0) -> None:
    """Measure orders of convergence and quality of every sampler on a mixture.

    Args:
        run_dir: Folder of the results.
        preset: How many samplers, steps and draws.
        seed: Of the noise.
    """
    with jax.enable_x64(True):
        full = preset == "full"
        sizes = SIZES[preset]
        methods = {name: METHODS[name] for name in (METHODS if full else SMOKE)}
        methods.pop("adaptive", None)  # its calls do not follow from the grid
        extra = {"dpm_solver_pp_3 as published": Method(published_3m, 2)} if full else {}
        rows: list[Row] = []
        for process_name in PROCESSES if full else ["vp"]:
            process = PROCESSES[process_name]()
            for name, method in (methods | extra).items():
                if process_name == "flow" and name in extra:
                    continue  # it has no limit at an infinite step
                row: Callable[..., Row] = functools.partial(
                    dict, process=process_name, sampler=name
                )
                if method.order is not None:
                    errors = flow_errors(process, method, sizes)
                    order = math.log2(errors[-2] / errors[-1])
                    for n, error in zip(sizes, errors, strict=True):
                        calls = method.calls(n, to_data=False)
                        rows.append(row(steps=n, calls=calls, error=error, order=order))
                if process_name == "vp" and name not in extra:
                    few = [n for n in sizes if n <= 64]
                    for n, distance in zip(
                        few,
                        distances(process, method, few, seed, 10_000 if full else 2_000),
                        strict=True,
                    ):
                        rows.append(row(steps=n, calls=method.calls(n), distance=distance))
        expected = {name: method.order for name, method in (methods | extra).items()}
        floor = draw_floor(seed, 10_000 if full else 2_000)
        directory = Path(run_dir)
        write_csv(
            directory, rows, ("process", "sampler", "steps", "calls", "error", "order", "distance")
        )
        solvers_report.write_mixture(directory, rows, expected, floor)
    print(f"Report: {directory / 'report.md'}")


def draw_floor(seed: int, num: int) -> float:
    """Return the Wasserstein-1 distance of so many exact draws from the mixture."""
    mixture = make_mixture()
    draws = jnp.sort(mixture.sample(jax.random.key(seed + 1), num)[:, 0])
    exact = quantile(mixture, processes.edm(), jnp.asarray(0.0), (jnp.arange(num) + 0.5) / num)
    return float(jnp.abs(draws - exact).mean())


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

    full = preset == "full"
    config, restored = digits.restore(Path(trained_run))
    train, held_out = (open_images(config, split) for split in ("train", "test"))
    model, params = build_model(config, train), restored.state["ema"]
    labels = np.arange(512 if full else 16) % (train.num_classes or 1)
    key = jax.random.key(seed)
    if train.labels is None or held_out.labels is None:
        raise command.Refusal(f"--trained-run {trained_run} has images without labels to read.")
    scaled = {"train": flat(train), "held": flat(held_out)}
    reader = SVC(gamma="scale").fit(scaled["train"], train.labels)

    def draw(name: str, num_steps: int) -> np.ndarray:
        generate = make_generator(model, train.shape, name, num_steps)
        return generate(params, key, labels)[0].reshape(len(labels), -1)

    reference = draw("unipc_3", 400 if full else 8)
    rows: list[Row] = []
    for name in METHODS if full else SMOKE:
        method = METHODS[name]
        for n in (5, 10, 20, 50) if full else (4,):
            x = draw(name, n)
            row: Row = {"sampler": name, "steps": n, "calls": method.calls(n)}
            row["readable"] = float((reader.predict(x) == labels).mean())
            row["frechet"] = solvers_report.frechet(x, scaled["held"])
            if method.order is not None and not method.needs_signal:
                row["error"] = float(np.sqrt(np.mean((x - reference) ** 2)))
            rows.append(row)
            if name == "adaptive":
                break  # the grid does not matter to it
    limits = {
        "readable": float((reader.predict(scaled["held"]) == held_out.labels).mean()),
        "frechet": solvers_report.frechet(scaled["train"], scaled["held"]),
    }
    directory = Path(run_dir)
    write_csv(directory, rows, ("sampler", "steps", "calls", "error", "readable", "frechet"))
    solvers_report.write_digits(directory, rows, limits, config.num_steps, len(labels))
    print(f"Report: {directory / 'report.md'}")


def flat(images: data.Images) -> np.ndarray:
    """Return images as rows of numbers in [-1, 1]."""
    values = data.centers(jnp.asarray(images.levels), images.num_levels)
    return np.asarray(values).reshape(len(images), -1)


def write_csv(directory: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write results.csv, numbers to six digits."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [row.get(column, "") for column in columns]
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("solvers", {"mixture": mixture, "digits": digits_run}, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
