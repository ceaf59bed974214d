"""P(real) by a linear probe: a logistic head on the features of a frozen vision backbone.

    kind: rewards/probe.py:Probe     model: a folder or Hub repository of any AutoModel that sees pictures
    python rewards/probe.py config.yaml [key=value ...]     fits the head of each probe that the config names

A detector that you can fit on your own generator in minutes. With f (D,) the backbone's pooled output, or the
mean of its last hidden state, and mean and std those of f over what is fitted,

    P(real) = sigmoid(w . (f - mean) / std + b)     minimises  mean cross entropy + penalty |w|^2 / 2

on photographs (cfg.photos) and as many pictures that the base generator draws of the training prompts: plain
words, no LoRA. Each penalty is cross-validated. A fold holds back prompts, with all pictures and photographs of
them, so that a subject is no help. The penalty with the least cross entropy on what was held back then fits the
head on everything. That a linear probe of a large backbone knows the pictures of other generators too is
UnivFD's finding (arXiv 2302.10174).
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

# a script looks for modules beside itself, and these are one folder up
sys.path.append(str(Path(__file__).parents[1]))

import ranks
from common import ConfigError, check_finite, load_model, loading, rng
from generator import Generator
from learner import Photographs
from reward import Preprocess, as_bytes, as_file, frozen, p_real

PICTURES = 256  # of each kind at most; more of them take longer to draw
FOLDS = 5
PENALTIES = [10.0**i for i in range(-4, 2)]


class Backbone:
    """A frozen vision model under its own preprocessing; of a CLIP the picture's half. ConfigError: no such.

    head: the safetensors file of the head. jpeg: quality of a round trip before it looks, 0 for none.
    """

    def __init__(self, model, device="cpu", *, head, jpeg=0):
        whole = load_model(AutoModel, model, dtype=torch.float32)
        self.model = frozen(getattr(whole, "vision_model", whole), device)
        self.preprocess = Preprocess(model)
        self.head = head
        self.jpeg = jpeg

    def features(self, images):
        """(B,3,H,W) in [0,1] -> (B, D) f32"""
        pixels = self.preprocess(as_file(images.to(self.model.device), self.jpeg))  # (B,3,h,w)
        out = self.model(pixel_values=pixels)
        if out.get("pooler_output") is None:
            return out.last_hidden_state.mean(1)
        return out.pooler_output.flatten(1)


class Probe(Backbone):
    """The reward, P(real). ConfigError: no head yet, or one of another backbone."""

    def __init__(self, model, device="cpu", **args):
        head = args["head"]
        if not Path(head).is_file():
            raise ConfigError(f"{head} is no file; expected a head, which rewards/probe.py fits first")
        super().__init__(model, device, **args)
        width = self.features(torch.zeros(1, 3, 8, 8)).shape[1]
        with loading(head):
            state = load_file(head)
            # a part of the model, so that it moves and learns with it
            self.model.probe = frozen(new_head(width), device)
            self.model.probe.load_state_dict(state)
        check_finite(head, state)

    def trainable(self):
        return list(self.model.probe.parameters())

    def logits(self, images, prompts=None):
        """(B,3,H,W) -> (B, 2), [fake, real], with grad in the head alone"""
        return F.pad(self.model.probe(self.features(images)), (1, 0))

    def __call__(self, images, prompts):
        return p_real(self.logits(images))  # (B,)


# ---------------------------------------------------------------- fitting


def new_head(width):
    """(B, D) -> (B, 1), the logit of P(real); 0 until it is fitted"""
    # a trick: the running statistics of a BatchNorm that never trains are the mean and std of the features
    head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, 1)).eval()
    for p in head.parameters():
        nn.init.zeros_(p)
    return head


def fit(features, labels, penalty):
    """features (n, D), labels (n,) f32, 1 for photographs -> the head at the minimum of the loss above"""
    head = new_head(features.shape[1])
    head[0].running_mean = features.mean(0)
    head[0].running_var = features.var(0)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        entropy = F.binary_cross_entropy_with_logits(head(features)[:, 0], labels)
        value = entropy + penalty * head[1].weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return head


def cross_validate(features, labels, folds):
    """features (n, D), labels (n,), folds (n,) in 0..FOLDS-1 -> the best penalty; prints all of them"""
    losses = {}
    for penalty in PENALTIES:
        z = torch.zeros_like(labels)  # (n,), each by a head that has not seen its prompt
        for fold in range(FOLDS):
            held = folds == fold
            z[held] = fit(features[~held], labels[~held], penalty)(features[held])[:, 0].detach()
        losses[penalty] = F.binary_cross_entropy_with_logits(z, labels).item()
        right = ((z > 0) == (labels > 0)).float()  # (n,)
        each = " ".join(f"{right[folds == fold].mean():.3f}" for fold in range(FOLDS))
        loss = f"cross entropy {losses[penalty]:.3f}, accuracy {right.mean():.3f}"
        print(f"penalty {penalty:g}: on held-back prompts {loss}, by fold {each}")
    return min(losses, key=losses.get)


def examples(cfg, prompts):
    """As many base pictures as photographs -> images (2n,3,H,W) f32 in [0,1], prompts, labels (2n,) f32"""
    place = (ranks.pick_device(cfg.device), getattr(torch, cfg.dtype), cfg.micro_batch)
    generator = Generator(cfg.generator, *place, cfg.offload)
    shape = (cfg.generator.height, cfg.generator.width)
    prepare = generator.reconstruct if cfg.autoencode_photos else lambda images: images
    photos = Photographs(cfg.photos, shape, prepare)
    n = min(PICTURES, len(photos.rows))
    noise = rng("probe", cfg.seed)
    order = noise.permutation(len(prompts))
    texts = [prompts[order[i % len(order)]] for i in range(n)]
    drawn, _ = generator.rollout(texts, [("probe picture", cfg.seed, i) for i in range(n)])
    images, texts, labels = photos.beside(list(zip(as_bytes(drawn), texts)), noise)
    return images, texts, labels.float()


def main(cfg, prompts):
    """Fit the head of every probe among cfg.rewards, and write its file"""
    named = cfg.rewards.train | cfg.rewards.validation | cfg.rewards.heldout
    probes = [reward for reward in named.values() if reward.kind.endswith("probe.py:Probe")]
    if not probes:
        raise ConfigError("rewards: no probe; expected a reward of kind rewards/probe.py:Probe")
    images, texts, labels = examples(cfg, prompts)
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    folds = torch.tensor([numbers[text] % FOLDS for text in texts])  # (2n,)
    if len({*zip(folds.tolist(), labels.tolist())}) < 2 * FOLDS:
        raise ConfigError(f"{cfg.photos}: too few prompts; expected photographs of many more than {FOLDS}")
    for reward in probes:
        with loading("args"):
            backbone = Backbone(reward.model, ranks.pick_device(cfg.device), **reward.args)
        rows = [backbone.features(part).cpu() for part in images.split(cfg.micro_batch)]
        features = torch.cat(rows)  # (2n, D)
        head = fit(features, labels, cross_validate(features, labels, folds))
        Path(backbone.head).parent.mkdir(parents=True, exist_ok=True)
        save_file(head.state_dict(), backbone.head)
        print(f"{backbone.head}: fitted on {len(labels)} pictures, half of them photographs")


if __name__ == "__main__":
    from grpo import cli, load_config, read_prompts

    def run():
        cfg = load_config(sys.argv[1:])
        main(cfg, read_prompts(cfg.prompts))

    cli(run)
