"""Use what was trained: rewrite, draw, score.

    python sample.py config.yaml "a prompt" ...                 rewrite and draw, with the LoRAs of <out>
    python sample.py config.yaml "a prompt" refiner=null        draw the words as they are
    python sample.py config.yaml score=true picture.png ...     what each reward says of each picture

Drawn pictures go to <out>/drawn/ as PNG files that carry their prompt, rewrite and seed.
"""

import itertools
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ranks
from common import ConfigError
from generator import Generator
from grpo import cli, load_config
from refiner import Refiner
from reward import load_rewards, read_image, score, to_pil


def with_lora(policy, folder):
    """The policy with the LoRA of a run, where the run has left one; told, or base would pass for trained"""
    if folder.is_dir():
        policy.load(folder)
    else:
        print(f"{folder} does not exist: base weights")
    return policy


def draw(cfg, prompts):
    """Rewrite and draw each prompt; prints rewrites and files"""
    out = Path(cfg.out)
    place = (
        ranks.pick_device(cfg.device),
        getattr(torch, cfg.dtype),
        cfg.micro_batch,
        cfg.offload,
    )
    numbers = range(len(prompts))
    texts = prompts  # with refiner=null they are drawn as they are
    generator = with_lora(Generator(cfg.generator, *place), out / "generator")
    if cfg.refiner:
        refiner = with_lora(Refiner(cfg.refiner, *place, generator), out / "refiner")
        texts, _ = refiner.rollout(prompts, 1, [("sample rewrite", cfg.seed, i) for i in numbers])
    # (B, 3, H, W), Euler steps: nothing explores here
    images, _ = generator.rollout(texts, [("sample", cfg.seed, i) for i in numbers])
    folder = out / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    # a name that is free: earlier pictures stay, whichever of them were deleted
    names = (folder / f"{i:05d}.png" for i in itertools.count())
    for picture, prompt, text in zip(to_pil(images), prompts, texts):
        path = next(path for path in names if not path.exists())
        info = PngInfo()
        info.add_itxt("prompt", prompt)  # which score=true reads
        info.add_itxt("rewrite", text)
        info.add_itxt("seed", str(cfg.seed))
        picture.save(path, pnginfo=info)
        print(f"{path}: {text}")


def judge(cfg, paths):
    """Training and validation rewards of each picture at the generator's size, one in memory at a time

    A reward that reads the prompt has a value where the picture carries one. Held-out detectors stay
    bench.py's.
    """
    shape = (cfg.generator.height, cfg.generator.width)
    images = torch.stack([read_image(path, shape) for path in paths])  # (B, 3, H, W)
    prompts = [Image.open(path).info.get("prompt", "") for path in paths]
    # a table with tabs, for a terminal or a spreadsheet
    print("reward", *paths, sep="\t")
    for name, config in (cfg.rewards.train | cfg.rewards.validation).items():
        # made anew each time: together they may not fit
        reward = load_rewards({name: config}, ranks.pick_device(cfg.device))
        values = score(reward, images, prompts, cfg.micro_batch)[name].tolist()
        cells = [f"{value:.3f}" for value in values]
        if getattr(reward[name], "needs_prompt", False):
            # without its prompt a picture's alignment says nothing
            cells = [cell if prompt else "-" for cell, prompt in zip(cells, prompts)]
        print(name, *cells, sep="\t")


def main(argv):
    # a prompt may hold "=", but does not start with a dotted key and one
    keys = [word for word in argv[1:] if re.match(r"[\w.]+=", word)]
    things = [word for word in argv[1:] if word not in keys]
    cfg = load_config(argv[:1] + [word for word in keys if word != "score=true"])
    if not things:
        raise ConfigError(
            'nothing to do; expected python sample.py config.yaml "a prompt" ..., or score=true picture ...'
        )
    work = judge if "score=true" in keys else draw
    work(cfg, things)


if __name__ == "__main__":
    cli(lambda: main(sys.argv[1:]))
