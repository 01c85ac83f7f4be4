"""Every line of code in the README runs, and what it says of itself holds."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order_and_say_what_is_true(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        names = {}
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    share = float(re.search(r"([\d.]+) of the samples", printed)[1])
    stderr = (0.3 * 0.7 / 1000) ** 0.5
    assert abs(share - 0.30) < 4 * stderr + 0.005  # 100 Euler steps
    assert abs(names["log_prob"] - names["mixture"].log_prob(names["x"])).max() < 0.05
    assert float(names["metrics"]["loss"]) < 0.95  # 1.0 predicts nothing


def test_the_files_it_names_exist():
    for path in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(jaxdiff/[\w/.]+|experiments|tests)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_its_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
