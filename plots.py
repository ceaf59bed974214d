"""Pictures of a run, where people would rather look than read: grids of what it draws, and its curves."""

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import torch
from einops import rearrange
from PIL import Image

PANELS = {  # kind of metric in metrics.jsonl: title
    "rewards": "trained rewards, on each step's pictures",
    "validation": "validation prompts, held back from training",
    "refiner": "refiner",
}


def save_grid(images, path, columns, zoom=2):
    """images (B,3,H,W), bytes or floats in [0,1] -> PNG, row by row; an incomplete last row is left out"""
    columns = min(columns, len(images))
    images = images[: len(images) // columns * columns]
    if images.dtype != torch.uint8:
        images = (images * 255).round().byte()
    grid = rearrange(
        images, "(row column) c h w -> (row h) (column w) c", column=columns
    )
    picture = Image.fromarray(grid.cpu().numpy())
    wide = picture.width * zoom
    high = picture.height * zoom
    picture.resize((wide, high), Image.NEAREST).save(path)


def save_before_after(before, after, path, columns=12, pairs=3):
    """Rows in turn, before and after: the same prompt and noise stand above each other."""
    columns = min(columns, len(before))
    rows = []
    for first in range(0, len(before) - columns + 1, columns):
        rows.append(before[first : first + columns])
        rows.append(after[first : first + columns])
    save_grid(torch.cat(rows[: 2 * pairs]), path, columns)


def save_curves(rows, path):
    """Rows of metrics.jsonl -> trained rewards, validation and the refiner over steps"""
    kinds = [kind for kind in PANELS if any(kind in row for row in rows)]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5 * len(kinds), 4.2), squeeze=False
    )
    for axis, kind in zip(axes[0], kinds):
        found = [row for row in rows if kind in row]
        steps = [row["step"] for row in found]
        for name in found[0][kind]:
            # the rewards of a look stand in the first panel already
            if not name.startswith("train_") and name not in ("loss", "grad_norm"):
                axis.plot(
                    steps,
                    [row[kind][name] for row in found],
                    "o-",
                    ms=3,
                    label=name,
                )
        for before, row in zip(rows, rows[1:]):
            if before["stage"] != row["stage"]:
                axis.axvline(row["step"] - 0.5, color="gray", lw=0.8, ls=":")
        axis.set(
            title=PANELS[kind], xlabel="step", xlim=(-0.5, rows[-1]["step"] + 0.5)
        )
        axis.legend(frameon=False)
        axis.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
