"""Where likelihoods of trained models run, and what is said where they cannot be taken."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MIXTURE

from experiments.common import evaluations, flows
from experiments.common.command import REPORT, Refusal
from experiments.common.evaluations import EVALUATION, JUDGED, is_judged
from experiments.common.methods import METHODS
from experiments.images import judging as digits_likelihood
from experiments.images.judging import is_full, mixture_bits, mixture_rows
from experiments.images.model import PRESETS
from jaxdiff import data, denoisers, likelihood, predictions, processes

SIZES = [(8, 1), (28, 1), (32, 3), (64, 3)]
PROCESSES = {"cosine": processes.cosine(), "flow": processes.flow()}


def exact_network(process, prediction):
    """What a perfect network says: it has no answer at alpha = 0."""
    denoise = MIXTURE.denoiser(process)

    def network(x_t, t):
        return predictions.convert(process, "x0", prediction, denoise(x_t, t), x_t, t)

    return denoisers.from_network(network, process, prediction)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [("cosine", "eps"), pytest.param("flow", "score", marks=pytest.mark.slow)],
)
def test_networks_that_need_signal_have_a_likelihood_where_alpha_ends_at_0(name, prediction):
    process = PROCESSES[name]
    ended = flows.until_start(process, prediction)
    assert ended.alpha(ended.t_max) > 0.0
    assert ended.t_max == METHODS["ddim"].start(process, True)  # where its samples start
    x = MIXTURE.sample(jax.random.key(0), 8)
    given = {"t_min": flows.data_end(process, jnp.asarray(14.0)), "rtol": 1e-3, "atol": 1e-3}
    denoise = exact_network(process, prediction)
    found, _ = jax.jit(lambda x: likelihood.log_prob(ended, denoise, x, **given))(x)
    # The prior at log-SNR -8 is off by alpha x.z, 0.018 times about 2, one way or the other.
    np.testing.assert_allclose(found, MIXTURE.log_prob(x), atol=5e-2)


def test_others_keep_the_process_as_it_is():
    process = PROCESSES["flow"]
    assert flows.until_start(process, "v") is process
    assert flows.until_start(processes.vp(), "eps").t_max == 1.0
    assert METHODS["ddim"].start(process, False) == 1.0
    assert flows.data_end(processes.ve(), jnp.asarray(12.0)) == 0.0  # never so clean


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1.0, 1.0, "--log-snr-low must be below"),
        (-20.0, -12.0, "--log-snr-high must be above -7.8"),
    ],
)
def test_bounds_that_no_model_can_be_judged_between_are_refused(low, high, said):
    with pytest.raises(Refusal, match=said):
        flows.check_ends(processes.ve(), "eps", low, high)


def test_a_solver_that_does_not_end_is_one_sentence(capfd):
    def rough(x_t, t):
        return 1e3 * jnp.sin(1e3 * x_t)

    process, x = PROCESSES["cosine"], jnp.ones((2, 2))
    solve = jax.jit(lambda x: likelihood.log_prob(process, rough, x, max_steps=8)[0])
    longer = "train longer, or give `evaluate` a larger"
    with pytest.raises(flows.Unsolved, match=longer), flows.solving():
        np.asarray(solve(x))
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError, match="another"), flows.solving():
        raise RuntimeError("another")


def test_work_is_cut_into_parts_of_one_size():
    assert [part.tolist() for part in flows.chunks(np.arange(5), 2)] == [[0, 1], [2, 3], [4, 4]]
    assert [part.tolist() for part in flows.chunks(np.arange(2), 8)] == [[0, 1]]
    assert flows.chunks(np.arange(0), 8) == []


def test_mixtures_of_many_dimensions_are_bounded(monkeypatch):
    monkeypatch.setattr(digits_likelihood, "MIXTURE_IMAGES", 120)
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (200, 12, 12, 1), np.uint8)
    images = data.Images.from_arrays(levels)
    x, said = mixture_rows(jax.random.key(0), images, 0)
    assert x.shape == (120, 12, 12, 1)
    assert "120 random images" in said
    assert not is_full(x)
    bits = mixture_bits(x[:100], x[100:], (1, 2), images.bin_width, 0)
    assert sorted(bits) == [1, 2]
    assert all(7.0 < value < 9.0 for value in bits.values())  # 8 bits: levels are uniform
    few = data.Images.from_arrays(levels[:10])
    assert mixture_rows(jax.random.key(0), few, 0)[0].shape == (10, 12, 12, 1)


def of_shape(*shape):
    return data.Images("mine", "test", 9, shape, 256, None, [])


def test_large_images_are_judged_in_bounded_time_and_memory(monkeypatch):
    config = PRESETS["full"]
    found = [digits_likelihood.num_examples(config, of_shape(n, n, c)) for n, c in SIZES]
    assert found == [297, 41, 10, 8]
    asked = dataclasses.replace(config, eval_examples=500)
    assert digits_likelihood.num_examples(asked, of_shape(64, 64, 3)) == 500
    rows = []
    monkeypatch.setattr(data.Images, "rows", lambda self, indices: rows.append(len(indices)) or {})
    for n, c in SIZES[1:]:
        with pytest.raises(KeyError):
            mixture_rows(
                jax.random.key(0), dataclasses.replace(of_shape(n, n, c), num_examples=60_000), 0
            )
    assert rows == [5000, 5000, 1365]
    notes = []
    args = jax.random.key(0), of_shape(96, 96, 3), np.zeros((2, 96, 96, 3)), 0, notes, False
    assert digits_likelihood.judge_mixture(config, *args) == ({}, "")
    assert notes == ["No mixture was fitted: images of 27648 numbers are too many for EM."]


def test_a_report_is_of_a_step_and_an_average(tmp_path):
    settings = {"eval_split": "test", "sizes": [2]}
    of = {"step": 20, "average": "main", **settings}
    results = {"nll": 1.5, "lost": float("nan")}
    assert not is_judged(tmp_path, 20)
    evaluations.write(tmp_path, of, results, "# report")
    assert is_judged(tmp_path, 20)
    assert not is_judged(tmp_path, 10)
    assert json.loads((tmp_path / EVALUATION).read_text()) == {"step": 20, "nll": 1.5}
    assert evaluations.differing(tmp_path, settings | {"unknown": 1}) == []
    assert evaluations.differing(tmp_path, {"sizes": [3]}) == ["sizes [2] (asked [3])"]
    evaluations.write(tmp_path, of | {"average": "0.5"}, results, "# report")
    assert not is_judged(tmp_path, 20)
    evaluations.write(tmp_path, of, results, "# report")
    evaluations.begin(tmp_path)  # and a crash among the figures
    assert not is_judged(tmp_path, 20)
    (tmp_path / JUDGED).write_text("{")
    assert not is_judged(tmp_path, 20)
    (tmp_path / JUDGED).unlink()  # a crash before it was written
    assert not is_judged(tmp_path, 20)
    assert evaluations.steps(11, 5000) == "step 11 of 5000"
    assert evaluations.steps(20, 20) == "20 steps"


def test_reports_of_earlier_versions_are_known(tmp_path):
    (tmp_path / REPORT).write_text("# report")
    (tmp_path / EVALUATION).write_text(json.dumps({"nll": 1.5}))
    assert is_judged(tmp_path, 20)
    (tmp_path / EVALUATION).write_text(json.dumps({"step": 20, "average": "main", "grid": 4}))
    assert is_judged(tmp_path, 20)
    assert not is_judged(tmp_path, 10)
    assert evaluations.differing(tmp_path, {"grid": 8}) == ["grid 4 (asked 8)"]
    (tmp_path / REPORT).unlink()
    assert not is_judged(tmp_path, 20)
