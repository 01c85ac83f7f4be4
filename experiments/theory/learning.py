"""Learning the score from noise, and what the losses have to do with likelihood."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.common.one_dimension import make_mixture, quantile
from experiments.common.targets import make_target
from experiments.theory.claim import Claim, Context
from jaxdiff import (
    Mixture,
    denoisers,
    likelihood,
    losses,
    nn,
    plotting,
    predictions,
    processes,
    sample,
    samplers,
    timesteps,
)
from jaxdiff.plotting import ACCENT, INK, MUTED, SECOND
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, Key, PyTree

VP, FLOW = processes.vp(), processes.flow()


def ring() -> Mixture:
    """Return the eight modes on the circle."""
    mixture = make_target("mixture").mixture
    assert mixture is not None
    return mixture


def score_and_noise_are_one(ctx: Context) -> Claim:
    """The network's output: score and eps are the same up to -sigma."""
    mixture, num = ring(), 400
    t = VP.time_of_log_snr(jnp.asarray(2.0))

    @jax.jit
    def run(key: Key) -> tuple[Array, Array, Array]:
        key_data, key_noise = jax.random.split(key)
        x0 = mixture.sample(key_data, num)
        x_t = VP.alpha(t) * x0 + VP.sigma(t) * jax.random.normal(key_noise, x0.shape)
        x0_hat = mixture.denoiser(VP)(x_t, t)
        eps_hat = predictions.convert(VP, "x0", "eps", x0_hat, x_t, t)
        return x_t, eps_hat, mixture.diffuse(VP, t).score(x_t)

    x_t, eps_hat, score = jax.device_get(run(ctx.key(40)))
    sigma = float(VP.sigma(t))
    error = float(np.abs(eps_hat + sigma * score).max())
    figure, axis = plotting.new_figure(4.6, 4.2)
    few = slice(0, 70)
    axis.quiver(*x_t[few].T, *score[few].T, color=ACCENT, label="score", width=0.004)
    axis.quiver(*x_t[few].T, *eps_hat[few].T, color=SECOND, label="expected noise", width=0.004)
    axis.set(title="Score and expected noise point apart", xlabel="$x_1$", ylabel="$x_2$")
    axis.set_aspect("equal")
    axis.legend(loc="upper right", fontsize=8)
    plotting.save(figure, ctx.directory / "score_and_noise.png")
    return Claim(
        "The network outputs the noise of a step, which is -a grad log p.",
        "E[eps | x_t] + sigma grad log q(x_t) is 0 everywhere (1e-4, float32)",
        error,
        error < 1e-4,
        ("score_and_noise.png",),
    )


