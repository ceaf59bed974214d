"""A night's run in small: 2,000 steps with everything on, watched from outside. A script for Linux, no test.

    python tests/soak.py [key=value ...]        any key of config.yaml but `out`; out/soak must be new

Both policies train, detectors learn, looks and checkpoints come often. It prints the slopes of memory and
open files over steps, and its exit code is not 0 where a step is missing.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out/soak"
LEARN = "{threshold: 0, accuracy: 1, max_steps: 1, batch_size: 8, replay: 64, every: 5}"
WORDS = [
    f"out={OUT}",
    "stages=[{train: refiner, steps: 400, prompts: 2, rewrites: 3, keep_original: false, images: 1},"
    " {train: generator, steps: 800, prompts: 2, images: 3},"
    " {train: joint, steps: 800, prompts: 1, rewrites: 2, images: 2}]",
    "generator.num_steps=3",
    "generator.window=1",
    "refiner.max_new_tokens=32",
    "eval_every=50",
    "eval_images=1",
    "save_every=20",
    f"learners={{semantic: {LEARN}, feature: {LEARN}}}",
    "rewards.train.feature.args={learn: [encoder, classifier]}",
]


def watch(process):
    """-> (n, 3): rows of metrics.jsonl, MiB of memory and open files, twice a second until it ends"""
    seen = []
    log = OUT / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.5)
        status = Path(f"/proc/{process.pid}/statm")
        if log.exists() and process.poll() is None:
            rows = log.read_bytes().count(b"\n")
            resident = int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((rows, resident, len(os.listdir(f"/proc/{process.pid}/fd"))))
    return np.array(seen)


def main(words):
    command = [sys.executable, "grpo.py", "config.yaml", *WORDS, *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    seen = watch(process)
    late = seen[
        len(seen) // 4 : -2
    ]  # the first quarter warms up, and the last readings are of a process that leaves
    for column, name in ((1, "MiB of memory"), (2, "open files")):
        slope = np.polyfit(late[:, 0], late[:, column], 1)[0] * 1000
        print(
            f"{name}: {late[0, column]:.0f} to {late[-1, column]:.0f}, {slope:+.2f} per 1,000 steps"
        )
    rows = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "reward" in row]
    learnt = sum(any(row.get("detectors", {}).values()) for row in rows)
    print(f"{len(steps)} steps; detectors learnt in {learnt} of them")
    sys.exit(process.returncode or steps != list(range(len(steps))))


if __name__ == "__main__":
    main(sys.argv[1:])
