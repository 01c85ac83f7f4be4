"""A sampler and three denoisers of one's own, beside the library's, on a mixture.

    python -m experiments.custom_sampler

The sampler is the midpoint method on the probability flow in the noise level sigma / alpha. The
networks are a Linen module, an Equinox module and a plain function; each holds the exact
prediction for a mixture of two Gaussians, so what every sampler should reach is known exactly.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp

from experiments.common import command, options
from experiments.common.one_dimension import MEANS, VARIANCES, WEIGHTS, make_mixture, quantile
from jaxdiff import Sampler, denoisers, processes, sample, samplers, timesteps
from jaxdiff.processes import Process
from jaxdiff.typing import Array, Denoiser, Key


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


def predict_eps(process: Process, mixture: Any, x_t: Array, t: Array) -> Array:
    """Return E[eps | x_t] for x_t (B, 1) and a mixture's (weights, means, variances), (2,) each."""
    weights, means, variances = mixture
    spread = process.alpha(t) ** 2 * variances + process.variance(t)
    apart = x_t - process.alpha(t) * means  # (B, 2)
    belongs = jax.nn.softmax(jnp.log(weights) - 0.5 * (jnp.log(spread) + apart**2 / spread))
    return process.sigma(t) * jnp.sum(belongs * apart / spread, axis=-1, keepdims=True)


def function_network(process: Process) -> Callable[[Array, Array], Array]:
    """Return a plain function."""
    mixture = jnp.array(WEIGHTS), jnp.array(MEANS), jnp.array(VARIANCES)
    return functools.partial(predict_eps, process, mixture)


class LinenModule(flax.linen.Module):
    """The mixture as three Linen parameters."""

    process: Process

    @flax.linen.compact
    def __call__(self, x_t: Array, t: Array) -> Array:
        """Predict eps."""
        weights = self.param("weights", lambda _: jnp.array(WEIGHTS))
        means = self.param("means", lambda _: jnp.array(MEANS))
        variances = self.param("variances", lambda _: jnp.array(VARIANCES))
        return predict_eps(self.process, (weights, means, variances), x_t, t)


def linen_network(process: Process) -> Callable[..., Any]:
    """Return a Linen module applied to its variables."""
    module = LinenModule(process)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 1)), jnp.asarray(1.0))
    return functools.partial(module.apply, variables)


def equinox_network(process: Process) -> Callable[[Array, Array], Array] | None:
    """Return an Equinox module, or None where Equinox is not installed."""
    try:
        import equinox
    except ImportError:
        return None

    class Module(equinox.Module):
        weights: Array
        means: Array
        variances: Array

        def __call__(self, x_t: Array, t: Array) -> Array:
            return predict_eps(process, (self.weights, self.means, self.variances), x_t, t)

    return Module(jnp.array(WEIGHTS), jnp.array(MEANS), jnp.array(VARIANCES))


NETWORKS: dict[str, Callable[[Process], Any]] = {
    "function": function_network,
    "linen": linen_network,
    "equinox": equinox_network,
}


def compare(num_steps: int = 32) -> None:
    """Print the largest error of each network and sampler against the exact flow.

    Args:
        num_steps: Steps from noise to data.
    """
    options.check_counts(num_steps=num_steps)
    process = processes.vp()
    makers = {
        "midpoint (ours)": midpoint,
        "heun": samplers.heun,
        "dpm_solver_pp": samplers.dpm_solver_pp,
        "unipc": samplers.unipc,
    }
    t_end = 1e-2
    ts = timesteps.log_snr(process, num_steps, t_end)
    q = jnp.linspace(0.02, 0.98, 49)
    x_T, exact = (quantile(make_mixture(), process, t, q)[:, None] for t in (ts[0], ts[-1]))  # noqa: N806
    print(f"{'network':<10} {'sampler':<18} {'largest error':>14}   ({num_steps} steps)")
    for name, build in NETWORKS.items():
        network = build(process)
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


def main(argv: list[str]) -> int:
    """Run the command line."""
    return command.run("custom_sampler", {"compare": compare}, argv or ["compare"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
