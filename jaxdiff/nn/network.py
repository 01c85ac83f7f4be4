"""What the networks share: their options, how they are called, and what they are conditioned on."""

import abc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff import checks, numerics
from jaxdiff.nn.conditioning import (
    Condition,
    Conditions,
    Context,
    Labels,
    choose,
    named,
)
from jaxdiff.nn.layers import Linear
from jaxdiff.nn.times import LogSNR, Time
from jaxdiff.typing import Array, Key, PyTree


class Network(nnx.Module, abc.ABC):
    """A network of x, log-SNR and conditioning.

    Args:
        conditioning: None for an unconditional network, a condition, or a mapping of names to
            conditions; see `jaxdiff.nn.conditioning`.
        num_classes: short for ``conditioning=nn.Labels(num_classes)``: labels are integers in
            0..num_classes, num_classes being the null label. 0 is None.
        dropout: rate of dropout, which is on when a key is given.
        remat: recompute the blocks in the backward pass, for memory.
        dtype: of the computation; normalisation and softmax are in float32 at least.
        param_dtype: of the parameters.
        rngs: source of the initial parameters, which follow from its seed.
        sizes: further options, each a whole number of at least 1.

    Raises:
        TypeError: if an option is of another kind.
        ValueError: if a size is below 1, `dropout` lies outside [0, 1), or both `conditioning`
            and `num_classes` are given.
    """

    time = LogSNR.name
    """What its time is; see :func:`jaxdiff.nn.on_log_snr` and :func:`jaxdiff.nn.on_steps`."""
    conditioning: "Conditioning"

    def __init__(
        self,
        *,
        dropout: float,
        remat: bool,
        dtype: Any,
        rngs: nnx.Rngs,
        **sizes: int,
    ) -> None:
        for name, size in sizes.items():
            checks.count(name, size)
        checks.number("dropout", dropout, 0.0, 1.0, below=True)
        try:
            known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:
            known = False
        if not known:
            raise TypeError(f"`dtype` must be a floating-point one; got {checks.shown(dtype)}.")
        if not callable(getattr(rngs, "params", None)):
            raise TypeError(
                f"`rngs` must be a flax.nnx.Rngs, such as nnx.Rngs(0); got {checks.shown(rngs)}."
            )
        self.remat = remat
        self.dtype = dtype

    def __call__(
        self, x: Array, log_snr: Array, cond: PyTree = None, *, key: Key | None = None
    ) -> Array:
        """Evaluate the network.

        Args:
            x: shape (B, D) for the perceptron, (B, H, W, C) for networks of images.
            log_snr: shape () or (B,), infinities allowed; in a network made with
                ``time=nn.Steps()`` the number of a step.
            cond: None for an unconditional network, else as its conditioning says; in evaluation
                None, also by name, stands for no condition.
            key: one key or (B,) row keys: training, with dropout; None: evaluation.

        Returns:
            The shape of x, in the dtype of the computation but at least float32; 0 at
            initialisation.

        Raises:
            TypeError: if `x` is not one array of real numbers, or conditioning of another kind.
            ValueError: if a shape is wrong, a concrete label out of range, or `cond` given to
                an unconditional network or missing in the training of another.
        """
        x = self.check_x(x)
        rows = None if key is None else numerics.row_keys(key, x.shape[0])
        c, context = self.conditioning(log_snr, cond, x.shape[0], training=key is not None)
        output = self.evaluate(x, c, context, rows)
        return output.astype(jnp.promote_types(self.dtype, jnp.float32))

    @abc.abstractmethod
    def check_x(self, x: Any) -> Array:
        """Return the input in the dtype of the computation, or refuse it."""

    @abc.abstractmethod
    def evaluate(self, x: Array, c: Array, context: Context | None, rows: Key | None) -> Array:
        """Evaluate the network on what was judged.

        Args:
            x: as `check_x` returned it.
            c: the vector of time and conditioning (B, C).
            context: what to attend to, if there is any.
            rows: row keys (B,) in training, or None.

        Returns:
            The shape of x.
        """


