r"""The four families with networks: what each is made of, trained by, sampled from and judged by.

Images are rows of D numbers in [-1, 1], dequantised anew at every step.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.common.methods import METHODS
from experiments.common.optimization import build_optimizer
from experiments.families.config import Config
from experiments.families.networks import Family, Pixels, Rows, perceptron
from jaxdiff import (
    data,
    denoisers,
    likelihood,
    losses,
    nn,
    numerics,
    processes,
    sample,
    timesteps,
    training,
)
from jaxdiff.processes import Process
from jaxdiff.training import networks
from jaxdiff.typing import Array, Batch, Denoiser, Key, LossFn, PyTree
from jaxdiff.variational import row_sum

# --- Variational autoencoder ----------------------------------------------------------------


def vae(config: Config, pixels: Pixels) -> Family:
    r"""Make a variational autoencoder: p(z) = N(0, I), p(x | z) and q(z | x) diagonal Gaussians.

    Both standard deviations are learned, the decoder's too, so that it is a density like the
    others' and its bound is in the same units.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), eqs. 3 and 10.
    """
    rngs, num_dims = nnx.Rngs(config.seed), pixels.num_dims
    encoder, encode = perceptron(config, num_dims, 2 * config.latent, rngs)
    decoder, decode = perceptron(config, config.latent, 2 * num_dims, rngs)
    lowest = math.log(0.25 * data.bin_width(pixels.num_levels))  # of a standardised pixel

    def gaussian(output: Array, low: float) -> tuple[Array, Array]:
        mean, raw = jnp.split(output, 2, axis=1)
        return mean, low * jax.nn.sigmoid(raw + 1.0)  # between exp(low) and 1

    def posterior(params: PyTree, x: Array, key: Key | None = None) -> tuple[Array, Array]:
        return gaussian(encode(params["encoder"], x, key), -5.0)

    def loss_fn(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        key_encode, key_z, key_decode = jax.random.split(key, 3)
        x = batch["x0"]
        mean, log_std = posterior(params, x, key_encode)
        z = mean + jnp.exp(log_std) * numerics.normal(key_z, mean)
        divergence = row_sum(0.5 * (mean**2 + jnp.exp(2.0 * log_std) - 1.0) - log_std)
        output = gaussian(decode(params["decoder"], z, key_decode), lowest)
        loss = divergence - log_normal(x, *output)
        return loss / num_dims, {"divergence": divergence}

    def log_weight(params: PyTree, key: Key, x: Array) -> Array:
        mean, log_std = posterior(params, x)
        z = mean + jnp.exp(log_std) * numerics.normal(key, mean)
        joint = log_normal(x, *gaussian(decode(params["decoder"], z), lowest))
        joint += log_normal(z, jnp.zeros_like(z), jnp.zeros_like(z))
        return joint - log_normal(z, mean, log_std)

    def draw(params: PyTree, key: Key) -> Array:
        key_z, key_x = jax.random.split(key)
        z = numerics.normal(key_z, jnp.zeros((config.num_samples, config.latent)))
        mean, log_std = gaussian(decode(params["decoder"], z), lowest)
        return pixels.restore(mean + jnp.exp(log_std) * numerics.normal(key_x, mean))

    optimizer = build_optimizer(config)
    return Family(
        num_steps=config.num_steps,
        state=training.init(
            {"encoder": encoder, "decoder": decoder}, optimizer, ema_decay=config.ema_decay
        ),
        update=training.make_update(pixels.loss(loss_fn), optimizer, ema_decay=config.ema_decay),
        draw=draw,
        calls=1,
        elbo=pixels.log_density(log_weight),
        log_weight=pixels.log_density(log_weight),
    )


def log_normal(x: Array, mean: Array, log_std: Array) -> Array:
    """Return log N(x; mean, diag(exp(2 log_std))) in nats (B,), all (B, D)."""
    error = (x - mean) * jnp.exp(-log_std)
    return -row_sum(0.5 * error**2 + log_std + 0.5 * math.log(2.0 * math.pi))


# --- Generative adversarial network ---------------------------------------------------------


def gan(config: Config, pixels: Pixels) -> Family:
    r"""Make a GAN: the non-saturating losses, with a penalty on the slope at real images.

        discriminator: softplus(-d(x)) + softplus(d(g(z))) + gamma / 2 ||grad_x d(x)||^2
        generator:     softplus(-d(g(z)))

    Generated images get the noise of dequantisation too, or the discriminator would look for it
    and nothing else. An update moves the discriminator, then the generator against it.

    Source: Goodfellow et al. 2014 (arXiv:1406.2661), section 3; Mescheder et al. 2018
    (arXiv:1801.04406), eq. 9.
    """
    rngs, num_dims, num_levels = nnx.Rngs(config.seed), pixels.num_dims, pixels.num_levels
    generator, generate = perceptron(config, config.latent, num_dims, rngs)
    discriminator, discriminate = perceptron(config, num_dims, 1, rngs)
    half_bin = 0.5 * data.bin_width(num_levels)

    def imagine(params: PyTree, key: Key, num: int) -> Array:
        z = numerics.normal(key, jnp.zeros((num, config.latent)))
        return jnp.tanh(generate(params["generator"], z))

    def fake(params: PyTree, key: Key, num: int) -> Array:
        key_z, key_u = numerics.split(key)
        x = imagine(params, key_z, num)
        return x + half_bin * (2.0 * jax.vmap(uniform_like)(numerics.row_keys(key_u, num), x) - 1.0)

    def uniform_like(key: Key, x: Array) -> Array:
        return jax.random.uniform(key, x.shape, x.dtype)

    def logit(params: PyTree, x: Array) -> Array:
        return discriminate(params["discriminator"], x)[:, 0]

    def discriminator_loss(
        params: PyTree, key: Key, batch: Batch
    ) -> tuple[Array, dict[str, Array]]:
        def total(x: Array) -> tuple[Array, Array]:
            logits = logit(params, x)
            return jnp.sum(logits), logits

        key_data, key_fake = jax.random.split(key)
        real = data.dequantize(key_data, batch["x0"], num_levels)
        slope, on_real = jax.grad(total, has_aux=True)(real)
        on_fake = logit(params, fake(params, key_fake, len(real)))
        loss = jax.nn.softplus(-on_real) + jax.nn.softplus(on_fake)
        return loss + 0.5 * config.slope_penalty * row_sum(slope**2), {}

    def generator_loss(params: PyTree, key: Key, batch: Batch) -> tuple[Array, dict[str, Array]]:
        return jax.nn.softplus(-logit(params, fake(params, key, len(batch["x0"])))), {}

    def update_of(part: str, loss_fn: LossFn) -> training.GradientUpdate:
        schedule = optax.cosine_decay_schedule(config.gan_learning_rate, config.gan_steps)
        optimizer = optax.adam(schedule, b1=0.0, b2=0.99)
        return training.make_update(loss_fn, optimizer, ema_decay=config.ema_decay, part=part)

    update = networks.alternate(
        discriminator=update_of("discriminator", discriminator_loss),
        generator=update_of("generator", generator_loss),
    )
    return Family(
        num_steps=config.gan_steps,
        state=update.init({"generator": generator, "discriminator": discriminator}),
        update=update,
        draw=lambda params, key: imagine(params, key, config.num_samples),
        calls=1,
    )


# --- Diffusion and flow matching ------------------------------------------------------------


def ddpm(config: Config, pixels: Pixels) -> Family:
    """Make a diffusion model on the chain of DDPM, its loss weighted as the bound is.

    Sampled by the reverse chain, whose ELBO is bounded; the exact likelihood is the probability
    flow's, another model with the same network.

    Source: Ho et al. 2020 (arXiv:2006.11239); the weighting: Kingma et al. 2021
    (arXiv:2107.00630), eq. 18.
    """
    chain = processes.ddpm(config.chain_steps)
    draws = timesteps.draw_log_snr(config.log_snr_low, config.log_snr_high)

    def make_loss(apply: Any) -> LossFn:
        return losses.denoising(apply, chain, prediction="v", loss_on="eps", times=draws)

    family = diffusion(config, pixels, chain, "v", make_loss, config.ddpm_sampler)

    def bound_on(grid: Callable[..., Array]) -> Rows:
        ts = grid(chain, config.elbo_steps, t_end=1.0 / config.chain_steps)

        def elbo(params: PyTree, key: Key, x: Array) -> Array:
            return likelihood.elbo(key, chain, family.denoiser(params), x, ts).log_weight

        return pixels.log_density(elbo)

    return family.made._replace(
        elbo=bound_on(timesteps.uniform),  # the chain's own nodes
        fine_elbo=bound_on(timesteps.log_snr),
    )


def flow(config: Config, pixels: Pixels) -> Family:
    """Make a flow-matching model: straight paths, uniform times, the error of the velocity.

    Source: Lipman et al. 2023 (arXiv:2210.02747), eq. 14.
    """
    process = processes.flow()

    def make_loss(apply: Any) -> LossFn:
        return losses.flow_matching(apply, process)

    return diffusion(config, pixels, process, "velocity", make_loss, config.flow_sampler).made


class Diffusion(NamedTuple):
    """A family that is a denoiser: as such, and (params -> denoiser)."""

    made: Family
    denoiser: Callable[[PyTree], Denoiser]


def diffusion(
    config: Config,
    pixels: Pixels,
    process: Process,
    prediction: str,
    make_loss: Callable[[Any], LossFn],
    sampler: tuple[str, int],
) -> Diffusion:
    """Make what diffusion and flow matching share: network, sampler, probability flow."""
    module = nn.MLP(
        pixels.num_dims,
        width=config.width,
        depth=config.depth,
        dropout=config.dropout,
        rngs=nnx.Rngs(config.seed),
    )
    params, apply = nn.functional(module)
    apply = nn.on_log_snr(apply, process.log_snr)
    optimizer = build_optimizer(config)
    method, num_steps = METHODS[sampler[0]], sampler[1]

    def denoiser(params: PyTree) -> Denoiser:
        def network(x_t: Array, t: Array) -> Array:
            return apply(params, x_t, t)

        return denoisers.from_network(network, process, prediction)

    def draw(params: PyTree, key: Key) -> Array:
        key_start, key_path = jax.random.split(key)
        x_T = process.prior_sample(key_start, (config.num_samples, pixels.num_dims))  # noqa: N806
        ts = timesteps.uniform(process, num_steps, t_start=method.start(process))
        return pixels.restore(sample(key_path, method.make(process, denoiser(params)), x_T, ts))

    def log_prob(params: PyTree, key: Key, x: Array) -> Array:
        return likelihood.log_prob(
            process,
            denoiser(params),
            x,
            key=key,
            num_probes=config.num_probes,
            rtol=config.eval_tolerance,
            atol=config.eval_tolerance,
            t_min=process.time_of_log_snr(jnp.asarray(config.log_snr_high, x.dtype)),
        )[0]

    family = Family(
        num_steps=config.num_steps,
        state=training.init(params, optimizer, ema_decay=config.ema_decay),
        update=training.make_update(
            pixels.loss(make_loss(apply)), optimizer, ema_decay=config.ema_decay
        ),
        draw=draw,
        calls=method.calls(num_steps),
        log_prob=pixels.log_density(log_prob),
    )
    return Diffusion(family, denoiser)


MAKERS: dict[str, Callable[[Config, Pixels], Family]] = {
    "VAE": vae,
    "GAN": gan,
    "DDPM": ddpm,
    "flow matching": flow,
}
