"""The comparison of families, through its command line, and the fairness of it."""

import csv
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.families import __main__ as families
from experiments.families.models import MAKERS
from experiments.families.networks import describe
from jaxdiff import data

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@functools.cache
def full_size():
    """Return (parameters, operations of the training) of each family of the full preset."""
    images = data.load_images("digits", "train")
    pixels = describe(images.levels.reshape(len(images), -1), images.num_levels)
    config = families.PRESETS["full"]
    made = {name: make(config, pixels) for name, make in MAKERS.items()}
    return {
        name: (family.num_params, family.training_flops(config.batch_size, pixels.num_dims))
        for name, family in made.items()
    }


@pytest.mark.slow
def test_networks_are_alike_in_parameters_and_training():
    parameters, flops = zip(*full_size().values(), strict=True)
    print(full_size())
    assert max(parameters) <= 1.1 * min(parameters)
    assert max(flops) <= 1.1 * min(flops)


@pytest.mark.slow
def test_the_smoke_judges_all_families_alike(tmp_path, capsys):
    command = ["--preset", "smoke", "--run-dir", str(tmp_path)]
    assert families.main(command) == 0
    with (tmp_path / "results.csv").open() as file:
        rows = {row["family"]: row for row in csv.DictReader(file)}
    assert list(rows) == [families.MIXTURE, *families.SMOKE, families.FLOOR]
    for name, row in rows.items():
        for column in ("frechet", "precision", "recall", "density", "coverage"):
            assert math.isfinite(float(row[column])), (name, column)
    likelihoods = {
        name: {column for column in row if "bits_per_dim" in column and row[column]}
        for name, row in rows.items()
    }
    assert likelihoods["GAN"] == set()
    assert likelihoods[families.MIXTURE] == {"exact_bits_per_dim"}
    assert likelihoods["flow matching"] == {"exact_bits_per_dim"}
    report = (tmp_path / "report.md").read_text()
    for name in ("samples.png", "likelihood.png", "quality.png"):
        assert name in report
        assert (tmp_path / name).stat().st_size > 5_000
    before = (tmp_path / "results.csv").read_bytes()
    assert families.main(command) == 0
    assert (tmp_path / "results.csv").read_bytes() == before
    assert families.main([*command, "--seed", "1"]) == 1
    assert "--seed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_other_families_are_judged_by_their_bounds(tmp_path):
    config = families.PRESETS["smoke"]
    digits = families.load(jax.random.key(0))
    digits = digits._replace(x_held_out=digits.x_held_out[: config.eval_images])
    pixels = describe(families.flat(digits.train.levels), digits.train.num_levels)
    found = {}
    for name in MAKERS.keys() - set(families.SMOKE):
        family = MAKERS[name](config, pixels)
        key = jax.random.key(1)
        results, _, drawn = families.fit_network(tmp_path / name, config, family, digits, key)
        assert drawn.shape == (config.num_samples, 64)
        found[name] = {k: v for k, v in results.items() if "bits_per_dim" in k}
        assert all(math.isfinite(value) for value in found[name].values())
    assert found["VAE"].keys() == {"elbo_bits_per_dim", "weighted_bits_per_dim"}
    assert found["VAE"]["weighted_bits_per_dim"] < found["VAE"]["elbo_bits_per_dim"]
    names = {"exact_bits_per_dim", "elbo_bits_per_dim", "fine_bits_per_dim"}
    assert found["DDPM"].keys() == names


def test_a_pixel_is_standardised_and_put_back():
    levels = np.random.default_rng(0).integers(0, 17, (200, 3)).astype(np.uint8)
    levels[:, 2] = 4  # a pixel that never changes
    pixels = describe(levels, 17)
    x = jnp.asarray(data.centers(jnp.asarray(levels), 17))
    np.testing.assert_allclose(pixels.restore(pixels.standardize(x)), x, atol=1e-6)
    assert np.isfinite(pixels.standardize(x)).all()

    def density(params, key, y):  # a unit Gaussian of standardised pixels
        return -0.5 * jnp.sum(y**2 + jnp.log(2.0 * jnp.pi), axis=1)

    given = pixels.log_density(density)(None, None, x)
    by_hand = -0.5 * ((x - pixels.mean) / pixels.std) ** 2 - jnp.log(
        pixels.std * jnp.sqrt(2.0 * jnp.pi)
    )
    np.testing.assert_allclose(given, by_hand.sum(1), atol=1e-5)