class Conditioning(nnx.Module):
    """Embeds time and conditioning.

    Args:
        width: C, the size of what it returns.
        conditioning: as in :class:`Network`.
        num_classes: likewise.
        time: what the time is.
        dtype: of the computation past the waves of the time.
        param_dtype: of the parameters.
        rngs: source of the initial parameters.

    Raises:
        TypeError: if `num_classes` is no whole number, or `conditioning` or `time` of another kind.
        ValueError: if `num_classes` is negative, both are given, or a mapping of conditions is
            empty or has a name that is no identifier.
    """

    def __init__(
        self,
        width: int,
        *,
        conditioning: Conditions | None = None,
        num_classes: int | None = None,
        time: Time = LogSNR(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        chosen = choose(conditioning, num_classes)
        conditions = {} if chosen is None else named(chosen)
        if not isinstance(time, Time):
            raise TypeError(
                f"`time` must be nn.LogSNR() or nn.Steps(), made; got {checks.shown(time)}."
            )
        self.time = time
        self.conditions = tuple(conditions.items())
        self.several = chosen is not None and not isinstance(chosen, Condition)
        self.has_context = any(condition.has_context for condition in conditions.values())
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        xavier = nnx.initializers.xavier_uniform()
        self.time_in = Linear(time.width, width, kernel_init=xavier, **options)
        self.time_out = Linear(width, width, kernel_init=xavier, **options)
        for name, condition in self.conditions:
            setattr(self, self._place(name), condition.make(width, **options))

    def __call__(
        self, time: Array, cond: PyTree, num_rows: int, *, training: bool = False
    ) -> tuple[Array, Context | None]:
        """Return the vector of time and conditioning (B, C), and what to attend to, if anything.

        Args:
            time: shape () or (B,).
            cond: the condition's value, a mapping of names to values for several, or None.
            num_rows: B.
            training: whether all of it must be given.

        Raises:
            ValueError: if the time or `cond` has another shape, a concrete label is out of
                range, a name is missing or unknown, conditioning is given to an unconditional
                network, or is missing in training.
            TypeError: if times are no real numbers, `cond` holds something of another kind, or
                a condition gives tokens that does not say so.
        """
        name = self.time.name
        checks.real(name, time)
        time = jnp.asarray(time)
        if time.shape not in ((), (num_rows,)):
            raise ValueError(f"`{name}` must have shape () or ({num_rows},); got {time.shape}.")
        features = self.time.embed(jnp.broadcast_to(time, (num_rows,)))
        vector = self.time_out(jax.nn.silu(self.time_in(features)))
        contexts: list[Context] = []
        values = self._values(cond)
        for name, condition in self.conditions:
            value, shown = values[name], f'cond["{name}"]' if self.several else "cond"
            if value is None:
                if training:
                    raise ValueError(_missing(shown, condition))
                value = _repeated(condition.null(), num_rows)
            found = condition.embed(getattr(self, self._place(name)), value, shown, num_rows)
            if found.vector is not None:
                vector = vector + found.vector.astype(vector.dtype)
            if found.context is not None:
                if not condition.has_context:  # then there is nothing to attend with
                    kind = type(condition).__name__
                    raise TypeError(f"`has_context` of {kind} must be True: it gives tokens.")
                contexts.append(found.context)
        if not contexts:
            return vector, None
        tokens = [context.tokens.astype(vector.dtype) for context in contexts]
        masks = [context.mask for context in contexts]
        return vector, Context(jnp.concatenate(tokens, 1), jnp.concatenate(masks, 1))

    def _place(self, name: str) -> str:
        """Return the attribute that holds a condition's parameters."""
        return f"cond_{name}" if self.several else name

    def _values(self, cond: PyTree) -> dict[str, PyTree]:
        """Return the value of each condition by name, None where there is none."""
        names = [name for name, _ in self.conditions]
        if not names and cond is not None:
            raise ValueError(
                "`cond` must be None: the network was built without num_classes or conditioning."
            )
        if not self.several or cond is None:
            return dict.fromkeys(names, cond)
        if not isinstance(cond, Mapping):
            raise TypeError(
                f"`cond` must be a mapping of {', '.join(names)}; got {checks.shown(cond)}."
            )
        missing = [name for name in names if name not in cond]
        unknown = [str(name) for name in cond if name not in names]
        if missing or unknown:
            said = [f"{', '.join(missing)} missing"] * bool(missing)
            said += [f"{', '.join(unknown)} unknown"] * bool(unknown)
            raise ValueError(
                f"`cond` must be a mapping of {', '.join(names)}; got {' and '.join(said)}."
            )
        return dict(cond)


def _missing(name: str, condition: Condition) -> str:
    batch = f'batch["cond"]{name.removeprefix("cond")}'
    null = "nn.null_cond(conditioning)"
    if isinstance(condition, Labels):
        null = f"The label {condition.num_classes}"
    return (
        f"`{name}` must hold {condition.holds}: the network was built with {condition}, and the "
        f"batch has none. Put them into the batch as {batch}, or train without. {null} stands for "
        "none."
    )


def _repeated(null: PyTree, num_rows: int) -> PyTree:
    """Give the value of one example a batch axis."""
    return jax.tree.map(lambda each: jnp.broadcast_to(each, (num_rows, *np.shape(each))), null)
