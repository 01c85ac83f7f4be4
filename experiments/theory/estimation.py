"""Densities, data, likelihood and mixtures: the article's first third."""

import math

import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments.common.one_dimension import MEANS, VARIANCES, WEIGHTS
from experiments.theory.claim import Claim, Context
from jaxdiff import data, plotting
from jaxdiff.plotting import ACCENT, INK, MUTED, SECOND

STDS = np.sqrt(VARIANCES)
GRID = np.linspace(-2.2, 2.2, 400)
GOOD, BAD = (-0.9, 0.75), (0.1, 1.4)
"""Means of two candidates for the density of the data."""


def pdf(x: np.ndarray, means: tuple[float, ...] = MEANS) -> np.ndarray:
    """Return the density of two Gaussians at x (...)."""
    parts = stats.norm.pdf(x[..., None], np.array(means), STDS)
    return parts @ np.array(WEIGHTS)


def draw(ctx: Context, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw from the density."""
    generator = np.random.default_rng([ctx.seed, number])
    component = generator.choice(2, size=shape, p=WEIGHTS)
    return np.array(MEANS)[component] + STDS[component] * generator.normal(size=shape)


def data_are_a_sample(ctx: Context) -> Claim:
    """A data set is a sample of p(x), and tells more of it the larger it is."""
    sizes, repeats = (50, 200, 800, 3200), ctx.size(40, 5)
    cdf = np.cumsum(pdf(GRID)) * (GRID[1] - GRID[0])
    distances = []
    for size in sizes:
        x = np.sort(draw(ctx, size, (repeats, size)), axis=1)
        empirical = np.stack([np.searchsorted(row, GRID) / size for row in x])
        distances.append(np.abs(empirical - cdf).max(axis=1).mean())
    slope = float(np.polyfit(np.log(sizes), np.log(distances), 1)[0])
    figure, axes = plotting.new_figure(9.0, 3.2, ncols=2)
    points = draw(ctx, 1, (60,))
    axes[0].plot(GRID, pdf(GRID), color=ACCENT, label="p(x)")
    axes[0].plot(points, np.zeros(60), "|", color=SECOND, markersize=12, label="60 data points")
    axes[0].set(title="A density and a sample of it", xlabel="x", ylabel="density")
    axes[0].legend()
    axes[1].loglog(sizes, distances, "o-", color=ACCENT)
    axes[1].loglog(sizes, distances[0] * (np.array(sizes) / sizes[0]) ** -0.5, "--", color=MUTED)
    axes[1].set(title="Distance to p falls as 1 / sqrt(n) (dashed)")
    axes[1].set(xlabel="number of points n", ylabel="largest difference of distribution")
    plotting.save(figure, ctx.directory / "data.png")
    return Claim(
        "Images are draws of an unknown p(x): a data set is a sample of it.",
        "the largest difference to p's distribution function falls as n^-0.5",
        {"slope": slope, **{f"n={n}": float(d) for n, d in zip(sizes, distances, strict=True)}},
        abs(slope + 0.5) < 0.1,
        ("data.png",),
    )


def a_fitted_density_can_be_sampled(ctx: Context) -> Claim:
    """An estimate q(x) of the density can be sampled: new data."""
    from sklearn.mixture import GaussianMixture

    num = ctx.size(2000, 400)
    train, fresh = draw(ctx, 2, (num,)), draw(ctx, 3, (num,))
    q = GaussianMixture(2, random_state=ctx.seed).fit(train[:, None])
    new = q.sample(num)[0][:, 0]
    distance = float(stats.wasserstein_distance(new, fresh))
    floor = float(stats.wasserstein_distance(train, fresh))
    figure, axis = plotting.new_figure(6.4, 3.2)
    axis.hist(new, 60, density=True, color=ACCENT, alpha=0.3, label="samples of q")
    axis.plot(GRID, pdf(GRID), color=INK, label="p, unknown")
    axis.plot(GRID, np.exp(q.score_samples(GRID[:, None])), "--", color=SECOND, label="q, fitted")
    axis.set(title=f"q fitted to {num} points, and sampled", xlabel="x", ylabel="density")
    axis.legend()
    plotting.save(figure, ctx.directory / "generate.png")
    return Claim(
        "An estimate q(x) fitted to the data can be sampled: that is what generative AI does.",
        "samples of q are about as far from fresh data as the data themselves (below 3 times)",
        {"samples of q to fresh data": distance, "data to fresh data": floor},
        distance < 3.0 * floor,
        ("generate.png",),
    )


def likelihood_tells_candidates_apart(ctx: Context) -> Claim:
    """Of two candidates the product of the heights at the data is larger for the better one."""
    repeats, num = ctx.size(2000, 200), 10
    x = draw(ctx, 4, (repeats, num))
    good, bad = (pdf(x, means).prod(axis=1) for means in (GOOD, BAD))
    share = float((good > bad).mean())
    figure, axes = plotting.new_figure(9.0, 3.2, ncols=2, sharey=True)
    for axis, means, name in zip(axes, (GOOD, BAD), ("a good candidate", "a bad one"), strict=True):
        product = pdf(x[0], means).prod()
        axis.plot(GRID, pdf(GRID, means), color=ACCENT)
        axis.vlines(x[0], 0.0, pdf(x[0], means), color=SECOND)
        axis.plot(x[0], np.zeros(num), "o", color=SECOND, markersize=4)
        axis.set(title=f"{name}: product of heights {product:.2g}", xlabel="x")
    axes[0].set_ylabel("density")
    plotting.save(figure, ctx.directory / "likelihood.png")
    return Claim(
        "The likelihood, the product of a candidate's heights at the points, tells which of two "
        "candidates is better.",
        f"of data sets of {num} points more than 0.95 prefer the candidate closer to p",
        share,
        share > 0.95,
        ("likelihood.png",),
    )


def logarithms_do_not_underflow(ctx: Context) -> Claim:
    """The logarithm has the same argmax, and a sum that float32 can hold."""
    x = draw(ctx, 5, (1000,))
    heights = pdf(x).astype(np.float32)
    product = np.multiply.accumulate(heights)
    total = np.add.accumulate(np.log(heights))
    gone = int(np.argmax(product == 0.0)) + 1
    shifts = np.linspace(-1.0, 1.0, 201)
    few = x[:20]
    by_product = [pdf(few - shift).prod() for shift in shifts]
    by_sum = [np.log(pdf(few - shift)).sum() for shift in shifts]
    apart = float(abs(shifts[np.argmax(by_product)] - shifts[np.argmax(by_sum)]))
    figure, axes = plotting.new_figure(9.0, 3.2, ncols=2)
    axes[0].semilogy(np.arange(1, 1001), np.where(product > 0, product, np.nan), color=SECOND)
    axes[0].axvline(gone, color=MUTED, linestyle="--")
    axes[0].set(title=f"Product in float32: 0 after {gone} points", xlabel="points")
    axes[0].set_ylabel("likelihood")
    axes[1].plot(np.arange(1, 1001), total, color=ACCENT)
    axes[1].set(title="Sum of logarithms: finite", xlabel="points", ylabel="log-likelihood")
    plotting.save(figure, ctx.directory / "logarithm.png")
    return Claim(
        "The log-likelihood has the same argmax, and is a sum where the product underflows.",
        "float32: the product of 1000 heights is 0, the sum of logarithms finite; argmax equal",
        {
            "product": float(product[-1]),
            "points until 0": gone,
            "sum of logarithms": float(total[-1]),
            "argmax apart": apart,
        },
        bool(product[-1] == 0.0 and math.isfinite(total[-1]) and apart == 0.0),
        ("logarithm.png",),
    )


def em_raises_the_likelihood(ctx: Context) -> Claim:
    """Each iteration of EM raises the log-likelihood of a mixture."""
    x, steps = draw(ctx, 6, (500,)), 40
    means, variances, weights = np.array([-0.2, 0.1]), np.array([1.0, 1.0]), np.array([0.5, 0.5])
    history, fits = [], []
    for _ in range(steps):
        parts = weights * stats.norm.pdf(x[:, None], means, np.sqrt(variances))
        history.append(float(np.log(parts.sum(1)).mean()))
        fits.append((means, variances, weights))
        shares = parts / parts.sum(1, keepdims=True)
        counts = shares.sum(0)
        means = (shares * x[:, None]).sum(0) / counts
        variances = (shares * (x[:, None] - means) ** 2).sum(0) / counts
        weights = counts / counts.sum()
    rises = np.diff(history)
    figure, axes = plotting.new_figure(9.0, 3.2, ncols=2)
    axes[0].plot(history, "o-", color=ACCENT, markersize=3)
    axes[0].set(title="EM: log-likelihood a point", xlabel="iteration", ylabel="nats")
    axes[1].hist(x, 50, density=True, color=MUTED, alpha=0.3, label="data")
    for i in (0, 5, 15, steps - 1):
        m, v, w = fits[i]
        axes[1].plot(GRID, stats.norm.pdf(GRID[:, None], m, np.sqrt(v)) @ w, label=f"after {i}")
    axes[1].set(title="The mixture on its way", xlabel="x", ylabel="density")
    axes[1].legend(fontsize=8)
    plotting.save(figure, ctx.directory / "em.png")
    return Claim(
        "A Gaussian mixture is fitted by raising its likelihood: EM does so at each iteration.",
        "no iteration lowers the log-likelihood",
        {"smallest rise": float(rises.min()), "gained": history[-1] - history[0]},
        bool(rises.min() > -1e-12 and history[-1] > history[0]),
        ("em.png",),
    )


def mixtures_are_not_enough_for_images(ctx: Context) -> Claim:
    """More components stop helping: on digits the held-out likelihood turns."""
    from sklearn.mixture import GaussianMixture

    counts = (1, 4, 10, 30, 60) if ctx.full else (1, 4, 10, 60)
    splits = [data.load_images("digits", split) for split in ("train", "test")]
    train, test = (
        np.asarray(data.dequantize(ctx.key(7 + i), jnp.asarray(images.levels), images.num_levels))
        .reshape(len(images), -1)
        .astype(np.float64)
        for i, images in enumerate(splits)
    )
    per_dim = splits[0].bin_width, train.shape[1]
    seen: list[float] = []
    held_out: list[float] = []
    for count in counts:
        fitted = GaussianMixture(count, reg_covar=1e-3, random_state=ctx.seed, max_iter=30)
        fitted.fit(train)
        for results, x in ((seen, train), (held_out, test)):
            nats = -fitted.score(x) - per_dim[1] * math.log(per_dim[0])
            results.append(float(nats / per_dim[1] / math.log(2.0)))
    best = int(np.argmin(held_out))
    figure, axis = plotting.new_figure(6.4, 3.4)
    axis.plot(counts, held_out, "o-", color=ACCENT, label="held out")
    axis.plot(counts, seen, "o--", color=SECOND, label="training data")
    axis.set(title="Gaussian mixtures of digits", xlabel="components K", ylabel="bits/dim")
    axis.legend()
    plotting.save(figure, ctx.directory / "mixtures.png")
    return Claim(
        "A mixture with enough components fits anything, but is not enough for images.",
        "on held-out digits bits/dim turn before K = 60, on the training data they go on",
        {f"K={k}": value for k, value in zip(counts, held_out, strict=True)},
        best < len(counts) - 1 and seen[-1] < seen[best],
        ("mixtures.png",),
        "EM with full covariances; diffusion and flow matching on the same digits are in "
        "`experiments.families` and `experiments.digits`, some 0.6 bits/dim below the best.",
    )


def clip_scale(values: np.ndarray) -> np.ndarray:
    """Return images (..., 64) of [-1, 1] as uint8 (..., 8, 8, 1)."""
    levels = np.clip((values + 1.0) * 127.5, 0, 255).astype(np.uint8)
    return levels.reshape(*values.shape[:-1], 8, 8, 1)
