"""The published recipe against the default one, from the same start, on one machine, one after the other.

    python tests/race.py 0 1 2          seeds; -> out/race/race.png and a table

Each run's looks tell what was reached after how many seconds: the validation detectors, the KID to validation
photographs and the alignment. Looks are part of a run and of its time. What is done before this script starts
is kept: a finished run ends at once.
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt

RECIPES = {"default": [], "published": ["profile=published"]}
PANELS = {
    "validation": "validation detector",
    "kid": "KID",
    "train_alignment": "alignment",
}


def run(recipe, seed):
    """-> the looks of a run, [{"seconds", "validation", "kid", "score", ...}]; trains what is not there yet"""
    out = Path(f"out/race/{recipe}{seed}")
    words = [*RECIPES[recipe], f"seed={seed}", f"out={out}", "resume=true"]
    subprocess.run([sys.executable, "grpo.py", "config.yaml", *words], check=True)
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    looks = [row["validation"] | {"seconds": row["seconds"]} for row in rows if "validation" in row]
    start = looks[0]["seconds"]  # loading the models is no part of the race
    return [look | {"seconds": look["seconds"] - start} for look in looks]


def main(seeds):
    looks = {(recipe, seed): run(recipe, seed) for seed in seeds for recipe in RECIPES}
    print(
        "| seed | published: best score | after (s) | default: as good after (s) | share | default: best score |"
    )
    print("|---|---|---|---|---|---|")
    for seed in seeds:
        best = max(looks["published", seed], key=lambda look: look["score"])
        ours = looks["default", seed]
        reached = [look["seconds"] for look in ours if look["score"] >= best["score"]]
        when, share = "never", ""
        if reached:
            when, share = f"{reached[0]:.0f}", f"{reached[0] / best['seconds']:.2f}"
        top = max(look["score"] for look in ours)
        print(f"| {seed} | {best['score']:.3f} | {best['seconds']:.0f} | {when} | {share} | {top:.3f} |")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4.2), layout="tight")
    for axis, (name, title) in zip(axes, PANELS.items()):
        for (recipe, seed), found in looks.items():
            line = dict(
                color="C0" if recipe == "default" else "C1", label=recipe if seed == seeds[0] else None
            )
            axis.plot([look["seconds"] for look in found], [look[name] for look in found], ".-", **line)
        axis.set(title=title, xlabel="seconds")
        axis.legend()
    figure.savefig("out/race/race.png", dpi=80)


if __name__ == "__main__":
    main(sys.argv[1:] or ["0"])
