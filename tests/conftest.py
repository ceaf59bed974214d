"""Tiny random checkpoints of the real classes, saved with save_pretrained: tests go through the code that real models go through."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network
os.environ["TRITON_INTERPRET"] = "1"  # before triton is: kernels run on the CPU, in the tests that ask for them
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import kernels  # noqa: F401
from common import ConfigError

del os.environ["TRITON_INTERPRET"]  # the others take the plain path
torch.set_num_threads(1)  # the models are tiny: a second thread would mostly wait


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """The default config names nano/... relative to the repository."""
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)


TINY = dict(
    model="nano/flux",
    call=dict(guidance_scale=3.5, max_sequence_length=16),
    height=16,
    width=16,
    num_steps=5,
    draw_steps=5,
    window=2,
    log_prob="path",
    extremes=0,
    lora_targets=["to_q", "to_k", "to_v", "to_out.0"],
    lora_rank=4,
    lora_alpha=8,
)


def perturb(gen, std=0.05):
    """Give the LoRA, and its average, something to add"""
    g = torch.Generator().manual_seed(3)
    for key, p in gen.lora.items():
        if "lora_B" in key:
            p.data = std * torch.randn(p.shape, generator=g)
            gen.ema[key].copy_(p.data)


def nudge(policy):
    """Make its LoRA another than the one that drew"""
    for p in policy.parameters():
        p.data += 0.02


@pytest.fixture
def tiny_generator():
    """changes -> a Generator on the tiny FLUX with a LoRA that is not zero"""
    from generator import Generator, GeneratorConfig

    def make(micro_batch=4, offload=False, dtype=torch.float32, **changes):
        cfg = GeneratorConfig(**(TINY | changes))
        gen = Generator(cfg, dtype=dtype, micro_batch=micro_batch, offload=offload)
        gen.add_lora()
        perturb(gen)
        return gen

    return make


def refuses(message):
    """Inside, something is refused, as a user's mistake is: by a ConfigError whose line holds the message."""
    return pytest.raises(ConfigError, match=message)


def pictures(count, side=64):
    """(B,3,H,W) in [0,1], always the same"""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def list_photos(file, split, count):
    """The first photographs of nano/photos as a list of their own -> its file"""
    lines = (ROOT / f"nano/photos/{split}.jsonl").read_text().splitlines()[:count]
    text = "\n".join(lines)
    file.write_text(text.replace('"image": "', f'"image": "{ROOT}/nano/photos/'))
    return file


def damage(file, kind):
    """A .safetensors, of which one tensor becomes what libraries pass in silence: they fill in and skip names."""
    weights = load_file(file)
    name, tensor = weights.popitem()
    instead = {
        "missing": {},
        "unexpected": {name: tensor, "extra": tensor.clone()},
        "renamed": {f"{name}.other": tensor},
        "not finite": {name: tensor / 0},
        "reshaped": {name: tensor[..., :1].clone()},
    }
    save_file(weights | instead[kind], file, {"format": "pt"})


@dataclass
class Bomb:
    """Unpickled, it would make a folder"""

    place: str

    def __reduce__(self):
        return os.mkdir, (self.place,)


def read_log(out):
    """-> the rows of a run's metrics.jsonl"""
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


REWARDS = """
import random

import numpy
import torch

def bright(images, prompts):
    return images.mean((1, 2, 3))

def smooth(images, prompts):
    return -images.diff(dim=3).abs().mean((1, 2, 3))

def side(images, prompts):  # around 0, so that rounding stays small
    return (images[..., :8] - images[..., 8:]).mean((1, 2, 3))

def half(images, prompts):
    return (images[..., :8, :] - images[..., 8:, :]).mean((1, 2, 3))

def noisy(images, prompts):  # draws from all global generators, as an augmentation would
    return torch.rand(len(images)) + random.random() + float(numpy.random.rand())
"""


@pytest.fixture
def config(tmp_path):
    """words -> Config of a run on the tiny FLUX and the nano refiner, with rewards that need no model; <tmp>/config.yaml

    stage: the only one, as a YAML mapping without braces.
    """
    import grpo

    mine = tmp_path / "mine.py"
    mine.write_text(REWARDS)
    prompts = tmp_path / "few.txt"
    prompts.write_text("a cat\na dog\n\na red cup\na tree\n")
    photos = str(list_photos(tmp_path / "photos.jsonl", "test", 12))
    rewards = {name: {"kind": f"{mine}:{name}"} for name in ("bright", "smooth")}
    base = dict(
        out=str(tmp_path / "out"),
        micro_batch=4,
        eval_every=1,
        eval_images=1,
        validation_prompts=str(prompts),
        test_prompts=str(prompts),
        validation_photos=photos,
        test_photos=photos,
        generator=TINY,
        refiner=dict(max_new_tokens=24),
        rewards=dict(train=rewards, validation={"bright": rewards["bright"]}, heldout={"smooth2": rewards["smooth"]}),
        bench=dict(images=2, axes=dict(realism=["smooth2"], detail=[])),
    )

    def make(*words, stage="train: generator, steps: 2, prompts: 2, images: 3"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(base | {"stages": [yaml.safe_load("{" + stage + "}")]}))
        return grpo.load_config([str(tmp_path / "config.yaml"), *words])

    return make
