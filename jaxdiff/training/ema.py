r"""Moving averages of the parameters: how fast they forget, and making others afterwards.

A power-function average of width s remembers a fixed share of the run, however long it is: at step
t it weighs the parameters theta(1..t) by

    w_t(i) = (i^(g + 1) - (i - 1)^(g + 1)) / t^(g + 1),   s = sqrt(g + 1) / ((g + 2) sqrt(g + 3)),

which the recursion ema <- b ema + (1 - b) theta gives with b(t) = (1 - 1/t)^(g + 1). Its profile is
close to (g + 1) / t^(g + 1) tau^g on [0, t], with standard deviation s t. The average of any other
width, at any earlier step, is nearly a linear combination of a few that were kept, with the
weights of a least-squares fit of their profiles.

Source: Karras et al. 2024 (arXiv:2312.02696), section 3: eq. 2 (profile), the recursion and the
width in section 3.1, the fit in section 3.2. The discrete weights above are what their recursion
gives.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.typing import Array, PyTree

MAX_STD = 1.0 / (2.0 * math.sqrt(3.0))
"""The width of the average that weighs all steps alike, g = 0."""


class PowerDecay(NamedTuple):
    """The decay of a power-function average, for `make_update`.

    Attributes:
        std: the profile's standard deviation over the length of the run, in (0, 0.288].
    """

    std: float

    def __call__(self, step: Array) -> Array:
        """Return b(t) of the update that makes step t = 1, 2, ..."""
        t = jnp.asarray(step, jnp.float32)
        return jnp.exp((exponent(self.std) + 1.0) * jnp.log1p(-1.0 / t))


class Warmup(NamedTuple):
    """A decay that rises to a constant one, min(decay, (1 + t) / (10 + t)), for `make_update`.

    The average of a constant decay holds decay^t of the initial parameters; this one forgets
    them as t^-9 while it rises.

    Attributes:
        decay: the constant one, in [0, 1].

    Source: `num_updates` of TensorFlow's `tf.train.ExponentialMovingAverage`; t counts the update
    that is averaged, as in the code of Song et al. 2021 (arXiv:2011.13456).
    """

    decay: float

    def __call__(self, step: Array) -> Array:
        """Return the decay of the update that makes step t = 1, 2, ..."""
        t = jnp.asarray(step, jnp.float32)
        return jnp.minimum(self.decay, (1.0 + t) / (10.0 + t))


Decay: TypeAlias = float | PowerDecay | Warmup
"""How one average forgets."""
EmaDecay: TypeAlias = Decay | Mapping[str, Decay]
"""One decay, or several by name."""


def decay_at(decay: Decay, step: Array) -> float | Array:
    """Return the d of ema <- d ema + (1 - d) params in the update that makes step `step`."""
    return decay(step) if isinstance(decay, PowerDecay | Warmup) else decay


def check_decay(ema_decay: EmaDecay) -> Mapping[str, Decay] | None:
    """Check decays; return them if they are named.

    Raises:
        ValueError: if a decay is outside [0, 1], or a width outside (0, 0.288].
    """
    named = ema_decay if isinstance(ema_decay, Mapping) else {"": ema_decay}
    for name, decay in named.items():
        which = f"`ema_decay[{name!r}]`" if name else "`ema_decay`"
        if isinstance(decay, PowerDecay):
            _check_std(decay.std, f"{which}.std")
        elif isinstance(decay, Warmup):
            checks.number(f"{which.strip('`')}.decay", decay.decay, 0.0, 1.0)
        else:
            checks.number(which.strip("`"), decay, 0.0, 1.0)
    return named if isinstance(ema_decay, Mapping) else None


def start(params: PyTree, ema_decay: EmaDecay) -> PyTree:
    """Return the averages before the first update: copies of `params`, in float32 at least.

    Raises:
        ValueError: if a decay is out of its range.
    """
    names = check_decay(ema_decay)

    def wide(leaf: Array) -> Array:
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)

    if names is None:
        return jax.tree.map(wide, params)
    return {name: jax.tree.map(wide, params) for name in names}


def move(averages: PyTree, params: PyTree, ema_decay: EmaDecay, step: Array) -> PyTree:
    """Return the averages after the update that makes step `step` = 1, 2, ... and `params`."""
    if isinstance(ema_decay, Mapping):
        return {
            name: move(averages[name], params, decay, step) for name, decay in ema_decay.items()
        }
    d = decay_at(ema_decay, step)

    def of_leaf(e: Array, p: Array) -> Array:
        return (d * e + (1.0 - d) * p.astype(e.dtype)).astype(e.dtype)

    return jax.tree.map(of_leaf, averages, params)


def initial_share(decay: Decay, num_steps: int) -> float:
    """Return how much of an average is still the parameters before the first of `num_steps`.

    It is decay^num_steps, or the product of decays that rise; a power-function average forgets
    them at once.
    """
    if isinstance(decay, PowerDecay):
        return 0.0
    if isinstance(decay, Warmup):
        t = np.arange(1.0, num_steps + 1.0)
        return float(np.prod(np.minimum(decay.decay, (1.0 + t) / (10.0 + t))))
    return float(decay) ** num_steps


def exponent(std: float) -> float:
    """Return the g of a power-function average of width `std`.

    Raises:
        ValueError: if `std` is outside (0, 0.288].
    """
    _check_std(std, "`std`")
    # (g + 2)^2 (g + 3) s^2 = g + 1, whose one root at least 0 is the largest
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return max(0.0, float(roots.real.max()))


def post_hoc_weights(
    steps: Sequence[int], stds: Sequence[float], step: int, std: float
) -> np.ndarray:
    """Return how to combine kept averages into one that was not kept.

    Args:
        steps: when each average was kept, (N,), each at least 1.
        stds: the width of each, (N,).
        step: when the wanted one ends: 1 to the last of `steps`.
        std: its width.

    Returns:
        The weights (N,), float64.

    Raises:
        ValueError: if nothing is kept, the lengths differ, a step is out of its range or a width
            outside (0, 0.288].

    Source: Karras et al. 2024 (arXiv:2312.02696), section 3.2 and appendix C.
    """
    if not len(steps) or len(steps) != len(stds):
        raise ValueError(f"`steps` and `stds` must match; got {len(steps)} and {len(stds)}.")
    if min(steps) < 1 or not 1 <= step <= max(steps):
        raise ValueError(f"`step` must lie in 1..{max(steps)}, the last one kept; got {step}.")
    times = np.array([*steps, step], np.float64) / max(steps)
    powers = np.array([exponent(each) for each in (*stds, std)])
    # <p_i, p_j> of p(tau) = (g + 1) / t^(g + 1) tau^g, the profiles scaled to unit norm
    total = powers[:, None] + powers[None, :] + 1.0
    shorter = np.minimum(times[:, None], times[None, :])
    longer = np.maximum(times[:, None], times[None, :])
    of_longer = np.where(times[:, None] >= times[None, :], powers[:, None], powers[None, :])
    product = (powers[:, None] + 1.0) * (powers[None, :] + 1.0) / total
    product = product * (shorter / longer) ** of_longer / longer
    norms = np.sqrt(np.diag(product))
    gram = product / norms[:, None] / norms[None, :]
    weights = np.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1], rcond=1e-13)[0]
    return weights * norms[-1] / norms[:-1]


def combine(weights: Sequence[float] | np.ndarray, trees: Iterable[PyTree]) -> PyTree:
    """Return the weighted sum of trees, which may be read one by one.

    Args:
        weights: (N,).
        trees: N trees of one structure.

    Returns:
        A tree like them, summed in float64.

    Raises:
        ValueError: if there are not N trees.
    """
    total = dtypes = None
    for weight, tree in zip(weights, trees, strict=True):
        part = jax.tree.map(lambda leaf, w=weight: w * np.asarray(leaf, np.float64), tree)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, tree)
        total = part if total is None else jax.tree.map(np.add, total, part)
    if total is None:
        raise ValueError("`trees` must hold at least one tree; got none.")
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), total, dtypes)


def _check_std(std: float, name: str) -> None:
    checks.number(name.replace("`", ""), std)
    if not 0.0 < std <= MAX_STD + 1e-12:
        raise ValueError(f"{name} must lie in (0, {MAX_STD:.3f}]; got {std}.")
