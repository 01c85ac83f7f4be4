"""Samplers on published weights against the network's own adaptive solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_to_image_cases as cases
from cases import rows_of

from experiments.common.methods import METHODS
from experiments.common.one_dimension import make_mixture, quantile
from experiments.pretrained.conditioning import Asked, Guidance, Guided
from experiments.solvers import __main__ as solvers
from experiments.solvers.imported import Comparison, World, write
from experiments.solvers.padding import pad, skipping
from jaxdiff import Model, pretrained, processes, sample, timesteps


def exact_world(process, num=33, **options):
    """The world of a mixture whose network is exact, in one dimension, from its quantiles."""
    mixture = make_mixture()

    def apply(params, x_t, t, cond=None, *, key=None):
        return mixture.denoiser(process)(x_t[:, 0, 0], t)[:, None, None]

    loaded = pretrained.Denoising(Model(apply, process, "x0"), {}, None, None, {})
    guided = Guided(loaded, Guidance(), 1.0)
    comparison = Comparison(num=num, dtype="float64", **options)
    return World(guided, guided.shared(None), None, (num, 1, 1, 1), comparison)


def test_errors_are_those_against_the_exact_flow(tmp_path):
    process = processes.ddpm(100)
    world = exact_world(process, tolerance=1e-10)
    rows = world.measure(("ddim", "ancestral", "adaptive"), (16, 32))
    assert [row["sampler"] for row in rows] == ["ddim"] * 2 + ["adaptive"]
    assert [row["calls"] for row in rows[:2]] == [16, 32]
    assert [row.get("steps") for row in rows] == [16, 32, None]
    coarse, fine = rows[0]["error"], rows[1]["error"]
    assert 1.6 < coarse / fine < 2.4
    assert rows[2]["error"] < 1e-2
    assert rows[2]["calls"] > 6
    assert float(world.t_end) == pytest.approx(0.01)
    (answer,) = world.answers.values()
    assert answer.moved < 1e-7
    assert answer.calls > rows[2]["calls"]
    x_T = process.sigma(1.0) * jax.random.normal(jax.random.key(0), world.shape)  # noqa: N806
    exact = flow_map(process, x_T.ravel(), world.t_end)
    np.testing.assert_allclose(answer.x.ravel(), exact, atol=1e-4)
    write(tmp_path, "exact", Asked(), world, rows)
    assert "# Samplers on exact 33 examples of 1 x 1 x 1, all from" in text_of(tmp_path)
    assert (tmp_path / "error.png").stat().st_size > 10_000


def text_of(directory):
    return " ".join((directory / "report.md").read_text().split())


def flow_map(process, x_T, t_end):  # noqa: N803
    """x_s = F_s^-1(F_t(x_t)), by a table of quantiles."""
    mixture = make_mixture()
    q = jax.scipy.stats.norm.cdf(jnp.linspace(-4.5, 4.5, 4001))
    start, end = (quantile(mixture, process, jnp.asarray(t), q) for t in (process.t_max, t_end))
    return jnp.interp(x_T, start, end)


@pytest.mark.slow
def test_each_start_has_an_answer_of_its_own():
    process = processes.flow()
    world = exact_world(process, num=3, tolerance=1e-4)
    rows = world.measure(("ddim", "edm"), (4,))
    starts = sorted(world.answers)
    assert starts[1] == 1.0
    assert float(process.log_snr(jnp.asarray(starts[0]))) == pytest.approx(-8.0)
    assert all(row["error"] < 1.0 for row in rows)
    assert float(process.sigma(world.t_end) / process.alpha(world.t_end)) == pytest.approx(1e-3)


def test_steps_of_no_length_cost_nothing_and_change_nothing():
    process, asked = processes.vp(), []
    x_T = jax.random.normal(jax.random.key(0), (3, 1))  # noqa: N806

    def denoise(x_t, t):
        jax.debug.callback(lambda t: asked.append(float(t)), t)
        return make_mixture().denoiser(process)(x_t, t)

    sampler = METHODS["unipc_3"].make(process, denoise)
    ts = timesteps.uniform(process, 4, t_end=0.1)
    plain = sample(jax.random.key(0), sampler, x_T, ts)
    jax.effects_barrier()
    calls, asked[:] = len(asked), []
    padded = sample(jax.random.key(0), skipping(sampler), x_T, pad(ts, (4, 16)))
    jax.effects_barrier()
    np.testing.assert_allclose(padded, plain, rtol=1e-12)
    assert len(asked) == calls


def smoke(weights, run_dir, *options):
    paths = ["--weights", str(weights), "--run-dir", str(run_dir)]
    return solvers.main(["imported", "--preset", "smoke", *paths, *options])


@pytest.mark.slow
def test_the_smoke_writes_table_and_figure(as_users_run_it, tmp_path, capsys):
    weights = cases.class_pipeline(tmp_path / "weights")
    out, options = tmp_path / "out", ("--num", "2", "--tolerance", "1e-4", "--dtype", "float64")
    assert smoke(weights, out, *options) == 0
    rows = rows_of(out)
    assert [row["sampler"] for row in rows] == ["ddim"] * 2 + ["unipc_2"] * 2 + ["adaptive"]
    assert all(0.0 < float(row["error"]) < 1.0 for row in rows)
    text = text_of(out)
    assert "# Samplers on weights 2 examples of 8 x 8 x 4, guided by 4, all from" in text
    assert "t = 0.001, where sigma / alpha is 0.0292" in text
    assert "tolerance of 0.0001" in text
    assert "In float32" not in text
    assert (out / "error.png").stat().st_size > 10_000
    capsys.readouterr()
    assert smoke(weights, out, *options) == 0  # finished: nothing to do
    assert "Report:" in capsys.readouterr().out
    assert smoke(weights, out, *options, "--seed", "1") == 1
    assert "seed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("text", ("--prompt", "a cat", "--negative-prompt", "the thing", "--rule", "rescaled")),
        ("text", ("--prompt", "", "--guidance-scale", "1", "--grid", "log_snr")),
        ("two_text", ("--prompt", "a cat")),
        ("two_text", ("--prompt", "a cat", "--negative-prompt", "the thing")),
        ("flow", ("--label", "2", "--guidance-scale", "3")),
        ("pixel", ()),
    ],
    ids=str,
)
def test_the_smoke_takes_weights_of_each_kind(as_users_run_it, tmp_path, kind, options):
    make = cases.flow_folder if kind == "flow" else getattr(cases, f"{kind}_pipeline")
    weights = make(tmp_path / "weights")
    assert smoke(weights, tmp_path / "out", "--num", "2", *options) == 0
    rows = rows_of(tmp_path / "out")
    assert all(0.0 < float(row["error"]) < 2.0 for row in rows)
    assert "In float32" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("text", (), "--prompt must be given"),
        ("pixel", ("--guidance-scale", "2"), "--guidance-scale must be 1"),
        ("pixel", ("--tolerance", "0.1"), "--tolerance must be in"),
        ("pixel", ("--num", "0"), "--num must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(as_users_run_it, tmp_path, capsys, kind, options, said):
    weights = getattr(cases, f"{kind}_pipeline")(tmp_path / "weights")
    assert smoke(weights, tmp_path / "out", *options) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
