"""Killed and resumed equals never killed; stopped, spoiled, crowded and faulty runs say what was kept."""

import errno
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file as safetensors_save

import checkpoint as C
import grpo
import reward as R
from conftest import CALLS, TARGETS, small_detector

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
        lines = (Path.cwd() / "nano/photos/validation.jsonl").read_text().splitlines()[:8]
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["image"] = str(Path.cwd() / "nano/photos" / row["image"])
        (tmp_path / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)))
        mine = {name: {"kind": f"{tmp_path}/mine.py:{name}"} for name in ("bright", "noisy")}
        generator = dict(model=checkpoints("flux"), height=16, width=16, num_steps=3, window=1, call=CALLS["flux"])
        generator |= dict(lora_targets=TARGETS, lora_rank=4, lora_alpha=8)
        values = dict(out=str(tmp_path / "out"), stages=STAGES, micro_batch=4, eval_every=2, eval_images=1)
        values |= dict(save_every=1)
        values |= {n: str(tmp_path / "prompts.txt") for n in ("prompts", "validation_prompts", "test_prompts")}
        values |= dict(validation_photos=str(tmp_path / "photos.jsonl"), generator=generator)
        values |= dict(refiner=dict(max_new_tokens=8), rewards=dict(train=mine, validation={"bright": mine["bright"]}))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(grpo.merge(values, changes)))
        return str(tmp_path / "config.yaml")

    return write


def load(path, *words):
    return grpo.load_config([path, *words])


def result(out):
    """What a run is judged by: rows without seconds, pictures, tensors of the LoRA files and the last checkpoint"""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    pictures = {p.name: p.read_bytes() for p in (*(out / "samples").iterdir(), out / "curves.png")}
    folders = (out / "generator", out / "refiner", C.complete(out)[0])
    files = {f"{f.name}/{p.name}": load_bytes(p.read_bytes()) for f in folders for p in f.glob("*.safetensors")}
    return rows, pictures, {f"{f}/{n}": t for f, tensors in files.items() for n, t in tensors.items()}


def assert_same(one, other):
    rows, pictures, tensors = zip(one, other)
    assert rows[0] == rows[1] and pictures[0] == pictures[1] and set(tensors[0]) == set(tensors[1])
    assert [n for n in tensors[0] if not torch.equal(tensors[0][n], tensors[1][n])] == []


# ---------------------------------------------------------------- exact resume


TOUCHES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def run_and_signal(path, words, touches, nth, number):
    """In a process of its own: train, and send itself a signal just before it touches the folder for the nth time."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(Path(path).with_suffix(".log"), "a", buffering=1)
    seen = 0

    def hook(name, args):
        nonlocal seen
        if name in touches and "/out/" in str(args[0]):
            seen += 1
            if seen == nth:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    grpo.train(load(path, *words))


def spawn(path, words=(), nth=0, touches=TOUCHES, number=signal.SIGKILL):
    """-> exit code; the negative signal where one killed it"""
    context = multiprocessing.get_context("forkserver")  # loads torch once
    context.set_forkserver_preload(["grpo"])
    process = context.Process(target=run_and_signal, args=(path, words, touches, nth, number))
    process.start()
    process.join(300)
    return process.exitcode


def test_killed_anywhere_and_resumed_is_never_killed(written, tmp_path):
    """One run is killed a dozen times, as it touches its folder: before, in and after checkpoints, rows and pictures.

    It is also stopped twice, and resumed each time: rows, weights, optimizers, pictures, the detector that learns and
    the last checkpoint are those of an undisturbed run, bit for bit.
    """
    update = dict(threshold=0, accuracy=1, max_steps=2, batch_size=4, replay=6, lr=1e-3)
    learning = dict(model=small_detector(tmp_path / "detector"), update=update)
    path = written(rewards={"train": {"learning": learning}}, photos=str(tmp_path / "photos.jsonl"))
    assert spawn(path, ["out=" + str(tmp_path / "whole" / "out")]) == 0
    for nth in (1, 4):  # before and in the first checkpoint
        assert spawn(path, ["resume=true"], nth) == -signal.SIGKILL
    for nth in (1, 2, 1):  # before a checkpoint is renamed: all of it is written, and it does not count
        assert spawn(path, ["resume=true"], nth, ("os.rename",)) == -signal.SIGKILL
    assert spawn(path, ["resume=true"], 12, number=signal.SIGTERM) == 143
    assert spawn(path, ["resume=true"], 12, number=signal.SIGINT) == 0
    nths = np.random.default_rng(0).integers(8, 32, 7).tolist()
    codes = [spawn(path, ["resume=true"], nth) for nth in nths]
    assert codes == [-signal.SIGKILL] * 7
    assert spawn(path, ["resume=true"]) == 0 and not (tmp_path / "out" / C.LOCK).exists()
    assert_same(result(tmp_path / "out"), result(tmp_path / "whole" / "out"))
    rows, _, tensors = result(tmp_path / "out")
    assert len(rows) == 8 and sum(bool(row.get("detectors")) for row in rows) == 6
    assert any(n.endswith("/detector.learning.replay") for n in tensors)


def test_a_stopped_run_finishes_its_step_and_saves_it(written, tmp_path, monkeypatch, capsys):
    """SIGTERM in a step: the step's row and checkpoint are there, whatever save_every says; exit code 143."""
    cfg = load(written(stages=[STAGES[1]], save_every=100))
    monkeypatch.setattr(grpo.R, "score", killing(grpo.R.score, signal.SIGTERM, 3))  # two of a look, then a step's
    with pytest.raises(SystemExit) as end:
        grpo.train(cfg)
    assert end.value.code == 143 and len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 1
    assert C.complete(tmp_path / "out")[0].name == "000001" and "resume=true" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def killing(function, number, nth):
    """function, which at its nth call sends this process a signal"""
    calls = []

    def wrapped(*args):
        calls.append(args)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return function(*args)

    return wrapped


