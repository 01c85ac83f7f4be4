"""Scenes: what they hold is what is asked, what is said is what is drawn."""

import dataclasses

import numpy as np
import pytest

from jaxdiff import data
from jaxdiff.data import scenes

MANY = np.arange(4000)
SHARES = {"one": (1.0, 0.0, 0.0), "two": (0.0, 1.0, 0.0), "several": (0.0, 0.0, 1.0)}
MIXED = scenes.Scenes(4000, seed=3, shares=(0.4, 0.35, 0.25))


def pairs_held_out(factors):
    """Whether each of the first two objects is of a pair that training never sees, (B, 2)."""
    return scenes.HELD_OUT.reshape(8, 8)[factors.shape, factors.colour][:, :2]


def test_a_scene_is_a_function_of_its_seed_and_index():
    chosen, few = np.array([17, 3, 99]), np.arange(100)
    for made in (MIXED, dataclasses.replace(MIXED, num_examples=9000)):
        np.testing.assert_array_equal(
            made.rows(chosen)["image"], MIXED.rows(few)["image"][chosen], strict=True
        )
        assert made.captions(chosen) == [MIXED.captions(few)[i] for i in chosen]
    other = dataclasses.replace(MIXED, seed=4)
    assert np.mean(other.factors(MANY).shape[:, 0] == MIXED.factors(MANY).shape[:, 0]) < 0.2


def test_scenes_stay_what_they_were():
    assert MIXED.captions(np.arange(4)) == [
        "a pink star left of a cyan cross",
        "a cyan circle, and to the right of it a pink plus sign",
        "a beige picture of 4 pink capital Ns",
        "two purple hoops",
    ]


@pytest.mark.parametrize("kind", SHARES)
def test_training_sees_no_combination_that_is_held_out(kind):
    seen = scenes.Scenes(4000, shares=SHARES[kind]).factors(MANY)
    assert set(seen.kind) == {list(SHARES).index(kind)}
    assert not pairs_held_out(seen)[:, : seen.num_objects.min()].any()
    unseen = scenes.Scenes(4000, shares=SHARES[kind], combinations="held_out").factors(MANY)
    held_out = pairs_held_out(unseen)
    if kind == "two":  # one of them, either
        assert (held_out.sum(1) == 1).all()
        assert abs(held_out[:, 0].mean() - 0.5) < 4 * 0.5 / 4000**0.5
        for factors in (seen, unseen):
            assert not scenes.HELD_OUT_ORDER[factors.shape[:, 0], factors.shape[:, 1]].any()
            assert (factors.colour[:, 0] != factors.colour[:, 1]).all()
    else:
        assert held_out[:, 0].all()


def test_an_order_held_out_is_of_pairs_that_training_sees():
    made = scenes.Scenes(4000, shares=SHARES["two"], combinations="held_out_order")
    factors = made.factors(MANY)
    assert scenes.HELD_OUT_ORDER[factors.shape[:, 0], factors.shape[:, 1]].all()
    assert not pairs_held_out(factors).any()


def test_every_factor_is_drawn_evenly():
    factors = scenes.Scenes(4000, combinations="all").factors(MANY)
    pair = 8 * factors.shape[:, 0] + factors.colour[:, 0]
    for values, num in (
        (pair, 64),
        (factors.size, 3),
        (factors.place, 9),
        (factors.background, 4),
    ):
        share = np.bincount(values, minlength=num) / 4000
        stderr = (1 / num * (1 - 1 / num) / 4000) ** 0.5
        assert abs(share - 1 / num).max() < 4 * stderr, num


def test_objects_are_where_they_are_said_to_be_and_apart():
    factors = MIXED.factors(MANY)
    one, two, several = (factors.kind == k for k in range(3))
    grid = np.round((factors.centre[one, 0] - 0.5) / 0.26).astype(int) + 1
    np.testing.assert_array_equal(3 * grid[:, 0] + grid[:, 1], factors.place[one])
    down, right = (factors.centre[two, 0] - factors.centre[two, 1]).T
    offset = np.select([factors.relation[two] == k for k in range(4)], [-right, right, -down, down])
    assert (offset > 0.35).all()
    gaps = factors.centre[:, :, None] - factors.centre[:, None]
    gaps = (
        np.hypot(gaps[..., 0], gaps[..., 1]) - factors.radius[..., None] - factors.radius[:, None]
    )
    assert gaps[two, 0, 1].min() > 0
    count = factors.num_objects[several, None, None]
    real = (np.arange(4)[:, None] < np.arange(4)) & (np.arange(4) < count)
    assert gaps[several][real].min() > 0
    reach = abs(factors.centre - 0.5).max(-1) + factors.radius
    assert reach[np.arange(4) < factors.num_objects[:, None]].max() < 0.51  # all within the picture


