"""From noise to data: transport, gradient ascent, and what samples instead."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.one_dimension import make_mixture, quantile
from experiments.common.targets import make_target
from experiments.theory.claim import Claim, Context
from jaxdiff import denoisers, metrics, plotting, processes, sample, samplers, timesteps
from jaxdiff.plotting import ACCENT, INK, MUTED, SECOND
from jaxdiff.typing import Array, Key

VP = processes.vp()
BOX = (-1.6, 1.6)


def noise_is_transported_to_data(ctx: Context) -> Claim:
    """A generator turns N(0, I) into q(x): the probability flow moves quantiles."""
    mixture, steps = make_mixture(), ctx.size(200, 120)
    q = jnp.linspace(0.01, 0.99, 25)
    ts = timesteps.quadratic(VP, steps, 1e-4)

    @jax.jit
    def paths() -> tuple[Array, Array, Array]:
        first, last = (quantile(mixture, VP, t, q)[:, None] for t in (ts[0], ts[-1]))
        made = samplers.unipc(VP, mixture.denoiser(VP), order=3)
        _, states = sample(jax.random.key(0), made, first, ts, collect=made.value)
        return jnp.concatenate([first[None], states])[..., 0], last[:, 0], first[:, 0]

    tracks, exact, first = jax.device_get(paths())
    error = float(np.abs(tracks[-1] - exact).max())
    crossings = int((np.diff(tracks, axis=1) <= 0).sum())
    x = np.linspace(-2.5, 2.5, 300, dtype=np.float32)
    figure, axes = plotting.new_figure(9.0, 3.4, ncols=3, sharey=True, width_ratios=(1, 4, 1))
    axes[1].plot(ts, tracks, color=ACCENT, linewidth=0.8)
    axes[1].invert_xaxis()
    axes[1].set(title="Transport: paths from noise to data", xlabel="time t")
    prior = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    axes[0].fill_betweenx(x, -prior, color=MUTED, alpha=0.4)
    axes[0].set(title="N(0, 1)", ylabel="x", xticks=[])
    axes[2].fill_betweenx(
        x, np.exp(mixture.log_prob(jnp.asarray(x)[:, None])), color=SECOND, alpha=0.5
    )
    axes[2].set(title="q(x)", xticks=[])
    plotting.save(figure, ctx.directory / "transport.png")
    _density_gif(ctx, mixture)
    return Claim(
        "A generator turns N(0, I) into q(x): a transport.",
        "each quantile of the noise arrives at that quantile of the data (1e-3); paths never cross",
        {"largest error": error, "crossings": crossings},
        error < 1e-3 and crossings == 0,
        ("transport.png", "density.gif"),
    )


def _density_gif(ctx: Context, mixture: object) -> None:
    """The density on its way from noise to data."""
    x = jnp.linspace(-2.5, 2.5, 300)
    times = jnp.linspace(1.0, 0.0, ctx.size(40, 6)) ** 2 + 1e-5

    @jax.jit
    @jax.vmap
    def density(t: Array) -> Array:
        return jnp.exp(make_mixture().diffuse(VP, t).log_prob(x[:, None]))

    heights = jax.device_get(density(jnp.minimum(times, 1.0)))

    def frame(axis: object, i: int) -> None:
        axis.fill_between(x, heights[i], color=ACCENT, alpha=0.5)  # type: ignore[attr-defined]
        axis.set(  # type: ignore[attr-defined]
            title=f"From noise to data: q(x_t), t = {times[i]:.2f}",
            xlabel="x",
            ylabel="density",
            ylim=(0.0, 1.1),
        )

    plotting.save_frames(ctx.directory / "density.gif", frame, len(heights))


def ascent_maximises_and_does_not_sample(ctx: Context) -> Claim:
    """Gradient ascent on log p ends on the modes; Langevin, the SDE and the ODE sample p."""
    mixture = make_target("mixture").mixture
    assert mixture is not None
    num, steps = ctx.size(2000, 300), ctx.size(1000, 200)
    denoise = mixture.denoiser(VP)
    score = denoisers.to_score(VP, denoise)
    warm = timesteps.quadratic(VP, steps, 1e-3)
    key_truth, key_other, key_start, key_path = jax.random.split(ctx.key(20), 4)
    start = 1.2 * jax.random.normal(key_start, (num, 2))
    scale = jnp.asarray(2e-3)

    def moves(noise: float) -> Callable[[Key], Array]:
        """X + a grad log p(x), at the data's own density, T times."""
        made = samplers.langevin(lambda x, t: mixture.score(x), scale, noise=noise)
        return lambda key: sample(key, made, start, jnp.full(steps + 1, 1e-3))

    def annealed(key: Key) -> Array:
        made = samplers.langevin(score, lambda t: 0.3 * VP.variance(t))
        return sample(key, made, VP.prior_sample(key_start, (num, 2)), warm)

    def solve(made: samplers.Sampler) -> Callable[[Key], Array]:
        return lambda key: sample(key, made, VP.prior_sample(key_start, (num, 2)), warm)

    methods: dict[str, Callable[[Key], Array]] = {
        "gradient ascent": moves(0.0),
        "Langevin": moves(1.0),
        "annealed Langevin": annealed,
        "reverse SDE": solve(samplers.ancestral(VP, denoise)),
        "probability flow": solve(samplers.ddim(VP, denoise)),
    }

    @jax.jit
    def run(key: Key) -> dict[str, Array]:
        return {name: method(key) for name, method in methods.items()}

    truth, other = (np.asarray(mixture.sample(key, num)) for key in (key_truth, key_other))
    found = run(key_path)
    results = {name: np.asarray(found[name]) for name in methods}
    distances = {name: metrics.mmd(x, truth, bandwidth=0.2) for name, x in results.items()}
    floor = metrics.mmd(other, truth, bandwidth=0.2)
    spread = {
        name: float(np.linalg.norm(x[:, None] - np.asarray(mixture.means), axis=2).min(1).mean())
        for name, x in (results | {"data": truth}).items()
    }
    figure, axes = plotting.new_figure(9.0, 6.4, ncols=3, nrows=2, sharey=True, sharex=True)
    for axis, (name, x) in zip(axes.flat, ({"data": truth} | results).items(), strict=True):
        axis.plot(*x.T, ".", markersize=2, color=INK if name == "data" else ACCENT)
        value = "" if name == "data" else f": MMD² {distances[name]:.4f}"
        axis.set(title=name + value, xlim=BOX, ylim=BOX, aspect="equal")
        axis.title.set_fontsize(11)
    for axis in axes[1]:
        axis.set_xlabel("$x_1$")
    for axis in axes[:, 0]:
        axis.set_ylabel("$x_2$")
    plotting.save(figure, ctx.directory / "ascent.png")
    _ascent_gif(ctx, scale, start[:400])
    limit = 0.2 * distances["gradient ascent"]
    others = ("annealed Langevin", "reverse SDE", "probability flow")
    return Claim(
        "Following the gradient of log p from noise gives samples of p. (It does not: it maximises."
        " With the right noise, or by the probability flow, it does.)",
        "MMD² to p of gradient ascent at least 5 times that of annealed Langevin, reverse SDE and "
        "probability flow; mean distance to the nearest mode near 0, against 0.125 of data",
        {"MMD²": distances | {"as many draws": floor}, "distance to the nearest mode": spread},
        max(distances[name] for name in others) < limit
        and spread["gradient ascent"] < 0.1 * spread["data"],
        ("ascent.png", "ascent.gif"),
        "Langevin without annealing keeps the share of each mode that its start gave it.",
    )


