"""Rewards: detectors that tell photographs from generated pictures, and alignment with the prompt. One signature for all:

    reward(images (B,3,H,W) f32 in [0,1], prompts: B texts) -> (B,) finite, higher is better

    python reward.py config.yaml picture.jpg ...    a table: each reward of each picture

A detector returns P(real). Kinds, each with a `model` and options of its own in `args`, which are the keyword arguments of its class:

    classifier   any AutoModelForImageClassification; labels found by name
    clip         alignment: cosine by any CLIPModel (CLIP, LongCLIP, PickScore)
    vlm          an image-text model asked whether the picture is real or fake (Forensic-Chat)
    omniaid      CLIP ViT with low-rank experts behind a router (OmniAID); one expert without router is Effort
    remote       the question of `vlm` to an OpenAI-compatible endpoint (vLLM, SGLang)
    file.py:name your own: a function with the signature above, or, where `args` are given, a factory of one (see `user_reward`)

Each reward is standardised in its own group before the weighted sum, so its scale never matters. Detectors have `logits(images, prompts)
-> (B, 2)` [fake, real], differentiable in the weights, and, where they can learn, `trainable()`, the parameters to learn with. With
`jpeg: 90` in its args a detector sees every picture after a JPEG round trip: photographs come as JPEG, drawn pictures do not, and what the
codec leaves behind would otherwise tell them apart, or be imitated. It is off by default because the nano photographs went through the
generator's autoencoder, which leaves no codec's trace. Size is the caller's: `read_photos` and the table crop to the generator's.
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
import pickle
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

QUESTION = (
    "Is this picture a photograph that a camera took, or was it made by an image generator? "
    "Answer with one word: real for a photograph, fake for a generated picture."
)


@dataclass
class RewardConfig:
    """One reward of the mapping name -> {kind, model, weight, args}; see config.yaml."""

    kind: str = "classifier"
    model: str = ""
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardsConfig:
    """Which reward may see what: `train` is optimised, `validation` chooses the checkpoint, `heldout` is for bench.py alone."""

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


def p_real(logits):
    """(B, 2) logits [fake, real] -> (B,)"""
    return logits.float().softmax(-1)[:, 1]


# ---------------------------------------------------------------- pictures in and out


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
    """(B,3,H,W) -> the same after a JPEG round trip, as a photograph would arrive; untouched where `jpeg` is 0. No gradient to images."""
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
    except (OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{model} cannot be loaded ({reason}); expected a folder or a repository of the Hub"
        ) from error


def frozen(model, device):
    return model.to(device).eval().requires_grad_(False)


class ClassifierReward:
    """P(real) by any AutoModelForImageClassification; which labels mean real is found by their names, never by position.

    real: labels that mean real, in any case; all others mean fake. jpeg: see `as_file`.
    """

    folder = "config.json"  # what a local folder must hold
    REAL = ("real", "photo", "photograph", "human", "natural", "authentic")

    def __init__(self, cfg, device="cpu", *, real: tuple = REAL, jpeg: int = 0):
        from transformers import AutoModelForImageClassification

        self.model = frozen(from_pretrained(AutoModelForImageClassification, cfg.model, dtype=torch.float32), device)
        labels = {i: str(label).lower() for i, label in self.model.config.id2label.items()}
        self.real = [i for i, label in labels.items() if label in {name.lower() for name in real}]
        self.fake = [i for i in labels if i not in self.real]
        if not self.real or not self.fake:
            which = "real" if self.fake else "fake"
            raise ValueError(
                f"{cfg.model}: no label of {list(labels.values())} means {which}; expected one of {', '.join(real)} to mean "
                "real and another to mean fake; args.real names other labels"
            )
        self.preprocess, self.jpeg = Preprocess(cfg.model), jpeg

    def trainable(self):
        return list(self.model.parameters())

    def logits(self, images, prompts=None):
        """(B,3,H,W) -> (B, 2): logsumexp over the labels that mean fake, and over those that mean real"""
        pixels = self.preprocess(as_file(images.to(self.model.device), self.jpeg))
        out = self.model(pixel_values=pixels).logits.float()  # (B, labels)
        return torch.stack([out[:, self.fake].logsumexp(-1), out[:, self.real].logsumexp(-1)], -1)

    def __call__(self, images, prompts):
        return p_real(self.logits(images))  # (B,)


class ClipReward:
    """Alignment: cosine of picture and prompt by any CLIPModel: CLIP (77 tokens), LongCLIP (248), PickScore.

    A text longer than the model's context is cut, and the running count of such texts is warned about each time that it doubles.
    processor: where tokenizer and preprocessing come from, if not from the model (PickScore's are those of its base).
    """

    folder = "config.json"
    needs_prompt = True

    def __init__(self, cfg, device="cpu", *, processor: str = ""):
        from transformers import AutoTokenizer, CLIPModel

        self.name, self.cut, self.seen = cfg.model, 0, 0
        self.model = frozen(from_pretrained(CLIPModel, cfg.model, dtype=torch.float32), device)
        self.tokenizer = from_pretrained(AutoTokenizer, processor or cfg.model)
        self.length = self.model.config.text_config.max_position_embeddings
        self.preprocess = Preprocess(processor or cfg.model)

    def features(self, images, layer=None):
        """(B,3,H,W) in [0,1] -> (B, D): the pooled picture, or the class token after block `layer`, normalised. KID is measured on it.

        The deep features know the subject, early ones colour and texture.
        """
        pixels = self.preprocess(images.to(self.model.device))
        out = self.model.vision_model(pixel_values=pixels, output_hidden_states=bool(layer))
        if not layer:
            return out.pooler_output.float()
        token = out.hidden_states[layer][:, 0].float()  # (B, D)
        return F.layer_norm(token, token.shape[-1:])

    def count_cut(self, prompts):
        """Counts the texts that do not fit, and warns."""
        before = self.cut
        self.cut += sum(len(ids) > self.length for ids in self.tokenizer(prompts).input_ids)
        self.seen += len(prompts)
        if self.cut.bit_length() > before.bit_length():
            warnings.warn(
                f"{self.name} reads {self.length} tokens: {self.cut} of {self.seen} texts so far were longer and were cut"
            )

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
    """Each word as written, lower, Capitalised and UPPER, with and without the space that starts a word in byte-level vocabularies"""
    return sorted(
        {
            space + w
            for word in words
            for w in (word, word.lower(), word.capitalize(), word.upper())
            for space in ("", " ")
        }
    )


class VlmReward:
    """P(real) by any AutoModelForImageTextToText with a chat template, from the first token of its answer:

        sigmoid(logsumexp of the logits of 'real' tokens - logsumexp of those of 'fake' tokens)

    over all spellings that are one token. question: `{prompt}` in it becomes the user's words. real, fake: the answer words.
    dtype: of the weights. jpeg: see `as_file`.
    """

    folder = "config.json"

    def __init__(
        self,
        cfg,
        device="cpu",
        *,
        question: str = QUESTION,
        real: tuple = ("real",),
        fake: tuple = ("fake",),
        dtype: str = "float32",
        jpeg: int = 0,
    ):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = from_pretrained(AutoProcessor, cfg.model)
        if not self.processor.chat_template:
            raise ValueError(f"{cfg.model} has no chat template; expected an instruction-tuned image-text model")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"args.dtype: {dtype!r}; expected float32, bfloat16 or float16")
        self.processor.tokenizer.padding_side = "left"  # so that every row's last position is its last token
        self.real, self.fake = self.tokens(real), self.tokens(fake)
        if set(self.real) & set(self.fake):
            raise ValueError(
                f"args: real {list(real)} and fake {list(fake)} share a token of {cfg.model}; expected other words"
            )
        self.question, self.jpeg, self.needs_prompt = question, jpeg, "{prompt}" in question
        model = from_pretrained(AutoModelForImageTextToText, cfg.model, dtype=getattr(torch, dtype))
        self.model = frozen(model, device)
        # the logits of one position, where the model knows how: those of all are gigabytes
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def tokens(self, words):
        """Ids of the spellings that are one token; an answer word that is never one token is refused"""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.encode(w, add_special_tokens=False) for w in spellings(words)]
        found = sorted({i[0] for i in ids if len(i) == 1 and i[0] not in tokenizer.all_special_ids})
        if not found:
            raise ValueError(f"args: no spelling of {list(words)} is one token of the model; expected other words")
        return found

    def logits(self, images, prompts):
        """(B,3,H,W), B texts -> (B, 2): logsumexp over the fake tokens, and over the real ones, in one left-padded batch"""
        texts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": self.question.replace("{prompt}", p)}],
                    }
                ],
                add_generation_prompt=True,
                tokenize=False,
            )
            for p in prompts
        ]
        pictures = to_pil(as_file(images, self.jpeg))
        inputs = self.processor(text=texts, images=[[p] for p in pictures], padding=True, return_tensors="pt")
        out = self.model(**inputs.to(self.model.device, self.model.dtype), **self.last).logits[:, -1].float()  # (B, V)
        return torch.stack([out[:, self.fake].logsumexp(-1), out[:, self.real].logsumexp(-1)], -1)

    def __call__(self, images, prompts):
        return p_real(self.logits(images, prompts))  # (B,)


# ---------------------------------------------------------------- kind: omniaid


class ExpertLinear(nn.Module):
    """y = W_main x + bias + sum_i gate_i U_i diag(S_i) V_i x, as two low-rank matmuls over all experts at once

    x (B,T,in), gates (B,E) -> (B,T,out); `weight_main` (out,in) is a buffer, the SVD of the stock weight truncated by the rank.
    """

    def __init__(self, width, experts, rank):
        super().__init__()
        self.weight_main = nn.Buffer(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.U_experts = nn.ParameterList(torch.empty(width, rank) for _ in range(experts))
        self.S_experts = nn.ParameterList(torch.empty(rank) for _ in range(experts))
        self.V_experts = nn.ParameterList(torch.empty(rank, width) for _ in range(experts))

    def forward(self, x, gates):
        scale = gates[:, :, None] * torch.stack(list(self.S_experts))  # (B, E, r)
        h = F.linear(x, torch.cat(list(self.V_experts))) * scale.flatten(1)[:, None]  # (B, T, E*r)
        return F.linear(x, self.weight_main, self.bias) + F.linear(h, torch.cat(list(self.U_experts), 1))  # (B, T, out)


class ExpertAttention(nn.Module):
    def __init__(self, config, experts, rank):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, ExpertLinear(config.hidden_size, experts, rank))

    def forward(self, x, gates):
        q, k, v = (
            p(x, gates).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, width of a head)
        return self.out_proj(y.transpose(1, 2).flatten(2), gates)  # (B, T, D)


class ExpertBlock(nn.Module):
    def __init__(self, config, experts, rank):
        from transformers.models.clip.modeling_clip import CLIPMLP

        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.self_attn, self.mlp = ExpertAttention(config, experts, rank), CLIPMLP(config)

    def forward(self, x, gates):
        x = x + self.self_attn(self.layer_norm1(x), gates)
        return x + self.mlp(self.layer_norm2(x))


class OmniAID(nn.Module):
    """CLIP ViT whose attention projections carry low-rank experts; the same gates in all layers. Modules are named as in the checkpoints.

    The router chooses `top_k` of the experts that it has an output for, softmaxed over the chosen; those that it has none for are always
    on with gate 1, and without a router all are. It reads the mean patch embedding before `ln_pre` (V1), or, where the checkpoint holds a
    frozen CLIP ViT as `feature_extractor`, that model's pooled output (V2). All sizes follow from the tensors `state`; the heads, which
    do not show there, are 64 wide as in every published CLIP ViT.
    """

    def __init__(self, state, top_k=2):
        from transformers import CLIPVisionConfig, CLIPVisionModel
        from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

        super().__init__()
        width, _, _, patch = state["embeddings.patch_embedding.weight"].shape
        positions = len(state["embeddings.position_embedding.weight"])
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(state["encoder_layers.0.mlp.fc1.bias"]),
            num_hidden_layers=len({k.split(".")[1] for k in state if k.startswith("encoder_layers.")}),
            num_attention_heads=max(width // 64, 1),
            patch_size=patch,
            image_size=patch * round((positions - 1) ** 0.5),
        )
        ranks = [v.shape[0] for k, v in state.items() if k.startswith("encoder_layers.0.self_attn.q_proj.S_experts.")]
        self.experts, self.top_k, self.size = len(ranks), top_k, config.image_size
        self.embeddings, self.ln_pre, self.ln_post = (
            CLIPVisionEmbeddings(config),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )
        self.encoder_layers = nn.ModuleList(
            ExpertBlock(config, self.experts, ranks[0]) for _ in range(config.num_hidden_layers)
        )
        self.head = nn.Linear(width, 2)
        self.gating_network = self.feature_extractor = None
        if "gating_network.network.2.bias" in state:
            hidden, routed = len(state["gating_network.network.0.bias"]), len(state["gating_network.network.2.bias"])
            network = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, routed))
            self.gating_network = nn.ModuleDict({"network": network})
        if any(k.startswith("feature_extractor.") for k in state):
            self.feature_extractor = CLIPVisionModel(config)

    def gates(self, pixels, x):
        """pixels (B,3,h,w), embeddings x (B,T,D) -> (B, E)"""
        ones = torch.ones(len(x), self.experts, device=x.device, dtype=x.dtype)
        if self.gating_network is None:
            return ones
        if self.feature_extractor is None:
            routing = x[:, 1:].mean(1)  # (B, D), over patches, without the class token
        else:
            with torch.no_grad():
                routing = self.feature_extractor(pixels).pooler_output  # (B, D)
        logits, chosen = self.gating_network["network"](routing).topk(self.top_k)  # (B, top_k)
        routed = self.gating_network["network"][2].out_features
        semantic = torch.zeros_like(ones[:, :routed]).scatter(1, chosen, logits.softmax(-1))
        return torch.cat([semantic, ones[:, routed:]], 1)

    def forward(self, pixels):
        """normalised pixels (B,3,size,size) -> logits (B, 2)"""
        x = self.embeddings(pixels)  # (B, T, D)
        gates = self.gates(pixels, x)
        x = self.ln_pre(x)
        for layer in self.encoder_layers:
            x = layer(x, gates)
        return self.head(self.ln_post(x[:, 0]))


def read_state(model, file=""):
    """A .pth holding {"model": state dict}, or a .safetensors -> {name: f32 tensor}. Only tensors are read from a .pth, never code."""
    path = Path(model) / file if file else Path(model)
    if not path.is_file() and file and not Path(model).exists():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model, file))
    if not path.is_file():
        raise ValueError(
            f"{path} is not a file; expected a .pth or .safetensors, or a repository and the file's name in args.file"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        try:
            with torch.serialization.safe_globals(
                [argparse.Namespace]
            ):  # their training options lie beside the weights
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path} cannot be read as weights alone ({str(error).splitlines()[0]})") from error
        state = state.get("model", state)
    unused = ("U_r", "V_r", "weight_original_fnorm", "position_ids")  # buffers of their training
    return {k: v.float() for k, v in state.items() if k.rpartition(".")[2] not in unused}


class OmniAidReward:
    """P(real) by OmniAID or, with one expert and no router, Effort. `model`: a file, or a folder or Hub repository with `file` in it.

    Preprocessing as published, on tensors: resized (bilinear, antialiased) to 512 x 512, then to the model's own size, CLIP's mean
    and std; in float throughout, where theirs rounds to 8 bits between the two. real: index of real in the head, 0 as published.
    top_k: experts that the router mixes. resize: pixels of the first resize, 0 for none. jpeg: see `as_file`.
    """

    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(
        self, cfg, device="cpu", *, file: str = "", real: int = 0, top_k: int = 2, resize: int = 512, jpeg: int = 0
    ):
        if real not in (0, 1):
            raise ValueError(f"args.real: {real}; expected 0 or 1, the index in the head")
        state = read_state(cfg.model, file)
        try:
            self.model = OmniAID(state, top_k)
        except (KeyError, IndexError) as error:
            raise ValueError(f"{cfg.model}: no OmniAID checkpoint ({error}); it holds {bounded(state)}") from error
        names = self.model.state_dict()
        missing, unexpected = [k for k in names if k not in state], [k for k in state if k not in names]
        shapes = [k for k in names if k in state and names[k].shape != state[k].shape]
        if missing or unexpected or shapes:
            raise ValueError(
                f"{cfg.model}: keys do not match; missing {bounded(missing)}; unexpected {bounded(unexpected)}; "
                f"of another shape {bounded(shapes)}"
            )
        self.model.load_state_dict(state)
        frozen(self.model, device)
        self.real, self.resize, self.jpeg = real, resize, jpeg

    def trainable(self):
        """Head and experts, which is what the published learning detector trains"""
        return [p for n, p in self.model.named_parameters() if n.startswith("head.") or "_experts." in n]

    def preprocess(self, images):
        """(B,3,H,W) in [0,1] -> (B,3,size,size) normalised"""
        if self.resize:
            images = resize(images, self.resize, "bilinear")
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return (resize(images, self.model.size, "bilinear") - mean) / std

    def logits(self, images, prompts=None):
        """(B,3,H,W) -> (B, 2) [fake, real]"""
        images = as_file(images.to(self.model.head.weight.device), self.jpeg)
        return self.model(self.preprocess(images))[:, [1 - self.real, self.real]]

    def __call__(self, images, prompts):
        return p_real(self.logits(images))  # (B,)


def bounded(names, most=4):
    """The first few names, for a message of one line"""
    names = list(names)
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
    )


# ---------------------------------------------------------------- kind: remote


class RemoteReward:
    """P(real) by a vision model behind an OpenAI-compatible endpoint, from the log-probs of its answer's first token.

    model: the name under which it is served. url: of the endpoint, such as http://localhost:8000/v1. key_env: name of the environment variable
    that holds the API key; empty sends none. question, real, fake, jpeg: as for `vlm`; pictures travel as JPEG of that quality, or PNG.
    P(real) is renormalised over the listed alternatives that spell `real` or `fake`; a side that is not among the 20 listed counts with
    the probability of the least likely of them, which is its upper bound. timeout: seconds for one attempt, reading included. retries: after 429,
    5xx, a time-out, a lost connection or an unreadable answer, with waits of backoff x 1, 2, 4, ... seconds, at most 60. concurrency:
    requests at a time. What still fails then ends the run with a ValueError that names URL and cause.
    """

    def __init__(
        self,
        cfg,
        device="cpu",
        *,
        url: str,
        key_env: str = "",
        question: str = QUESTION,
        real: tuple = ("real",),
        fake: tuple = ("fake",),
        jpeg: int = 0,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 8,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"args.url: {url!r}; expected http://... or https://...")
        if key_env and not os.environ.get(key_env):
            raise ValueError(
                f"args.key_env: the environment has no {key_env}; expected the API key there, never in the config"
            )
        self.served, self.url, self.question, self.jpeg = cfg.model, url, question, jpeg
        self.key = (
            os.environ[key_env] if key_env else "none"
        )  # an empty one would make the client send the user's Hub token
        self.real, self.fake = ({w.strip().lower() for w in words} for words in (real, fake))
        self.timeout, self.retries, self.backoff, self.concurrency = timeout, retries, backoff, concurrency
        self.needs_prompt = "{prompt}" in question

    def parse(self, answer):
        """The server's answer -> P(real); ValueError for one that says neither word or has no log-probs"""
        logprobs = answer.choices[0].logprobs
        if not logprobs or not logprobs.content:
            raise ValueError("no log-probs in the answer; the server must support logprobs and top_logprobs")
        listed = [(t.token.strip().lower(), float(t.logprob)) for t in logprobs.content[0].top_logprobs]
        real, fake = ([p for token, p in listed if token in words] for words in (self.real, self.fake))
        if not real and not fake:
            raise ValueError(f"the answer starts with {bounded([repr(t) for t, _ in listed])}, neither real nor fake")
        least = [min(p for _, p in listed)]
        real, fake = (torch.tensor(side or least).logsumexp(0) for side in (real, fake))
        return torch.sigmoid(real - fake).item()

    async def ask(self, client, free, picture, prompt):
        """One picture, with retries -> P(real)"""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        data = f"data:image/{'jpeg' if self.jpeg else 'png'};base64,{base64.b64encode(encode(picture, self.jpeg)).decode()}"
        question = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data}}, question]}]
        for attempt in range(self.retries + 1):
            try:
                async with free:
                    request = client.chat_completion(
                        messages, model=self.served, max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=20
                    )
                    return self.parse(await asyncio.wait_for(request, self.timeout))
            except OfflineModeIsEnabled as error:
                raise ValueError(f"{self.url}: HF_HUB_OFFLINE forbids it; unset it to use a remote reward") from error
            except HfHubHTTPError as error:
                status = error.response.status_code
                problem = f"status {status} ({error.response.text.strip()[:100]})"
                if status != 429 and status < 500:
                    break
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} seconds"
            except (HTTPError, OSError) as error:
                problem = f"no connection ({error})"
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                problem = f"an answer that cannot be read ({error})"
            if attempt < self.retries:
                await asyncio.sleep(min(self.backoff * 2**attempt, 60))
        raise ValueError(f"{self.url}, model {self.served}: {problem}, after {attempt + 1} attempts")

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
            raise ValueError(
                f"rewards: {name}: kind {cfg.kind!r}; expected {', '.join(KINDS)} or path/to/file.py:function"
            )
        if colon:
            continue
        check_args(f"rewards: {name}: args", KINDS[path], cfg.args)
        if not cfg.model:
            raise ValueError(f"rewards: {name}: no model; expected a folder or a repository of the Hub")
        needed = getattr(KINDS[path], "folder", None)
        if needed and Path(cfg.model).exists() and not (Path(cfg.model) / needed).is_file():
            raise ValueError(f"rewards: {name}: {cfg.model} has no {needed}; expected a model of save_pretrained")