# ---------------------------------------------------------------- spoiled checkpoints, changed configs, crowded folders


def two_steps(written, tmp_path, **changes):
    """A finished run of one stage and two steps -> its config's path, its folder"""
    path = written(stages=[dict(STAGES[1], train="generator", steps=2)], **changes)
    grpo.train(load(path))
    return path, tmp_path / "out"


@pytest.mark.parametrize("spoil", ["truncated", "foreign", "rows"])
def test_a_spoiled_checkpoint_falls_back_to_the_one_before(written, tmp_path, capsys, spoil):
    """A line names it and why; the run ends as it would have. With none left one line says so."""
    path, out = two_steps(written, tmp_path)
    before = result(out)
    last, previous = C.complete(out)
    assert (last.name, previous.name) == ("000002", "000001")

    def harm(folder):
        if spoil == "truncated":
            os.truncate(folder / "tensors.safetensors", 1000)
        elif spoil == "foreign":
            (folder / "state.json").write_text('{"step": 2}')
        else:
            rows = (out / "metrics.jsonl").read_text().splitlines(True)
            (out / "metrics.jsonl").write_text(rows[0] + rows[1][:9] if folder == last else "")

    harm(last)
    grpo.train(load(path, "resume=true"))
    printed = capsys.readouterr().out
    assert "falls back to the one before" in printed and f"goes on from {previous}" in printed
    assert_same(result(out), before)
    for folder in C.complete(out):
        harm(folder)
    with pytest.raises(ValueError, match="no checkpoint of .* can be read; train anew with out=NAME"):
        grpo.train(load(path, "resume=true"))