def _ascent_gif(ctx: Context, scale: Array, start: Array) -> None:
    """Ascent beside Langevin, from the same noise."""
    mixture = make_target("mixture").mixture
    assert mixture is not None
    num_frames = ctx.size(36, 6)
    every = ctx.size(12, 2)

    @jax.jit
    def run(key: Key) -> tuple[Array, Array]:
        tracks = []
        for noise in (0.0, 1.0):
            made = samplers.langevin(lambda x, t: mixture.score(x), scale, noise=noise)
            ts = jnp.full(num_frames * every + 1, 1e-3)
            tracks.append(sample(key, made, start, ts, collect=made.value)[1][::every])
        return tracks[0], tracks[1]

    tracks = jax.device_get(run(ctx.key(21)))

    def frame(axes: object, i: int) -> None:
        for axis, track, name in zip(axes, tracks, ("ascent", "Langevin"), strict=True):  # type: ignore[call-overload]
            axis.plot(*track[i].T, ".", markersize=3, color=ACCENT)
            axis.set(title=f"{name}, step {i * every}", xlim=BOX, ylim=BOX, aspect="equal")

    plotting.save_frames(ctx.directory / "ascent.gif", frame, num_frames, ncols=2)


def small_steps_sample(ctx: Context) -> Claim:
    """Langevin with steps of size h is wrong by order h: why T is often 1000."""
    sizes = (0.4, 0.2, 0.1, 0.05)
    num = ctx.size(200_000, 20_000)

    @jax.jit
    @jax.vmap
    def variance(step: Array, key: Key) -> Array:
        made = samplers.langevin(lambda x, t: -x, step)
        count = 120
        ts = jnp.zeros(count + 1)
        x = sample(key, made, jax.random.normal(key, (num, 1)), ts)
        return x.var()

    found = np.asarray(variance(jnp.array(sizes), jax.random.split(ctx.key(22), len(sizes))))
    exact = 1.0 / (1.0 - np.array(sizes) / 2.0)
    stderr = exact * np.sqrt(2.0 / num)
    figure, axis = plotting.new_figure(6.4, 3.2)
    axis.errorbar(sizes, found, 4 * stderr, fmt="o", color=ACCENT, label="measured, ± 4 s.e.")
    steps = np.linspace(0.0, 0.42, 50)
    axis.plot(steps, 1 / (1 - steps / 2), "--", color=MUTED, label="1 / (1 - h / 2)")
    axis.axhline(1.0, color=INK, linewidth=0.8, label="variance of p")
    axis.set(title="Langevin on N(0, 1): the price of a step", xlabel="step size h")
    axis.set_ylabel("variance reached")
    axis.legend()
    plotting.save(figure, ctx.directory / "step_size.png")
    return Claim(
        "x_{T-1} = x_T + a grad log p, discretised; T is often 1000: small steps.",
        "the variance reached is 1 / (1 - h / 2) within 4 standard errors: right as h goes to 0",
        {f"h={h}": float(v) for h, v in zip(sizes, found, strict=True)},
        bool((np.abs(found - exact) < 4 * stderr).all()),
        ("step_size.png",),
    )