def check_args(where, kind, args):
    """The keyword arguments of a kind's class are its options: unknown, missing and mistyped ones raise ValueError."""
    options = {n: p for n, p in inspect.signature(kind).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key, value in args.items():
        if key not in options:
            close = difflib.get_close_matches(str(key), options, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(options) or 'none'}"
            raise ValueError(f"{where}.{key} is not an option of this kind; {hint}")
        kinds = {float: (float, int), tuple: (list, tuple)}.get(options[key].annotation, options[key].annotation)
        words = kinds != (list, tuple) or value and all(isinstance(v, str) for v in value)
        if not isinstance(value, kinds) or isinstance(value, bool) or not words:
            expected = {tuple: "a list of words"}.get(options[key].annotation, options[key].annotation.__name__)
            raise ValueError(f"{where}.{key}: {value!r}; expected {expected}")
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"{where}.{key}: {value!r}; expected 0 or more")
    for key, option in options.items():
        if option.default is option.empty and key not in args:
            raise ValueError(f"{where}.{key} is missing; expected {option.annotation.__name__}")


def user_reward(cfg):
    """`file.py:name`: a reward function, or, where `args` are given, a factory called once with them that returns one."""
    path, _, attribute = cfg.kind.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ValueError(f"{path} has no {attribute!r}")
    function = getattr(module, attribute)
    return function(**cfg.args) if cfg.args else function


