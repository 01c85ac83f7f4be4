"""The forward process, its closed form, and the step back."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.one_dimension import make_mixture
from experiments.theory.claim import Claim, Context
from experiments.theory.estimation import clip_scale
from jaxdiff import (
    data,
    forward,
    likelihood,
    plotting,
    processes,
    sample,
    samplers,
    timesteps,
)
from jaxdiff.plotting import ACCENT, INK, MUTED, SECOND
from jaxdiff.processes import Process
from jaxdiff.typing import Array

DELTA = np.linspace(1e-4, 0.02, 1000)
"""delta_t, the betas of DDPM; gamma_t = 1 - delta_t."""


def digits(num: int) -> np.ndarray:
    """Return real images as rows (num, 64) in [-1, 1]."""
    images = data.load_images("digits", "train")
    centers = data.centers(jnp.asarray(images.levels[:num]), images.num_levels)
    return np.asarray(centers).reshape(num, -1)


def flow_has_an_exact_likelihood(ctx: Context) -> Claim:
    """Along dx = [-b x - a grad log p] dt the density changes by its divergence."""
    mixture = make_mixture()
    x = jnp.linspace(-2.0, 2.0, ctx.size(81, 21))[:, None]
    found, exact = {}, {}
    for name, process in (("vp", processes.vp()), ("flow", processes.flow())):
        t_min = likelihood.default_t_min(process)

        @jax.jit
        def run(process: Process = process, t_min: Array = t_min) -> tuple[Array, ...]:
            denoise = mixture.denoiser(process)
            log_prob, x_T = likelihood.log_prob(process, denoise, x, t_min=t_min)  # noqa: N806
            sigma = process.sigma(jnp.asarray(process.t_max))
            prior = -0.5 * (x_T / sigma) ** 2 - jnp.log(sigma * jnp.sqrt(2.0 * jnp.pi))
            ends = mixture.diffuse(process, process.t_max).log_prob(x_T)
            start = mixture.diffuse(process, t_min).log_prob(x)
            return log_prob, prior[:, 0], ends, start

        log_prob, prior, ends, start = jax.device_get(run())
        found[name], exact[name] = log_prob, start + prior - ends
    errors = {name: float(np.abs(found[name] - exact[name]).max()) for name in found}
    figure, axis = plotting.new_figure(6.4, 3.2)
    axis.plot(x[:, 0], exact["flow"], color=INK, linewidth=3, alpha=0.3, label="closed form")
    for name, style in (("vp", "--"), ("flow", ":")):
        axis.plot(x[:, 0], found[name], style, label=f"{name}: by the probability flow")
    axis.set(title="Exact likelihood along the probability flow", xlabel="x")
    axis.set_ylabel("log p(x), nats")
    axis.legend()
    plotting.save(figure, ctx.directory / "exact_likelihood.png")
    return Claim(
        "The probability-flow ODE dx = [-b(t) x - a(t) grad log p(x)] dt carries the density: its "
        "likelihood is exact.",
        "the largest difference to the closed form below 1e-3 nats (float32, the prior's mismatch "
        "taken out)",
        errors,
        max(errors.values()) < 1e-3,
        ("exact_likelihood.png",),
    )


def decay_keeps_the_variance(ctx: Context) -> Claim:
    """Without the -b x term the variance grows; with it x_T is N(0, I)."""
    x0 = digits(ctx.size(1500, 600))
    x0 = x0 - x0.mean(0)
    x0 = x0 / x0.std()
    generator = np.random.default_rng([ctx.seed, 30])
    with_decay = without = x0
    variances = [(1.0, 1.0)]
    means = [(1.0, 1.0)]
    for delta in DELTA:
        z = generator.normal(size=x0.shape)
        with_decay = np.sqrt(1.0 - delta) * with_decay + np.sqrt(delta) * z
        without = without + np.sqrt(delta) * z
        variances.append((float(with_decay.var()), float(without.var())))
        means.append((float((with_decay * x0).mean()), float((without * x0).mean())))
    table, kept = np.array(variances), np.array(means)
    last = {"with decay": table[-1, 0], "without": table[-1, 1], "signal left": kept[-1, 0]}
    figure, axes = plotting.new_figure(9.0, 3.2, ncols=2)
    for i, (name, color) in enumerate((("with decay (VP)", ACCENT), ("without (VE)", SECOND))):
        axes[0].plot(table[:, i], color=color, label=name)
        axes[1].plot(kept[:, i], color=color, label=name)
    axes[0].plot(1.0 + np.concatenate([[0.0], np.cumsum(DELTA)]), ":", color=INK, label="1 + sum δ")
    axes[0].set(title="Variance of $x_t$, real digits", xlabel="step t", ylabel="variance a pixel")
    axes[1].set(title="What is left of $x_0$", xlabel="step t", ylabel="mean of $x_t x_0$")
    axes[0].legend()
    plotting.save(figure, ctx.directory / "decay.png")
    return Claim(
        "Without the decay -b x the variance grows and x_T is not N(0, I); with it, it is.",
        "on digits scaled to variance 1, after 1000 steps: 1 with decay, 1 + sum delta = "
        f"{1 + DELTA.sum():.2f} without (both within 0.05), signal left below 0.02",
        {name: float(value) for name, value in last.items()},
        abs(last["with decay"] - 1.0) < 0.05
        and abs(last["without"] - 1.0 - DELTA.sum()) < 0.05 * (1.0 + DELTA.sum())
        and abs(last["signal left"]) < 0.02,
        ("decay.png",),
    )


def steps_compose_to_the_closed_form(ctx: Context) -> Claim:
    """T transitions are q(x_t | x_0) = N(sqrt(gbar_t) x_0, dbar_t I)."""
    ddpm, x0 = processes.ddpm(), jnp.ones((1, 1))

    @jax.jit
    def compose() -> tuple[Array, Array, Array, Array]:
        def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], tuple]:
            mean, variance = carry
            s, t = i / 1000, (i + 1) / 1000
            scaled, std = forward.transition(ddpm, mean, s, t)
            ratio = scaled / mean
            new = scaled, ratio**2 * variance + std**2
            return new, new

        _, (means, variances) = jax.lax.scan(step, (x0, jnp.zeros((1, 1))), jnp.arange(1000.0))
        times = jnp.arange(1, 1001) / 1000
        closed = forward.marginal(ddpm, jnp.ones((1000, 1)), times)
        return means[:, 0, 0], variances[:, 0, 0], closed[0][:, 0], closed[1][:, 0] ** 2

    means, variances, closed_means, closed_variances = jax.device_get(compose())
    gbar = np.cumprod(1.0 - DELTA)
    error = max(np.abs(means - closed_means).max(), np.abs(variances - closed_variances).max())
    own = float(np.abs(closed_means**2 - gbar).max())
    figure, axis = plotting.new_figure(6.4, 3.2)
    axis.plot(closed_means**2, color=ACCENT, label=r"$\bar\gamma_t$, closed form")
    axis.plot(closed_variances, color=SECOND, label=r"$\bar\delta_t$, closed form")
    axis.plot(np.arange(1000)[::50], means[::50] ** 2, "o", color=ACCENT, label="t single steps")
    axis.plot(np.arange(1000)[::50], variances[::50], "o", color=SECOND)
    axis.set(title="q($x_t$ | $x_0$): signal and noise", xlabel="step t", ylabel="share")
    axis.legend()
    plotting.save(figure, ctx.directory / "closed_form.png")
    measured = {
        "chain against closed form": float(error),
        "closed form against the product of gamma": own,
        "gbar_T": float(gbar[-1]),
        "dbar_T": float(closed_variances[-1]),
    }
    return Claim(
        "T transitions N(sqrt(gamma_t) x, delta_t I) compose to N(sqrt(gbar_t) x_0, dbar_t I); for "
        "large T gbar goes to 0 and dbar to 1.",
        "differences below 1e-5 (float32); gbar_T below 1e-4",
        measured,
        float(error) < 1e-5 and own < 1e-5 and gbar[-1] < 1e-4,
        ("closed_form.png",),
    )


def the_step_back_undoes_decay_and_noise(ctx: Context) -> Claim:
    """x_{t-1} = x_t + b(t) x_t + a(t) grad log p(x_t): a and b read off the sampler."""
    ddpm = processes.ddpm()
    times = jnp.arange(2, 1001) / 1000  # the step to t = 0 returns x0_hat

    @jax.jit
    @jax.vmap
    def read_off(t: Array) -> tuple[Array, Array]:
        def mean_of(x: Array, score: Array) -> Array:
            x0_hat = (x + ddpm.variance(t) * score) / ddpm.alpha(t)  # Tweedie
            mean, _ = forward.posterior(ddpm, x[None], x0_hat[None], t, t - 1e-3)
            return mean[0]

        zero, one = jnp.zeros(1), jnp.ones(1)
        return mean_of(one, zero)[0] - 1.0, mean_of(zero, one)[0]

    with jax.enable_x64(False):
        b, a = (np.asarray(v) for v in read_off(times))
    gamma = 1.0 - DELTA[1:]
    errors = {
        "b(t) - (1 / sqrt(gamma) - 1)": float(np.abs(b - (gamma**-0.5 - 1.0)).max()),
        "a(t) - delta / sqrt(gamma)": float(np.abs(a - DELTA[1:] / np.sqrt(gamma)).max()),
    }
    figure, axis = plotting.new_figure(6.4, 3.2)
    axis.plot(a, color=ACCENT, label="a(t): towards the data")
    axis.plot(b, color=SECOND, label="b(t): undoing the decay")
    axis.plot(np.arange(999)[::60], (DELTA[1:] / np.sqrt(gamma))[::60], "o", color=ACCENT)
    axis.plot(np.arange(999)[::60], (gamma**-0.5 - 1.0)[::60], "o", color=SECOND)
    axis.plot([], [], "o", color=MUTED, label="published")
    axis.set(title="The DDPM step: x + b(t) x + a(t) score", xlabel="step t", ylabel="coefficient")
    axis.legend()
    plotting.save(figure, ctx.directory / "reverse_step.png")
    return Claim(
        "The step back undoes the decay, then removes noise: x + b(t) x + a(t) grad log p(x).",
        "a = delta / sqrt(gamma), b = 1 / sqrt(gamma) - 1, as DDPM has them (1e-5); 0 < b < 1",
        errors | {"largest b": float(b.max())},
        max(errors.values()) < 1e-5 and b.min() > 0.0 and b.max() < 1.0,
        ("reverse_step.png",),
    )


def images_go_to_noise_and_back(ctx: Context) -> Claim:
    """Noise strips: images to noise and back, by the exact flow of a fitted mixture."""
    from sklearn.mixture import GaussianMixture

    from jaxdiff import Mixture

    flow, num = processes.cosine(), ctx.size(8, 4)
    images = digits(ctx.size(1500, 300))
    fitted = GaussianMixture(ctx.size(10, 2), reg_covar=1e-3, random_state=ctx.seed).fit(images)
    covariances = 0.5 * (fitted.covariances_ + fitted.covariances_.swapaxes(1, 2))
    mixture = Mixture(
        *(jnp.asarray(v, jnp.float32) for v in (fitted.weights_, fitted.means_, covariances))
    )
    steps = ctx.size(100, 40)
    ts = timesteps.uniform(flow, steps)

    @jax.jit
    def there_and_back(x0: Array, key: Array) -> tuple[Array, Array, Array]:
        made = samplers.heun(flow, mixture.denoiser(flow))
        noise = samplers.encode(made, x0, ts[::-1])
        back, path = sample(key, made, noise, ts, collect=made.value)
        drawn, dreamt = sample(key, made, flow.prior_sample(key, x0.shape), ts, collect=made.value)
        return back, path, dreamt

    x0 = images[:num]
    back, path, dreamt = jax.device_get(there_and_back(jnp.asarray(x0), ctx.key(31)))
    error = float(np.sqrt(np.mean((back - x0) ** 2)))
    kept = np.linspace(0, steps - 1, 9).round().astype(int)
    plotting.save_strip(
        ctx.directory / "back.png",
        clip_scale(np.concatenate([path[kept[::-1]], path[kept]])[::1]),
        [f"{float(ts[i + 1]):.2f}" for i in [*kept[::-1], *kept]],
        "Images to noise and back, by the probability flow",
        "time t",
    )
    frames = clip_scale(np.concatenate([path[::-1], path])[:: max(1, steps // 20)])
    plotting.save_animation(ctx.directory / "noising.gif", frames, num_columns=num)
    plotting.save_animation(
        ctx.directory / "dreaming.gif", clip_scale(dreamt[:: max(1, steps // 20)]), num_columns=num
    )
    return Claim(
        "From image to noise and back: the flow is a bijection.",
        "real digits encoded to noise and decoded again differ by less than 0.02 a pixel (r.m.s.)",
        error,
        error < 0.02,
        ("back.png", "noising.gif", "dreaming.gif"),
        f"The denoiser is the exact one of a Gaussian mixture of digits; {steps} Heun steps each "
        "way.",
    )
