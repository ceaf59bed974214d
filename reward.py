"""Rewards: detectors that tell photographs from generated pictures, and alignment with the prompt. One signature for all:

    reward(images (B,3,H,W) f32 in [0,1], prompts: B texts) -> (B,) finite, higher is better

A detector returns P(real). To add a reward, write a function with that signature in a file of your own and name it in the config as
`kind: my_rewards.py:brightness`; whatever else stands in its mapping is passed to it by name, once, if it is a factory (see `user_reward`).
Each reward is standardised in its own group before the weighted sum, so its scale never matters.
"""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


@dataclass
class RewardConfig:
    """One reward of the mapping name -> {kind, model, weight, ...}; see config.yaml."""

    kind: str = "classifier"
    model: str = ""
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardsConfig:
    """Which reward may see what: `train` is optimised, `validation` chooses the checkpoint, `heldout` is loaded by bench.py alone."""

    train: dict[str, RewardConfig] = field(default_factory=dict)
    validation: dict[str, RewardConfig] = field(default_factory=dict)
    heldout: dict[str, RewardConfig] = field(default_factory=dict)
    kid: str = "nano/clip"
    kid_layer: int | None = 1


# ---------------------------------------------------------------- pure maths


def standardise(rewards):
    """(P, G) rewards of P groups -> (r - mean) / (std + 1e-4), population std. The 1e-4 keeps rounding from becoming an advantage."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-4)


def kid(x, y):
    """Kernel Inception Distance of features x (n, D), y (m, D): unbiased squared MMD, kernel (x.y/D + 1)^3. arXiv 1801.01401. May be < 0."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    return ((xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()).item()


# ---------------------------------------------------------------- kinds


def resize(images, size):
    """(B,3,H,W) -> (B,3,size,size), antialiased bicubic; untouched when it fits"""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


class Preprocess:
    """The size and normalisation of a checkpoint's preprocessor_config.json, on whole batches."""

    def __init__(self, model):
        from transformers.image_processing_base import ImageProcessingMixin

        values, _ = ImageProcessingMixin.get_image_processor_dict(model)
        size = values.get("crop_size") or values["size"]
        self.size = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
        self.mean, self.std = (torch.tensor(values[n]).view(3, 1, 1) for n in ("image_mean", "image_std"))

    def __call__(self, images):
        return (resize(images, self.size) - self.mean.to(images.device)) / self.std.to(images.device)


class ClassifierReward:
    """P(real) by any AutoModelForImageClassification; which labels mean real is found by their names, never by position."""

    REAL = ("real", "photo", "photograph", "human", "natural", "authentic")

    def __init__(self, cfg, device):
        from transformers import AutoModelForImageClassification

        self.model = from_pretrained(AutoModelForImageClassification, cfg.model).to(device).eval().requires_grad_(False)
        labels = {i: str(label).lower() for i, label in self.model.config.id2label.items()}
        self.real = [i for i, label in labels.items() if label in self.REAL]
        if not self.real:
            raise ValueError(
                f"{cfg.model}: no label of {list(labels.values())} means real; expected one of {', '.join(self.REAL)}"
            )
        self.preprocess = Preprocess(cfg.model)

    def __call__(self, images, prompts):
        logits = self.model(pixel_values=self.preprocess(images)).logits.float()  # (B, labels)
        return logits.softmax(-1)[:, self.real].sum(-1)  # (B,)


