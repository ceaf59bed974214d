"""Rewards: detectors that tell photographs from generated pictures, and alignment with the prompt. One signature:

    reward(images (B,3,H,W) f32 in [0,1], prompts: B texts) -> (B,) finite, higher is better

    python reward.py config.yaml picture.jpg ...    a table: each reward of each picture

A detector returns P(real). Kinds, each with a `model`, and in `args` the keyword arguments of its class:

    classifier    any AutoModelForImageClassification; labels found by name
    clip          alignment: cosine by any CLIPModel (CLIP, LongCLIP, PickScore)
    vlm           an image-text model asked whether the picture is real or fake (Forensic-Chat)
    omniaid       CLIP ViT with low-rank experts behind a router (OmniAID); one expert without router is Effort
    remote        the question of `vlm` to an OpenAI-compatible endpoint that gives log-probs (vLLM, SGLang)
    file.py:name  your own function with the signature above or, where `args` are given, a factory of one

Each reward is standardised in its own group before the weighted sum, so its scale never matters. A detector's
`logits(images, prompts)` are (B, 2), [fake, real], differentiable in its weights; `trainable()` lists the weights that
a learning detector would learn.

Size and codec: photographs come as JPEG and drawn pictures do not, so what the codec leaves behind could tell them
apart, or be imitated. With `jpeg: 90` in its args a detector sees every picture after a JPEG round trip of that
quality. It is off unless asked for: the nano photographs pass through the generator's autoencoder instead
(`autoencode_photos`), and encoding costs CPU time. Photographs get the generator's size from `read_photos`.

A detector with an `update` in its config learns while it is the reward (RealGen-V2): see Learner.
"""

import argparse
import asyncio
import base64
import difflib
import importlib.util
import inspect
import io
import json
import os
import sys
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import nn

QUESTION = (
    "Is this picture a photograph that a camera took, or was it made by an image generator? "
    "Answer with one word: real for a photograph, fake for a generated picture."
)
REAL_LABELS = ("real", "photo", "photograph", "human", "natural", "authentic")


@dataclass
class UpdateConfig:
    """When a detector learns, and how; `profiles.v2` of config.yaml says each key's unit and reason."""

    threshold: float = 0.6
    accuracy: float = 0.9
    max_steps: int = 20
    lr: float = 4e-5
    batch_size: int = 32
    replay: int = 512
    ema: float = 0.99
    anchor: float = 0.0
    every: int = 1

    def __post_init__(self):
        for name, good, expected in (
            ("accuracy", 0 < self.accuracy <= 1, "a share in (0, 1]"),
            ("max_steps", self.max_steps >= 1, "1 or more"),
            ("lr", self.lr > 0, "a number above 0"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("replay", self.replay >= 0, "0 or more"),
            ("ema", 0 <= self.ema < 1, "a decay in [0, 1)"),
            ("anchor", 0 <= self.anchor < 1, "a share in [0, 1)"),
            ("every", self.every >= 1, "1 or more"),
        ):
            if not good:
                raise ValueError(f"update.{name}: {getattr(self, name)}; expected {expected}")


@dataclass
class RewardConfig:
    """One reward of the mapping name -> {kind, model, weight, args, update}; see config.yaml."""

    kind: str = "classifier"
    model: str = ""
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    update: UpdateConfig | None = None


@dataclass
class RewardsConfig:
    """`train` is optimised, `validation` chooses the checkpoint, `heldout` is loaded by bench.py alone."""

    train: dict[str, RewardConfig] = field(default_factory=dict)
    validation: dict[str, RewardConfig] = field(default_factory=dict)
    heldout: dict[str, RewardConfig] = field(default_factory=dict)
    kid: str = "nano/clip"
    kid_layer: int | None = 1

    def __post_init__(self):
        for name, cfg in (self.validation | self.heldout).items():
            if cfg.update:
                raise ValueError(f"rewards: {name}: update, but what selects or reports must not learn; expected null")


# ---------------------------------------------------------------- pure maths


def standardise(rewards):
    """(P, G) rewards of P groups -> (r - mean) / (std + 1e-4), population std; 1e-4 so that rounding is no advantage"""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True, correction=0) + 1e-4)


def kid(x, y):
    """Kernel Inception Distance of features x (n, D), y (m, D): unbiased squared MMD, kernel (x.y/D + 1)^3. May be < 0.

    arXiv 1801.01401.
    """

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    return ((xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()).item()


def fake_real(logits, fake, real):
    """(B, V) logits, two lists of columns -> (B, 2): logsumexp of each, [fake, real]"""
    return torch.stack([logits[:, fake].logsumexp(-1), logits[:, real].logsumexp(-1)], -1)


def p_real(logits):
    """(B, 2) logits [fake, real] -> (B,)"""
    return logits.float().softmax(-1)[:, 1]


# ---------------------------------------------------------------- pictures


def resize(images, size, mode="bicubic"):
    """(B,3,H,W) -> (B,3,size,size), antialiased; untouched when it fits"""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode=mode, antialias=True).clamp(0, 1)


def to_pil(images):
    """(B,3,H,W) in [0,1] -> B PIL pictures of 8 bits"""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def encode(picture, jpeg):
    """PIL picture -> bytes of a JPEG file of quality `jpeg` (1 to 95), or of a PNG where it is 0"""
    file = io.BytesIO()
    picture.save(file, **(dict(format="JPEG", quality=jpeg) if jpeg else dict(format="PNG")))
    return file.getvalue()


def as_file(images, jpeg):
    """(B,3,H,W) -> the same after a JPEG round trip of quality `jpeg`, without gradient; untouched where it is 0"""
    if not jpeg:
        return images
    pixels = np.stack([np.array(Image.open(io.BytesIO(encode(p, jpeg)))) for p in to_pil(images)])  # (B,H,W,3) u8
    return torch.from_numpy(pixels).to(images.device).permute(0, 3, 1, 2).float() / 255


