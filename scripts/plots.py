"""Where pictures go: the checks before the work, and the file after it. What is drawn is the caller's."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """ValueError where `picture` could not write `path`: before the work rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install -e .[eval]")
    if path.suffix.lower() not in PLOTS:
        raise ValueError(f"--plot {path} is no kind of picture that is written; end its name in {', '.join(PLOTS)}")
    folder = path.expanduser().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--plot {path} cannot be written: {folder} has to be a folder that can be, {path.name} none")


@contextmanager
def picture(path: Path, *, size: tuple[float, float], panels: int = 1) -> Iterator[tuple["Figure", list["Axes"]]]:
    """An empty picture with panels side by side, written at the end; `size` in inches."""
    import matplotlib

    matplotlib.use("agg")  # draws without a screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    try:
        yield figure, list(axes[0])
        figure.savefig(path.expanduser(), dpi=150)
    finally:
        pyplot.close(figure)