class ClipReward:
    """Alignment: cosine of picture and prompt by any CLIPModel (CLIP, LongCLIP, PickScore)."""

    def __init__(self, cfg, device):
        from transformers import AutoTokenizer, CLIPModel

        self.model = from_pretrained(CLIPModel, cfg.model).to(device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        self.length = self.model.config.text_config.max_position_embeddings
        self.preprocess = Preprocess(cfg.model)

    def features(self, images, layer=None):
        """(B,3,H,W) in [0,1] -> (B, D): the pooled picture, or the class token after block `layer`, normalised. KID is measured on it.

        The deep features know the subject, early ones colour and texture.
        """
        out = self.model.vision_model(pixel_values=self.preprocess(images), output_hidden_states=bool(layer))
        if not layer:
            return out.pooler_output.float()
        token = out.hidden_states[layer][:, 0].float()  # (B, D)
        return F.layer_norm(token, token.shape[-1:])

    def __call__(self, images, prompts):
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(images.device)
        text = self.model.text_projection(self.model.text_model(**tokens).pooler_output).float()  # (B, D)
        picture = self.model.visual_projection(self.features(images).to(text.dtype))  # (B, D)
        return F.cosine_similarity(picture, text)  # (B,)


KINDS = {"classifier": ClassifierReward, "clip": ClipReward}


def check(configs):
    """What can be told without loading a model: kinds, files, folders. ValueError names the reward."""
    for name, cfg in configs.items():
        path, colon, _ = cfg.kind.partition(":")
        if colon and not Path(path).is_file() or not colon and path not in KINDS:
            raise ValueError(
                f"rewards: {name}: kind {cfg.kind!r}; expected {', '.join(KINDS)} or path/to/file.py:function"
            )
        if not colon and not cfg.model:
            raise ValueError(f"rewards: {name}: no model; expected a folder or a repository of the Hub")
        if not colon and Path(cfg.model).exists() and not (Path(cfg.model) / "config.json").is_file():
            raise ValueError(f"rewards: {name}: {cfg.model} has no config.json; expected a model of save_pretrained")


def user_reward(name, cfg):
    """`file.py:name`: a reward function, or, where `args` are given, a factory called once with them that returns one."""
    path, _, attribute = cfg.kind.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ValueError(f"rewards: {name}: {path} has no {attribute!r}")
    function = getattr(module, attribute)
    return function(**cfg.args) if cfg.args else function


def from_pretrained(cls, model):
    """float32 weights; one clear line for what cannot be loaded."""
    try:
        return cls.from_pretrained(model, dtype=torch.float32)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"rewards: {model} cannot be loaded ({reason}); give a folder or a repository") from error


def load_rewards(configs, device="cpu"):
    """The factory: {name: RewardConfig} -> {name: reward}. Models load once, here."""
    check(configs)
    return {
        name: user_reward(name, cfg) if ":" in cfg.kind else KINDS[cfg.kind](cfg, device)
        for name, cfg in configs.items()
    }


# ---------------------------------------------------------------- the public entry


@torch.no_grad()
def score(rewards, images, prompts, micro_batch=64):
    """Every reward of every picture: {name: (B,) f32 on the CPU}. A wrong shape or a value that is not finite stops the run by name."""
    scores = {}
    for name, reward in rewards.items():
        parts = []
        for i in range(0, len(images), micro_batch):
            chunk, texts = images[i : i + micro_batch], list(prompts[i : i + micro_batch])
            value = torch.as_tensor(reward(chunk, texts))
            if value.shape != (len(chunk),):
                raise ValueError(
                    f"rewards: {name} returned shape {tuple(value.shape)} for {len(chunk)} pictures; expected ({len(chunk)},)"
                )
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"rewards: {name} returned a value that is not finite for {texts[int((~torch.isfinite(value)).nonzero()[0])]!r}; "
                    "rewards must be finite"
                )
            parts.append(value.float().cpu())
        scores[name] = torch.cat(parts)
    return scores


def read_image(path, size=None):
    """A picture file -> (3,H,W) f32 in [0,1], cropped to a square and resized when `size` (height, width) is given"""
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error})") from error
    if size and picture.size != (size[1], size[0]):
        h, w = size
        scale = max(h / picture.height, w / picture.width)
        picture = picture.resize(
            (max(w, round(picture.width * scale)), max(h, round(picture.height * scale))), Image.BICUBIC
        )
        left, top = (picture.width - w) // 2, (picture.height - h) // 2
        picture = picture.crop((left, top, left + w, top + h))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def read_photos(path, size):
    """JSON lines {"image", "prompt"}, paths relative to the file -> images (B,3,H,W) f32 in [0,1], prompts"""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path} is not a file; expected JSON lines {{"image": path, "prompt": text}}')
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return torch.stack([read_image(path.parent / r["image"], size) for r in rows]), [r["prompt"] for r in rows]
