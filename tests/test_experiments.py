"""The theory and the distributions in the plane, through their command lines."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import few
from PIL import Image

from experiments.common import targets
from experiments.theory import __main__ as theory
from experiments.theory import estimation, learning, processes
from experiments.theory.claim import Claim, Context
from experiments.toy2d import model as toy2d
from experiments.toy2d.__main__ import main as toy2d_main
from jaxdiff import plotting

pytestmark = pytest.mark.usefixtures("as_users_run_it")


# --- theory ---------------------------------------------------------------------------------


FEW = ("Data", "Log-likelihood", "What the network outputs")


@pytest.fixture(scope="module", params=[FEW, pytest.param(None, marks=pytest.mark.slow)])
def measured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory")
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        pytest.MonkeyPatch.context() as patch,
    ):
        if request.param is not None:
            patch.setattr(theory, "SLOW", theory.CLAIMS.keys() - set(request.param))
        assert theory.main(["--preset", "smoke", "--run-dir", str(folder)]) == 0
    return folder


def test_the_smoke_measures_and_draws_claims(measured):
    claims = json.loads((measured / "claims.json").read_text())
    assert len(claims) in (len(FEW), len(theory.CLAIMS) - len(theory.SLOW))
    report = (measured / "report.md").read_text()
    for claim in claims:
        assert {"claim", "expected", "measured", "holds"} <= claim.keys()
        assert claim["holds"], claim
        for figure in claim["figures"]:
            assert figure in report
            assert (measured / figure).stat().st_size > 5_000
    animations = list(measured.glob("*.gif"))
    assert animations or len(claims) == len(FEW)
    for path in animations:
        with Image.open(path) as animation:
            assert animation.n_frames >= 5


def test_a_finished_folder_is_left_alone_and_another_config_refused(measured, capsys):
    before = {path: path.stat().st_mtime_ns for path in measured.iterdir()}
    assert theory.main(["--preset", "smoke", "--run-dir", str(measured)]) == 0
    assert theory.main(["--preset", "smoke", "--seed", "1", "--run-dir", str(measured)]) == 1
    assert "--seed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in measured.iterdir()} == before


def numbers(value):
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [value]


def test_every_claim_is_in_the_committed_results_and_holds():
    folder = pathlib.Path(__file__).parent.parent / "experiments" / "results" / "theory"
    claims = json.loads((folder / "claims.json").read_text())
    assert [claim["name"] for claim in claims] == list(theory.CLAIMS)
    assert len(claims) >= 15
    for claim in claims:
        assert claim["holds"], claim["name"]
        assert all(math.isfinite(number) for number in numbers(claim["measured"]))
        assert all((folder / figure).exists() for figure in claim["figures"])


def test_claims_could_come_out_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "save", lambda figure, path: None)
    ctx = Context(tmp_path, 0, full=False)
    monkeypatch.setattr(estimation, "BAD", (-1.0, 0.8))  # the truth itself is no bad candidate
    assert not estimation.likelihood_tells_candidates_apart(ctx).holds
    monkeypatch.setattr(processes, "DELTA", processes.DELTA[::-1])
    assert not processes.the_step_back_undoes_decay_and_noise(ctx).holds
    assert not processes.steps_compose_to_the_closed_form(ctx).holds
    untrained = learning.noising_teaches_the_score(ctx)
    assert isinstance(untrained, Claim)
    assert not untrained.holds


# --- toy2d ----------------------------------------------------------------------------------


def test_a_smoke_run_ends_with_everything_measured(tmp_path, capsys):
    command = ["--preset", "smoke", "--quiet", "--run-dir", str(tmp_path)]
    assert toy2d_main(command) == 0
    results = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("nll", "entropy", "nll_gap", "nll_gap_stderr", "c2st", "negative_elbo"):
        assert math.isfinite(results[name]), name
    gap = results["nll"] - results["entropy"]
    assert results["nll_gap"] == pytest.approx(gap, abs=1e-5)
    assert 0.0 <= results["c2st"] <= 1.0
    of = json.loads((tmp_path / "judged.json").read_text())
    assert (results["step"], of["step"], of["average"]) == (20, 20, "main")
    assert "step 20, average `main`" in (tmp_path / "report.md").read_text()
    for name in ("density.png", "field.png", "loss.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    before = (tmp_path / "evaluation.json").stat().st_mtime_ns
    assert toy2d_main(command) == 0
    assert (tmp_path / "evaluation.json").stat().st_mtime_ns == before
    assert toy2d_main([*command, "--width", "8"]) == 1
    assert "--width: there 16, asked 8" in capsys.readouterr().err


@pytest.mark.parametrize("loss", few(toy2d.LossName.__args__, ("denoising", "sliced", "elbo")))
def test_every_loss_trains(loss):
    config = toy2d.dataclasses.replace(toy2d.PRESETS["smoke"], loss=loss)
    model = toy2d.build_model(config)
    batch = next(toy2d.batches(config, model.target, 0))
    value, grads = jax.jit(
        jax.value_and_grad(
            lambda params: toy2d.build_loss(config, model)(params, jax.random.key(0), batch)[
                0
            ].mean()
        )
    )(model.init_params())
    assert np.isfinite(value)
    assert sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(grads)) > 0.0


def test_what_cannot_be_meant_is_refused(tmp_path, capsys):
    folder = ["--run-dir", str(tmp_path / "none")]
    assert toy2d_main([*folder, "--target", "moons", "--loss", "explicit"]) == 1
    assert "--loss explicit needs the score" in capsys.readouterr().err
    assert toy2d_main([*folder, "--num-steps", "0"]) == 1
    assert "--num-steps must be at least 1" in capsys.readouterr().err
    assert toy2d_main([*folder, "--log-snr-low", "20"]) == 1
    assert "--log-snr-low must be below" in capsys.readouterr().err
    assert toy2d_main([*folder, "--eval-points", "10"]) == 1
    assert "--eval-points must be at least 20" in capsys.readouterr().err
    assert theory.main([*folder, "--seed", "-1"]) == 1
    assert "--seed must lie in 0..4294967295" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", few(targets.TargetName.__args__, ("mixture", "pinwheel")))
def test_targets_are_where_they_say(name):
    target = targets.make_target(name)
    x = np.asarray(target.sample(jax.random.key(0), 4000))
    assert x.shape == (4000, 2)
    assert np.abs(x.mean(0)).max() < 0.35
    assert 0.3 < x.std() < 0.9
    if target.log_prob is not None:
        # the density integrates to 1 over a box that holds everything
        places = np.linspace(-2.0, 2.0, 401) + 1e-4
        grid = np.stack(np.meshgrid(places, places), -1).reshape(-1, 2).astype(np.float32)
        found = np.asarray(jax.jit(target.log_prob)(np.concatenate([x, grid])))
        mass = float(np.exp(found[len(x) :]).sum()) * 0.01**2
        assert mass == pytest.approx(1.0, abs=0.01)
        assert np.isfinite(found[: len(x)]).all()
