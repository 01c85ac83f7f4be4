"""Pictures: grids of images, strips over time, animations, training curves.

Images come as uint8 (..., H, W, C) with C 1 or 3. Small images are magnified by whole factors, so
that every pixel stays a square.

Figures are drawn by Agg on canvases of their own: no window system, and the backend that a notebook
or `MPLBACKEND` has chosen is neither needed nor changed. Files are written whole or not at all.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdiff import files
from jaxdiff.extras import needed_by

__all__ = [
    "magnify",
    "new_figure",
    "save",
    "save_animation",
    "save_by_class",
    "save_curve",
    "save_frames",
    "save_image",
    "save_sheet",
    "save_strip",
    "tile",
]

INK, MUTED, ACCENT, SECOND = "#1b1f24", "#6b7480", "#2f6db5", "#c8553d"


def tile(images: np.ndarray, num_columns: int, *, pad: int = 1, fill: int = 255) -> np.ndarray:
    """Lay images out in rows.

    Args:
        images: uint8 (N, H, W, C).
        num_columns: images a row.
        pad: pixels between and around them.
        fill: the level of the padding.

    Returns:
        uint8 (rows, columns, 3).
    """
    num, height, width, channels = images.shape
    num_rows = -(-num // num_columns)
    sheet = np.full(
        (num_rows * (height + pad) + pad, num_columns * (width + pad) + pad, channels),
        fill,
        np.uint8,
    )
    for i, image in enumerate(images):
        row, column = divmod(i, num_columns)
        top, left = row * (height + pad) + pad, column * (width + pad) + pad
        sheet[top : top + height, left : left + width] = image
    return np.broadcast_to(sheet, (*sheet.shape[:2], 3)) if channels == 1 else sheet[..., :3]


def magnify(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel of (H, W, C) `factor` times both ways."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def save_image(path: files.Path, image: np.ndarray) -> None:
    """Save one image (H, W, C) as a PNG, pixel by pixel."""
    with needed_by("jaxdiff.plotting"):
        from PIL import Image

    with files.whole(path) as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")


def save_sheet(path: files.Path, images: np.ndarray, *, num_columns: int = 8) -> None:
    """Save images (N, H, W, C) as one PNG, magnified to be looked at."""
    save_image(path, magnify(tile(images, num_columns), max(1, 64 // images.shape[2])))


def save_animation(path: files.Path, frames: np.ndarray, *, num_columns: int = 5) -> None:
    """Save frames (T, N, H, W, C) as a GIF that pauses on its last frame."""
    with needed_by("jaxdiff.plotting"):
        from PIL import Image

    factor = max(1, 64 // frames.shape[3])
    sheets = [Image.fromarray(magnify(tile(frame, num_columns), factor)) for frame in frames]
    _save_frames(path, sheets, 60)


def save_frames(
    path: files.Path, draw: Callable[[Any, int], None], num_frames: int, *, ncols: int = 1
) -> None:
    """Save a figure that changes as a GIF that pauses on its last frame.

    Args:
        path: a GIF.
        draw: (axes, i) draws frame i on cleared axes; a row of them if there are several.
        num_frames: how many.
        ncols: axes side by side.
    """
    with needed_by("jaxdiff.plotting"):
        from PIL import Image

    figure, axes = new_figure(3.8 * ncols + 1.0 * (ncols == 1), 3.4, ncols=ncols)
    frames = []
    for i in range(num_frames):
        for axis in np.ravel(axes):
            axis.clear()
        draw(axes, i)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]))
    _save_frames(path, frames, 90)


def _save_frames(path: files.Path, frames: Sequence[Any], milliseconds: int) -> None:
    durations = [milliseconds] * (len(frames) - 1) + [1800]
    with files.whole(path) as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )


def new_figure(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure of so many inches and its axes, as `matplotlib.pyplot.subplots` does.

    Args:
        width: in inches.
        height: in inches.
        options: those of `matplotlib.figure.Figure.subplots`.

    Raises:
        ImportError: if Matplotlib is not installed, naming the extra.
    """
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**options)


