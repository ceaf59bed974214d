"""P(real) by OmniAID, RealGen's feature detector: a CLIP ViT with low-rank experts in its projections.

    kind: rewards/omniaid.py:OmniAid     model: a file, or a folder or Hub repository with args.file

In every attention projection, with a gate g_i of expert i that is the same in all layers,

    y = W x + sum_i g_i U_i diag(S_i) V_i x + bias

W is the stock weight without its smallest singular values. V1 has experts of rank 1 and a router that reads
the mean patch embedding. V2 has rank 8 and a router that reads the pooled output of a frozen CLIP. One expert
and no router is Effort. B pictures, T tokens (class token, then patches), D width, E experts, r rank.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from common import ConfigError, check_finite, loading
from reward import as_file, frozen, p_real, resize

# buffers in the published files that only the authors' training reads
UNUSED = ("U_r", "V_r", "weight_original_fnorm", "position_ids")


class ExpertLinear(nn.Module):
    """The formula above, x (B,T,D) -> (B,T,D), all experts in two matmuls. OmniAID sets `gates` (B,E)."""

    def __init__(self, width, experts, rank):
        def one_each(*shape):
            return nn.ParameterList(torch.empty(shape) for _ in range(experts))

        super().__init__()
        self.weight_main = nn.Buffer(torch.empty(width, width))  # W, which never learns
        self.bias = nn.Parameter(torch.empty(width))
        self.U_experts = one_each(width, rank)
        self.S_experts = one_each(rank)
        self.V_experts = one_each(rank, width)
        self.gates = None

    def forward(self, x):
        U = torch.cat(list(self.U_experts), 1)  # (D, E*r)
        S = torch.stack(list(self.S_experts))  # (E, r)
        V = torch.cat(list(self.V_experts))  # (E*r, D)
        gated = self.gates[:, None, :, None] * S  # (B, 1, E, r)
        h = (x @ V.T) * gated.flatten(2)  # (B, T, E*r)
        y = F.linear(x, self.weight_main, self.bias)  # (B, T, D)
        return y + h @ U.T


class OmniAID(nn.Module):
    """The network of one file: `state`, {name: tensor}, gives the sizes; modules are named as it names them.

    A head's width does not show in the tensors: 64, as in every CLIP ViT. top_k: experts that a router mixes.
    """

    def __init__(self, state, top_k):
        super().__init__()
        width, _, _, patch = state["embeddings.patch_embedding.weight"].shape
        patches = len(state["embeddings.position_embedding.weight"]) - 1
        layers = {name.split(".")[1] for name in state if name.startswith("encoder_layers.")}
        first = "encoder_layers.0.self_attn.q_proj.S_experts."
        ranks = [len(state[name]) for name in state if name.startswith(first)]
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(state["encoder_layers.0.mlp.fc1.bias"]),
            num_hidden_layers=len(layers),
            num_attention_heads=max(width // 64, 1),
            patch_size=patch,
            image_size=patch * round(patches**0.5),
            attn_implementation="sdpa",
        )
        self.pixels = config.image_size
        self.experts = len(ranks)
        self.top_k = top_k
        self.embeddings = CLIPVisionEmbeddings(config)
        self.encoder_layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in layers)
        for layer in self.encoder_layers:
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(layer.self_attn, name, ExpertLinear(width, len(ranks), ranks[0]))
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)
        self.gating_network = None
        self.feature_extractor = None
        if "gating_network.network.0.bias" in state:
            hidden = len(state["gating_network.network.0.bias"])
            routed = len(state["gating_network.network.2.bias"])
            network = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, routed))
            self.gating_network = nn.ModuleDict({"network": network})
            if not 1 <= top_k <= routed:
                raise ConfigError(f"args.top_k: {top_k}; expected 1 to {routed}, the outputs of the router")
        if "feature_extractor.pre_layrnorm.bias" in state:
            self.feature_extractor = CLIPVisionModel(config)

    def gates(self, pixels, x):
        """pixels (B,3,h,w), their embeddings x (B,T,D) -> (B,E)

        The router's best `top_k` share 1 by a softmax. Experts that it has no output for are always on, with
        gate 1: the sixth, which knows artifacts where the others know subjects; all where there is no router.
        """
        gates = x.new_ones(len(x), self.experts)
        if self.gating_network is None:
            return gates
        if self.feature_extractor is None:
            seen = x[:, 1:].mean(1)  # (B, D)
        else:
            seen = self.feature_extractor(pixels).pooler_output.detach()  # (B, D)
        outputs = self.gating_network["network"](seen)  # (B, routed)
        values, picked = outputs.topk(self.top_k)  # (B, top_k)
        gates[:, : outputs.shape[1]] = 0
        return gates.scatter(1, picked, values.softmax(-1))

    def forward(self, pixels):
        """normalised pixels (B,3,h,w) -> logits (B,2)"""
        x = self.embeddings(pixels)  # (B, T, D)
        gates = self.gates(pixels, x)
        for module in self.modules():
            if isinstance(module, ExpertLinear):
                module.gates = gates
        x = self.ln_pre(x)
        for layer in self.encoder_layers:
            x = layer(x, attention_mask=None)
        x = self.ln_post(x[:, 0])  # (B, D), the class token
        return self.head(x)


def read_state(model, file=""):
    """.safetensors or .pth, which may be {"model": ...} -> {name: f32 tensor}. A .pth runs no code."""
    path = Path(model, file)
    with loading(path):
        if file and not Path(model).exists():
            path = Path(hf_hub_download(model, file))
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            # training options may lie beside the weights; a Namespace holds values and does nothing
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        state = {n: t.float() for n, t in state.items() if n.split(".")[-1] not in UNUSED}
    check_finite(path, state)
    return state


class OmniAid:
    """The reward, P(real). ConfigError: no such file; names, shapes or numbers that are not a whole model's.

    Pictures are prepared as published, but in float: resized to 512 x 512, then to the model's size, both
    bilinear. file: its name in a folder or Hub repository. real: index of real in the head, 0 as published.
    top_k: experts that the router mixes. resize: pixels of the first resize, 0 for none. jpeg: quality of a
    round trip of every picture, 0 for none.
    """

    def __init__(self, model, device="cpu", *, file="", real=0, top_k=2, resize=512, jpeg=0):
        if real not in (0, 1):
            raise ConfigError(f"args.real: {real}; expected 0 or 1, the index in the head")
        state = read_state(model, file)
        with loading(model):
            self.model = OmniAID(state, top_k)
            self.model.load_state_dict(state)
        frozen(self.model, device)
        self.real = real
        self.resize = resize
        self.jpeg = jpeg

    def trainable(self):
        """Head and experts, as in the published detector that learns"""
        named = self.model.named_parameters()
        return [p for name, p in named if name.startswith("head.") or "_experts." in name]

    def preprocess(self, images):
        """(B,3,H,W) in [0,1] -> normalised (B,3,h,w)"""
        if self.resize:
            images = resize(images, self.resize, "bilinear")
        images = resize(images, self.model.pixels, "bilinear")
        mean, std = images.new_tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD])[:, :, None, None]  # (3,1,1) each
        return (images - mean) / std

    def logits(self, images, prompts=None):
        images = as_file(images.to(self.model.head.weight.device), self.jpeg)
        logits = self.model(self.preprocess(images))  # (B, 2)
        return logits[:, [1 - self.real, self.real]]  # [fake, real]

    def __call__(self, images, prompts):
        return p_real(self.logits(images))  # (B,)
