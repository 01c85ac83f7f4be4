"""Every choice of every option, through training and evaluation: none dies on the way."""

import dataclasses
import json
import math
import typing

import jax
import pytest

from experiments import digits
from experiments.common.command import PRESET, REPORT, defaults_of
from experiments.common.evaluations import EVALUATION
from experiments.common.optimization import FREE
from experiments.images import model as image_model
from experiments.toy2d import model as toy2d
from experiments.toy2d.__main__ import main as toy2d_main
from jaxdiff.training import run as runs

SMALL = {
    digits.main: ("--num-steps", "2", "--width", "8", "--batch-size", "8", "--sample-steps", "2"),
    toy2d_main: ("--num-steps", "2", "--width", "8", "--eval-points", "40", "--sample-steps", "3"),
}


def choices(config_type):
    """Return the words that set each field with few values to each of them, by option."""
    found = {}
    for name, hint in typing.get_type_hints(config_type).items():
        option = f"--{name.replace('_', '-')}"
        kinds = [hint, *typing.get_args(hint)]
        literals = [kind for kind in kinds if typing.get_origin(kind) is typing.Literal]
        if literals:
            words = [(option, value) for value in typing.get_args(literals[0])]
            found[option] = words + [(option, "None")] * (type(None) in kinds)
        elif hint is bool:
            found[option] = [(option,), (f"--no-{name.replace('_', '-')}",)]
    return found


def each_once(config_type):
    """Return as many commands as the option with most choices has; each sets every option."""
    found = choices(config_type)
    most = max(map(len, found.values()))
    return [
        [word for words in found.values() for word in words[i % len(words)]] for i in range(most)
    ]


def commands(main, config_type, more):
    words = [*each_once(config_type), *(line.split() for line in more)]
    return [pytest.param(main, each, id="_".join(each).replace("--", "")) for each in words]


RUNS = [
    *commands(
        digits.main,
        image_model.Config,
        [
            "--prediction eps",
            "--prediction eps --process flow",
            "--prediction score",
            "--prediction score --process flow",
            "--mixture-components",
            "--mixture-components 1 200",
            "--log-snr-high 20",
            "--log-snr-low -20",
            "--eval-tolerance 1e-6",
            "--loss-on None --prediction x0",
        ],
    ),
    *commands(
        toy2d_main,
        toy2d.Config,
        [
            "--prediction eps",
            "--prediction score --process flow",
            "--loss implicit --prediction score",
            "--loss elbo --prediction eps",
            "--eval-points 20",
            "--log-snr-high 20",
        ],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("main", "options"), RUNS)
def test_every_choice_trains_and_is_judged_or_is_refused_at_once(main, options, tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["--preset", "smoke", "--quiet", "--run-dir", str(folder), *SMALL[main]]
    train = ["train"] * (main is digits.main)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        code = main([*train, *command, *options])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if code == 1:
        assert err.startswith("error: --"), err
        assert not folder.exists()
        return
    assert code == 0, err
    assert (folder / REPORT).exists()
    results = json.loads((folder / EVALUATION).read_text())
    assert len(results) > 4
    assert all(math.isfinite(value) for value in results.values())


def test_every_field_refuses_what_it_cannot_be_by_its_name():
    wrong = {int: -1, float: math.nan, bool: "yes", str: 3}
    for experiment, check in ((image_model, image_model.check), (toy2d, toy2d.check)):
        config = experiment.PRESETS["smoke"]
        for name, hint in typing.get_type_hints(experiment.Config).items():
            kinds = [hint, *typing.get_args(hint)]
            value = next((wrong[kind] for kind in kinds if kind in wrong), "nonsense")
            many = typing.get_origin(hint) is tuple
            broken = dataclasses.replace(config, **{name: (value,) if many else value})
            option = f"--{name.replace('_', '-')} must"
            with pytest.raises(Exception, match=option) as caught:
                check(broken)
            assert type(caught.value).__name__ == "Refusal"


def as_asked(experiment, *argv):
    return defaults_of(argv, experiment.PRESETS, experiment.asked_again)


@pytest.mark.parametrize("experiment", [image_model, toy2d])
def test_what_is_not_given_is_as_recorded_and_a_preset_that_is_given_is_given_whole(
    experiment, tmp_path
):
    presets, folder = experiment.PRESETS, tmp_path / "run"
    assert as_asked(experiment, "--run-dir", str(folder)) == (presets["full"], "full")
    config = dataclasses.replace(presets["smoke"], width=24, decay_steps=7, num_steps=30)
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    runs.write_record(folder, record, free=FREE, also={PRESET: "smoke"})
    for words in (["--run-dir", str(folder)], [f"--run_dir={folder}", "--num-steps", "40"]):
        assert as_asked(experiment, *words) == (config, "smoke")
    given = as_asked(experiment, "--run-dir", str(folder), "--preset", "smoke")
    assert given == (presets["smoke"], "smoke")
    (folder / "config.json").write_text("{")  # the command says what is wrong with it
    assert as_asked(experiment, "--run-dir", str(folder)) == (presets["full"], "full")


def test_a_recorded_folder_of_images_is_asked_for_by_its_path():
    config = dataclasses.replace(
        image_model.PRESETS["full"], data="folder", data_dir="/there", image_size=8
    )
    again = image_model.asked_again(image_model.to_record(config))
    assert (again.data, again.data_dir, again.image_size) == ("/there", None, 8)
    named = dataclasses.replace(config, data="mnist", image_size=None)
    again = image_model.asked_again(image_model.to_record(named))
    assert (again.data, again.data_dir) == ("mnist", None)  # where it lies is as recorded
