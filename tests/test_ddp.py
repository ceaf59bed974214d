"""Two processes do what one does: gloo on the CPU, by torchrun. Run by torchrun, this file is a rank."""

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, read_log, refuses
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import grpo
import ranks
from folder import flat

DETECTOR = "{kind: classifier, model: nano/feature, args: {learn: [classifier]}}"
UPDATE = "{threshold: 0, accuracy: 1, max_steps: 3, batch_size: 6, replay: 8}"
GENERATOR = "train: generator, steps: 2, prompts: 4, images: 4"
CASES = {  # stage, words; micro_batch divides no group
    "refiner": [
        "train: refiner, prompts: 2, rewrites: 4, keep_original: false, images: 1",
        "refiner.beta=0.1",
    ],
    "generator": [GENERATOR, "updates=2"],
    "joint": ["train: joint, prompts: 2, rewrites: 3, images: 2"],
    "learning": [GENERATOR, f"rewards.train.d={DETECTOR}", f"learners.d={UPDATE}"],
    "fsdp": [GENERATOR, "updates=2", "fsdp=true"],
}


def walk(cfg):
    """Two steps and a look -> rows and all that they left, of this rank"""
    run = grpo.Run(cfg)
    rows = [flat(run.step(cfg.stages[0], iteration)) for iteration in range(2)]
    look, images = run.evaluate(cfg.stages[0])
    held = sum(
        getattr(p, "_local_tensor", p).numel() for p in run.generator.model.parameters()
    )
    return {"rows": [*rows, look], "state": run.state(), "images": images, "held": held}


def torchrun(*words):
    """On two ranks -> what they print"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *words], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def settings(config, tmp_path):
    """stage, words -> Config of a run whose rewards spread around 0"""
    words = [
        "rewards.train.bright=null",
        "rewards.train.smooth=null",
        "micro_batch=3",
        "refiner.lr=1e-4",
        "seed=1",  # at seed 0 rounding tips one token of a rewrite over to its neighbour
    ]
    for name in ("side", "half"):
        words.append(f"rewards.train.{name}={{kind: '{tmp_path}/mine.py:{name}'}}")
    return lambda stage, *more: config(*words, *more, stage=stage)


def check_close(one, other):
    """{name: tensor or number}, up to what rounding does; AdamW makes whole steps of gradients that are mere rounding"""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if torch.is_tensor(value):
            difference = value.float() - other[name].float()  # pictures are bytes
            assert difference.norm() <= 1e-2 * value.float().norm(), name
        else:
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_two_ranks_do_what_one_does(settings, tmp_path):
    """Rows, pictures, weights and EMA of every kind of stage; and both ranks hold the same bits.

    So does a detector that learns. With fsdp each holds half of the frozen weights, and nothing else changes.
    """
    alone = {}
    for case, words in CASES.items():
        cfg = settings(*words)
        file = str(tmp_path / f"{case}.yaml")
        OmegaConf.save(OmegaConf.create(asdict(cfg)), file)
        alone[file] = walk(cfg)
    torchrun("tests/test_ddp.py", *alone)
    for file, one in alone.items():
        first, second = (torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2))
        for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
        for row, row_of_two in zip(one["rows"], first["rows"], strict=True):
            check_close(row, row_of_two)
        check_close({"images": one["images"]}, {"images": first["images"]})
        for policy, tensors in one["state"]["tensors"].items():
            check_close(tensors, first["state"]["tensors"][policy])
        assert first["held"] < (0.6 if "fsdp" in file else 1.1) * one["held"]


def test_rank_0_writes_and_prints(settings, tmp_path):
    """`torchrun grpo.py` leaves the log and the LoRAs that `python grpo.py` leaves, once."""
    cfg = settings("train: joint, steps: 2, prompts: 2, rewrites: 3, images: 2")
    grpo.train(cfg)
    printed = torchrun("grpo.py", f"{cfg.out}/config.yaml", f"out={tmp_path}/two")
    assert printed.count("keeps the weights of step") == 1
    for row, row_of_two in zip(read_log(cfg.out), read_log(tmp_path / "two"), strict=True):
        check_close(row["validation"], row_of_two["validation"])
    for name in ("generator/pytorch_lora_weights", "refiner/adapter_model"):
        files = (f"{out}/{name}.safetensors" for out in (cfg.out, tmp_path / "two"))
        check_close(*map(load_file, files))


def test_ranks_get_equal_parts_or_nothing(settings, monkeypatch, tmp_path):
    """Prompts that are no multiple of the ranks, in a stage or in validation, are refused at start."""
    monkeypatch.setattr(ranks, "WORLD", 2)
    with refuses("prompts: 3; expected a multiple of 2"):
        grpo.train(settings("train: generator, steps: 1, prompts: 3, images: 2"))
    cfg = settings("train: generator, steps: 1, prompts: 2, images: 2")
    cfg.validation_prompts = tmp_path / "three.txt"
    cfg.validation_prompts.write_text("a\nb\nc\n")
    with refuses("3 prompts on 2 ranks; expected a multiple"):
        grpo.check_run(cfg)


if __name__ == "__main__":
    with ranks.meeting("cpu"):
        for file in sys.argv[1:]:
            torch.save(walk(grpo.load_config([file])), f"{file}.{ranks.RANK}")
