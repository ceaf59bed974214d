"""Rewards: detectors that tell photographs from generated pictures, and alignment. One signature:

    reward(images (B,3,H,W) f32 in [0,1], prompts: B texts) -> (B,) finite, higher = more real

Every kind comes through one door, `kind` in the config:

    classifier    P(real) by any AutoModelForImageClassification; labels found by name
    clip          alignment: cosine or dot product by any CLIPModel (CLIP, LongCLIP, PickScore)
    file.py:name  yours, or one of rewards/: Vlm, Endpoint, OmniAid, Probe, Naturalness. A *function* is the
                  reward itself, `args` are its keyword arguments. A *class* is made once, name(model, device,
                  **args), and the object is the reward.

A detector that can learn (learner.py) also has a `model`, and `logits(images, prompts)` -> (B, 2), [fake,
real], with gradients in the weights of it that `trainable()` lists. In training each reward is standardised
in its group before the weighted sum, so its scale does not matter there; it does for `keep: reward`.
"""

import importlib.util
import inspect
import io
import json
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import AutoModelForImageClassification, AutoTokenizer, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin

from common import ConfigError, batches, bounded, check_folder, few, load_model, loading

REAL_LABELS = ["real", "photo", "photograph", "human", "natural", "authentic"]


@dataclass
class RewardConfig:
    """One reward of the mapping name -> {kind, model, weight, args}; see config.yaml."""

    kind: str = "classifier"
    model: str = ""
    weight: float = bounded("natural", 1.0)
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardsConfig:
    """`train` is optimised, `validation` selects what is kept, `heldout` is loaded by bench.py alone."""

    train: dict[str, RewardConfig | None] = field(default_factory=dict)
    validation: dict[str, RewardConfig | None] = field(default_factory=dict)
    heldout: dict[str, RewardConfig | None] = field(default_factory=dict)
    kid: str = "nano/clip"
    kid_layer: int | None = bounded("positive", 1)

    def __post_init__(self):
        # a profile or a word drops a reward by setting it to null
        for name in ("train", "validation", "heldout"):
            setattr(self, name, {n: r for n, r in getattr(self, name).items() if r})

    def check(self):
        if not any(r.weight for r in self.train.values()):
            raise ConfigError(
                "rewards.train: the weights sum to 0; expected one reward with a weight above 0"
            )


# ---------------------------------------------------------------- maths


def p_real(logits):
    """(B, 2) logits [fake, real] -> (B,)"""
    return logits.float().softmax(-1)[:, 1]


def mean_kernels(x, y, units):
    """Features x (n, D) of U units, y (m, D) -> KID's kernel, a mean over each unit: (U, U), (U, m), (m, m)

    (x.y / D + 1)^3. units (n,): the prompt of each picture. Pictures of one prompt are alike, which is no
    lack of variety: they are one unit, and only pairs of different units count.
    """

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    x = x.double()
    y = y.double()
    member = units[None] == units.unique()[:, None]  # (U, n)
    mean = member / member.sum(1, keepdim=True).double()  # (U, n)
    return mean @ kernel(x, x) @ mean.T, mean @ kernel(x, y), kernel(y, y)


