"""Ancestral sampling: draw from q(x_s | x_t, x0_hat), the reverse chain of DDPM."""

from jaxdiff import checks, forward, numerics
from jaxdiff.processes import Process
from jaxdiff.samplers.protocol import Sampler, solver, taken
from jaxdiff.typing import Array, Denoiser, Key


def ancestral(process: Process, denoise: Denoiser, variance: str = "posterior") -> Sampler:
    """Make the ancestral sampler.

    x_s is drawn around the mean of q(x_s | x_t, x0_hat); the step to sigma = 0 returns x0_hat
    without noise. Order 1 in the weak sense.

    Args:
        process: the forward process.
        denoise: the denoiser.
        variance: "posterior", that of q(x_s | x_t, x_0), exact for data of no variance; or
            "upper", that of q(x_t | x_s), exact for data of variance 1.

    Raises:
        ValueError: if `variance` is neither.

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 2 and section 3.2 for the two variances.
    """
    checks.choice("variance", variance, ("posterior", "upper"))
    denoise = taken(process, denoise)

    def step(key: Key, x_t: Array, t: Array, s: Array) -> Array:
        x0_hat = denoise(x_t, t)
        mean, std = forward.posterior(process, x_t, x0_hat, t, s)
        if variance == "upper":
            _, upper = forward.transition(process, x_t, s, t)
            std = numerics.sqrt(upper**2 * (process.variance(s) > 0))
        return mean + std * numerics.normal(key, x_t)

    return solver(process, denoise, step)
