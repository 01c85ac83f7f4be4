"""The noun that losses, likelihoods and samplers share: network, process and prediction."""

from typing import Any, NamedTuple

from jaxdiff import checks, predictions
from jaxdiff.denoisers.networks import NetworkDenoiser, from_network
from jaxdiff.processes import Process
from jaxdiff.typing import Apply, Array, PyTree


class Model(NamedTuple):
    """What is trained, judged and sampled: a network, its process, and what it predicts.

    Losses take it, and what they train is sampled by :meth:`denoiser`:

        model = Model(apply, processes.flow(), "velocity")
        loss_fn = losses.denoising(model)
        sampler = samplers.heun(model.process, model.denoiser(params, labels))

    Attributes:
        apply: the pure network, ``apply(params, x_t, t, cond, key=key)`` -> (B, ...).
        process: the forward process.
        prediction: what the network predicts, one of `predictions.KINDS`.
    """

    apply: Apply
    process: Process
    prediction: str = "eps"

    @property
    def needs_signal(self) -> bool:
        """Whether it cannot be asked where alpha is 0: see `timesteps.start`."""
        return self.prediction in predictions.SIGNAL_NEEDED

    def denoiser(self, params: PyTree, cond: PyTree = None, clip: Any = None) -> NetworkDenoiser:
        """Make the denoiser of parameters, and of the conditioning of its rows.

        Args:
            params: of the network.
            cond: pytree of (B, ...) leaves; None asks a network of `jaxdiff.nn` for its null
                condition, which only `drop_cond` has trained. What solves row by row takes it by
                itself, with the denoiser of no conditioning:
                ``likelihood.log_prob(..., cond=cond)``.
            clip: limit x0_hat to [-clip, clip].

        Raises:
            TypeError: as :func:`from_network`.
            ValueError: as :func:`from_network`.
        """

        def network(x_t: Array, t: Array, given: PyTree = cond) -> Array:
            return self.apply(params, x_t, t, given)

        return from_network(network, self.process, self.prediction, clip)


def as_model(apply: Any, process: Any, prediction: str | None, default: str) -> Model:
    """Return the model of a function's arguments: given as one, or in its parts.

    Args:
        apply: a Model, or a network.
        process: that of the network; None beside a Model.
        prediction: that of the network, by default `default`; None beside a Model.
        default: a kind.

    Raises:
        TypeError: if there is a network without a process.
        ValueError: if there is more than a Model.
    """
    if isinstance(apply, Model):
        given = {"process": process, "prediction": prediction}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` must not be given beside a Model, which has its own; "
                    f"got {checks.shown(value)}."
                )
        return apply
    if process is None:
        raise TypeError(
            "`process` must be given with a network: the one that it is trained on. "
            "Or give one Model(apply, process, prediction)."
        )
    return Model(apply, process, default if prediction is None else prediction)