def many_small_steps_make_the_generator(ctx: Context) -> Claim:
    """G = Q(., T) o ... o Q(., 1): with few steps it misses, with many G(x_T) ~ q(x)."""
    mixture = make_target("mixture").mixture
    assert mixture is not None
    num, counts = ctx.size(2000, 300), (1, 2, 4, 8, 16, 32, 64)
    key_truth, key_other, key_start, key_path = jax.random.split(ctx.key(23), 4)
    longest = counts[-1]

    @jax.jit
    def run(ts: Array) -> Array:
        x_T = VP.prior_sample(key_start, (num, 2))  # noqa: N806
        return sample(key_path, samplers.ancestral(VP, mixture.denoiser(VP)), x_T, ts)

    truth, other = (np.asarray(mixture.sample(key, num)) for key in (key_truth, key_other))
    grids = [timesteps.quadratic(VP, count) for count in counts]
    padded = [jnp.pad(ts, (0, longest + 1 - len(ts)), mode="edge") for ts in grids]
    found = [metrics.mmd(np.asarray(run(ts)), truth, bandwidth=0.2) for ts in padded]
    floor = abs(metrics.mmd(other, truth, bandwidth=0.2))
    figure, axis = plotting.new_figure(6.4, 3.2)
    axis.loglog(
        counts, np.maximum(found, 1e-5), "o-", color=ACCENT, label="reverse chain of T steps"
    )
    axis.axhline(floor, color=MUTED, linestyle="--", label="as many draws of p")
    axis.set(title="G = Q(., T) o ... o Q(., 1): quality by T", xlabel="steps T")
    axis.set_ylabel("MMD² to p")
    axis.legend()
    plotting.save(figure, ctx.directory / "steps.png")
    return Claim(
        "The composed steps G = Q(., T) o ... o Q(., 1) turn x_T ~ N(0, I) into G(x_T) ~ q(x).",
        "MMD² to p falls at least 20 times from T = 1 to T = 64",
        {f"T={count}": value for count, value in zip(counts, found, strict=True)},
        found[0] > 20 * abs(found[-1]),
        ("steps.png",),
    )
