"""A night's run in small: 2,000 steps with everything on, watched from outside. A script, not a test; Linux alone.

    python tests/soak.py [key=value ...]        any key of config.yaml; `out` must be new

Both policies train, detectors learn every fifth step, looks and checkpoints come as often as they may. Twice a second this script reads
memory and open files of the process; at the end it prints the slopes over steps (least squares over the last three quarters), whether metrics.jsonl
holds every step once, and what stands in `out`; it writes assets/soak.png, and exits with 1 where a step or a row is missing.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/soak")
FIGURE = ROOT / "assets/soak.png"
UPDATE = "{threshold: 0, accuracy: 1, max_steps: 1, batch_size: 8, replay: 64, lr: 3.0e-4, ema: 0.9, every: 5}"
WORDS = [
    f"out={OUT}",
    "stages=[{train: refiner, steps: 400, prompts: 2, rewrites: 3, images: 1, keep_original: false},"
    " {train: generator, steps: 800, prompts: 2, rewrites: 1, images: 3, keep_original: true},"
    " {train: joint, steps: 800, prompts: 1, rewrites: 3, images: 2, keep_original: true}]",
    "generator.num_steps=3", "generator.window=1", "refiner.max_new_tokens=32", "eval_every=50", "eval_images=1", "save_every=20",
    f"rewards.train.semantic.update={UPDATE}", f"rewards.train.feature.update={UPDATE}",
    "rewards.train.feature.args={learn: [encoder, classifier]}",
]  # fmt: skip


def watch(process, metrics):
    """-> (n, 3): rows of metrics.jsonl, MiB of resident memory, open files, until the process ends"""
    seen, page = [], os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        try:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page / 2**20
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:  # it has just ended
            break
        rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if rows:
            seen.append((rows, resident, files))
        time.sleep(0.5)
    process.wait()
    return np.array(seen, float)


def draw(seen, rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for axis, column, title in ((axes[0], 1, "resident memory, MiB"), (axes[1], 2, "open files")):
        axis.plot(seen[:, 0], seen[:, column], lw=0.8)
        axis.set(title=title, xlabel="step", ylim=(0, 1.2 * seen[:, column].max()))
    trained = [r for r in rows if "reward" in r]
    smooth = np.convolve([r["reward"] for r in trained], np.ones(25) / 25, "valid")
    axes[2].plot(np.arange(len(smooth)) + 12, smooth, lw=0.8)
    axes[2].set(title="reward, mean of 25 steps", xlabel="step")
    for axis in axes:
        axis.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(words):
    out = Path(next((w.partition("=")[2] for w in reversed(words) if w.startswith("out=")), OUT))
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "grpo.py"), "config.yaml", *WORDS, *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)  # its bar is on stderr
    seen = watch(process, ROOT / out / "metrics.jsonl")
    if process.returncode:
        sys.exit(f"grpo.py ended with {process.returncode}")
    out = ROOT / out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows if "reward" in r]
    planned = sum(stage["steps"] for stage in yaml.safe_load((out / "config.yaml").read_text())["stages"])
    wrong = sum(steps.count(step) != 1 for step in range(planned))
    late = seen[seen[:, 0] > len(rows) / 4]
    memory, files = (np.polyfit(late[:, 0], late[:, c], 1)[0] * 1000 for c in (1, 2))
    learnt = sum(len(r.get("detectors", {})) for r in rows)
    skipped, looks = sum(r.get("skipped", 0) for r in rows), sum("validation" in r for r in rows)
    print(f"{len(steps)} steps, {wrong} missing or twice, {looks} looks, {learnt} updates of detectors, {skipped} updates left out; "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    for name, column, slope, unit in (("memory", 1, memory, " MiB"), ("open files", 2, files, "")):
        tenth = len(seen) // 10  # medians of a tenth: the last readings are of a process that is leaving
        a, b = np.median(seen[2 * tenth : 3 * tenth + 1, column]), np.median(seen[-tenth - 1 :, column])
        print(f"{name}: {a:.0f}{unit} after a quarter, {b:.0f}{unit} at the end, slope {slope:+.2f}{unit} per 1,000 steps")
    print(f"{sum(p.is_file() for p in out.rglob('*'))} files, {sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 2**20:.0f} MiB in {out.name}/")
    draw(seen, rows, FIGURE)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
