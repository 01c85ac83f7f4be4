"""Ablations of a text-to-image model: what each run sees, what is measured, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from ablation_cases import relative, told_untrained, train_alone, untrained

from experiments.ablations import judging, told, training
from experiments.ablations.catalogue import MAKERS
from experiments.ablations.definition import Ablation, groups
from experiments.common.command import Refusal
from experiments.latents import denoiser
from experiments.latents.judges import obeyed, templates

pytestmark = pytest.mark.usefixtures("as_users_run_it")

SMOKE = dataclasses.replace(MAKERS["binding"]()["smoke"].base, optimizer="muon")
MIXED = (0.35, 0.5, 0.15)


def but(**values):
    return dataclasses.replace(SMOKE, **values)


# --- What a run sees ------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [MIXED, (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.2, 0.8)])
def test_every_batch_has_the_kinds_by_their_shares(shares):
    config = but(scene_shares=shares, batch_size=128, num_steps=50, num_scenes=1000)
    kind = told.chosen(config) // 1000
    count = (kind[..., None] == np.arange(3)).sum(1)  # (steps, 3)
    assert np.abs(count - 128 * np.array(shares)).max() < 2.5
    assert np.abs(count.sum(0) - 50 * 128 * np.array(shares)).max() < 2.5
    assert not count[:, np.array(shares) == 0.0].any()


def test_scenes_of_a_kind_come_once_an_epoch_in_an_order_of_the_seed():
    config = but(scene_shares=MIXED, batch_size=128, num_steps=60, num_scenes=1000)
    stream = told.chosen(config).ravel()
    for kind in range(3):
        seen = stream[stream // 1000 == kind]
        for epoch in np.split(seen, range(1000, len(seen), 1000)):
            assert len(set(epoch)) == len(epoch)
    assert len(stream[stream // 1000 == 1]) > 3000
    other = told.chosen(dataclasses.replace(config, seed=1)).ravel()
    assert (other // 1000 == stream // 1000).all()
    assert (other != stream).mean() > 0.9


def test_mixtures_and_seeds_have_the_same_autoencoder_and_latents(monkeypatch):
    asked = []

    def load(*args):
        asked.append(args)
        return untrained(*args)

    monkeypatch.setattr(told, "load", load)
    ablation = MAKERS["binding_data"]()["smoke"]
    made = [told.ToldProblem(group.config) for group in groups(ablation)]
    told.ToldProblem(dataclasses.replace(ablation.base, seed=7))
    assert set(asked) == {(32, 2)}
    tables = [problem.table(problem.config) for problem in made]
    assert (tables[0]["chosen"] != tables[1]["chosen"]).any()
    assert (tables[1]["chosen"] // 32 == 1).all()
    jax.tree.map(np.testing.assert_array_equal, tables[0]["all"], tables[1]["all"])


def test_a_batch_is_of_the_captions_of_its_scenes():
    problem = told_untrained(SMOKE)
    text, table = problem.coded.text, problem.table(SMOKE)
    batch = problem.batch(None, table, 3)
    scenes = [divmod(int(row), 32) for row in table["chosen"][3]]
    captions = [told.scenes_of(kind, 32).captions(np.array([i]))[0] for kind, i in scenes]
    jax.tree.map(np.testing.assert_array_equal, batch["text"], text.encode(captions))
    assert batch["mean"].shape == (8, 8, 8, 4)


def test_any_caption_has_no_more_tokens_than_the_tokenizer_takes():
    text = told.learn_text()
    asked = told_untrained(but(num_prompts=200))
    for cell in asked.cells.values():
        assert denoiser.told(text, cell.captions)["tokens"].shape == (200, text.length)


# --- What is measured -----------------------------------------------------------------------


def test_measures_are_of_their_own_prompts():
    problem = told_untrained(but(num_prompts=5))
    real = np.concatenate([cell.pictures() for cell in problem.cells.values()])
    black = np.zeros_like(real)
    for name, measure in told.MEASURES.items():
        assert measure.of_samples(problem, problem.config, 0, real) > 0.5, name
        assert measure.of_samples(problem, problem.config, 0, black) == 0.0, name
        assert measure.higher_is_better
    moved = np.roll(real, 5, axis=0)  # each cell has the pictures of another
    assert told.MEASURES["obeyed_two"].of_samples(problem, problem.config, 0, moved) == 0.0
    cell = problem.cells["two_objects_seen"]
    found = obeyed(templates.read(cell.pictures()), cell.factors)
    for factor in ("relation", "colours", "shapes"):
        value = told.MEASURES[f"bound_{factor}"].of_samples(problem, problem.config, 0, real)
        assert value == pytest.approx(found[factor].mean())


def test_pictures_are_read_once_for_all_measures_of_a_cell(monkeypatch):
    problem, reads = told_untrained(but(num_prompts=2)), []
    real = np.concatenate([cell.pictures() for cell in problem.cells.values()])

    def read(pictures):
        reads.append(len(pictures))
        return templates_read(pictures)

    templates_read = templates.read
    monkeypatch.setattr(templates, "read", read)
    for name in ("obeyed_two", "bound_relation", "bound_colours", "obeyed_one"):
        for _ in range(2):
            told.MEASURES[name].of_samples(problem, problem.config, 0, real.copy())
    assert reads == [2, 2]


# --- What is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "axes", "match"),
    [
        ({"optimizer": "adamw"}, {"muon_learning_rate": (0.02, 0.1)}, "adamw has no rate of Muon"),
        ({"network": "unet"}, {"patch_size": (2, 1)}, "network unet has no patch_size"),
        ({}, {"log_snr_low": (-10.0, -8.0)}, "do not end there"),
        ({}, {"beta_max": (20.0, 8.0)}, "process flow has no range of beta"),
        ({}, {"num_samples": (1, 2)}, "vary `num_prompts`"),
        ({}, {"scene_shares": (MIXED, (0.35, 0.5, 0.15))}, "each once"),
    ],
)
def test_an_axis_that_changes_nothing_is_refused(base, axes, match):
    with pytest.raises(ValueError, match=match):
        Ablation("", told.WORLD, but(**base), axes, ("obeyed_two",))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"scene_shares": (0.5, 0.4, 0.0)}, "--scene-shares.*sum to 1"),
        ({"drop_cond": 0.0}, "--guidance-scale must be 1"),
        ({"space": "pixels"}, "--space must be latents"),
        ({"network": "unet", "text_attention": "joint"}, "--text-attention joint"),
        ({"num_scenes": 8}, "--num-scenes must be at least 32"),
        ({"sampler": "adaptive"}, "chooses its own number of calls"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(values, match):
    told.check(SMOKE)
    with pytest.raises(Refusal, match=match):
        told.check(but(**values))


# --- Runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_side_by_side_are_what_a_run_of_latents_is():
    axes = {"muon_learning_rate": (0.02, 0.005)}
    ablation = Ablation("", told.WORLD, SMOKE, axes, ("obeyed_two",), seeds=2)
    (group,) = groups(ablation)
    problem = told.ToldProblem(group.config)
    trained = training.train(problem, group)
    config = but(decay_steps=4, **group.members[3])
    assert (config.muon_learning_rate, config.seed) == (0.005, 1)
    store, text = problem.coded.store, problem.coded.text
    recipe = denoiser.build(config, store, text)
    batches = (store.records.rows(rows) for rows in told.chosen(config))
    loss = denoiser.build_loss(config, recipe, store)
    alone = train_alone(config, batches, recipe.init_params, loss)
    assert relative(jax.tree.map(lambda x: x[3], trained.ema), alone) < 1e-5


@pytest.mark.slow
def test_latents_are_those_of_the_scenes_and_decode_to_pictures():
    problem = told.ToldProblem(SMOKE)
    coded = problem.coded
    rows = coded.store.records.rows(np.arange(96))
    scene = told.scenes_of(2, 32).rows(np.array([5]))["image"]
    x = (2.0 * scene.astype(np.float32) + 1.0) / 256.0 - 1.0
    mean, deviation = coded.autoencoder.encode(coded.params, x)
    np.testing.assert_allclose(rows["mean"][69:70], mean, atol=1e-5)
    np.testing.assert_allclose(rows["deviation"][69:70], deviation, atol=1e-5)
    z = coded.store.scale * (rows["mean"] - coded.store.shift)
    power = np.mean(z**2 + (coded.store.scale * rows["deviation"]) ** 2)
    np.testing.assert_allclose([z.mean(), power], [0.0, 1.0], atol=1e-4)


@pytest.mark.slow
def test_guidance_and_no_guidance_draw_pictures_of_all_prompts():
    axes = {"guidance_scale": (3.0, 1.0)}
    ablation = Ablation("", told.WORLD, SMOKE, axes, ("obeyed_two", "bound_shapes"), seeds=2)
    (group,) = groups(ablation)
    rows = judging.run_group(ablation, group)["rows"]
    assert [row["nfe"] for row in rows] == [4, 4, 2, 2]
    assert all(0.0 <= row["obeyed_two"] <= row["bound_shapes"] <= 1.0 for row in rows)
