"""Judges of scenes: they read what was drawn, and hold it against what was asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.latents.judges import (
    Reading,
    ceiling,
    detector,
    obeyed,
    of_factors,
    shares,
    templates,
)
from experiments.latents.judges.obeyed import relation
from jaxdiff import training
from jaxdiff.data import scenes
from jaxdiff.data.scenes import Scenes

KINDS = {"one": (1.0, 0.0, 0.0), "two": (0.0, 1.0, 0.0), "several": (0.0, 0.0, 1.0)}
NAMES = {
    "one": {"shape", "colour", "place", "all", "size", "background"},
    "two": {"objects", "shapes", "colours", "relation", "all", "background"},
    "several": {"number", "shapes", "colours", "all", "background"},
}


OTHER = 8
"""A shape or colour that is none."""


def factors_of(kind, num=200):
    """Factors of scenes of a kind; of two objects, those of two shapes."""
    factors = Scenes(num, 5, shares=KINDS[kind], combinations="all").factors(np.arange(num))
    if kind != "two":
        return factors
    return chosen(factors, factors.shape[:, 0] != factors.shape[:, 1])


def chosen(factors, which):
    return type(factors)(*(field[which] for field in factors))


def of_second(field):
    """Return shapes or colours of which the second is none."""
    return np.where(np.arange(4)[None] == 1, OTHER, field)


def failing(reading, factors):
    """Names of what no picture obeys; all else every picture must, where it is said."""
    found = obeyed(reading, factors)
    wrong = {name for name, values in found.items() if not np.nanmax(values)}
    for name, values in found.items():
        assert name in wrong or np.nanmin(values), name
    return wrong


def swapped(field):
    """Return a field of objects (B, 4, ...) with the first two in each other's place."""
    return field[:, [1, 0, 2, 3]]


# --- Obeyed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_as_asked_obeys(kind):
    factors = factors_of(kind)
    found = obeyed(of_factors(factors), factors)
    assert set(found) == NAMES[kind]
    assert not failing(of_factors(factors), factors)
    said = scenes.said(factors)
    for name in {"size", "background"} & set(found):
        np.testing.assert_array_equal(~np.isnan(found[name]), said[name])
    for name in set(found) - {"size", "background"}:
        assert found[name].dtype == bool, name


@pytest.mark.parametrize(
    ("kind", "field", "change", "wrong"),
    [
        ("one", "shape", lambda x: (x + 1) % 8, {"shape", "all"}),
        ("one", "colour", lambda x: (x + 1) % 8, {"colour", "all"}),
        ("one", "centre", lambda x: np.where(x < 0.37, x + 0.26, x - 0.26), {"place", "all"}),
        ("one", "num_objects", lambda x: x + 1, {"all"}),
        ("one", "num_objects", lambda x: x - 1, {"shape", "colour", "place", "size", "all"}),
        ("one", "size", lambda x: (x + 1) % 3, {"size"}),
        ("one", "background", lambda x: (x + 1) % 4, {"background"}),
        ("two", "shape", lambda x: x * 0 + OTHER, {"shapes", "all"}),
        ("two", "shape", of_second, {"shapes", "all"}),
        ("two", "colour", lambda x: x * 0 + OTHER, {"colours", "all"}),
        ("two", "colour", of_second, {"colours", "all"}),
        ("two", "centre", swapped, {"relation", "all"}),
        ("two", "centre", lambda x: x[..., ::-1], {"relation", "all"}),
        ("two", "num_objects", lambda x: x - 1, NAMES["two"] - {"background"}),
        ("two", "num_objects", lambda x: x - 2, NAMES["two"] - {"background"}),
        ("two", "background", lambda x: (x + 1) % 4, {"background"}),
        ("several", "shape", of_second, {"shapes", "all"}),
        ("several", "colour", of_second, {"colours", "all"}),
        ("several", "num_objects", lambda x: x + 1, {"number", "all"}),
        ("several", "num_objects", lambda x: x * 0, NAMES["several"] - {"background"}),
    ],
)
def test_what_is_wrong_is_told_by_its_name_alone(kind, field, change, wrong):
    factors = factors_of(kind)
    exact = of_factors(factors)
    changed = exact._replace(**{field: change(getattr(exact, field))})
    assert failing(changed, factors) == wrong


def test_the_order_in_which_objects_are_found_does_not_matter():
    factors = factors_of("two")
    exact = of_factors(factors)
    fields = ("shape", "colour", "centre", "size")
    turned = exact._replace(**{name: swapped(getattr(exact, name)) for name in fields})
    assert not failing(turned, factors)


