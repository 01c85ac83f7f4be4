"""The comparison of samplers and the custom sampler, through their real command lines."""

import jax
import pytest
from cases import rows_of

from experiments import bench, custom_sampler, digits
from experiments.common.methods import METHODS, NAMES
from experiments.solvers import __main__ as solvers

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def test_every_method_has_a_name_and_the_other_way_round():
    assert tuple(METHODS) == NAMES


def test_the_mixture_smoke_measures_orders(tmp_path):
    assert solvers.main(["mixture", "--preset", "smoke", "--run-dir", str(tmp_path)]) == 0
    orders = {row["sampler"]: float(row["order"]) for row in rows_of(tmp_path) if row["order"]}
    assert orders["ddim"] == pytest.approx(1.0, abs=0.35)
    assert orders["unipc_2"] == pytest.approx(3.0, abs=0.6)  # 32 steps at most
    distances = [float(row["distance"]) for row in rows_of(tmp_path) if row["distance"]]
    assert 0.0 < min(distances) < max(distances) < 0.5
    report = (tmp_path / "report.md").read_text()
    for picture in ("orders.png", "quality.png"):
        assert picture in report
        assert (tmp_path / picture).stat().st_size > 10_000


def test_the_published_third_order_shows_second_and_ours_third():
    with jax.enable_x64(True):
        process, sizes = solvers.PROCESSES["vp"](), (64, 128)
        published = solvers.Method(solvers.published_3m, 2)
        ratios = []
        for method in (published, METHODS["dpm_solver_pp_3"]):
            coarse, fine = solvers.flow_errors(process, method, sizes)
            ratios.append(coarse / fine)
    assert 2**1.7 < ratios[0] < 2**2.5
    assert ratios[1] > 2**2.8


@pytest.mark.slow
def test_the_digits_smoke_judges_a_trained_run(tmp_path, capsys):
    trained, out = tmp_path / "trained", tmp_path / "out"
    options = ["digits", "--preset", "smoke", "--run-dir", str(out), "--trained-run", str(trained)]
    assert solvers.main(options) == 1
    assert "experiments.digits train" in capsys.readouterr().err
    train = ["train", "--preset", "smoke", "--quiet", "--num-steps", "5", "--no-evaluate"]
    assert digits.main([*train, "--run-dir", str(trained)]) == 0
    assert not (trained / "report.md").exists()
    assert solvers.main(options) == 0
    rows = rows_of(out)
    assert {row["sampler"] for row in rows} == set(solvers.SMOKE)
    assert all(0.0 <= float(row["readable"]) <= 1.0 for row in rows)
    assert all(float(row["frechet"]) > 0.0 for row in rows)
    assert (out / "quality.png").stat().st_size > 10_000


def test_a_sampler_of_ones_own_beside_the_librarys(capsys):
    assert custom_sampler.main(["compare", "--num-steps", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    errors = {tuple(line.split()[:2]): float(line.split()[-1]) for line in lines}
    for network in ("function", "linen", "equinox"):
        assert errors[network, "midpoint"] < 6e-3
        assert errors[network, "unipc"] < errors[network, "dpm_solver_pp"]


@pytest.mark.slow
def test_the_bench_of_samplers_ends_with_a_ratio(capsys):
    options = ["samplers", "--rounds", "1", "--num-steps", "2", "--width", "16"]
    assert bench.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[-1].removeprefix("ratio ")) > 0.0
    assert {line.split()[0] for line in lines} >= set(NAMES) - {"adaptive"}
