"""P(real) by OmniAID, RealGen's feature detector: a CLIP ViT with low-rank experts in its projections.

    kind: rewards/omniaid.py:OmniAid     model: a file, or a Hub repository with args.file

In every attention projection, with a gate g_i of expert i that is the same in all layers,

    y = W x + bias + sum_i g_i U_i diag(S_i) V_i x

W is the stock weight without its smallest singular values. V1 has experts of rank 1 and a router that reads
the mean patch embedding. V2 has rank 8 and a router that reads the pooled output of a frozen CLIP. Effort has
one expert of rank 1, its residual, and no router; it is evaluated with ImageNet's statistics. B pictures, T
tokens (class token, then patches), D width, E experts, r rank.
"""

import argparse

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from common import check_finite, loading
from reward import Classifier, normalise, resize

# ViT-L/14, as in all the published files; whether it sees 336 or 224 pixels shows in the file
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
# part of a published name -> what the stock CLIPVisionModel calls it, and we
NAMES = {
    "module.": "",
    "backbone.": "",
    "_residual": "_experts.0",
    "encoder_layers": "encoder.layers",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "weight_main": "weight",
    "gating_network.network": "router",
}
# buffers in the published files that only the authors' training reads
UNUSED = ("U_r", "S_r", "V_r", "weight_original_fnorm", "position_ids")


class Network(CLIPVisionModel):
    """The network that one file is of: `state`, {name: tensor}, tells pixels, experts, rank and router."""

    def __init__(self, state):
        patches = len(state["embeddings.position_embedding.weight"]) - 1  # less the class token
        super().__init__(CLIPVisionConfig(**SHAPE, image_size=SHAPE["patch_size"] * round(patches**0.5)))
        first = "encoder.layers.0.self_attn.q_proj.S_experts."
        self.experts = sum(name.startswith(first) for name in state)
        for name, projection in self.encoder.named_modules():
            if name.endswith("_proj"):
                for part in ("U_experts", "S_experts", "V_experts"):  # (D, r), (r,), (r, D)
                    tensors = [state[f"encoder.{name}.{part}.{i}"] for i in range(self.experts)]
                    setattr(projection, part, nn.ParameterList(tensors))
                projection.register_forward_hook(self.add_experts)
        width = SHAPE["hidden_size"]
        self.head = nn.Linear(width, 2)
        self.router = self.feature_extractor = None
        if "router.0.bias" in state:
            hidden = len(state["router.0.bias"])
            subjects = len(state["router.2.bias"])
            self.router = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, subjects))
        if "feature_extractor.pre_layrnorm.bias" in state:
            self.feature_extractor = CLIPVisionModel(self.config)

    def add_experts(self, projection, inputs, y):
        """The formula above, as a hook of a projection: inputs (x (B,T,D),), y = W x + bias (B,T,D)"""
        parts = (projection.U_experts, projection.S_experts, projection.V_experts)
        for gate, U, S, V in zip(self.gates, *parts):
            y = y + gate * (inputs[0] @ V.T * S @ U.T)  # from left to right: (B, T, r), then (B, T, D)
        return y

    def route(self, pixels):
        """pixels (B,3,h,w) -> gates (B,E)

        The router's best two share 1 by a softmax, as published. Experts that it has no output for are always
        on, with gate 1: the sixth, which knows artifacts where the others know subjects; or all of them.
        """
        gates = pixels.new_ones(len(pixels), self.experts)
        if self.router is None:
            return gates
        if self.feature_extractor is None:
            seen = self.embeddings(pixels)[:, 1:].mean(1)  # (B, D)
        else:
            seen = self.feature_extractor(pixels).pooler_output  # (B, D)
        outputs = self.router(seen)  # (B, subjects)
        values, picked = outputs.topk(2)  # (B, 2)
        gates[:, : outputs.shape[1]] = 0
        return gates.scatter(1, picked, values.softmax(-1))

    def forward(self, pixels):
        """normalised pixels (B,3,h,w) -> logits (B,2), [real, fake]"""
        self.gates = self.route(pixels).T[:, :, None, None]  # (E, B, 1, 1)
        return self.head(super().forward(pixels).pooler_output)


def read_state(path):
    """A .pth, which may be {"model": ...} -> {name: f32 tensor} under our names. No code in it runs."""
    # training options may lie beside the weights; a Namespace holds values and does nothing
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {}
    for name, tensor in state.get("model", state).items():
        for published, ours in NAMES.items():
            name = name.replace(published, ours)
        if not name.endswith(UNUSED):
            tensors[name] = tensor.float()
    check_finite(path, tensors)
    return tensors


class OmniAid(Classifier):
    """The reward, P(real), and like a Classifier it can learn: head and experts do.

    ConfigError: no such file; names, shapes or numbers that are not a whole model's. Pictures are prepared as
    published, but in float: resized to 512 x 512, then to the model's size, both bilinear. file: its name in
    a Hub repository. resize: pixels of the first resize, 0 for none. imagenet: normalise with its statistics
    instead of CLIP's. Effort takes resize 0 and imagenet true.
    """

    def __init__(self, model, device="cpu", *, file="", resize=512, imagenet=False):
        with loading(model):
            state = read_state(hf_hub_download(model, file) if file else model)
            self.model = Network(state)
            self.model.load_state_dict(state)
        self.model.to(device).requires_grad_(False)
        self.learn = ("head.", "_experts.")  # as in the published detector that learns
        self.resize = resize
        self.statistics = [OPENAI_CLIP_MEAN, OPENAI_CLIP_STD]
        if imagenet:
            self.statistics = [IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]

    def preprocess(self, images):
        """(B,3,H,W) in [0,1] -> normalised (B,3,h,w)"""
        if self.resize:
            images = resize(images, self.resize, "bilinear")
        images = resize(images, self.model.config.image_size, "bilinear")
        return normalise(images, *self.statistics)

    def logits(self, images, prompts=None):
        pixels = self.preprocess(images.to(self.model.device))  # (B,3,h,w)
        return self.model(pixels).flip(-1)  # (B, 2), [fake, real]