def test_colours_of_each_other_are_both_there_and_not_all_is_right():
    factors = factors_of("two")
    exact = of_factors(factors)
    assert failing(exact._replace(colour=swapped(exact.colour)), factors) == {"all"}
    moved = exact._replace(colour=swapped(exact.colour), centre=swapped(exact.centre))
    assert failing(moved, factors) == {"relation", "all"}  # it is that of the shapes


def test_a_third_object_spoils_the_number_alone():
    factors = factors_of("two")
    exact = of_factors(factors)
    order = [2, 0, 1, 3]  # the surest of all is one too many
    more = Reading(exact.num_objects + 1, *(field[:, order] for field in exact[1:5]), exact[5])
    more.shape[:, 0], more.colour[:, 0] = OTHER, OTHER
    assert failing(more, factors) == {"objects", "all"}


def test_things_unlike_those_asked_for_are_in_no_relation():
    factors = factors_of("two")
    exact = of_factors(factors)
    none = np.full_like(exact.shape, OTHER)
    other = exact._replace(shape=none, colour=none)
    assert failing(other, factors) == {"shapes", "colours", "relation", "all"}


def test_one_relation_holds_of_any_two_places():
    first = np.array([[0.5, 0.2], [0.5, 0.8], [0.2, 0.5], [0.8, 0.6]])
    np.testing.assert_array_equal(relation(first, np.full((4, 2), 0.5)), np.arange(4))


def test_shares_are_of_the_captions_that_say_it():
    found = {
        "all": np.array([True, True, True, False]),
        "size": np.array([1.0, 0.0, np.nan, np.nan]),
        "background": np.full(4, np.nan),
    }
    assert shares(found) == {
        "all": 0.75,
        "all_stderr": (0.75 * 0.25 / 4) ** 0.5,
        "size": 0.5,
        "size_stderr": (0.5 * 0.5 / 2) ** 0.5,
    }


def test_scenes_that_are_not_alike_in_kind_or_number_are_refused():
    mixed = Scenes(40, shares=(0.5, 0.5, 0.0)).factors(np.arange(40))
    with pytest.raises(ValueError, match="of one kind; got one, two"):
        obeyed(of_factors(mixed), mixed)
    one = factors_of("one")
    with pytest.raises(ValueError, match="as many pictures; got 200 and 100"):
        obeyed(of_factors(one), chosen(one, np.arange(200) < 100))


# --- Templates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "num"), [("one", 32), ("two", 12), ("several", 12)])
def test_templates_read_what_is_drawn(kind, num):
    records = Scenes(num, 11, shares=KINDS[kind], combinations="all")
    factors = records.factors(np.arange(num))
    reading = templates.read(records.rows(np.arange(num))["image"])
    assert not failing(reading, factors)
    if kind == "one":
        np.testing.assert_array_equal(reading.size[:, 0], factors.size)
        np.testing.assert_array_equal(reading.background, factors.background)
        off = abs(reading.centre[:, 0] - factors.centre[:, 0]) * 32
        assert off.max() < 0.5  # of a pixel


def test_templates_read_larger_pictures_and_none_where_nothing_is():
    records = Scenes(6, 12, size=48, shares=KINDS["one"], combinations="all")
    assert ceiling(templates.read, records)["all"] == 1.0
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    empty = np.full((1, 32, 32, 3), 128, np.uint8)
    reading = templates.read(np.concatenate([empty, noise]))
    np.testing.assert_array_equal(reading.num_objects, 0)
    assert reading.background[0] == scenes.BACKGROUNDS.index("grey")


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 32, 30, 3), (0, 32, 32, 3), (4, 32, 32, 1)])
def test_what_are_no_pictures_is_refused(shape):
    for read in (templates.read, lambda images: detector.read({}, images)):
        with pytest.raises(ValueError, match=r"`images` must be uint8 \(B, S, S, 3\)"):
            read(np.zeros(shape, np.uint8))


# --- Detector -----------------------------------------------------------------------------------


