"""Every block of code in the documents runs alone, and what they say of themselves holds."""

import contextlib
import functools
import importlib
import pathlib
import re
import shlex

import jax
import pytest
import tyro

from experiments.common import command
from jaxdiff.files import stores

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = {
    path.name: path.read_text() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
README = DOCUMENTS["README.md"]
SLOW = {"likelihoods.md-0"}
"""Blocks that say again what another one does, of the same mixture: README.md-0."""
BLOCKS = [
    pytest.param(code, id=f"{name}-{i}", marks=[pytest.mark.slow] * (f"{name}-{i}" in SLOW))
    for name, text in DOCUMENTS.items()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


def commands():
    """Return (experiment, arguments) of every command in the documents, each once."""
    found = {}
    for text in DOCUMENTS.values():
        whole = re.sub(r"\\\n\s*", " ", text)
        for name, rest in re.findall(r"-m experiments\.(\w+)([^\n#'`\]]*)", whole):
            found[name, tuple(shlex.split(rest))] = None
    return list(found)


def run(code):
    """Run a block in a namespace of its own; return it."""
    names = {"__name__": "readme"}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "document", "exec"), names)
    return names


def block_with(text):
    (code,) = [each.values[0] for each in BLOCKS if text in each.values[0]]
    return code


TRUE = {
    "def generate": lambda names, said: (
        abs(float(re.search(r"([\d.]+) of the samples", said)[1]) - 0.30)
        < 4 * (0.3 * 0.7 / 1000) ** 0.5 + 0.005  # 100 Euler steps
    ),
    "log-likelihood wrong by at most": lambda names, said: (
        float(re.search(r"at most ([\d.]+) nats", said)[1]) < 0.05
        and abs(float(re.search(r"([\d.]+) at the left", said)[1]) - 0.30)
        < 4 * (0.3 * 0.7 / 1000) ** 0.5 + 0.005
    ),
    "x = mixture.sample(jax.random.key(1), 5)": lambda names, said: (
        abs(names["log_prob"] - names["mixture"].log_prob(names["x"])).max() < 0.05
    ),
    "for step in range(100)": lambda names, said: (
        float(names["metrics"]["loss"]) < 0.95  # 1.0 predicts nothing
    ),
    "by_mesh = ": lambda names, said: (
        abs(float(names["by_pmap"]["loss"] - names["by_mesh"]["loss"])) < 1e-5
    ),
    "networks.alternate(": lambda names, said: (
        int(names["state"].step) == 5 and float(names["metrics"]["generator_grad_norm"]) > 0
    ),
    "runs/corners": lambda names, said: float(re.match(r"[\d.]+", said)[0]) > 0.6,
    "runs/mine": lambda names, said: "16 images, and 20 steps" in said,
    "schedulers.read(": lambda names, said: (
        said.startswith("v ")
        and abs(names["schedule"].process.alpha(1.0) ** 2 - 0.00466) < 1e-5
        and abs(names["schedule"].step(1.0) - 999) < 1e-3
    ),
    "MINE = Ablation(": lambda names, said: (
        names["MINE"].check() is None
        # averages that forget their start
        and names["MINE"].base.ema_decay ** names["MINE"].base.num_steps < 1e-3
    ),
    "theirs.safetensors": lambda names, said: "[[3. 3. 3. 3. 3.]]" in said,
    "flax.linen": lambda names, said: "8 losses" in said,
}
"""What holds after a block that holds a text: (its names, what it printed) -> whether."""


@pytest.mark.parametrize("code", BLOCKS)
def test_a_python_block_runs_alone_and_says_what_is_true(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(code)
    said = capsys.readouterr().out
    for text, holds in TRUE.items():
        assert text not in code or holds(names, said)


def test_what_is_known_to_be_true_is_of_blocks_that_are_there():
    for text in TRUE:
        assert block_with(text)


def inert(fn):
    """Return a command that takes the same options and does nothing."""
    if isinstance(fn, functools.partial):
        return functools.partial(inert(fn.func), *fn.args, **fn.keywords)
    return functools.wraps(fn)(lambda *args, **options: None)


@pytest.mark.parametrize(("name", "words"), commands(), ids=lambda x: str(x))
def test_a_command_in_the_documents_can_be_read(name, words, monkeypatch):
    def read(prog, found, argv):
        if callable(found):
            tyro.cli(inert(found), prog=prog, args=list(argv))
        else:
            tyro.extras.subcommand_cli_from_dict(
                {key: inert(fn) for key, fn in found.items()}, prog=prog, args=list(argv)
            )
        return 0

    def silent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(command, "run", read)
    monkeypatch.setattr(stores.StorePath, "read_bytes", silent)  # of a bucket that there is none of
    path = ROOT / "experiments" / name
    module = importlib.import_module(f"experiments.{name}" + ".__main__" * path.is_dir())
    with contextlib.ExitStack() as stack:
        if "--help" in words:
            stack.enter_context(pytest.raises(SystemExit, match="0"))
        assert module.main(list(words)) == 0


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_files_it_names_exist(name):
    folder = ROOT if (ROOT / name).exists() else ROOT / "docs"
    for path in re.findall(r"\]\(([^):]+)\)", DOCUMENTS[name]):
        file, _, anchor = path.partition("#")
        assert (folder / file).exists(), path
        headings = re.findall(r"^#+ (.*)$", (folder / file).read_text(), re.M) if anchor else [""]
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings], path
    for path in re.findall(r"`(jaxdiff/[\w/.]+|docs|experiments|tests)`", DOCUMENTS[name]):
        assert (ROOT / path).exists(), path


def test_every_page_is_found_from_the_readme():
    for path in ROOT.glob("docs/*.md"):
        assert f"](docs/{path.name})" in README


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_its_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
