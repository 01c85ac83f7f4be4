"""The command for images, as tests run it."""

import jax

from experiments import digits


def run(capsys, *argv):
    """Run a command as a user's process would, in this one; return code, stdout, stderr."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        try:
            code = digits.main([str(word) for word in argv])
        except SystemExit as stop:  # tyro's own refusals
            code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err
