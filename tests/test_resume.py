"""Killed and resumed equals never killed; stopped, spoiled, crowded and faulty runs say what was kept."""

import errno
import json
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
import yaml

import checkpoint as C
import grpo
import reward as R
from conftest import CALLS, TARGETS

REWARDS = """
import random, numpy, torch

def bright(images, prompts):
    return images.mean((1, 2, 3))

def noisy(images, prompts):  # draws from all global generators, as an augmentation would
    noise = torch.rand(len(images)) + random.random() + float(numpy.random.rand())
    return -images.diff(dim=3).abs().mean((1, 2, 3)).cpu() + 0.01 * noise
"""
STAGES = [
    dict(train="refiner", steps=3, prompts=2, rewrites=2, images=1, keep_original=False),
    dict(train="joint", steps=3, prompts=2, rewrites=3, images=2, keep_original=True),
]


@pytest.fixture
def written(checkpoints, tmp_path):
    """changes -> path of a config file: the tiny FLUX, the nano refiner, rewards that need no model, 8 photographs"""

    def write(**changes):
        (tmp_path / "mine.py").write_text(REWARDS)
        (tmp_path / "prompts.txt").write_text("a cat\na dog\na red cup\n")
        lines = (grpo.Path.cwd() / "nano/photos/validation.jsonl").read_text().splitlines()[:8]
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["image"] = str(grpo.Path.cwd() / "nano/photos" / row["image"])
        (tmp_path / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)))
        mine = {name: {"kind": f"{tmp_path}/mine.py:{name}"} for name in ("bright", "noisy")}
        generator = dict(model=checkpoints("flux"), height=16, width=16, num_steps=3, window=1, call=CALLS["flux"])
        generator |= dict(lora_targets=TARGETS, lora_rank=4, lora_alpha=8)
        values = dict(out=str(tmp_path / "out"), stages=STAGES, micro_batch=4, eval_every=2, eval_images=1, save_every=1)
        values |= {n: str(tmp_path / "prompts.txt") for n in ("prompts", "validation_prompts", "test_prompts")}
        values |= dict(validation_photos=str(tmp_path / "photos.jsonl"), generator=generator)
        values |= dict(refiner=dict(max_new_tokens=8), rewards=dict(train=mine, validation={"bright": mine["bright"]}))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(grpo.merge(values, changes)))
        return str(tmp_path / "config.yaml")

    return write


def load(path, *words):
    return grpo.load_config([path, *words])


def result(out):
    """All that a run is judged by: rows without seconds, files of weights and pictures as bytes"""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ["generator/pytorch_lora_weights.safetensors", "refiner/adapter_model.safetensors", "curves.png"]
    names += [f"samples/{p.name}" for p in sorted((out / "samples").iterdir())]
    last = C.complete(out)[0]
    files = {n: (out / n).read_bytes() for n in names} | {"last": (last / "tensors.safetensors").read_bytes()}
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], files


# ---------------------------------------------------------------- exact resume


def run_and_die(path, words, event, number):
    """A process of its own: train, and send itself a signal at the event-th touch of the run's folder (open, rename, mkdir, removal)."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    seen = 0

    def hook(name, args):
        nonlocal seen
        if name in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree") and "/out/" in str(args[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    grpo.train(load(path, *words))


def spawn(path, words=(), event=0, number=signal.SIGKILL):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo"])
    process = context.Process(target=run_and_die, args=(path, words, event, number))
    process.start()
    process.join(300)
    return process.exitcode


def test_killed_anywhere_and_resumed_is_never_killed(written, tmp_path):
    """One run is killed a dozen times, at touches of its folder that fall before, in and after checkpoints, rows and pictures, and resumed
    each time: rows, weights, pictures and the last checkpoint are those of a run that nobody killed, bit for bit."""
    path = written()
    assert spawn(path, ["out=" + str(tmp_path / "whole" / "out")]) == 0
    rng, killed = np.random.default_rng(0), 0
    for event in [1, 3, 4, *rng.integers(8, 40, 11).tolist()]:
        killed += spawn(path, ["resume=true"], int(event)) == -signal.SIGKILL
    assert spawn(path, ["resume=true"]) == 0 and killed >= 12
    rows, files = result(tmp_path / "out")
    whole_rows, whole_files = result(tmp_path / "whole" / "out")
    assert rows == whole_rows and len(rows) == 8
    assert set(files) == set(whole_files) and [n for n in files if files[n] != whole_files[n]] == []