def _import_matplotlib() -> None:
    with needed_by("jaxdiff.plotting"):
        try:
            import matplotlib  # noqa: F401
        except ValueError:
            # MPLBACKEND names a backend that is not there: what a shell started from a notebook
            # hands on. Matplotlib itself cannot be imported then, Agg or not, and what of it was
            # imported is of no use to a second try.
            for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
                del sys.modules[name]
            chosen = os.environ.pop("MPLBACKEND", None)
            try:
                import matplotlib  # noqa: F401
            finally:
                if chosen is not None:
                    os.environ["MPLBACKEND"] = chosen


def save(figure: Any, path: files.Path, *, dpi: int = 160) -> None:
    """Save a figure as a PNG; the same picture is the same file.

    Raises:
        OSError: if the file cannot be written; what was there is then as it was.
    """
    with files.whole(path) as file:
        # No creation date and no version among the metadata: the same figure is the same file.
        figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})


def save_by_class(
    path: files.Path,
    real: np.ndarray,
    drawn: np.ndarray,
    names: Sequence[str],
    title: str,
    *,
    ylabel: str = "class",
) -> None:
    """Save one row a class: real images on the left, samples of that class on the right.

    Args:
        path: a PNG.
        real: uint8 (K, N, H, W, C).
        drawn: uint8 (K, M, H, W, C).
        names: one a class.
        title: of the whole.
        ylabel: what a row is.
    """
    num_classes, height = len(real), real.shape[2] + 1
    widths = [images.shape[1] for images in (real, drawn)]
    beside = max(1.2, 0.5 + 0.085 * max(len(name) for name in names))
    figure, axes = new_figure(
        0.42 * sum(widths) + beside, 0.42 * num_classes + 0.8, ncols=2, width_ratios=widths
    )
    for axis, images, label in zip(axes, (real, drawn), ("real, held out", "drawn"), strict=True):
        axis.imshow(tile(images.reshape(-1, *images.shape[2:]), images.shape[1]))
        axis.set_title(label, fontsize=10, color=INK)
        axis.set_xticks([])
        axis.tick_params(length=0, labelsize=10, labelcolor=INK)
        axis.set_yticks([(i + 0.5) * height for i in range(num_classes)])
        axis.set_yticklabels(names if axis is axes[0] else [])
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel(ylabel, color=MUTED)
    figure.suptitle(title, fontsize=12, color=INK)
    save(figure, path)


def save_strip(
    path: files.Path, frames: np.ndarray, labels: Sequence[str], title: str, caption: str
) -> None:
    """Save a strip over time: one column a time, one row an image.

    Args:
        path: a PNG.
        frames: uint8 (T, N, H, W, C).
        labels: one a time, below its column.
        title: above.
        caption: below, what the labels are.
    """
    num_times, num_images = frames.shape[:2]
    figure, axis = new_figure(0.72 * num_times + 0.4, 0.72 * num_images + 1.1)
    rows = frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:])
    axis.imshow(tile(rows, num_times))
    width = frames.shape[3] + 1
    axis.set_xticks([(i + 0.5) * width for i in range(num_times)])
    axis.set_xticklabels(labels)
    axis.set_yticks([])
    axis.tick_params(length=0, labelsize=9, labelcolor=INK)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(caption, fontsize=10, color=MUTED)
    axis.set_title(title, fontsize=12, color=INK)
    save(figure, path)


def save_curve(
    path: files.Path, steps: Sequence[float], values: Sequence[float], *, title: str, ylabel: str
) -> None:
    """Save a curve over training steps, with a running median.

    Its axis is logarithmic where all values are positive.
    """
    figure, axis = new_figure(6.4, 3.6)
    half = max(1, len(values) // 40)
    medians = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    axis.plot(steps, values, color=ACCENT, alpha=0.35, linewidth=1, label="logged batch")
    axis.plot(steps, medians, color=ACCENT, linewidth=2, label="running median")
    if len(values) and min(values) > 0.0:
        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
    axis.set_xlabel("training step", color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.set_title(title, fontsize=12, color=INK)
    axis.grid(color="#e4e7eb", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, labelcolor=INK)
    save(figure, path)
