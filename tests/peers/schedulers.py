"""What diffusers' schedulers make of their configs. See `common` for how to run it."""

from typing import Any

import diffusers
import numpy as np
from peers.common import Golden, main

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHORT = {"num_train_timesteps": 40}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"_class_name": "DDPMScheduler", **SHORT},
    "sd": {"_class_name": "PNDMScheduler", **SD, "skip_prk_steps": True, "steps_offset": 1},
    "cosine": {"_class_name": "DDIMScheduler", **SHORT, "beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {
        "_class_name": "DDIMScheduler",
        **SD,
        **SHORT,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "given": {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 3},
    "heun": {"_class_name": "HeunDiscreteScheduler", **SHORT},
}


def schedulers(seed: int, larger: int) -> Golden:
    configs, arrays = {}, {}
    for name, config in CONFIGS.items():
        if name == "given":
            config = {**config, "trained_betas": [0.1, 0.25 + larger / 8, 0.5]}
        elif larger:
            config = {**config, "num_train_timesteps": 777, "beta_end": 0.013 + seed / 1000}
        made = getattr(diffusers, config["_class_name"]).from_config(config)
        configs[name] = config
        arrays[name] = np.stack([made.betas.numpy(), made.alphas_cumprod.numpy()])
    return Golden(configs, {}, seed, arrays)


if __name__ == "__main__":
    main({"schedulers": schedulers})