class Preprocess:
    """The size, filter and normalisation of a checkpoint's preprocessor_config.json, on whole batches."""

    def __init__(self, model):
        from transformers.image_processing_base import ImageProcessingMixin

        values, _ = ImageProcessingMixin.get_image_processor_dict(model)
        size = values.get("crop_size") or values["size"]
        self.size = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
        self.mode = "bilinear" if values.get("resample") == Image.Resampling.BILINEAR else "bicubic"
        self.mean, self.std = (torch.tensor(values[n]).view(3, 1, 1) for n in ("image_mean", "image_std"))

    def __call__(self, images):
        return (resize(images, self.size, self.mode) - self.mean.to(images.device)) / self.std.to(images.device)


# ---------------------------------------------------------------- kinds: classifier, clip


def from_pretrained(cls, model, **options):
    """One clear line for what cannot be loaded."""
    try:
        return cls.from_pretrained(model, **options)
    except (OSError, ImportError, SafetensorError) as error:  # the last: a download that was cut off
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{model} cannot be loaded ({reason}); expected a folder or a Hub repository") from error


def frozen(model, device):
    return model.to(device).eval().requires_grad_(False)


class ClassifierReward:
    """P(real) by any AutoModelForImageClassification; labels are found by their names, never by position.

    real: labels that mean real, in any case; all others mean fake. jpeg: quality of a round trip, 0 for none.
    learn: parts of the names of the weights that an `update` trains; all of them if not given.
    """

    def __init__(self, cfg, device="cpu", *, real: tuple = REAL_LABELS, jpeg: int = 0, learn: tuple = ("",)):
        from transformers import AutoModelForImageClassification

        self.model = frozen(from_pretrained(AutoModelForImageClassification, cfg.model, dtype=torch.float32), device)
        labels = {i: str(label).lower() for i, label in self.model.config.id2label.items()}
        self.real = [i for i, label in labels.items() if label in {name.lower() for name in real}]
        self.fake = [i for i in labels if i not in self.real]
        if not self.real or not self.fake:
            raise ValueError(
                f"{cfg.model}: no label of {list(labels.values())} means {'real' if self.fake else 'fake'}; "
                f"expected one of {', '.join(real)}, and another one; args.real names other labels"
            )
        self.preprocess, self.jpeg, self.learn = Preprocess(cfg.model), jpeg, learn

    def trainable(self):
        return [p for name, p in self.model.named_parameters() if any(part in name for part in self.learn)]

    def logits(self, images, prompts=None):
        pixels = self.preprocess(as_file(images.to(self.model.device), self.jpeg))
        return fake_real(self.model(pixel_values=pixels).logits.float(), self.fake, self.real)  # (B, 2)

    def __call__(self, images, prompts):
        return p_real(self.logits(images))  # (B,)


class ClipReward:
    """Alignment: cosine of picture and prompt by any CLIPModel: CLIP (77 tokens), LongCLIP (248), PickScore.

    A text that is longer is cut; how many were is counted in `cut` and warned about each time that the count doubles.
    processor: where tokenizer and preprocessing come from, if not from the model.
    """

    needs_prompt = True

    def __init__(self, cfg, device="cpu", *, processor: str = ""):
        from transformers import AutoTokenizer, CLIPModel

        self.name, self.cut, self.seen = cfg.model, 0, 0
        self.model = frozen(from_pretrained(CLIPModel, cfg.model, dtype=torch.float32), device)
        self.tokenizer = from_pretrained(AutoTokenizer, processor or cfg.model)
        self.length = self.model.config.text_config.max_position_embeddings
        self.preprocess = Preprocess(processor or cfg.model)

    def features(self, images, layer=None):
        """(B,3,H,W) in [0,1] -> (B, D) for KID: the pooled picture, or the class token after block `layer`, normalised

        The deep features know the subject, early ones colour and texture.
        """
        pixels = self.preprocess(images.to(self.model.device))
        out = self.model.vision_model(pixel_values=pixels, output_hidden_states=bool(layer))
        if not layer:
            return out.pooler_output.float()
        token = out.hidden_states[layer][:, 0].float()  # (B, D)
        return F.layer_norm(token, token.shape[-1:])

    def count_cut(self, prompts):
        before, self.seen = self.cut, self.seen + len(prompts)
        self.cut += sum(len(ids) > self.length for ids in self.tokenizer(prompts).input_ids)
        if self.cut.bit_length() > before.bit_length():
            warnings.warn(f"{self.name} reads {self.length} tokens; {self.cut} of {self.seen} texts were cut")

    def __call__(self, images, prompts):
        self.count_cut(list(prompts))
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        text = self.model.text_projection(self.model.text_model(**tokens).pooler_output).float()  # (B, D)
        picture = self.model.visual_projection(self.features(images).to(text.dtype))  # (B, D)
        return F.cosine_similarity(picture, text)  # (B,)


# ---------------------------------------------------------------- kind: vlm


def spellings(words):
    """Each word as written, lower, Capitalised and UPPER, with and without the leading space that vocabularies keep"""
    cased = {f(word) for word in words for f in (str, str.lower, str.capitalize, str.upper)}
    return sorted(cased | {" " + word for word in cased})


def picture_processor(model):
    """AutoProcessor without its video part, which would need torchvision and which pictures do not"""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = from_pretrained(AutoConfig, model)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"{model} is a {config.model_type}, which reads no pictures; expected an image-text model")
    stock = PROCESSOR_MAPPING[type(config)]
    parts = [name for name in stock.get_attributes() if "video" not in name]
    processor = type(stock.__name__, (stock,), {"get_attributes": classmethod(lambda _: parts)})
    return from_pretrained(processor, model)


