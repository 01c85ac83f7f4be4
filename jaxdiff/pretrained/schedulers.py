r"""From a scheduler's config to the process that a network was trained on, and what it predicts.

The schedulers of diffusers are many samplers over few processes. What they call a step n of T is
the time t = (n + 1) / T of a chain of betas; those that match flows have x_t = (1 - t) x0 + t eps
and hand their network n = T t. How they sample is not read here: every sampler of
`jaxdiff.samplers` runs on every process.

Betas are made in double precision (diffusers makes them in float32), as:

    linear              between beta_start and beta_end
    scaled_linear       square roots linear: Rombach et al. 2022 (arXiv:2112.10752), its code
    squaredcos_cap_v2   of alpha_bar = cos^2((t + 0.008) / 1.008 pi / 2), each at most 0.999:
                        Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 17
    trained_betas       as they stand

and rescaled to zero terminal SNR where the config says so (Lin et al. 2024, arXiv:2305.08891,
Algorithm 1). What a config asks beyond that is refused by name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdiff import checks, processes
from jaxdiff.pretrained.errors import WeightsError
from jaxdiff.typing import Array

__all__ = ["Schedule", "read"]

_CHAINS = (
    "DDPM",
    "DDPMParallel",
    "DDIM",
    "DDIMParallel",
    "DDIMInverse",
    "PNDM",
    "LMSDiscrete",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "DEISMultistep",
    "DPMSolverSinglestep",
    "DPMSolverMultistep",
    "DPMSolverMultistepInverse",
    "DPMSolverSDE",
    "UniPCMultistep",
    "SASolver",
)
_FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
_OTHER_BETAS = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
"""Those of which betas that are not said run from 0.00085 to 0.012."""
_CLIPPING = ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "HeunDiscrete")
"""Those that limit x0_hat where `clip_sample` is set: by default, but for the last."""

_OF_SAMPLING = """
    _class_name _diffusers_version algorithm_type base_image_seq_len base_shift clip_sample
    clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio euler_at_final
    final_sigmas_type interpolation_type lambda_min_clipped lower_order_final max_image_seq_len
    max_shift noise_sampler_seed predict_x0 predictor_order sample_max_value set_alpha_to_one
    sigma_max sigma_min skip_prk_steps solver_order solver_p solver_type steps_offset tau_func
    tensor_format time_shift_type timestep_spacing timestep_values use_beta_sigmas
    use_exponential_sigmas use_karras_sigmas use_lu_lambdas
"""
_OF_PROCESS = """
    beta_end beta_schedule beta_start flow_shift num_train_timesteps prediction_type
    rescale_betas_zero_snr shift trained_betas use_flow_sigmas variance_type