def test_what_is_said_is_what_is_there():
    """Each caption read again by its words alone."""
    factors, captions = MIXED.factors(MANY), MIXED.captions(MANY)
    said = scenes.said(factors)
    numbers = ({"two", "2"}, {"three", "3"}, {"four", "4"})
    for i, caption in enumerate(captions):
        words = set(caption.replace(",", "").split())
        colours = {scenes.COLOURS[c] for c in factors.colour[i, : factors.num_objects[i]]}
        assert words & set(scenes.COLOURS) == colours, caption
        assert said["background"][i] == bool(words & set(scenes.BACKGROUNDS)), caption
        assert " a o" not in f" {caption}", caption
        if factors.kind[i] == 2:
            assert words & numbers[factors.num_objects[i] - 2], caption
            assert len(words & set.union(*numbers)) == 1, caption
        if said["size"][i]:
            assert factors.kind[i] == 0
    assert len(set(captions)) > 2500
    assert len({word for caption in captions for word in caption.replace(",", "").split()}) < 100


def test_pictures_are_of_the_colours_that_are_said_at_any_size():
    solid = [
        scenes.SHAPES.index(name) for name in ("circle", "square", "triangle", "star", "cross")
    ]
    factors = MIXED.factors(MANY[:400])
    small, large = (scenes.render(factors, size).astype(float) for size in (32, 64))
    chosen = np.isin(factors.shape[:, 0], solid)
    pixel = (factors.centre[:, 0] * 64).astype(int)
    shown = large[np.arange(400), pixel[:, 0], pixel[:, 1]]
    wanted = scenes.RGB[factors.colour[:, 0]]
    assert abs(shown - wanted)[chosen].max() <= 12.5
    corner = large[factors.kind == 1, 0, 0]
    background = scenes.BACKGROUND_RGB[factors.background[factors.kind == 1]]
    assert abs(corner - background).max() <= 12.5
    halved = large.reshape(400, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.sqrt(((halved - small) ** 2).mean()) < 4.0  # of 255: edges alone differ


def test_shapes_have_the_areas_of_their_formulas():
    radius, size = 0.4, 256
    alone = scenes.Scenes(1).factors(np.arange(1))
    areas = {"circle": np.pi, "square": 4 * 0.84**2, "ring": np.pi * (1 - 0.56**2)}
    areas |= {"cross": 2 * 0.6 * 1.9 - 0.6**2, "triangle": 1.1**2 * 0.75 * 3**0.5}
    for name, area in areas.items():
        shape = np.full((1, 4), scenes.SHAPES.index(name))
        made = alone._replace(
            shape=shape,
            centre=np.full((1, 4, 2), 0.5),
            radius=np.full((1, 4), radius),
            tint=np.zeros((1, 5, 3)),
            background=np.array([0]),
        )
        red = scenes.render(made, size)[0, ..., 0].astype(float)
        top = scenes.RGB[made.colour[0, 0], 0]
        covered = ((red - 16) / (top - 16)).sum() / (radius * size) ** 2
        assert covered == pytest.approx(area, rel=0.02), name


def test_they_are_records_that_batches_read():
    made = scenes.Scenes(40, shares=(0.5, 0.5, 0.0))
    batch = next(data.batches(made, 8, seed=0, prefetch=0))
    indices = data.batch_indices(40, 8, 0, 0)
    np.testing.assert_array_equal(batch["image"], made.rows(indices)["image"], strict=True)
    assert batch["image"].shape == (8, 32, 32, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_examples": 0}, "`num_examples` must be at least 1"),
        ({"num_examples": 2.5}, "`num_examples` must be a whole number"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"seed": 2**63}, r"`seed` must be in 0\.\.2\^63 - 1"),
        ({"size": 8}, "`size` must be at least 16"),
        ({"shares": (0.5, 0.5)}, "`shares` must be three"),
        ({"shares": (0.5, 0.2, 0.2)}, "`shares` must sum to 1"),
        ({"shares": (2.0, -1.0, 0.0)}, "`shares` must"),
        ({"combinations": "new"}, "`combinations` must"),
        ({"combinations": "held_out_order"}, r"`shares` must be \(0, 1, 0\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        scenes.Scenes(**({"num_examples": 4} | wrong))
