"""Figures: whole files, and nobody else's backend."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxdiff import plotting

ROOT = pathlib.Path(__file__).parent.parent


def drawing(tmp_path, backend, after):
    """Draw where a backend was chosen, then run more code; return its output."""
    code = f"""if True:
        import sys
        from jaxdiff import plotting
        plotting.save_curve({str(tmp_path / "a.png")!r}, [1, 2], [2.0, 1.0], title="t", ylabel="y")
        assert "matplotlib.pyplot" not in sys.modules
        {after}
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"MPLBACKEND": backend},
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "a.png").stat().st_size > 5_000
    return run.stdout.strip()


def test_the_backend_that_was_chosen_stays(tmp_path):
    after = "import matplotlib.pyplot as plt; print(plt.get_backend())"
    assert drawing(tmp_path, "svg", after) == "svg"


@pytest.mark.parametrize("module", ["matplotlib_inline", "no_such_module"])
def test_a_backend_that_is_not_there_is_not_needed(tmp_path, module):
    chosen = f"module://{module}.backend_inline"  # a notebook's, where nothing of it is installed
    assert drawing(tmp_path, chosen, "import os; print(os.environ['MPLBACKEND'])") == chosen


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    old = tmp_path / "old.png"
    plotting.save_sheet(old, images)
    before = old.read_bytes()

    def draw(axes, i):
        if i == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        plotting.save_frames(old, draw, 3)
    figure, _ = plotting.new_figure(1.0, 1.0)
    with pytest.raises(OSError, match="none"):
        plotting.save(figure, tmp_path / "none" / "a.png")
    assert old.read_bytes() == before
    assert os.listdir(tmp_path) == ["old.png"]
    plotting.save_animation(tmp_path / "a.gif", np.stack([images, 255 - images]))
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 2
