"""Use what was trained: rewrite, draw, score.

    python sample.py config.yaml "a prompt" ...                 rewrite and draw, with the LoRAs of <out>
    python sample.py config.yaml "a prompt" refiner=null        draw the words as they are
    python sample.py config.yaml score=true picture.png ...     what each reward says of each picture

Drawn pictures go to <out>/drawn/ as PNG files that carry their prompt, rewrite, seed and model.
"""

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
    """The policy with the LoRA of a run, where the run has left one"""
    if folder.is_dir():
        policy.load(folder)
    else:
        print(f"{folder} does not exist: base weights")
    return policy


def draw(cfg, prompts):
    """Rewrite and draw each prompt; prints rewrites and files"""
    out = Path(cfg.out)
    device = ranks.pick_device(cfg.device)
    dtype = getattr(torch, cfg.dtype)
    texts = prompts  # with refiner=null they are drawn as they are
    if cfg.refiner:
        refiner = with_lora(Refiner(cfg.refiner, device, dtype, cfg.micro_batch), out / "refiner")
        texts, _ = refiner.rollout(
            prompts, 1, [("sample rewrite", cfg.seed, i) for i in range(len(prompts))]
        )
    generator = Generator(cfg.generator, device, dtype, cfg.micro_batch, cfg.offload)
    generator = with_lora(generator, out / "generator")
    # (B, 3, H, W)
    images, _ = generator.rollout(texts, [("sample", cfg.seed, i) for i in range(len(texts))])
    folder = out / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    # above all that are there: after a deletion their count would name one that exists
    taken = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()]
    number = max(taken, default=-1)
    for picture, prompt, text in zip(to_pil(images), prompts, texts):
        number += 1
        info = PngInfo()
        fields = {
            "prompt": prompt,
            "rewrite": text,
            "seed": str(cfg.seed),
            "model": cfg.generator.model,
        }
        for name, value in fields.items():
            info.add_itxt(name, value)
        path = folder / f"{number:05d}.png"
        picture.save(path, pnginfo=info)
        print(f"{path}: {text}")


def judge(cfg, paths):
    """Training and validation rewards of each picture at the generator's size, one in memory at a time

    A reward that reads the prompt has a value where the picture carries one. Held-out detectors stay
    bench.py's.
    """
    shape = cfg.generator.height, cfg.generator.width
    images = torch.stack([read_image(path, shape) for path in paths])  # (B, 3, H, W)
    prompts = [Image.open(path).info.get("prompt") for path in paths]
    print("\t".join(["reward", *paths]))
    for name, config in (cfg.rewards.train | cfg.rewards.validation).items():
        reward = load_rewards({name: config}, ranks.pick_device(cfg.device))
        reads_prompt = getattr(reward[name], "needs_prompt", False)
        rows = [i for i, prompt in enumerate(prompts) if prompt or not reads_prompt]
        cells = ["-"] * len(paths)
        if rows:
            values = score(reward, images[rows], [prompts[i] or "" for i in rows], cfg.micro_batch)[
                name
            ]
            for i, value in zip(rows, values.tolist()):
                cells[i] = f"{value:.3f}"
        print("\t".join([name, *cells]))


def main(argv):
    # a prompt may hold "=", but does not start with a dotted key and one
    keys = [word for word in argv[1:] if re.match(r"[\w.]+=", word) and word != "score=true"]
    cfg = load_config(argv[:1] + keys)
    things = [word for word in argv[1:] if word not in keys and word != "score=true"]
    if not things:
        raise ConfigError(
            'nothing to do; expected python sample.py config.yaml "a prompt" ..., or score=true picture ...'
        )
    if "score=true" in argv:
        judge(cfg, things)
    else:
        draw(cfg, things)


if __name__ == "__main__":
    cli(lambda: main(sys.argv[1:]))
