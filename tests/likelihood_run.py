"""The likelihood of a run's first held-out images, by all devices there are, as JSON.

    likelihood_run.py RUN_DIR COUNT

Run by test_device_likelihood.py in processes of their own, by so many forced devices.
"""

import json
import sys
from pathlib import Path

import jax

from experiments import digits
from experiments.images import judging as digits_likelihood
from experiments.images.model import build_model, open_images


def main(run_dir, count):
    config, _, params = digits.restore(Path(run_dir))
    test = open_images(config, "test")
    key_data, key_probes = jax.random.split(jax.random.key(0))
    x, labels = digits_likelihood.first_rows(key_data, test, int(count))
    bits_of = digits_likelihood.make_bits_of(config, build_model(config, test), test)
    bits = bits_of(params, key_probes, x, labels)
    print(json.dumps({"devices": jax.device_count(), "bits": bits.tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