def train(
    ctx: Context, loss_fn: Any, params: PyTree, steps: int, batch_size: int, mixture: Mixture
) -> PyTree:
    """Train on fresh draws of a mixture; return the averaged parameters."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def run(params: PyTree, key: Key) -> PyTree:
        def step(carry: tuple, key: Key) -> tuple[tuple, None]:
            params, ema, state = carry
            key_data, key_loss = jax.random.split(key)
            batch = {"x0": mixture.sample(key_data, batch_size)}
            grads = jax.grad(lambda p: loss_fn(p, key_loss, batch)[0].mean())(params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            ema = jax.tree.map(lambda e, p: 0.99 * e + 0.01 * p, ema, params)
            return (params, ema, state), None

        carry = (params, params, optimizer.init(params))
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][1]

    return run(params, ctx.key(41))


def small_network(process: Process, width: int) -> tuple[PyTree, Apply]:
    """Return parameters and pure function of a perceptron in the plane."""
    params, apply = nn.functional(nn.MLP(2, width=width, depth=2, rngs=nnx.Rngs(0)))
    return params, nn.on_log_snr(apply, process.log_snr)


def noising_teaches_the_score(ctx: Context) -> Claim:
    """Denoising alone learns the exact score field."""
    mixture, process = ring(), VP
    params, apply = small_network(process, ctx.size(96, 16))
    times = timesteps.draw_log_snr(-6.0, 7.0)
    loss_fn = losses.denoising(apply, process, prediction="v", loss_on="eps", times=times)
    params = train(ctx, loss_fn, params, ctx.size(2000, 20), ctx.size(256, 32), mixture)
    denoise = denoisers.from_network(partial(apply, params), process, "v")
    levels = jnp.array([4.0, 2.0, 0.0, -2.0])

    @jax.jit
    @jax.vmap
    def compare(level: Array, key: Key) -> Array:
        t = process.time_of_log_snr(level)
        diffused = mixture.diffuse(process, t)
        x_t = diffused.sample(key, 2000)
        exact = diffused.score(x_t)
        error = denoisers.to_score(process, denoise)(x_t, t) - exact
        return jnp.mean(error**2) / jnp.mean(exact**2)

    errors = np.asarray(compare(levels, jax.random.split(ctx.key(42), len(levels))))
    places = jnp.linspace(-1.6, 1.6, 19)
    points = jnp.stack(jnp.meshgrid(places, places), -1).reshape(-1, 2)

    @jax.jit
    def fields() -> tuple[Array, Array]:
        t = process.time_of_log_snr(jnp.asarray(3.0))
        found = denoisers.to_score(process, denoise)(points, t)
        return found, mixture.diffuse(process, t).score(points)

    figure, axes = plotting.new_figure(8.4, 4.2, ncols=2, sharey=True)
    for axis, field, name in zip(axes, jax.device_get(fields()), ("learned", "exact"), strict=True):
        length = np.linalg.norm(field, axis=1)
        axis.quiver(*points.T, *field.T, length, cmap="viridis", clim=(0.0, 25.0))
        axis.set(title=f"{name} score, log-SNR 3", xlabel="$x_1$", aspect="equal")
    axes[0].set_ylabel("$x_2$")
    plotting.save(figure, ctx.directory / "learned_score.png")
    table = {f"log-SNR {level:g}": float(e) for level, e in zip(levels, errors, strict=True)}
    return Claim(
        "The score is learned from noising: what tells two steps apart is the gradient.",
        "mean squared error over mean square of the exact score below 0.05 at each noise level",
        table,
        float(errors.max()) < 0.05,
        ("learned_score.png",),
    )


def all_score_matching_is_one(ctx: Context) -> Claim:
    """Explicit, implicit, sliced and denoising score matching have one gradient."""
    mixture, num = ring(), ctx.size(3000, 300)
    times = timesteps.draw_log_snr(-2.0, 2.0)

    def apply(params: Array, x_t: Array, t: Array, cond: Any = None, *, key: Any = None) -> Array:
        x0_hat = jnp.tanh(params[0] * x_t + params[1])
        return predictions.convert(VP, "x0", "score", x0_hat, x_t, t)

    options: dict[str, Any] = {"prediction": "score", "times": times}
    score = denoisers.to_score(VP, mixture.denoiser(VP))
    makers = {
        "explicit": losses.explicit(apply, VP, score, **options),
        "implicit": losses.implicit(apply, VP, **options),
        "sliced": losses.sliced(apply, VP, **options),
        "denoising": losses.denoising(apply, VP, **options),
    }
    params = jnp.array([[0.8, 1.1], [0.3, -0.2]])

    @jax.jit
    @jax.vmap
    def gradients(key: Key) -> dict[str, Array]:
        key_data, key_loss = jax.random.split(key)
        x0 = mixture.sample(key_data, 16)
        return {
            name: jax.grad(lambda p, f=f: f(p, key_loss, {"x0": x0})[0].mean())(params)
            for name, f in makers.items()
        }

    found = jax.device_get(gradients(jax.random.split(ctx.key(43), num)))
    flat = {name: g.reshape(num, -1) for name, g in found.items()}
    means = {name: g.mean(0) for name, g in flat.items()}
    stderrs = {name: g.std(0) / math.sqrt(num) for name, g in flat.items()}
    apart = {
        name: float(
            np.abs(
                (flat[name] - flat["explicit"]).mean(0)
                / ((flat[name] - flat["explicit"]).std(0) / math.sqrt(num))
            ).max()
        )
        for name in flat
        if name != "explicit"
    }
    figure, axis = plotting.new_figure(6.4, 3.2)
    for i, name in enumerate(means):
        places = np.arange(4) + 0.2 * i - 0.3
        axis.bar(places, means[name], 0.18, yerr=2 * stderrs[name], label=name, capsize=2)
    axis.set(title="One gradient, four losses (± 2 s.e.)", xlabel="parameter", ylabel="gradient")
    axis.set_xticks(range(4))
    axis.legend(fontsize=8)
    plotting.save(figure, ctx.directory / "score_matching.png")
    return Claim(
        "Explicit score matching J = E 1/2 |s - grad log p|^2 can be had without knowing grad log "
        "p.",
        "gradients of implicit, sliced and denoising score matching within 4 standard errors of "
        "the explicit one's",
        apart,
        max(apart.values()) < 4.0,
        ("score_matching.png",),
    )


def diffusion_bounds_the_likelihood(ctx: Context) -> Claim:
    """Weighted as the ELBO the loss bounds NLL; the simple loss does not."""
    mixture, num = make_mixture(), ctx.size(4000, 500)
    counts: tuple[int, ...] = (8, 32, 128, 512)
    t_end = VP.time_of_log_snr(jnp.asarray(8.0))
    x0 = mixture.sample(ctx.key(44), num)
    longest = counts[-1] if ctx.full else 128

    @jax.jit
    def bound(ts: Array, key: Key) -> tuple[Array, Array]:
        found = likelihood.elbo(key, VP, mixture.denoiser(VP), x0, ts)
        gap = mixture.log_prob(x0) - found.log_weight
        return gap.mean(), gap.std() / math.sqrt(num)

    counts = tuple(count for count in counts if count <= longest)
    grids = [timesteps.log_snr(VP, count, t_end) for count in counts]
    padded = [jnp.pad(ts, (0, longest + 1 - len(ts)), mode="edge") for ts in grids]
    gaps = np.array([jax.device_get(bound(ts, ctx.key(45))) for ts in padded])
    simple = losses.denoising(
        lambda params, x, t, c=None, *, key=None: predictions.convert(
            VP, "x0", "eps", mixture.denoiser(VP)(x, t), x, t
        ),
        VP,
    )
    unweighted = float(jax.jit(simple)(None, ctx.key(46), {"x0": x0})[0].mean())
    nll = float(-mixture.log_prob(x0).mean())
    figure, axis = plotting.new_figure(6.4, 3.2)
    axis.errorbar(counts, gaps[:, 0] + nll, 2 * gaps[:, 1], fmt="o-", color=ACCENT, label="ELBO")
    axis.axhline(nll, color=INK, linewidth=0.8, label="-log p, exact")
    axis.axhline(unweighted, color=SECOND, linestyle="--", label="unweighted loss")
    axis.set(title="The bound closes with the number of steps", xlabel="steps T", ylabel="nats")
    axis.set_xscale("log")
    axis.legend()
    plotting.save(figure, ctx.directory / "elbo.png")
    table: dict[str, Any] = {
        f"gap, T={n}": float(g) for n, g in zip(counts, gaps[:, 0], strict=True)
    }
    table |= {"nll": nll, "unweighted loss": unweighted}
    return Claim(
        "Diffusion maximises the log-likelihood. (It does under one weighting, of which it is a "
        "bound; the loss in use, unweighted, is no bound.)",
        "the ELBO of the exact denoiser is above -log p and comes at least 4 times closer from the "
        "coarsest to the finest T; the unweighted loss lies below -log p",
        table,
        bool((gaps[:, 0] > -4 * gaps[:, 1]).all())
        and gaps[-1, 0] < 0.25 * gaps[0, 0]
        and unweighted < nll,
        ("elbo.png",),
        "The bound belongs to the reverse chain's model; the probability flow's has an exact "
        "likelihood of its own.",
    )


def samplers_have_orders(ctx: Context) -> Claim:
    """What comes next: samplers. The error falls as a power of the number of steps."""
    mixture, sizes = make_mixture(), (16, 32, 64, 128)
    t_end = VP.time_of_log_snr(jnp.asarray(2.0))
    makers = {
        "ddim": (partial(samplers.ddim), 1),
        "heun": (partial(samplers.heun), 2),
        "dpm_solver_pp": (partial(samplers.dpm_solver_pp, order=2), 2),
        "unipc": (partial(samplers.unipc, order=2), 3),
    }
    q = jnp.linspace(0.05, 0.95, 19)
    grids = jnp.stack(
        [jnp.pad(timesteps.log_snr(VP, n, t_end), (0, sizes[-1] - n), mode="edge") for n in sizes]
    )

    @jax.jit
    def errors() -> dict[str, Array]:
        first, last = (quantile(mixture, VP, t, q)[:, None] for t in (grids[0, 0], t_end))

        def error(make: Any, ts: Array) -> Array:
            made = make(VP, mixture.denoiser(VP))
            return jnp.abs(sample(jax.random.key(0), made, first, ts) - last).max()

        return {name: jax.vmap(partial(error, make))(grids) for name, (make, _) in makers.items()}

    with jax.enable_x64(True):
        q, grids, t_end = (jnp.asarray(v, jnp.float64) for v in (q, grids, t_end))
        mixture = make_mixture()
        found = jax.device_get(errors())
    slopes = {name: float(np.log2(e[-2] / e[-1])) for name, e in found.items()}
    figure, axis = plotting.new_figure(6.4, 3.4)
    for name, values in found.items():
        axis.loglog(sizes, values, "o-", label=f"{name}: order {slopes[name]:.2f}")
    axis.set(title="Samplers against the exact flow", xlabel="steps", ylabel="largest error")
    axis.legend()
    plotting.save(figure, ctx.directory / "orders.png")
    return Claim(
        "Next: samplers. The step may be any solver of the flow.",
        "orders 1 (ddim), 2 (heun, dpm_solver_pp), 3 (unipc), each to 0.3",
        slopes,
        all(abs(slopes[name] - order) < 0.3 for name, (_, order) in makers.items()),
        ("orders.png",),
        "All samplers: `experiments.solvers`.",
    )


def flow_matching_is_the_same_flow_straighter(ctx: Context) -> Claim:
    """What comes next: flow matching. The same marginals, straighter paths when coupled."""
    mixture = ring()
    params, apply = small_network(FLOW, ctx.size(64, 16))
    steps, batch_size = ctx.size(2500, 10), ctx.size(256, 32)
    ts = timesteps.uniform(FLOW, 40)
    results, tracks = {}, {}
    for coupling in ("independent", "optimal_transport"):
        loss_fn = losses.flow_matching(apply, coupling=coupling)
        trained = train(ctx, loss_fn, params, steps, batch_size, mixture)

        @jax.jit
        def follow(trained: PyTree, key: Key) -> tuple[Array, Array]:
            x_T = FLOW.prior_sample(key, (256, 2))  # noqa: N806
            denoise = denoisers.from_network(partial(apply, trained), FLOW, "velocity")
            made = samplers.euler(FLOW, denoise)
            _, path = sample(key, made, x_T, ts, collect=made.value)
            path = jnp.concatenate([x_T[None], path])
            lengths = jnp.linalg.norm(jnp.diff(path, axis=0), axis=2).sum(0)
            chord = jnp.linalg.norm(path[-1] - path[0], axis=1)
            return path, lengths.sum() / chord.sum()

        path, ratio = jax.device_get(follow(trained, ctx.key(47)))
        tracks[coupling], results[coupling] = path, float(ratio)
    figure, axes = plotting.new_figure(8.4, 4.2, ncols=2, sharey=True)
    for axis, (name, path) in zip(axes, tracks.items(), strict=True):
        axis.plot(path[:, :60, 0], path[:, :60, 1], color=MUTED, linewidth=0.7)
        axis.plot(*path[-1].T, ".", color=ACCENT, markersize=4)
        title = f"{name.replace('_', ' ')}: length / chord {results[name]:.3f}"
        axis.set(title=title, xlabel="$x_1$", aspect="equal")
    axes[0].set_ylabel("$x_2$")
    plotting.save(figure, ctx.directory / "flow_matching.png")
    return Claim(
        "Next: flow matching, which regresses the velocity of straight paths.",
        "paths of the learned flow are longer than their chords; with noise and data of a batch "
        "coupled by optimal transport the excess is less than half",
        results,
        results["optimal_transport"] - 1.0 < 0.5 * (results["independent"] - 1.0),
        ("flow_matching.png",),
    )
