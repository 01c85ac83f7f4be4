r"""Times: grids for sampling, from noise down to data, and draws for training.

**Grids** are decreasing arrays of `num_steps` + 1 times, from t_max (or `t_start`) down to
`t_end`. They are plain traced arrays: another grid of the same length compiles nothing anew.

**Draws** are functions (key, process, B) -> times (B,) in (0, t_max], never 0. Example i of the
global batch gets its own; a stratified draw spreads u = (u_0 + i / B) mod 1 over the *global*
batch (Kingma et al. 2021, arXiv:2107.00630, appendix I.1), which lowers the variance of the loss.

**Starts.** A method that divides by alpha, or a network that predicts eps or the score, cannot
start where alpha(t_max) = 0. :func:`start` says where it may, for samples and likelihoods alike.
"""

from jaxdiff.timesteps.draws import (
    Draw,
    draw_at,
    draw_log_normal,
    draw_log_snr,
    draw_stratified,
    draw_uniform,
    stratified,
)
from jaxdiff.timesteps.grids import (
    INFINITE_START,
    check_grid,
    flow_shift,
    karras,
    log_snr,
    quadratic,
    uniform,
)
from jaxdiff.timesteps.starts import SIGNAL_START, check_start, start

__all__ = [
    "INFINITE_START",
    "SIGNAL_START",
    "Draw",
    "check_grid",
    "check_start",
    "draw_at",
    "draw_log_normal",
    "draw_log_snr",
    "draw_stratified",
    "draw_uniform",
    "flow_shift",
    "karras",
    "log_snr",
    "quadratic",
    "start",
    "stratified",
    "uniform",
]