class VlmReward:
    """P(real) by any AutoModelForImageTextToText with a chat template, from the first token of its answer:

        sigmoid(logsumexp of the logits of 'real' tokens - logsumexp of those of 'fake' tokens)

    over all spellings that are one token. question: `{prompt}` in it becomes the user's words. real, fake: the answers.
    dtype: of the weights. jpeg: quality of a round trip, 0 for none.
    """

    def __init__(self, cfg, device="cpu", *, question: str = QUESTION, real: tuple = ("real",), fake: tuple = ("fake",),
                 dtype: str = "float32", jpeg: int = 0):  # fmt: skip
        from transformers import AutoModelForImageTextToText

        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"args.dtype: {dtype!r}; expected float32, bfloat16 or float16")
        self.processor = picture_processor(cfg.model)
        if not self.processor.chat_template:
            raise ValueError(f"{cfg.model} has no chat template; expected an instruction-tuned image-text model")
        self.processor.tokenizer.padding_side = "left"  # so that every row's last position is its last token
        self.real, self.fake = self.tokens(real), self.tokens(fake)
        if set(self.real) & set(self.fake):
            raise ValueError(f"args: real {list(real)} and fake {list(fake)} share a token; expected other words")
        self.question, self.jpeg, self.needs_prompt = question, jpeg, "{prompt}" in question
        model = from_pretrained(AutoModelForImageTextToText, cfg.model, dtype=getattr(torch, dtype))
        self.model = frozen(model, device)
        # the logits of one position, where the model can give them alone: those of all are gigabytes
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def tokens(self, words):
        """Ids of the spellings that are one token; words of which none is are refused"""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in spellings(words)]
        found = sorted({i[0] for i in ids if len(i) == 1 and i[0] not in tokenizer.all_special_ids})
        if not found:
            raise ValueError(f"args: no spelling of {list(words)} is one token of the model; expected other words")
        return found

    def logits(self, images, prompts):
        texts = []
        for prompt in prompts:
            question = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
            chat = [{"role": "user", "content": [{"type": "image"}, question]}]
            texts.append(self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        pictures = [[picture] for picture in to_pil(as_file(images, self.jpeg))]
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        out = self.model(**inputs.to(self.model.device, self.model.dtype), **self.last).logits  # (B, 1 or L, V)
        return fake_real(out[:, -1].float(), self.fake, self.real)  # (B, 2)

    def __call__(self, images, prompts):
        return p_real(self.logits(images, prompts))  # (B,)


# ---------------------------------------------------------------- kind: omniaid


class ExpertLinear(nn.Module):
    """y = W_main x + bias + sum_i gate_i U_i diag(S_i) V_i x, x (B,T,D) -> (B,T,D): all experts in two low-rank matmuls

    `weight_main` (D,D), a buffer, is the stock weight's SVD truncated by the rank r; `gates` (B,E) are set by OmniAID.
    """

    def __init__(self, width, experts, rank):
        super().__init__()
        self.weight_main = nn.Buffer(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.U_experts = nn.ParameterList(torch.empty(width, rank) for _ in range(experts))
        self.S_experts = nn.ParameterList(torch.empty(rank) for _ in range(experts))
        self.V_experts = nn.ParameterList(torch.empty(rank, width) for _ in range(experts))
        self.gates = None

    def forward(self, x):
        scale = (self.gates[:, :, None] * torch.stack(list(self.S_experts))).flatten(1)  # (B, E*r)
        h = F.linear(x, torch.cat(list(self.V_experts))) * scale[:, None]  # (B, T, E*r)
        return F.linear(x, self.weight_main, self.bias) + F.linear(h, torch.cat(list(self.U_experts), 1))  # (B, T, D)


class OmniAID(nn.Module):
    """CLIP ViT whose attention projections are ExpertLinear, the same gates in all layers; names as in its files.

    The router picks `top_k` of the experts that it has outputs for, softmaxed over the picked. Experts that it has no
    output for, and all where there is no router, have gate 1. It reads the mean patch embedding before `ln_pre` (V1)
    or, where the checkpoint brings a frozen CLIP ViT as `feature_extractor`, its pooled output (V2). Sizes follow from
    the tensors, save the width of a head, which does not show in them: 64, as in every CLIP ViT.
    """

    def __init__(self, state, top_k=2):
        from transformers import CLIPVisionConfig, CLIPVisionModel
        from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

        super().__init__()
        width, _, _, patch = state["embeddings.patch_embedding.weight"].shape
        ranks = [len(v) for k, v in state.items() if k.startswith("encoder_layers.0.self_attn.q_proj.S_experts.")]
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(state["encoder_layers.0.mlp.fc1.bias"]),
            num_hidden_layers=len({k.split(".")[1] for k in state if k.startswith("encoder_layers.")}),
            num_attention_heads=max(width // 64, 1),
            patch_size=patch,
            image_size=patch * round((len(state["embeddings.position_embedding.weight"]) - 1) ** 0.5),
            attn_implementation="sdpa",
        )
        self.experts, self.top_k, self.size = len(ranks), top_k, config.image_size
        self.embeddings = CLIPVisionEmbeddings(config)
        self.encoder_layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))
        for layer in self.encoder_layers:
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(layer.self_attn, name, ExpertLinear(width, self.experts, ranks[0]))
        self.ln_pre, self.ln_post, self.head = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 2)
        self.gating_network = self.feature_extractor = None
        if any(k.startswith("gating_network.") for k in state):
            hidden, routed = (len(state[f"gating_network.network.{i}.bias"]) for i in (0, 2))
            router = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, routed))
            self.gating_network = nn.ModuleDict({"network": router})
            if not 1 <= top_k <= routed:
                raise ValueError(f"args.top_k: {top_k}; expected 1 to {routed}, the outputs of the router")
        if any(k.startswith("feature_extractor.") for k in state):
            self.feature_extractor = CLIPVisionModel(config)

    def gates(self, pixels, x):
        """pixels (B,3,size,size), embeddings x (B,T,D) -> (B,E)"""
        ones = x.new_ones(len(x), self.experts)
        if self.gating_network is None:
            return ones
        if self.feature_extractor is None:
            routing = x[:, 1:].mean(1)  # (B, D), without the class token
        else:
            with torch.no_grad():
                routing = self.feature_extractor(pixels).pooler_output  # (B, D)
        logits = self.gating_network["network"](routing)  # (B, routed experts)
        values, picked = logits.topk(self.top_k)  # (B, top_k)
        routed = torch.zeros_like(logits).scatter(1, picked, values.softmax(-1))
        return torch.cat([routed, ones[:, routed.shape[1] :]], 1)

    def forward(self, pixels):
        """normalised pixels (B,3,size,size) -> logits (B,2)"""
        x = self.embeddings(pixels)  # (B, T, D)
        gates = self.gates(pixels, x)
        for module in self.modules():
            if isinstance(module, ExpertLinear):
                module.gates = gates
        x = self.ln_pre(x)
        for layer in self.encoder_layers:
            x = layer(x, attention_mask=None)
        return self.head(self.ln_post(x[:, 0]))