"""
_ONLY = {
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
}
"""What other values of these would change is not here."""
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class Schedule(NamedTuple):
    """What a scheduler's config says of the network beside it.

    Attributes:
        process: the forward process.
        prediction: what the network predicts, one of `predictions.KINDS`.
        num_steps: T, in which its steps are counted.
        clip: the limit of x0_hat's entries with which it is sampled; None is none.
        shift: of the times of its grids, t -> shift t / (1 + (shift - 1) t); 1 is none.
    """

    process: processes.Process
    prediction: str
    num_steps: int
    clip: float | None = None
    shift: float = 1.0

    def step(self, t: Array) -> Array:
        """Return the step number that the network is given at times t."""
        steps = t * self.num_steps
        return steps if isinstance(self.process, processes.Flow) else steps - 1.0


def read(config: Mapping[str, Any], *, cuts_variance: bool = False) -> Schedule:
    """Read what a `scheduler_config.json` holds.

    Args:
        config: the file's contents.
        cuts_variance: whether the network leaves out the variance that it was taught to predict
            beside; otherwise a config that asks for a learned one is refused.

    Raises:
        WeightsError: if it asks for what is not here, naming it.
    """
    name = config.get("_class_name")
    kind = str(name).removesuffix("Scheduler")
    if name is None or kind not in (*_CHAINS, *_FLOWS):
        raise WeightsError(
            f"`_class_name` of a scheduler must be one of {', '.join((*_CHAINS, *_FLOWS))}, with "
            f"Scheduler behind it; got {name!r}."
        )
    _judge(config, cuts_variance)
    num_steps = _whole(config, "num_train_timesteps", 1000)
    predicted = config.get("prediction_type", "epsilon")
    if kind in _FLOWS or config.get("use_flow_sigmas"):
        if kind not in _FLOWS and predicted != "flow_prediction":
            raise WeightsError(
                "`prediction_type` must be flow_prediction beside use_flow_sigmas; "
                f"got {predicted!r}."
            )
        shift = _number(config, "shift" if kind in _FLOWS else "flow_shift", 1.0)
        return Schedule(processes.flow(), "velocity", num_steps, None, shift)
    if predicted not in _PREDICTIONS:
        raise WeightsError(
            f"`prediction_type` must be one of {', '.join(_PREDICTIONS)}; got {predicted!r}."
        )
    chain = processes.from_betas(_betas(config, num_steps, kind in _OTHER_BETAS))
    return Schedule(chain, _PREDICTIONS[predicted], num_steps, _clip(config, kind))


def _judge(config: Mapping[str, Any], cuts_variance: bool) -> None:
    for key, allowed in _ONLY.items():
        if config.get(key, allowed[0]) not in allowed:
            raise WeightsError(
                f"`{key}` of a scheduler must be {allowed[0]}; got {config[key]!r}, which is not "
                "supported."
            )
    known = (*f"{_OF_SAMPLING} {_OF_PROCESS}".split(), *_ONLY)
    odd = [key for key, value in config.items() if key not in known and value is not None]
    if odd:
        raise WeightsError(
            f"A scheduler's config must not have {', '.join(map(repr, odd))}: nothing is known of "
            "that. Take it out if the process does not depend on it."
        )
    variance = config.get("variance_type")
    if variance in ("learned", "learned_range") and not cuts_variance:
        raise WeightsError(
            f"`variance_type` {variance!r} is supported only where the network leaves the learned "
            "variance out."
        )


def _betas(config: Mapping[str, Any], num_steps: int, other: bool) -> np.ndarray:
    trained = config.get("trained_betas")
    schedule = config.get("beta_schedule", "linear")
    start = _number(config, "beta_start", 0.00085 if other else 0.0001)
    end = _number(config, "beta_end", 0.012 if other else 0.02)
    if trained is not None:
        betas = np.asarray(trained)
        if betas.shape != (num_steps,) or betas.dtype.kind not in "if":
            raise WeightsError(
                f"`trained_betas` must be num_train_timesteps numbers, {num_steps}; "
                f"got {checks.shown(trained)}."
            )
    elif schedule == "linear":
        betas = np.linspace(start, end, num_steps)
    elif schedule == "scaled_linear":
        betas = np.linspace(abs(start) ** 0.5, abs(end) ** 0.5, num_steps) ** 2
    elif schedule == "squaredcos_cap_v2":
        t = np.arange(num_steps + 1) / num_steps
        alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        raise WeightsError(
            "`beta_schedule` must be one of linear, scaled_linear, squaredcos_cap_v2; "
            f"got {schedule!r}."
        )
    if not ((betas > 0) & (betas < 1)).all():
        raise WeightsError("The betas of a scheduler must lie in (0, 1).")
    return _to_zero_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _to_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that the first stays and the last is 0."""
    root = np.exp(0.5 * np.cumsum(np.log1p(-betas)))
    if len(root) == 1:
        return np.ones(1)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return 1.0 - np.concatenate([root[:1], root[1:] / root[:-1]]) ** 2


def _clip(config: Mapping[str, Any], kind: str) -> float | None:
    if kind not in _CLIPPING or not config.get("clip_sample", kind != _CLIPPING[-1]):
        return None
    return _number(config, "clip_sample_range", 1.0)


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise WeightsError(f"`{key}` of a scheduler must be a positive number; got {value!r}.")
    return float(value)


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WeightsError(f"`{key}` of a scheduler must be at least 1; got {value!r}.")
    return value
