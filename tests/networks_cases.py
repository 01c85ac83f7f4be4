"""Updates that know more than their parameters: a GAN, and a student of a frozen teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import numerics
from jaxdiff.training import make_update, networks

NUM_DIMS, LATENT, WIDTH = 4, 2, 16
CRITIC = optax.adam(3e-3, b1=0.0, b2=0.9)
GENERATOR = optax.adamw(1e-3, b1=0.5)
STUDENT = optax.adam(1e-2)


def perceptron(seed, num_in, num_out, dtype="float64"):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    return {"w": draw(num_in, WIDTH), "b": jnp.zeros((1, WIDTH), dtype), "v": draw(WIDTH, num_out)}


def evaluate(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


# --- A GAN ----------------------------------------------------------------------------------


def gan_params(dtype="float64"):
    return {
        "critic": perceptron(0, NUM_DIMS, 1, dtype),
        "generator": perceptron(1, LATENT, NUM_DIMS, dtype),
    }


def imagine(params, key, like):
    return evaluate(params["generator"], numerics.normal(key, like[:, :LATENT]))


def critic_loss(params, key, batch):
    real, fake = batch["x0"], imagine(params, key, batch["x0"])
    on_real, on_fake = (evaluate(params["critic"], x)[:, 0] for x in (real, fake))
    return jax.nn.softplus(-on_real) + jax.nn.softplus(on_fake), {"margin": on_real - on_fake}


def generator_loss(params, key, batch):
    fake = imagine(params, key, batch["x0"])
    return jax.nn.softplus(-evaluate(params["critic"], fake)[:, 0]), {}


def gan(every=None, losses=(critic_loss, generator_loss), **options):
    def of(part, loss, optimizer, decay):
        return make_update(loss, optimizer, ema_decay=decay, part=part, **options)

    return networks.alternate(
        critic=of("critic", losses[0], CRITIC, 0.5),
        generator=of("generator", losses[1], GENERATOR, 0.9),
        every=every,
    )


# --- A student of a teacher -----------------------------------------------------------------


def teacher(dtype="float64"):
    return {"teacher": perceptron(2, NUM_DIMS, NUM_DIMS, dtype), "offset": jnp.arange(2)}


def student_params(dtype="float64"):
    return perceptron(3, NUM_DIMS, NUM_DIMS, dtype)


def statistics(dtype="float64"):
    return {"square": jnp.ones((1, NUM_DIMS), dtype)}


def student_loss_of(state):
    """Follow the teacher, and from step 5 one's own average too; inputs scaled by their size."""

    def loss_fn(params, key, batch):
        x_t = batch["x0"] + numerics.normal(key, batch["x0"])
        x = x_t / jnp.sqrt(state.statistics["square"])
        target = evaluate(state.frozen["teacher"], x_t) + state.frozen["offset"][1]
        own = evaluate(state.ema, x)
        share = jnp.where(state.step >= 5, 0.5, 0.0).astype(x.dtype)
        error = evaluate(params, x) - (1 - share) * target - share * own
        square = jnp.mean(x_t**2, axis=0, keepdims=True)
        new = {"square": 0.9 * state.statistics["square"] + 0.1 * square}
        return jnp.sum(error**2, axis=1), {"size": jnp.sum(x_t**2, axis=1)}, new

    return loss_fn


def student(**options):
    return make_update(loss_of=student_loss_of, optimizer=STUDENT, ema_decay=0.9, **options)
