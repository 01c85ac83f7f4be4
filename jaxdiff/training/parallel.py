"""How an update is compiled; every mode takes and returns the same state."""

import jax

from jaxdiff.training.update import Update


def jit(update: Update, *, donate: bool = False) -> Update:
    """Compile an update for one device.

    Args:
        update: from `make_update` without an `axis_name`.
        donate: let the new state take the buffers of the old one, which is then gone.
    """
    return jax.jit(update, donate_argnums=(0,) if donate else ())