def load_rewards(configs, device="cpu"):
    """The factory: {name: RewardConfig} -> {name: reward}. Models load once, here; what cannot is named."""
    check(configs)
    rewards = {}
    for name, cfg in configs.items():
        try:
            rewards[name] = user_reward(cfg) if ":" in cfg.kind else KINDS[cfg.kind](cfg, device, **cfg.args)
        except (ValueError, OSError) as error:
            raise ValueError(f"rewards: {name}: {error}") from error
    return rewards


# ---------------------------------------------------------------- the public entry


@torch.no_grad()
def score(rewards, images, prompts, micro_batch=64):
    """Every reward of every picture: {name: (B,) f32 on the CPU}. A wrong shape or a value that is not finite stops the run by name."""
    return {
        name: torch.cat(
            [
                score_chunk(name, reward, images[i : i + micro_batch], list(prompts[i : i + micro_batch]))
                for i in range(0, len(images), micro_batch)
            ]
        )
        for name, reward in rewards.items()
    }


def score_chunk(name, reward, images, prompts):
    try:
        value = torch.as_tensor(reward(images, prompts))
    except (ValueError, OSError) as error:
        raise ValueError(f"rewards: {name}: {error}") from error
    if value.shape != (len(images),):
        raise ValueError(
            f"rewards: {name} returned shape {tuple(value.shape)} for {len(images)} pictures; expected ({len(images)},)"
        )
    if not torch.isfinite(value).all():
        first = prompts[int((~torch.isfinite(value)).nonzero()[0])]
        raise ValueError(f"rewards: {name} returned a value that is not finite for {first!r}; rewards must be finite")
    return value.float().cpu()


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


