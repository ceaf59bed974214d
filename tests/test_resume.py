"""Killed and resumed equals never killed, to the bit; and what a checkpoint refuses."""

import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import Bomb, read_log, refuses
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import folder
import grpo
import learner

STAGES = """stages=[
    {train: refiner, steps: 2, prompts: 2, rewrites: 2, keep_original: false, images: 1},
    {train: generator, steps: 2, prompts: 2, images: 2},
    {train: joint, steps: 2, prompts: 2, rewrites: 2, images: 2}]"""
LEARNING = [
    "rewards.train.learning={kind: classifier, model: nano/feature, args: {learn: [classifier]}}",
    "learners.learning={threshold: 0, accuracy: 1, max_steps: 1, batch_size: 4, replay: 6}",
]
@pytest.fixture
def words(config, tmp_path):
    """The command line of a run with everything in it: all kinds of stage, a detector that learns"""
    config(f"out={tmp_path}/out")
    noisy = f"rewards.train.noisy={{kind: '{tmp_path}/mine.py:noisy'}}"
    return [
        f"{tmp_path}/config.yaml",
        STAGES,
        *LEARNING,
        noisy,
        "save_every=1",
        "resume=true",
    ]


def strike_at(owner, name, nth, strike, patch):
    """The nth call of owner.name from now on is struck before it does anything."""
    work = getattr(owner, name)
    calls = itertools.count(1)

    def struck(*args, **options):
        if next(calls) == nth:
            strike()
        return work(*args, **options)

    patch.setattr(owner, name, struck)


class Killed(BaseException):
    """What nothing catches"""


def die():
    raise Killed


def train_and_signal(words, number):
    """In a process of its own: a run that gets a signal in its second step"""
    torch.set_num_threads(1)
    strike_at(grpo.Run, "step", 2, lambda: os.kill(os.getpid(), number), pytest.MonkeyPatch())
    grpo.train(grpo.load_config(words))


def signalled(words, number):
    """-> exit code of a run that gets a signal; the negative number where that killed it"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo"])  # loads torch once
    process = context.Process(target=train_and_signal, args=(words, number))
    process.start()
    process.join()
    return process.exitcode


def result(out):
    """What a run is judged by: rows without seconds, LoRA files, and all of its last checkpoint"""
    rows = read_log(out)
    files = [load_file(path) for path in sorted(Path(out).rglob("*.safetensors"))]
    saved = torch.load(folder.checkpoints(out)[0], weights_only=True)
    for row in rows + saved["progress"]["rows"]:
        del row["seconds"]
    return tree_leaves((rows, files, saved))


MOMENTS = [
    (os, "replace", 2),  # a checkpoint is written, and does not count yet
    (grpo.Run, "optimize", 2),
    (grpo, "finish_stage", 1),
    (grpo.Log, "record", 2),
    (learner.Learner, "step", 2),
]


def test_killed_anywhere_and_resumed_is_never_killed(words, tmp_path):
    """Rows, LoRA files and the last checkpoint, detectors, AdamW and best look in it, are the same bits."""
    grpo.train(grpo.load_config([*words, f"out={tmp_path}/whole"]))
    cfg = grpo.load_config(words)
    assert signalled(words, signal.SIGKILL) == -signal.SIGKILL
    for moment in MOMENTS:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            strike_at(*moment, die, patch)
            grpo.train(cfg)
    grpo.train(cfg)
    for one, other in zip(result(tmp_path / "whole"), result(cfg.out), strict=True):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    assert sum(bool(row.get("detectors", {}).get("learning")) for row in read_log(cfg.out)) == 6


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_finishes_its_step_and_saves_it(words, tmp_path, number, code):
    """Whatever save_every says; the exit code is a shell's, so that && starts no bench."""
    assert signalled([*words, "save_every=99"], number) == code
    assert [path.name for path in folder.checkpoints(tmp_path / "out")] == ["000002.pt"]


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(config):
    """words -> Config, Run whose checkpoints of turns 1, 2 and 3 were saved in this order"""
    cfg = config(stage="train: generator, steps: 9, prompts: 2, images: 2")
    Path(cfg.out, "checkpoint").mkdir(parents=True)
    run = grpo.Run(cfg)
    for turn in (1, 2, 3):
        for p in run.generator.parameters():
            p.data.fill_(turn)
        folder.save_checkpoint(cfg, run.state(), {"turn": turn, "rows": []})
    return cfg, run


def test_the_last_two_checkpoints_stay(saved):
    """The newest first; one that is half written counts for nothing."""
    cfg, _ = saved
    Path(cfg.out, "checkpoint/writing").write_bytes(b"half")
    assert [path.name for path in folder.checkpoints(cfg.out)] == ["000003.pt", "000002.pt"]


def cut_off(path, saved):
    os.truncate(path, 5000)


def flip_a_bit(path, saved):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def put_nan(path, saved):
    next(iter(saved["state"]["tensors"]["generator"].values())).fill_(float("nan"))
    torch.save(saved, path)


def reshape(path, saved):
    tensors = saved["state"]["tensors"]["refiner"]
    tensors[next(iter(tensors))] = torch.zeros(3)
    torch.save(saved, path)


def plant_a_bomb(path, saved):
    torch.save(saved | {"progress": Bomb(f"{path}.went-off")}, path)


@pytest.mark.parametrize("harm", [cut_off, flip_a_bit, put_nan, reshape, plant_a_bomb])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(saved, harm, capsys):
    """A line says so, and no code in it runs; where none is whole, nothing is made up."""
    cfg, run = saved
    newest, before = folder.checkpoints(cfg.out)
    harm(newest, torch.load(newest, weights_only=True))
    assert folder.load_checkpoint(cfg, run.restore)["turn"] == 2
    assert all((p == 2).all() for p in run.generator.parameters())
    assert f"{newest}" in capsys.readouterr().out.partition("falls back to the one before")[0]
    assert not Path(f"{newest}.went-off").exists()
    harm(before, torch.load(before, weights_only=True))
    with refuses("no checkpoint of .* can be read; train anew with out=NAME"):
        folder.load_checkpoint(cfg, run.restore)


@pytest.mark.parametrize("key, value", [("weight_decay", 0.5), ("seed", 1), ("learners", {"a": 1})])
def test_what_decides_the_result_may_not_change(saved, key, value):
    """A changed key is named, and so is a prompt file whose words have changed. Other keys are free."""
    cfg, run = saved
    cfg.micro_batch = 1
    cfg.save_every = 7
    cfg.log = "wandb"
    cfg.bench = {"images": 3}
    assert folder.load_checkpoint(cfg, run.restore)["turn"] == 3
    whole = getattr(cfg, key)
    setattr(cfg, key, value)
    with refuses(f"resume: {key}.* is not what .*000003.pt was written with"):
        folder.load_checkpoint(cfg, run.restore)
    setattr(cfg, key, whole)
    Path(cfg.validation_prompts).write_text("another")
    with refuses("resume: validation_prompts"):
        folder.load_checkpoint(cfg, run.restore)


def test_two_runs_on_one_folder_are_refused(config):
    """The second is told, and afterwards the folder is free."""
    cfg = config("resume=true")
    with folder.lock(cfg):
        with refuses("another run is at work"), folder.lock(cfg):
            pass
    with folder.lock(cfg):
        pass