def read_state(model, file=""):
    """.pth with {"model": state dict}, or .safetensors -> {name: f32 tensor}. A .pth runs no code."""
    path = Path(model, file)
    if file and not Path(model).exists():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model, file))
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a .pth or .safetensors, or a Hub repository and args.file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # training options lie beside the weights
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the readers raise for a damaged file has no common kind
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} holds more than weights, or is damaged ({reason})") from error
    state = state.get("model", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f'{path} holds no weights; expected {{"model": {{name: tensor}}}} or {{name: tensor}}')
    unused = ("U_r", "V_r", "weight_original_fnorm", "position_ids")  # buffers that only their training reads
    return {k: v.float() for k, v in state.items() if k.rpartition(".")[2] not in unused}


class OmniAidReward:
    """P(real) by OmniAID or, with one expert and no router, Effort. `model`: a file, or a folder or Hub repository.

    Preprocessing as published, on tensors: resized (bilinear, antialiased) to 512 x 512, then to the model's size,
    CLIP's mean and std; in float, where theirs rounds to 8 bits in between. file: name in the folder or repository.
    real: index of real in the head, 0 as published. top_k: experts that the router mixes. resize: pixels of the first
    resize, 0 for none. jpeg: quality of a round trip, 0 for none.
    """

    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, cfg, device="cpu", *, file: str = "", real: int = 0, top_k: int = 2, resize: int = 512,
                 jpeg: int = 0):  # fmt: skip
        if real not in (0, 1):
            raise ValueError(f"args.real: {real}; expected 0 or 1, the index in the head")
        state = read_state(cfg.model, file)
        try:
            self.model = OmniAID(state, top_k)
        except (KeyError, IndexError) as error:
            raise ValueError(f"{cfg.model} is no OmniAID ({error} is missing); it holds {few(state)}") from error
        names = self.model.state_dict()
        missing, unexpected = [k for k in names if k not in state], [k for k in state if k not in names]
        shapes = [k for k in names if k in state and names[k].shape != state[k].shape]
        if missing or unexpected or shapes:
            raise ValueError(
                f"{cfg.model}: keys do not match; missing: {few(missing)}; unexpected: {few(unexpected)}; "
                f"of another shape: {few(shapes)}"
            )
        self.model.load_state_dict(state)
        frozen(self.model, device)
        self.real, self.resize, self.jpeg = real, resize, jpeg

    def trainable(self):
        """Head and experts, which the published learning detector trains"""
        return [p for name, p in self.model.named_parameters() if name.startswith("head.") or "_experts." in name]

    def preprocess(self, images):
        images = resize(images, self.resize, "bilinear") if self.resize else images
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return (resize(images, self.model.size, "bilinear") - mean) / std  # (B,3,size,size)

    def logits(self, images, prompts=None):
        images = as_file(images.to(self.model.head.weight.device), self.jpeg)
        return self.model(self.preprocess(images))[:, [1 - self.real, self.real]]  # (B, 2)

    def __call__(self, images, prompts):
        return p_real(self.logits(images))  # (B,)


def few(names, most=4):
    """The first names of a list, for a message of one line"""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


# ---------------------------------------------------------------- kind: remote