# ---------------------------------------------------------------- main


def table(scores, pictures):
    """{name: B values, None where there is none}, B names -> the lines of a table of B rows"""
    rows = [["picture", *scores]]
    rows += [[p, *("-" if v[i] is None else f"{v[i]:.3f}" for v in scores.values())] for i, p in enumerate(pictures)]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return ["  ".join([r[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(r[1:], widths[1:]))]) for r in rows]


def main(argv):
    """[config.yaml, pictures and key=value ...]: training and validation rewards of each picture, at the generator's size.

    The prompt that `clip` needs is read from a PNG's own `prompt` field; a picture without one has no value there. Held-out detectors
    stay bench.py's. One reward is in memory at a time.
    """
    from grpo import load_config

    pictures = [word for word in argv[1:] if "=" not in word or Path(word).is_file()]
    cfg = load_config([*argv[:1], *(word for word in argv[1:] if word not in pictures)])
    if not pictures:
        raise ValueError("no picture given; expected python reward.py config.yaml picture.jpg ... [key=value ...]")
    configs = {**cfg.rewards.train, **cfg.rewards.validation}
    check(configs)
    images = torch.stack([read_image(p, (cfg.generator.height, cfg.generator.width)) for p in pictures])
    prompts = [Image.open(p).info.get("prompt") for p in pictures]
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    scores = {}
    for name in configs:
        rewards = load_rewards({name: configs[name]}, device)
        needs_prompt = getattr(rewards[name], "needs_prompt", False)
        rows = [i for i, prompt in enumerate(prompts) if prompt or not needs_prompt]
        scores[name] = [None] * len(pictures)
        if rows:
            values = score(rewards, images[rows], [prompts[i] or "" for i in rows], cfg.micro_batch)[name]
            for i, value in zip(rows, values.tolist()):
                scores[name][i] = value
    print("\n".join(table(scores, pictures)))


if __name__ == "__main__":
    from grpo import cli

    cli(lambda: main(sys.argv[1:]))
