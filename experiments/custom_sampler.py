"""A sampler and three denoisers of one's own, beside the library's, on a mixture.

    python -m experiments.custom_sampler

The sampler is the midpoint method on the probability flow in the noise level sigma / alpha. The
networks are a Linen module, an Equinox module and a plain function; each holds the exact denoiser
of one Gaussian component of the data, so what every sampler should reach is known exactly.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp

from experiments import command
from jaxdiff import Mixture, Sampler, denoisers, processes, sample, samplers, timesteps
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Key

MEAN, STD = 0.7, 0.4
"""Of the data, one Gaussian: its probability flow is a shift and a scaling."""


def midpoint(process: Process, denoise: Denoiser) -> Sampler:
    """Make the midpoint method: order 2, two evaluations a step."""

    def level(t: Array) -> Array:
        return process.sigma(t) / process.alpha(t)

    def slope(y: Array, t: Array) -> Array:
        return (y - denoise(process.alpha(t) * y, t)) / level(t)

    def step(key: Key, x: Array, t: Array, s: Array) -> Array:
        y, middle = x / process.alpha(t), jnp.sqrt(level(t) * level(s))
        t_middle = process.time_of_log_snr(-2.0 * jnp.log(middle))
        y_middle = y + (middle - level(t)) * slope(y, t)
        return process.alpha(s) * (y + (level(s) - level(t)) * slope(y_middle, t_middle))

    return Sampler(init=lambda x_T: x_T, step=step, deterministic=True)


def exact_eps(process: Process, x_t: Array, t: Array) -> Array:
    """Return E[eps | x_t] of the data: a plain function that predicts eps."""
    alpha, variance = process.alpha(t), process.variance(t)
    return process.sigma(t) * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + variance)


class LinenNetwork(flax.linen.Module):
    """The same with its two numbers as Linen parameters."""

    process: Process

    @flax.linen.compact
    def __call__(self, x_t: Array, t: Array) -> Array:
        """Predict eps."""
        mean = self.param("mean", lambda _: jnp.asarray(MEAN))
        std = self.param("std", lambda _: jnp.asarray(STD))
        alpha, variance = self.process.alpha(t), self.process.variance(t)
        return self.process.sigma(t) * (x_t - alpha * mean) / (alpha**2 * std**2 + variance)


def equinox_network(process: Process) -> Callable[[Array, Array], Array] | None:
    """Return the same as an Equinox module, or None where Equinox is not installed."""
    try:
        import equinox
    except ImportError:
        return None

    class Network(equinox.Module):
        mean: Array
        std: Array

        def __call__(self, x_t: Array, t: Array) -> Array:
            alpha, variance = process.alpha(t), process.variance(t)
            return (
                process.sigma(t) * (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + variance)
            )

    return Network(jnp.asarray(MEAN), jnp.asarray(STD))


def compare(num_steps: int = 32, seed: int = 0) -> None:
    """Print the largest error of each network and sampler against the exact flow.

    Args:
        num_steps: Steps from noise to data.
        seed: Of the noise.
    """
    if num_steps < 1:
        raise command.Refusal(f"--num-steps must be at least 1; got {num_steps}.")
    process = processes.vp()
    linen = LinenNetwork(process)
    variables = linen.init(jax.random.key(0), jnp.zeros((1, 1)), jnp.asarray(1.0))
    networks: dict[str, Any] = {
        "function": functools.partial(exact_eps, process),
        "linen": functools.partial(linen.apply, variables),
        "equinox": equinox_network(process),
    }
    makers = {
        "midpoint (ours)": midpoint,
        "heun": samplers.heun,
        "dpm_solver_pp": samplers.dpm_solver_pp,
        "unipc": samplers.unipc,
    }
    t_end = 1e-2
    ts = timesteps.log_snr(process, num_steps, t_end)
    x_T = process.prior_sample(jax.random.key(seed), (1000, 1))  # noqa: N806
    exact = exact_flow(process, x_T, ts[0], ts[-1])
    print(f"{'network':<10} {'sampler':<18} {'largest error':>14}   ({num_steps} steps)")
    for name, network in networks.items():
        for sampler_name, make in makers.items():
            if network is None:
                print(f"{name:<10} {sampler_name:<18} {'not installed':>14}")
                continue

            @jax.jit
            def generate(
                key: Key, x_T: Array, ts: Array, network: Any = network, make: Any = make
            ) -> Array:
                denoise = denoisers.from_network(network, process, "eps")
                return sample(key, make(process, denoise), x_T, ts)

            error = jnp.abs(generate(jax.random.key(1), x_T, ts) - exact).max()
            print(f"{name:<10} {sampler_name:<18} {float(error):14.2e}")


def exact_flow(process: Process, x_t: Array, t: Array, s: Array) -> Array:
    """Return where the probability flow takes x_t: deviations shrink as the spread of q does."""
    data = Mixture(jnp.ones(1), jnp.full((1, 1), MEAN), jnp.full((1, 1, 1), STD**2))
    here, there = data.diffuse(process, t), data.diffuse(process, s)
    ratio = jnp.sqrt(there.covariances[0, 0, 0] / here.covariances[0, 0, 0])
    return there.means[0] + ratio * (x_t - here.means[0])


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("custom_sampler", {"compare": compare}, argv or ["compare"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