class RemoteReward:
    """P(real) by a vision model behind an OpenAI-compatible endpoint, from the log-probs of its answer's first token.

    model: the name it is served under. url: of the endpoint, such as http://localhost:8000/v1. key_env: environment
    variable that holds the API key; empty sends none. question, real, fake: as for `vlm`. jpeg: pictures travel as
    JPEG of this quality, or as PNG where it is 0. timeout: seconds of one attempt, reading included. retries: after
    429, 5xx, a time-out, a lost connection or an unreadable answer, with waits of backoff x 1, 2, 4, ... seconds, at
    most 60. concurrency: requests at a time. What then still fails ends the run with a ValueError that names URL and
    cause.

    P(real) is renormalised over the listed alternatives that spell a word of `real` or `fake`; a side that is not
    listed counts as likely as the least likely alternative, which is its upper bound.
    """

    def __init__(self, cfg, device="cpu", *, url: str, key_env: str = "", question: str = QUESTION,
                 real: tuple = ("real",), fake: tuple = ("fake",), jpeg: int = 0, timeout: float = 60.0,
                 retries: int = 4, backoff: float = 1.0, concurrency: int = 8):  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"args.url: {url!r}; expected http://... or https://...")
        if key_env and not os.environ.get(key_env):
            raise ValueError("args.key_env: no such environment variable; expected the name of one with the API key")
        self.served, self.url, self.question, self.needs_prompt = cfg.model, url, question, "{prompt}" in question
        self.key = os.environ[key_env] if key_env else "none"  # without one the client would send the user's Hub token
        self.real, self.fake = ({word.strip().lower() for word in words} for words in (real, fake))
        self.jpeg, self.timeout, self.retries, self.backoff = jpeg, timeout, retries, backoff
        self.concurrency = max(concurrency, 1)

    def parse(self, answer):
        """The server's answer -> P(real); ValueError for one that says neither word or has no log-probs"""
        logprobs = answer.choices[0].logprobs
        if not logprobs or not logprobs.content or not logprobs.content[0].top_logprobs:
            raise ValueError("no log-probs; the server must support logprobs and top_logprobs")
        listed = [(t.token.strip().lower(), float(t.logprob)) for t in logprobs.content[0].top_logprobs]
        real, fake = ([p for token, p in listed if token in words] for words in (self.real, self.fake))
        if not real and not fake:
            raise ValueError(f"it starts with {few([token for token, _ in listed])}, neither real nor fake")
        least = [min(p for _, p in listed)]
        real, fake = (torch.tensor(side or least).logsumexp(0) for side in (real, fake))
        value = torch.sigmoid(real - fake).item()
        if not 0 <= value <= 1:
            raise ValueError("log-probs that are not numbers")
        return value

    async def ask(self, client, free, picture, prompt):
        """One picture -> P(real), after as many attempts as it takes, at most 1 + retries"""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        kind, data = "jpeg" if self.jpeg else "png", base64.b64encode(encode(picture, self.jpeg)).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}},
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        options = dict(model=self.served, max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=20)
        for attempt in range(1, self.retries + 2):
            try:
                async with free:
                    request = client.chat_completion([{"role": "user", "content": content}], **options)
                    return self.parse(await asyncio.wait_for(request, self.timeout))
            except OfflineModeIsEnabled as error:
                raise ValueError(f"{self.url}: HF_HUB_OFFLINE forbids the request; unset it") from error
            except HfHubHTTPError as error:
                status = error.response.status_code
                problem = f"status {status} ({' '.join(error.response.text.split())[:100]})"
                if status != 429 and status < 500:
                    break
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} seconds"
            except (HTTPError, OSError) as error:
                problem = f"no connection ({error})"
            except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
                problem = f"an answer that cannot be read ({error})"
            if attempt <= self.retries:
                await asyncio.sleep(min(self.backoff * 2 ** (attempt - 1), 60))
        raise ValueError(f"{self.url}, model {self.served}: {problem}; gave up after {attempt} attempts")

    async def ask_all(self, pictures, prompts):
        from huggingface_hub import AsyncInferenceClient

        free = asyncio.Semaphore(self.concurrency)
        async with AsyncInferenceClient(base_url=self.url, api_key=self.key) as client:
            return await asyncio.gather(*(self.ask(client, free, p, t) for p, t in zip(pictures, prompts)))

    def __call__(self, images, prompts):
        return torch.tensor(asyncio.run(self.ask_all(to_pil(images), prompts)))  # (B,)


# ---------------------------------------------------------------- the factory

KINDS = {
    "classifier": ClassifierReward,
    "clip": ClipReward,
    "vlm": VlmReward,
    "omniaid": OmniAidReward,
    "remote": RemoteReward,
}


def check(configs):
    """What can be told without loading a model: kinds, options, files, folders. ValueError names the reward."""
    for name, cfg in configs.items():
        path, colon, _ = cfg.kind.partition(":")
        if colon and not Path(path).is_file() or not colon and path not in KINDS:
            known = ", ".join(KINDS)
            raise ValueError(f"rewards: {name}: kind {cfg.kind!r}; expected {known} or path/to/file.py:function")
        if colon:
            continue
        if cfg.update and not hasattr(KINDS[path], "trainable"):
            raise ValueError(f"rewards: {name}: {cfg.kind} cannot learn; expected update: null, or classifier, omniaid")
        if not cfg.model:
            raise ValueError(f"rewards: {name}: no model; expected a folder or a repository of the Hub")
        saved = path in ("classifier", "clip", "vlm")  # by save_pretrained
        if saved and Path(cfg.model).exists() and not Path(cfg.model, "config.json").is_file():
            raise ValueError(f"rewards: {name}: {cfg.model} has no config.json; expected a model of save_pretrained")
        check_args(f"rewards: {name}: args", KINDS[path], cfg.args)


