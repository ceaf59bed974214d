"""P(real) by a linear probe: a logistic head on the features of a frozen vision backbone.

    kind: rewards/probe.py:Probe     model: a folder or Hub repository of an AutoModel that sees pictures
    python rewards/probe.py config.yaml [key=value ...]      fits the head of rewards.validation.validation

It is a detector of your own generator. With f (D,) the backbone's pooled output, or the mean
of its last hidden state, brought to mean 0 and variance 1,

    P(real) = sigmoid(w . f + b)     minimises  mean cross entropy + penalty |w|^2

on photographs of cfg.photos and as many pictures that the base generator draws of the training prompts: plain
words, no LoRA. Penalties are cross-validated over prompts: a fold holds back all pictures and photographs of
its prompts, so that a subject is no help. The penalty that tells most of them apart fits the head on
everything. Linear probes of a large backbone are UnivFD's detectors (arXiv 2302.10174).
"""

import sys
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

# a script looks for modules beside itself, and these are one folder up
sys.path.append(str(Path(__file__).parents[1]))

from common import loading, rng
from learner import Photographs
from reward import Classifier, Preprocess, as_bytes, as_file, load_frozen

PICTURES = 256  # that are drawn, and as many photographs
FOLDS = 5
PENALTIES = [1.0, 0.1, 0.01, 0.001, 0.0001]


class Probe(Classifier):
    """The reward, P(real), and like a Classifier it can learn: the head alone does.

    ConfigError: no such backbone, no head yet, or one of another width. Of a CLIP the picture's half is
    taken. head: a safetensors file; None for one that is yet to be fitted. jpeg: quality of a round trip
    before it looks, 0 for none.
    """

    def __init__(self, model, device="cpu", *, head, jpeg=0):
        whole = load_frozen(AutoModel, model, device)
        self.model = getattr(whole, "vision_model", whole)
        self.preprocess = Preprocess(model)
        self.jpeg = jpeg
        self.learn = ["probe."]
        # a part of the model, so that it moves with it
        self.model.probe = nn.Linear(self.model.config.hidden_size, 1, device=device)
        self.model.requires_grad_(False)
        if head:
            with loading(f"{head}, which python rewards/probe.py fits,"):
                self.model.probe.load_state_dict(load_file(head))

    def features(self, images):
        """(B,3,H,W) in [0,1] -> (B, D) f32"""
        pixels = self.preprocess(as_file(images.to(self.model.device), self.jpeg))  # (B,3,h,w)
        out = self.model(pixel_values=pixels)
        pooled = out.get("pooler_output", out.last_hidden_state.mean(1))  # (B, D)
        return F.layer_norm(pooled, pooled.shape[1:])

    def logits(self, images, prompts=None):
        """(B,3,H,W) -> (B, 2), [fake, real], with grad in the head"""
        return F.pad(self.model.probe(self.features(images)), (1, 0))


# ---------------------------------------------------------------- fitting


def fit(features, labels, penalty):
    """features (n, D), labels (n,), 1 for photographs -> the head at the minimum of the loss above"""
    head = nn.Linear(features.shape[1], 1)
    for p in head.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        entropy = F.binary_cross_entropy_with_logits(head(features)[:, 0], labels.float())
        value = entropy + penalty * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


def cross_validate(features, labels, folds):
    """features (n, D), labels (n,), folds (n,) -> the best penalty; prints what each is worth"""
    accuracy = {}
    for penalty in PENALTIES:
        shares = []  # told apart, of each fold by a head that has not seen its prompts
        for fold in range(FOLDS):
            held = folds == fold  # (n,)
            head = fit(features[~held], labels[~held], penalty)
            right = (head(features[held])[:, 0] > 0) == labels[held]
            shares.append(round(right.float().mean().item(), 3))
        accuracy[penalty] = sum(shares) / FOLDS
        print(
            f"penalty {penalty}: accuracy on held-back prompts {accuracy[penalty]:.3f}, by fold {shares}"
        )
    # the first of equals, whose scores are the least extreme
    return max(accuracy, key=accuracy.get)


def main(argv):
    """[config.yaml, key=value ...]: draw, fit and write the head"""
    from grpo import Run, load_config  # not above, because grpo loads this file

    cfg = load_config(argv)
    reward = cfg.rewards.validation["validation"]
    with loading("rewards.validation.validation: args"):
        path = Path(reward.args["head"])
    path.parent.mkdir(parents=True, exist_ok=True)
    # a run without what is not needed yet
    cfg.refiner = None
    cfg.rewards.train = cfg.rewards.validation = {}
    run = Run(cfg, train=False)
    probe = Probe(reward.model, run.device, **reward.args | {"head": None})
    noise = rng("probe", cfg.seed)
    texts = noise.choice(run.prompts, PICTURES).tolist()
    keys = [("probe picture", cfg.seed, i) for i in range(PICTURES)]
    drawn, _ = run.generator.rollout(texts, keys)
    photos = Photographs(cfg.photos, drawn.shape[2:], run.real)
    # (2n, 3, H, W), 2n texts, (2n,)
    images, texts, labels = photos.beside([*zip(as_bytes(drawn), texts)], noise)
    parts = [probe.features(part).cpu() for part in images.split(cfg.micro_batch)]
    features = torch.cat(parts)  # (2n, D)
    folds = torch.tensor([crc32(text.encode()) % FOLDS for text in texts])  # (2n,)
    save_file(fit(features, labels, cross_validate(features, labels, folds)).state_dict(), path)


if __name__ == "__main__":
    from grpo import cli

    cli(lambda: main(sys.argv[1:]))