def mmd(xx, xy, yy):
    """The unbiased squared MMD of two samples; it may be below 0. A unit with itself is left out."""

    def off_diagonal(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return (off_diagonal(xx) + off_diagonal(yy) - 2 * xy.mean()).item()


def kid(x, y, units):
    """Kernel Inception Distance (arXiv 1801.01401) of features x (n, D), y (m, D); see mean_kernels"""
    return mmd(*mean_kernels(x, y, units))


# ---------------------------------------------------------------- pictures


def resize(images, pixels, mode="bicubic"):
    """(B,3,H,W) -> (B,3,pixels,pixels), antialiased; untouched when it fits"""
    if images.shape[-2:] == (pixels, pixels):
        return images
    return F.interpolate(images, (pixels, pixels), mode=mode, antialias=True).clamp(0, 1)


def as_bytes(images):
    """(B,3,H,W) in [0,1] -> uint8 on the CPU"""
    return (images.detach().float().clamp(0, 1) * 255).round().byte().cpu()


def to_pil(images):
    """(B,3,H,W) in [0,1] -> B PIL pictures of 8 bits"""
    return [Image.fromarray(x) for x in as_bytes(images).permute(0, 2, 3, 1).numpy()]


def encode(picture, jpeg):
    """PIL picture -> bytes of a JPEG file of quality `jpeg` (1 to 95), or of a PNG where it is 0"""
    file = io.BytesIO()
    picture.save(file, "JPEG" if jpeg else "PNG", quality=jpeg)  # which PNG does not look at
    return file.getvalue()


def as_file(images, jpeg):
    """(B,3,H,W) -> the same after a JPEG round trip of quality `jpeg`, without gradient; 0 for none

    Photographs come as JPEG and drawn pictures do not: what the codec leaves behind would tell them apart.
    """
    if not jpeg:
        return images
    files = [io.BytesIO(encode(picture, jpeg)) for picture in to_pil(images)]
    return torch.stack([read_image(file) for file in files]).to(images.device)  # (B,3,H,W)


def read_image(path, shape=None):
    """A picture file -> (3,H,W) f32 in [0,1], resized and cropped to `shape` (height, width) if given"""
    with loading(path):
        picture = Image.open(path).convert("RGB")
    if shape:  # one that fits stays as it is
        height, width = shape
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255  # (3,H,W)


def read_list(path):
    """JSON lines {"image": path relative to the file, "prompt": text} -> [(path, prompt)]"""
    with loading(path):
        lines = [line for line in Path(path).read_bytes().split(b"\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        with loading(f"{path}, row {number} of {{image, prompt}}"):
            row = json.loads(line)
            rows.append((Path(path).parent / row["image"], row["prompt"] + ""))
    if not rows:
        raise ConfigError(
            f'{path} has no row; expected JSON lines {{"image": path, "prompt": text}}'
        )
    return rows


def read_photos(path, shape):
    """JSON lines {"image", "prompt"}, paths relative to the file -> images (B,3,H,W) f32 in [0,1], prompts"""
    rows = read_list(path)
    images = torch.stack([read_image(image, shape) for image, _ in rows])  # (B,3,H,W)
    return images, [prompt for _, prompt in rows]


def normalise(images, mean, std):
    """(B,3,H,W), statistics of the 3 colours -> the same with mean 0 and deviation 1"""
    mean, std = images.new_tensor([mean, std])[:, :, None, None]  # (3,1,1) each
    return (images - mean) / std


class Preprocess:
    """The size, filter and normalisation of a checkpoint's preprocessor_config.json, on whole batches."""

    def __init__(self, model):
        with loading(model):
            values, _ = ImageProcessingMixin.get_image_processor_dict(model)
            size = values.get("crop_size") or values["size"]
            if isinstance(size, dict):  # older ones hold the number alone
                size = size.get("height") or size["shortest_edge"]
            bilinear = values.get("resample") == Image.Resampling.BILINEAR
            self.pixels = size
            self.mode = "bilinear" if bilinear else "bicubic"
            self.statistics = values["image_mean"], values["image_std"]

    def __call__(self, images):
        images = resize(images, self.pixels, self.mode)  # (B,3,pixels,pixels)
        return normalise(images, *self.statistics)


# ---------------------------------------------------------------- kinds


def load_frozen(cls, path, device, dtype=torch.float32, **options):
    """cls.from_pretrained(path), which is in eval mode, on the device and without gradients"""
    return load_model(cls, path, dtype=dtype, **options).to(device).requires_grad_(False)


class Classifier:
    """P(real) by any AutoModelForImageClassification; labels are found by their names, never by position.

    real: labels that mean real, in any case; all others mean fake. jpeg: quality of a round trip, 0 for
    none. learn: parts of the names of the weights that learn, where the detector does; all of them by
    default.
    """

    def __init__(self, model, device="cpu", *, real=REAL_LABELS, jpeg=0, learn=("",)):
        self.model = load_frozen(AutoModelForImageClassification, model, device)
        labels = {i: str(label).lower() for i, label in self.model.config.id2label.items()}
        self.real = [i for i, label in labels.items() if label in [name.lower() for name in real]]
        self.fake = [i for i in labels if i not in self.real]
        if not self.real or not self.fake:
            raise ConfigError(
                f"{model}: labels {few(labels.values())}; expected one of {few(real, 9)}, which means real, "
                "and another one; args.real names other labels"
            )
        self.preprocess = Preprocess(model)
        self.jpeg = jpeg
        self.learn = learn

    def trainable(self):
        return [
            p
            for name, p in self.model.named_parameters()
            if any(part in name for part in self.learn)
        ]

    def logits(self, images, prompts=None):
        pixels = self.preprocess(as_file(images.to(self.model.device), self.jpeg))  # (B,3,h,w)
        logits = self.model(pixel_values=pixels).logits  # (B, V)
        sides = [logits[:, labels].logsumexp(-1) for labels in (self.fake, self.real)]
        return torch.stack(sides, -1)  # (B, 2)

    def __call__(self, images, prompts):
        return p_real(self.logits(images))  # (B,)


class Clip:
    """Alignment: cosine of picture and prompt by any CLIPModel: CLIP, LongCLIP (248 tokens), PickScore.

    A longer text is cut, with a warning. processor: where tokenizer and preprocessing come from, if not
    from the model. dot: the dot product / 100, as RealGen trains on, in place of the cosine; lengths count.
    """

    needs_prompt = True

    def __init__(self, model, device="cpu", *, processor="", dot=False):
        self.model = load_frozen(CLIPModel, model, device)
        with loading(processor or model):
            self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
        self.preprocess = Preprocess(processor or model)
        self.length = self.model.config.text_config.max_position_embeddings
        self.dot = dot

    def features(self, images, layer=None):
        """Picture features for KID: (B,3,H,W) in [0,1] -> (B, D)

        The pooled picture, or the class token after block `layer`, normalised: the deep features know the
        subject, early ones colour and texture.
        """
        pixels = self.preprocess(images.to(self.model.device))  # (B,3,h,w)
        out = self.model.vision_model(pixel_values=pixels, output_hidden_states=bool(layer))
        if not layer:
            return out.pooler_output  # (B, D)
        token = out.hidden_states[layer][:, 0]  # (B, D)
        return F.layer_norm(token, token.shape[-1:])

    def __call__(self, images, prompts):
        if max(len(ids) for ids in self.tokenizer(prompts).input_ids) > self.length:
            # Python shows the same words once, not at each step
            warnings.warn(f"alignment reads {self.length} tokens; longer texts are cut")
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        text = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output  # (B, D)
        picture = self.model.visual_projection(self.features(images))  # (B, D)
        if self.dot:
            return (picture * text).sum(-1) / 100  # (B,)
        return F.cosine_similarity(picture, text)  # (B,)


# ---------------------------------------------------------------- the factory

KINDS = {"classifier": Classifier, "clip": Clip}


def find_kind(name, cfg):
    """A reward's config -> its class or function, before any model loads; mistyped options show here."""
    where = f"rewards: {name}"
    path, _, attribute = cfg.kind.partition(":")
    if cfg.kind in KINDS:
        if not cfg.model:
            raise ConfigError(
                f"{where}: model is empty; expected a folder or a repository of the Hub"
            )
        check_folder(cfg.model, "config.json")
        kind = KINDS[cfg.kind]
    elif Path(path).is_file():
        spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where a dataclass looks for its module
        spec.loader.exec_module(module)  # a bug in it keeps its traceback
        kind = getattr(module, attribute, None)
        if not kind:
            raise ConfigError(
                f"{where}: {path} has no {attribute!r}; expected a function or a class of it"
            )
    else:
        raise ConfigError(
            f"{where}: kind {cfg.kind!r}; expected {few(KINDS)} or path/to/file.py:name"
        )
    with loading(f"{where}: args"):
        inspect.signature(kind).bind(None, None, **cfg.args)
    return kind


def load_rewards(configs, device="cpu"):
    """{name: RewardConfig} -> {name: reward}. Models load once, here."""
    rewards = {name: partial(find_kind(name, cfg), **cfg.args) for name, cfg in configs.items()}
    for name, reward in rewards.items():
        if inspect.isclass(reward.func):
            rewards[name] = reward(configs[name].model, device)
    return rewards


# ---------------------------------------------------------------- the public entry


def score_batch(name, reward, images, prompts):
    """One reward of a batch -> (B,) f32 on the CPU. An exception gets the reward's name in front."""
    try:
        # a copy: a reward may write into its input
        seen = images.to(torch.float32, copy=True)  # (B,3,H,W)
        value = torch.as_tensor(reward(seen, list(prompts))).float()
    # sys.exit in a reward must not end the run as if all were well
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
    # one NaN would be the mean, the advantages and the weights of all
    if value.shape != (len(images),) or not value.isfinite().all():
        found = f"shape {tuple(value.shape)}: {few(value.flatten().tolist())}"
        raise ConfigError(
            f"rewards: {name} returned {found}; expected {len(images)} finite numbers"
        )
    return value.cpu()


@torch.no_grad()
def score(rewards, images, prompts, micro_batch=64, visit=None):
    """Every reward of every picture (B,3,H,W): {name: (B,) f32 on the CPU}

    visit: a device on which each reward's model scores, and from which it goes back to the CPU.
    """
    scores = {}
    for name, reward in rewards.items():
        model = getattr(reward, "model", None)
        visits = visit and hasattr(model, "to")  # a server's model is its name
        try:
            if visits:
                model.to(visit)
            parts = [
                score_batch(name, reward, x, texts)  # (b,)
                for x, texts in zip(batches(images, micro_batch), batches(prompts, micro_batch))
            ]
        finally:
            if visits:
                model.to("cpu")
        scores[name] = torch.cat(parts)  # (B,)
    return scores