def check_args(where, kind, args):
    """A kind's options are the keyword arguments of its class; unknown, missing and mistyped ones raise ValueError."""
    options = {n: p for n, p in inspect.signature(kind).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key, value in args.items():
        if key not in options:
            close = difflib.get_close_matches(str(key), options, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(options)}"
            raise ValueError(f"{where}.{key} is not an option of this kind; {hint}")
        expected = options[key].annotation
        if expected is tuple:
            good = isinstance(value, (list, tuple)) and value and all(isinstance(word, str) for word in value)
        else:
            good = type(value) is expected or expected is float and type(value) is int
            good = good and (expected is str or value >= 0)
        if not good:
            kinds = {tuple: "a list of words", int: "int, 0 or more", float: "float, 0 or more"}
            raise ValueError(f"{where}.{key}: {value!r}; expected {kinds.get(expected, expected.__name__)}")
    for key, option in options.items():
        if option.default is option.empty and key not in args:
            raise ValueError(f"{where}.{key} is missing")


def user_reward(cfg):
    """`file.py:name`: a reward function or, where `args` are given, a factory called once with them."""
    path, _, attribute = cfg.kind.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ValueError(f"{path} has no {attribute!r}")
    function = getattr(module, attribute)
    return function(**cfg.args) if cfg.args else function


def load_rewards(configs, device="cpu"):
    """The factory: {name: RewardConfig} -> {name: reward}. Models load once, here; ValueError names what cannot."""
    check(configs)
    rewards = {}
    for name, cfg in configs.items():
        try:
            rewards[name] = user_reward(cfg) if ":" in cfg.kind else KINDS[cfg.kind](cfg, device, **cfg.args)
        except (ValueError, OSError) as error:
            raise ValueError(f"rewards: {name}: {error}") from error
        except Exception as error:  # a user's file may raise anything
            if ":" not in cfg.kind:
                raise
            raise ValueError(f"rewards: {name}: {cfg.kind}: {type(error).__name__}: {error}") from error
    return rewards


# ---------------------------------------------------------------- the public entry


def blame(reward, error):
    """Where and how a user's reward failed: 'my_rewards.py:12: KeyError: ...'; of a kind of this file, the message."""
    call = reward if hasattr(reward, "__globals__") else type(reward).__call__
    path = getattr(call, "__globals__", {}).get("__file__", "its function")
    if path == __file__ and isinstance(error, (ValueError, OSError)):
        return str(error)
    lines = [f":{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}{lines[-1] if lines else ''}: {type(error).__name__}: {error}"


@torch.no_grad()
def score(rewards, images, prompts, micro_batch=64, visit=None):
    """Every reward of every picture: {name: (B,) f32 on the CPU}. ValueError names one that fails.

    visit: a device that each reward's model is moved to while it scores, and from there back to the CPU.
    """
    scores = {}
    for name, reward in rewards.items():
        parts, model = [], getattr(reward, "model", None)
        if visit and model is not None:
            model.to(visit)
        for i in range(0, len(images), micro_batch):
            chunk, texts = images[i : i + micro_batch], list(prompts[i : i + micro_batch])
            try:
                value = torch.as_tensor(reward(chunk, texts))
            except torch.OutOfMemoryError:  # another matter, see grpo.Run.within_memory
                raise
            except Exception as error:  # a user's function may raise anything
                raise ValueError(f"rewards: {name}: {blame(reward, error)}") from error
            if value.shape != (len(chunk),):
                shape, n = tuple(value.shape), len(chunk)
                raise ValueError(f"rewards: {name} returned shape {shape} for {n} pictures; expected ({n},)")
            if not torch.isfinite(value).all():
                text = texts[int((~torch.isfinite(value)).nonzero()[0])]
                raise ValueError(f"rewards: {name} returned a value that is not finite for {text!r}; it must be")
            parts.append(value.float().cpu())
        if visit and model is not None:
            model.to("cpu")
        scores[name] = torch.cat(parts)
    return scores


def read_image(path, size=None):
    """A picture file -> (3,H,W) f32 in [0,1], cropped and resized to `size` (height, width) where it is given"""
    try:
        picture = Image.open(path)
        if picture.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off at 255
            picture = Image.fromarray((np.array(picture) / 257).clip(0, 255).round().astype(np.uint8))
        picture = picture.convert("RGB")
    except Exception as error:  # what the decoders raise for a broken file has no common kind
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


def read_list(path):
    """JSON lines {"image": path relative to the file, "prompt": text} -> [(path, prompt)]; ValueError names file and line"""
    path, rows = Path(path), []
    if not path.is_file():
        raise ValueError(f'{path} is not a file; expected JSON lines {{"image": path, "prompt": text}}')
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("image", "prompt")):
                text = line[:60].decode(errors="replace")
                raise ValueError(f'{path}, line {number}: {text!r}; expected {{"image": path, "prompt": text}}')
            rows.append((path.parent / row["image"], row["prompt"]))
    if not rows:
        raise ValueError(f'{path} has no line in it; expected JSON lines {{"image": path, "prompt": text}}')
    return rows


def read_photos(path, size):
    """JSON lines {"image", "prompt"}, paths relative to the file -> images (B,3,H,W) f32 in [0,1], prompts"""
    rows = read_list(path)
    return torch.stack([read_image(image, size) for image, _ in rows]), [prompt for _, prompt in rows]


# ---------------------------------------------------------------- the detector that learns

HELD_BACK = 8  # each eighth photograph never trains: it tells when a detector has learnt enough
CACHE = 2**28  # bytes


class Photographs:
    """What learning detectors know as real: JSON lines {"image", "prompt"}, paths relative to the file, or a folder.

    A picture is read when it is drawn, at `size` (height, width), and goes through `prepare`, (1,3,H,W) -> the same, such as
    the generator's autoencoder. The first CACHE bytes of them are kept, 8 bits a colour; of the others only the names. One
    that cannot be read is named once, counted in `bad` and skipped.
    """

    def __init__(self, path, size, prepare=lambda images: images):
        self.path, self.size, self.prepare, self.bad, self.kept = Path(path), size, prepare, set(), {}
        if self.path.is_dir():
            known = Image.registered_extensions()
            self.rows = [(p, "") for p in sorted(self.path.rglob("*")) if p.suffix.lower() in known]
        elif self.path.is_file():
            self.rows = read_list(path)
        else:
            raise ValueError(f'photos: {path} is neither JSON lines {{"image": path, "prompt": text}} nor a folder')
        if len(self.rows) < HELD_BACK:
            raise ValueError(f"photos: {path} names {len(self.rows)} photographs; expected {HELD_BACK} or more")

    def draw(self, n, rng, held_back=False):
        """n photographs at random, or all where there are fewer, from those held back or from the others

        -> images (n,3,H,W) f32 in [0,1], n prompts
        """
        images, prompts = [], []
        for i in rng.permutation(len(self.rows)).tolist():  # of all, so that what is drawn depends on the rng alone
            if len(images) == n:
                break
            if i in self.bad or (i % HELD_BACK == HELD_BACK - 1) != held_back:
                continue
            try:
                images.append(self.read(i))
                prompts.append(self.rows[i][1])
            except ValueError as error:
                self.bad.add(i)
                warnings.warn(f"{error}; skipped, as {len(self.bad)} of {len(self.rows)} photographs so far")
        if not images:
            raise ValueError(f"photos: {self.path} has no picture that can be read; expected photographs")
        return torch.stack(images) / 255, prompts

    def read(self, i):
        """Row i -> (3,H,W) uint8; alone through `prepare`, so that it is the same whatever else is drawn or kept"""
        if i in self.kept:
            return self.kept[i]
        image = as_bytes(self.prepare(read_image(self.rows[i][0], self.size)[None]))[0]
        if (len(self.kept) + 1) * image.numel() <= CACHE:
            self.kept[i] = image
        return image


def as_bytes(images):
    """(B,3,H,W) in [0,1] -> uint8 on the CPU"""
    return (images.detach().float().clamp(0, 1) * 255).round().byte().cpu()


def augment(images, g):
    """(B,3,H,W) in [0,1] -> the same, each picture flipped, blurred, recoloured (half of them each) and slightly noised

    For photographs and pictures alike, so that none of it tells them apart. g: torch.Generator on the CPU.
    """
    n, half = len(images), lambda: torch.rand(n, 1, 1, 1, generator=g) < 0.5
    images = torch.where(half(), images.flip(3), images)
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    padded = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), "replicate")  # (3B, 1, H+2, W+2)
    blurred = F.conv2d(padded, kernel.outer(kernel)[None, None]).view_as(images)
    images = images.lerp(blurred, half() * torch.rand(n, 1, 1, 1, generator=g))
    jitter = half() * (torch.rand(3, n, 1, 1, 1, generator=g) - 0.5) * 0.4  # +-0.2 of brightness, contrast, saturation
    images = images * (1 + jitter[0])
    images = images.lerp(images.mean((1, 2, 3), keepdim=True), -jitter[1])
    images = images.lerp(images.mean(1, keepdim=True), -jitter[2])
    noise = torch.randn(images.shape, generator=g) * torch.rand(n, 1, 1, 1, generator=g) * 0.02  # std up to 5 of 255
    return (images + noise).clamp(0, 1)