def seen_of(factors):
    """Return what a network that is never wrong makes of scenes: told by the nearest object."""
    num = len(factors.kind)
    middles = (np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1) + 0.5) / 8
    off = (factors.centre[:, None, None] - middles[:, :, None]) * 8  # (B, 8, 8, 4, 2)
    there = np.arange(4) < factors.num_objects[:, None, None, None]
    share = (np.clip(1 - abs(off), 0, 1).prod(-1) * there).sum(-1)
    near = np.where(there, (off**2).sum(-1), np.inf).argmin(-1)
    rows = np.arange(num)[:, None, None]

    def logits(labels, count):
        return 50.0 * np.eye(count)[labels[rows, near]]

    return detector.Seen(
        share=np.log(share + 1e-9) - np.log1p(1e-9 - share),
        shape=logits(factors.shape, 8),
        colour=logits(factors.colour, 8),
        size=logits(of_factors(factors).size, 3),
        offset=np.take_along_axis(off, near[..., None, None], 3)[:, :, :, 0],
        background=50.0 * np.eye(4)[factors.background],
    )


def test_a_network_that_is_right_has_no_loss_and_is_read_exactly():
    factors = Scenes(300, 5, shares=(0.3, 0.4, 0.3), combinations="all").factors(np.arange(300))
    exact, seen = of_factors(factors), jax.tree.map(jnp.asarray, seen_of(factors))
    losses = jax.jit(detector.losses)(seen, exact._asdict())
    share = np.asarray(jax.nn.sigmoid(seen.share))
    entropy = -(share * np.log(share) + (1 - share) * np.log1p(-share)).sum((1, 2))
    # centres are float32 in the loss
    np.testing.assert_allclose(losses.pop("share"), entropy, rtol=1e-4)
    for name, loss in losses.items():
        np.testing.assert_allclose(loss, 0.0, atol=1e-9, err_msg=name)
    reading = Reading(**jax.device_get(jax.jit(detector.decoded)(seen)))
    np.testing.assert_array_equal(reading.num_objects, factors.num_objects)
    for kind in range(3):
        of_kind = factors.kind == kind
        assert not failing(chosen(reading, of_kind), chosen(factors, of_kind))
    one = factors.kind == 0
    np.testing.assert_allclose(reading.centre[one, 0], factors.centre[one, 0], atol=1e-6)
    np.testing.assert_array_equal(reading.size[one, 0], factors.size[one])


def test_an_object_is_counted_once_wherever_it_lies():
    at = np.stack(np.meshgrid(*2 * [np.linspace(0.1, 0.9, 40)], indexing="ij"), -1).reshape(-1, 2)
    factors = chosen(factors_of("one", 1), np.zeros(len(at), int))
    factors = factors._replace(centre=np.broadcast_to(at[:, None], (len(at), 4, 2)))
    cell, mass = jax.jit(detector.found)(jax.nn.sigmoid(jnp.asarray(seen_of(factors).share)))
    np.testing.assert_array_equal((mass > 0.5).sum(1), 1)
    np.testing.assert_allclose(mass[:, 0], 1.0, atol=1e-6)
    assert abs(np.stack(np.divmod(cell[:, 0], 8), 1) + 0.5 - 8 * at).max() <= 0.5 + 1e-9
    blurred = np.zeros((1, 8, 8))  # one object, whose share is smeared over a row
    blurred[0, 3, 2:5] = 0.3, 0.4, 0.3
    _, mass = detector.found(jnp.asarray(blurred))
    assert (mass > 0.5).sum() == 1


def test_training_lowers_the_loss_and_goes_on_from_any_step():
    config = detector.Config(batch_size=4, num_steps=12)
    update = detector.make_update(config)
    state, step = update.init(detector.init_params(config)), training.parallel.jit(update)
    batch, key = next(detector.batches_from(config)), jax.random.key(0)
    losses = []
    for _ in range(config.num_steps):
        state, metrics = step(state, key, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    reading = detector.read(state.params, np.asarray(batch["image"]))
    for name, field in of_factors(factors_of("one", 4))._asdict().items():
        assert getattr(reading, name).shape == field.shape, name
    stream = detector.batches_from(config)
    next(stream)
    later = next(detector.batches_from(config, 1))
    jax.tree.map(np.testing.assert_array_equal, next(stream), later)


def test_a_detector_of_a_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`size` must be a multiple of 16; got 40"):
        detector.init_params(detector.Config(size=40))
    with pytest.raises(ValueError, match="`num_steps` must be at least 1"):
        detector.make_update(dataclasses.replace(detector.Config(), num_steps=0))


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_a_detector_learns_to_read_scenes():
    params = detector.train(0)
    for kind, least in {"one": 0.98, "two": 0.97, "several": 0.97}.items():
        records = Scenes(512, 9, shares=KINDS[kind], combinations="all")
        found = ceiling(lambda images: detector.read(params, images), records)
        assert found["all"] > least, (kind, found)