def test_what_a_resume_may_change(written, tmp_path):
    """A changed key is one line with key, both values and remedy; where it runs and how often it saves may change."""
    path, out = two_steps(written, tmp_path)
    before = (out / "metrics.jsonl").read_bytes()
    for word, message in [
        ("generator.lr=5e-3", "resume: generator.lr is 0.005, but .*000002 was written with 0.001; set it back"),
        ("seed=1", "resume: seed is 1"),
        ("weight_decay=0.5", "resume: weight_decay is 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            grpo.train(load(path, "resume=true", word))
        assert (out / "metrics.jsonl").read_bytes() == before
    os.rename(out, tmp_path / "moved")
    grpo.train(load(path, "resume=true", f"out={tmp_path / 'moved'}", "save_every=2", "bench.images=1"))
    assert (tmp_path / "moved/metrics.jsonl").read_bytes() == before


def test_resume_without_a_checkpoint(written, tmp_path):
    """A folder with other things in it is refused; it is left as it was."""
    path = written()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="resume: .* holds no checkpoint"):
        grpo.train(load(path, "resume=true"))
    with pytest.raises(ValueError, match="is in use and is never overwritten"):
        grpo.train(load(path))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_two_runs_on_one_folder_are_refused(tmp_path, capsys):
    """The second is told who holds it; a stale lock is taken over; an unused folder is removed with its lock."""
    out = tmp_path / "out"
    with C.locked(out):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
            with C.locked(out):
                pass
        assert (out / C.LOCK).exists()
    assert not out.exists()
    out.mkdir()
    (out / C.LOCK).write_text("process 1 on elsewhere")
    with C.locked(out):
        assert "process 1 on elsewhere is gone" in capsys.readouterr().out
    assert not out.exists()


# ---------------------------------------------------------------- faults


class Full:
    """A file on a disk that is full from the second row on"""

    def __init__(self, file):
        self.file, self.rows = file, 0

    def write(self, text):
        self.rows += 1
        if self.rows > 1:
            self.file.write(text[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(text)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("where", ["checkpoint/000002", "metrics.jsonl"])
def test_a_full_disk_is_one_line(written, tmp_path, monkeypatch, where):
    """It names file and kept checkpoint; with room again the run goes on from there to the same end."""
    path, whole = two_steps(written, tmp_path)
    before = result(whole)
    whole.rename(tmp_path / "first")
    saves, start = [], grpo.Log.__init__

    def save_file(tensors, file):
        saves.append(file)
        if len(saves) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return safetensors_save(tensors, file)

    def full_metrics(log, *args, **values):
        start(log, *args, **values)
        log.metrics = Full(log.metrics)

    with monkeypatch.context() as patch:
        if where == "metrics.jsonl":
            patch.setattr(grpo.Log, "__init__", full_metrics)
        else:
            patch.setattr(C, "save_file", save_file)
        message = f"out/{where}: .*No space left on device.*; the last good checkpoint is .*/000001; resume=true"
        with pytest.raises(ValueError, match=message):
            grpo.train(load(path))
    assert [p.name for p in (tmp_path / "out/checkpoint").iterdir()].count(".writing") == 0
    grpo.train(load(path, "resume=true"))
    assert_same(result(tmp_path / "out"), before)


def test_a_step_that_is_not_finite_is_left_out(written, tmp_path, monkeypatch):
    """Weights, EMA and moments of its policy stay, the row counts it and holds null; three in a row end the run."""
    cfg = load(written(stages=[dict(STAGES[1], steps=4)]))
    run, stage = grpo.Run(cfg), cfg.stages[0]
    clipped_loss, factor, steps, states = grpo.clipped_loss, [1.0], [], []

    def spoiled(*args):
        loss, clipped = clipped_loss(*args)
        return loss * factor[0], clipped

    monkeypatch.setattr(grpo, "clipped_loss", spoiled)
    for iteration in range(3):
        states.append({n: t.clone() for n, t in run.state()[0].items()})
        factor[0] = float("nan") if iteration == 1 else 1.0
        steps.append(run.step(stage, iteration))
    states.append({n: t.clone() for n, t in run.state()[0].items()})
    moved = []
    for a, b in zip(states, states[1:]):
        moved.append({".".join(n.split(".")[:2]) for n in b if n not in a or not torch.equal(a[n], b[n])})
    everything = {"generator.lora", "generator.ema", "adamw.generator", "refiner.lora", "adamw.refiner"}
    assert moved == [everything, {"refiner.lora", "adamw.refiner"}, everything]
    assert [row["skipped"] for row in steps] == [0, 1, 0] and np.isnan(steps[1]["generator"]["loss"])
    factor[0] = float("inf")
    with pytest.raises(ValueError, match="step 2: loss or gradient was not finite in 3 steps in a row.*good.*/000002"):
        grpo.train(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [1, 1, 1] and rows[0]["generator"]["loss"] is None


@pytest.mark.parametrize(
    "body,message",
    [
        ("{}['no']", "KeyError: 'no'"),
        ("torch.zeros(2) @ torch.zeros(3)", "RuntimeError: inconsistent"),
        ("open('nowhere')", "FileNotFoundError: "),
    ],
)
def test_an_exception_in_a_reward_names_reward_and_line(tmp_path, body, message):
    """Whatever it raises, where the user wrote it; a wrong signature and a failing import name the file too."""
    config = R.RewardConfig(kind=str(tmp_path / "mine.py") + ":bad")
    (tmp_path / "mine.py").write_text(REWARDS + f"\ndef bad(images, prompts):\n    return {body}\n")
    rewards = R.load_rewards({"odd": config})
    line = len(REWARDS.splitlines()) + 3
    with pytest.raises(ValueError, match=f"rewards: odd: .*mine.py:{line}: {message}"):
        R.score(rewards, torch.zeros(1, 3, 4, 4), ["a"])
    (tmp_path / "mine.py").write_text("def bad(images):\n    return images\n")
    with pytest.raises(ValueError, match="rewards: odd: .*mine.py: TypeError: bad"):
        R.score(R.load_rewards({"odd": config}), torch.zeros(1, 3, 4, 4), ["a"])
    (tmp_path / "mine.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match="rewards: odd: .*mine.py:bad: ModuleNotFoundError"):
        R.load_rewards({"odd": config})


def test_out_of_memory_halves_the_micro_batch_once(written, tmp_path, monkeypatch, capsys):
    """The step is done again from the same weights, as if micro_batch had been half; the second time is one line."""
    path = written(stages=[dict(STAGES[1], steps=1)], micro_batch=6, rewards={"train": {"noisy": None}})
    cfg = load(path)
    run, stage = grpo.Run(cfg), cfg.stages[0]
    plain = grpo.Run(load(path, "micro_batch=3"))
    optimize = run.optimize
    failures = [True]

    def short(name, *args):  # after the generator has made its step
        if name == "refiner" and failures:
            failures.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return optimize(name, *args)

    monkeypatch.setattr(run, "optimize", short)
    row = run.within_memory(run.step, stage, 0)
    other = plain.step(stage, 0)
    assert cfg.micro_batch == run.generator.micro_batch == run.refiner.micro_batch == 3
    assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    a, b = run.state()[0], plain.state()[0]
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert run.state()[1] == {"micro_batch": 3, "halved": True}
    failures.append(True)
    with pytest.raises(ValueError, match="out of memory with micro_batch 3, halved already; expected a smaller"):
        run.within_memory(run.step, stage, 1)