class Learner:
    """Lets a detector learn while it is the reward (RealGen-V2), so that what once fooled it stops paying.

    After a training step whose pictures have a mean reward above `threshold`, the detector trains on batches of
    `batch_size` photographs and as many pictures, half of them from a reservoir of earlier steps: cross entropy with
    targets 0.95 and 0.05. It stops at `accuracy` on pictures and photographs that are held back, or at `max_steps`.

    The detector's own weights are an EMA, which scores and whose accuracy counts; `live` are the weights that AdamW
    moves, and that go back a share `anchor` of the way to the start after each step: against pictures that are nearly
    photographs, a detector without it learns the photographs by heart and forgets what it knew of realism.
    Everything random follows from (seed, iteration, name), so ranks that are given the same pictures agree.
    """

    def __init__(self, name, reward, cfg, photos, seed=0, micro_batch=64):
        if not hasattr(reward, "trainable") or not hasattr(reward, "logits"):
            raise ValueError(f"rewards: {name}: update needs its logits() and trainable(); expected both, or null")
        self.name, self.reward, self.cfg, self.photos = name, reward, cfg, photos
        self.seed, self.micro_batch = seed, micro_batch
        self.weights = reward.trainable()
        if not self.weights:
            raise ValueError(f"rewards: {name}: args.learn matches no weight; expected parts of their names")
        self.start, self.live = ([p.detach().clone() for p in self.weights] for _ in range(2))
        self.optimizer = torch.optim.AdamW(self.weights, lr=cfg.lr)
        self.replay, self.seen, self.steps = [], 0, 0  # [(picture (3,H,W) uint8, prompt)], pictures and steps so far

    def step(self, images, prompts, mean, iteration):
        """The pictures (B,3,H,W) of a training step and their mean reward -> metrics of an update, or None"""
        rng = np.random.default_rng([self.seed, iteration, *self.name.encode()])
        order, quarter = rng.permutation(len(images)), -(-len(images) // 4)
        pictures = list(zip(as_bytes(images), prompts))
        held, fresh = ([pictures[i] for i in rows] for rows in (order[:quarter], order[quarter:]))
        row = None
        if fresh and iteration % self.cfg.every == 0 and mean > self.cfg.threshold:
            row = self.learn(fresh, held, rng)
            row |= {"reward_before": mean, "reward_after": self.score(images, prompts).mean().item()}
        self.remember(fresh, rng)
        return row

    def learn(self, fresh, held, rng):
        """Training steps until the accuracy on what is held back is reached -> {steps, loss, accuracies, bad_photos}"""
        images, prompts = stack(held)
        photos, texts = self.photos.draw(len(held), rng, held_back=True)

        def accuracy():  # a share, photographs and pictures weigh the same
            fakes, reals = self.score(images, prompts) < 0.5, self.score(photos, texts) >= 0.5
            return (fakes.float().mean() + reals.float().mean()).item() / 2

        reached, losses = [accuracy()], []
        while reached[-1] < self.cfg.accuracy and len(losses) < self.cfg.max_steps:
            losses.append(self.train_step(fresh, rng))
            reached.append(accuracy())
        return {
            "steps": len(losses),
            "loss": losses[-1] if losses else 0.0,
            "accuracy_before": reached[0],
            "accuracy_after": reached[-1],
            "bad_photos": len(self.photos.bad),
        }

    def train_step(self, fresh, rng):
        """One AdamW step of the live weights and one back to the anchor, one EMA step of the detector's -> loss, nats per picture"""
        n, old = self.cfg.batch_size, min(self.cfg.batch_size // 2, len(self.replay))
        chosen = [fresh[i] for i in rng.integers(len(fresh), size=n - old)]
        chosen += [self.replay[i] for i in rng.integers(len(self.replay), size=old)] if old else []
        fakes, prompts = stack(chosen)
        photos, texts = self.photos.draw(n, rng)
        images = torch.cat([fakes, photos])  # (n + photographs, 3, H, W), both rounded to 8 bits
        images = augment(images, torch.Generator().manual_seed(int(rng.integers(2**63))))
        with self.live_weights():
            log_p = self.reward.logits(images, prompts + texts).float().log_softmax(-1)  # (n + photos, 2) [fake, real]
            fake, real = log_p[:n].mean(0), log_p[n:].mean(0)  # (2,) each: the sides weigh the same
            loss = -(0.95 * fake[0] + 0.05 * fake[1] + 0.05 * real[0] + 0.95 * real[1]) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            for p, start in zip(self.weights, self.start):
                p.data.lerp_(start, self.cfg.anchor)
        self.steps += 1
        decay = min(self.cfg.ema, self.steps / (self.steps + 9))  # short at first, or the start would linger
        for p, live in zip(self.weights, self.live):
            p.lerp_(live, 1 - decay)
        return loss.item()

    @contextmanager
    def live_weights(self):
        """Inside, the detector has the live weights, with gradients; contents change places, names never."""

        def swap():
            for p, live in zip(self.weights, self.live):
                kept = p.detach().clone()
                p.data.copy_(live)
                live.copy_(kept)

        swap()
        try:
            for p in self.weights:
                p.requires_grad_(True)
            yield
        finally:
            for p in self.weights:
                p.requires_grad_(False)
                p.grad = None
            swap()

    def score(self, images, prompts):
        return score({self.name: self.reward}, images, prompts, self.micro_batch)[self.name]  # (B,)

    def remember(self, pictures, rng):
        """Reservoir sampling (algorithm R): each picture so far is in the replay with the same probability."""
        for image, prompt in pictures:
            self.seen += 1
            slot = len(self.replay) if len(self.replay) < self.cfg.replay else int(rng.integers(self.seen))
            if slot < self.cfg.replay:
                self.replay[slot : slot + 1] = [(image.clone(), prompt)]  # or the whole batch would stay in memory

    def state(self):
        """{name: tensor}, all that a checkpoint must hold of it; weights by reference, on their device"""
        prompts = json.dumps([prompt for _, prompt in self.replay]).encode()
        state = {"steps": torch.tensor(self.steps), "seen": torch.tensor(self.seen)}
        state["replay"] = torch.stack([image for image, _ in self.replay]) if self.replay else torch.empty(0)
        state["bad_photos"] = torch.tensor(sorted(self.photos.bad), dtype=torch.int64)  # their rows
        state["prompts"] = torch.tensor(list(prompts), dtype=torch.uint8)  # UTF-8 of a JSON list
        for i, (p, live) in enumerate(zip(self.weights, self.live)):
            state[f"ema.{i}"], state[f"live.{i}"] = p.detach(), live
        for i, values in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{i}.{key}": value for key, value in values.items()}
        return state

    @torch.no_grad()
    def load_state(self, state):
        """What `state` returned, from a Learner of the same detector; anything else is a ValueError."""
        expected = {f"{kind}.{i}": p.shape for i, p in enumerate(self.weights) for kind in ("ema", "live")}
        for key, shape in expected.items():
            if key not in state or state[key].shape != shape:
                what = f"the saved detector has no {key} of shape {tuple(shape)}"
                raise ValueError(f"rewards: {self.name}: {what}; expected one of the same model and args.learn")
        for i, (p, live) in enumerate(zip(self.weights, self.live)):
            p.copy_(state[f"ema.{i}"])
            live.copy_(state[f"live.{i}"])
        adam = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "adam":
                adam.setdefault(int(rest.partition(".")[0]), {})[rest.partition(".")[2]] = value.clone()
        self.optimizer.load_state_dict({"state": adam, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.steps, self.seen = int(state["steps"]), int(state["seen"])
        self.photos.bad.update(state["bad_photos"].tolist())
        prompts = json.loads(bytes(state["prompts"].tolist()))
        self.replay = [(image.cpu().clone(), prompt) for image, prompt in zip(state["replay"], prompts)]


def stack(pictures):
    """[(picture (3,H,W) uint8, prompt)] -> images (n,3,H,W) f32 in [0,1], n prompts"""
    return torch.stack([image for image, _ in pictures]) / 255, [prompt for _, prompt in pictures]


def load_learners(configs, rewards, photos, seed=0, micro_batch=64):
    """{name: RewardConfig}, {name: reward}, Photographs -> {name: Learner} of those whose `update` is not null"""
    learning = {name: cfg.update for name, cfg in configs.items() if cfg.update}
    return {name: Learner(name, rewards[name], update, photos, seed, micro_batch) for name, update in learning.items()}


# ---------------------------------------------------------------- main


def table(scores, pictures):
    """{name: B values or None}, B names -> the lines of a table"""
    rows = [["picture", *scores]]
    rows += [[p, *("-" if v[i] is None else f"{v[i]:.3f}" for v in scores.values())] for i, p in enumerate(pictures)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{'>' if c else '<'}{widths[c]}}" for c, cell in enumerate(row)) for row in rows]


def main(argv):
    """[config.yaml, pictures, key=value ...]: training and validation rewards of each picture, at the generator's size.

    The prompt, for rewards that read one, is a PNG's own text field `prompt`; a picture without it has no value there.
    Held-out detectors stay bench.py's. One reward is in memory at a time.
    """
    from grpo import load_config, pick_device

    pictures = [word for word in argv[1:] if "=" not in word or Path(word).is_file()]
    cfg = load_config(argv[:1] + [word for word in argv[1:] if word not in pictures])
    if not pictures:
        raise ValueError("no picture; expected python reward.py config.yaml picture.jpg ... [key=value ...]")
    configs = cfg.rewards.train | cfg.rewards.validation
    check(configs)
    images = torch.stack([read_image(p, (cfg.generator.height, cfg.generator.width)) for p in pictures])
    prompts = [Image.open(p).info.get("prompt") for p in pictures]
    device = pick_device(cfg.device)
    scores = {}
    for name, config in configs.items():
        reward = load_rewards({name: config}, device)
        rows = [i for i, prompt in enumerate(prompts) if prompt or not getattr(reward[name], "needs_prompt", False)]
        scores[name] = [None] * len(pictures)
        if rows:
            values = score(reward, images[rows], [prompts[i] or "" for i in rows], cfg.micro_batch)[name]
            for i, value in zip(rows, values.tolist()):
                scores[name][i] = value
    print("\n".join(table(scores, pictures)))


if __name__ == "__main__":
    from grpo import cli

    cli(lambda: main(sys.argv[1:]))
