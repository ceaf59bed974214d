"""Pictures of a run, where people would rather look than read: grids of what it draws, and its curves."""

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import torch
from einops import rearrange

PANELS = {  # kind of metric in metrics.jsonl: title
    "rewards": "trained rewards, on each step's pictures",
    "validation": "validation prompts, held back from training",
    "refiner": "refiner",
}
# how names begin that are not drawn: a look's trained rewards stand in the first panel already, and the
# others have scales of their own, which would flatten the curves beside them
HIDDEN = ("train_", "loss", "grad_norm")


def save_grid(images, path, columns):
    """images (B,3,H,W) uint8 -> PNG, row by row; an incomplete last row is left out"""
    columns = min(columns, len(images))
    images = images[: len(images) // columns * columns]
    order = "(row column) c h w -> (row h) (column w) c"
    grid = rearrange(images, order, column=columns)  # one picture of all
    plt.imsave(path, grid.cpu().numpy())


def save_before_after(before, after, path):
    """(B,3,H,W) each -> at most 3 pairs of rows: the same prompt and noise stand above each other."""
    columns = min(12, len(before))  # 768 dots of 64 x 64 pictures, as wide as a page
    rows = min(3, len(before) // columns)
    both = torch.stack([before, after])[:, : rows * columns]  # (2, rows * columns, 3, H, W)
    order = "side (row column) c h w -> (row side column) c h w"
    save_grid(rearrange(both, order, column=columns), path, columns)


def save_curves(rows, path):
    """Rows of metrics.jsonl -> trained rewards, validation and the refiner over steps"""
    kinds = [kind for kind in PANELS if any(kind in row for row in rows)]
    size = (5 * len(kinds), 4.2)  # inches; at 80 dots an inch three panels fit a screen
    figure, axes = plt.subplots(
        1, len(kinds), figsize=size, squeeze=False, layout="tight"
    )
    for axis, kind in zip(axes[0], kinds):
        found = [row for row in rows if kind in row]  # looks are rarer than steps
        steps = [row["step"] for row in found]
        for name in found[0][kind]:
            if not name.startswith(HIDDEN):
                values = [row[kind][name] for row in found]
                axis.plot(steps, values, ".-", label=name)  # dots, or a single look would not show
        for before, row in zip(rows, rows[1:]):
            if before["stage"] != row["stage"]:  # a line where a stage begins
                axis.axvline(row["step"] - 0.5, color="gray")
        axis.set(title=PANELS[kind], xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
