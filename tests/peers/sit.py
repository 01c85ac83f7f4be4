"""What the interpolant transformer makes of images, and its velocity of its score and samples.

Its network is the diffusion transformer of the repository of that. See `common` for how to run it.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from peers.common import Golden, drawn, golden, last, main, shapes_of
from peers.dit import ORIGINAL, PLAIN, XL, Transformer, inputs_of, transformer


def sit(seed: int, larger: int, *, config: dict[str, Any]) -> Golden:
    config = {**config, "input_size": 8 + 4 * larger}
    model = transformer(config, seed)
    x, _, y = inputs_of(config, seed, config["in_channels"])
    u = torch.from_numpy(np.abs(drawn("u", (3,), seed, 1.0)))
    velocity = model(x, u, y)
    rows = u[:, None, None, None]
    # x = u data + (1 - u) noise and velocity = data - noise give noise, and -noise / (1 - u)
    # is the score; written out as in section 2.3 of arXiv:2401.08740.
    score = (rows * velocity - x) / ((1 - rows) ** 2 + rows * (1 - rows))
    sample, num_steps = x, 5
    for i in range(num_steps):
        sample = (
            sample
            + model(sample, torch.full((3,), i / num_steps, dtype=torch.float64), y) / num_steps
        )
    inputs = {"x": last(x), "u": u, "y": y, "pos_embed": model.pos_embed}
    outputs = {"velocity": last(velocity), "score": last(score), "sample": last(sample)}
    return golden(config, model, seed, inputs, outputs)


if __name__ == "__main__":
    cases = {"sit_sigma": partial(sit, config=ORIGINAL), "sit_plain": partial(sit, config=PLAIN)}
    main(cases, lambda: {"sit_xl_2": shapes_of(lambda: Transformer(**XL))})
