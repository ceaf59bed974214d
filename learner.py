"""The detector that learns while it is the reward (RealGen-V2), so that what once fooled it stops paying.

A frozen detector has blind spots, and a policy that is paid for its score finds them. After a training step
whose pictures have a mean reward above `threshold`, a student, which is a copy of the detector, trains on
photographs and as many pictures, half of them from earlier steps. The detector follows the student, until it
tells apart what was held back from training, or for `max_steps`:

    loss  = (CE(pictures, 0.05) + CE(photographs, 0.95)) / 2    the targets are of P(real)
    live <- AdamW(live, gradient of the loss)                   the student's weights: they train ...
    live <- live + anchor (start - live)                        ... and keep what they knew of realism
    ema  <- ema + (1 - decay) (live - ema)                      the detector's weights: they score
            decay = min(ema of the config, k / (k + 9))         step k; short, or the start would linger

Everything random follows from (name, seed, iteration), so ranks that are given the same pictures agree.

A reward that learns has a model, logits(images, prompts) -> (B, 2), [fake, real], and trainable() -> those
parameters of the model that learn.
A picture is a pair ((3,H,W) uint8, prompt) here, and so is a photograph: files have 8 bits a colour, and
pictures of more would give themselves away.
"""

import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from common import ConfigError, bounded, loading, rng
from reward import as_bytes, read_image, read_list, score

HELD_BACK = 8  # each eighth photograph never trains: it tells when a detector has learnt enough


@dataclass
class UpdateConfig:
    """When a detector learns, and how. The defaults are RealGen-V2's where they were published."""

    threshold: float = 0.6  # mean P(real) of a step's pictures above which it learns: it is being fooled
    accuracy: float = bounded("share", 0.9)  # share of what is held back told apart, at which it stops ...
    max_steps: int = bounded("positive", 20)  # ... or after this many optimizer steps
    lr: float = bounded("positive", 4e-5)  # AdamW; more for a small detector
    batch_size: int = bounded("positive", 32)  # photographs in a batch, and as many pictures; costs memory
    replay: int = bounded("natural", 512)  # pictures of earlier steps that are kept, as old tricks come back
    ema: float = bounded("decay", 0.99)  # per optimizer step; 0.9 for a small detector and a short run
    anchor: float = bounded("decay", 0.0)  # share of the way back to the start, per optimizer step
    every: int = bounded("positive", 1)  # training steps between looks at the threshold


# ---------------------------------------------------------------- photographs


class Photographs:
    """What learning detectors know as real: JSON lines {"image", "prompt"}, paths relative to the file.

    size: (height, width), pixels. prepare: (1,3,H,W) f32 in [0,1] -> the same, such as the generator's
    autoencoder, whose blur would otherwise tell. A photograph that cannot be read is warned about once and
    skipped: nobody should lose a night's run to one broken download among thousands.
    """

    def __init__(self, path, size, prepare):
        self.rows = read_list(path)  # [(path, prompt)]
        self.size = size
        self.prepare = prepare
        self.bad = set()  # numbers of rows that cannot be read

    @lru_cache(1024)  # that many stay in memory: 12 MB at 64 x 64, 3 GB at 1024 x 1024
    def read(self, i):
        """Row i -> (3,H,W) uint8; alone through `prepare`, so that it is the same whatever else is drawn"""
        image = read_image(self.rows[i][0], self.size)  # (3, H, W)
        return as_bytes(self.prepare(image[None]))[0]

    def beside(self, pictures, noise, held_back=False):
        """n pictures -> images (2n,3,H,W) f32 in [0,1], 2n prompts, labels (2n,): 0 fake, 1 real

        The second half are random photographs, all held back or none; repeated where there are fewer than n.
        """
        n = len(pictures)
        drawn = []
        for i in noise.permutation(len(self.rows)):  # of all, so that the draw depends on the noise alone
            if len(drawn) == n:
                break
            if i in self.bad or (i % HELD_BACK == HELD_BACK - 1) != held_back:
                continue
            try:
                drawn.append((self.read(i), self.rows[i][1]))
            except ConfigError as error:
                self.bad.add(i)
                warnings.warn(f"{error}; skipped, as {len(self.bad)} of {len(self.rows)} photographs so far")
        if not drawn:
            raise ConfigError(
                f"photos: {len(self.rows)}, of which {len(self.bad)} are broken; expected {HELD_BACK} or more"
            )
        both = pictures + (drawn * n)[:n]
        images = torch.stack([image for image, _ in both]) / 255  # (2n, 3, H, W)
        return images, [prompt for _, prompt in both], torch.arange(2 * n) // n


def augment(images, noise):
    """(B,3,H,W) in [0,1] -> the same; half are flipped, half blurred, half recoloured, and all get some grain

    For photographs and pictures alike, so that none of it tells them apart.
    """

    def uniform(kinds):
        return torch.from_numpy(noise.random((kinds, len(images), 1, 1, 1), "float32"))  # in [0, 1)

    flip, blur, recolour = uniform(3) < 0.5  # (B, 1, 1, 1) each
    softness, grain = uniform(2)
    brightness, contrast, saturation = recolour * (uniform(3) - 0.5) * 0.4  # in +-0.2
    images = torch.where(flip, images.flip(3), images)
    soft = F.pad(images, (1, 1, 1, 1), "replicate")  # (B, 3, H+2, W+2)
    for _ in range(2):  # a trick: means of two neighbours, twice, are the kernel (1, 2, 1) / 4
        soft = F.avg_pool2d(soft, 2, stride=1)  # (B, 3, H+1, W+1), then (B, 3, H, W)
    images = images.lerp(soft, blur * softness)
    images = images * (1 + brightness)
    images = images.lerp(images.mean((1, 2, 3), keepdim=True), -contrast)
    images = images.lerp(images.mean(1, keepdim=True), -saturation)
    normal = torch.from_numpy(noise.standard_normal(images.shape, "float32"))  # (B, 3, H, W)
    return (images + normal * grain * 0.02).clamp(0, 1)  # std up to 5 of 255


# ---------------------------------------------------------------- the learner


@dataclass
class Learner:
    """Lets a detector learn from Photographs and from the pictures that `step` is given."""

    name: str
    reward: object  # the detector; it scores
    cfg: UpdateConfig
    photos: Photographs
    seed: int = 0
    micro_batch: int = 64  # pictures at a time when it scores
    device: str = "cpu"  # where it trains; the reward's model may rest elsewhere, as it does under offload

    def __post_init__(self):
        with loading(f"learners.{self.name}"):  # has it no trainable(), or is that empty?
            self.ema = nn.ParameterList(self.reward.trainable())
            self.student = deepcopy(self.reward)
            self.live = nn.ParameterList(self.student.trainable())
            self.optimizer = torch.optim.AdamW(self.live, lr=self.cfg.lr)
        self.live.requires_grad_()
        self.start = deepcopy(self.ema)
        self.steps = 0  # of the optimizer
        self.replay = []  # [(ticket, picture)] by ticket

    def step(self, images, prompts, mean, iteration):
        """Pictures (B,3,H,W) uint8 of a step, B > 1, and their mean reward -> metrics of an update or None

        What is learnt judges the next step, not this one: in a group, pictures that a detector just trained
        on would stand below those that were held back.
        """
        noise = rng("learner " + self.name, self.seed, iteration)
        fresh = list(zip(images, prompts))
        noise.shuffle(fresh)
        held = fresh[::4]
        del fresh[::4]
        row = None
        if iteration % self.cfg.every == 0 and mean > self.cfg.threshold:
            home = self.ema[0].device
            try:
                self.move(self.device)
                row = self.learn(fresh, held, noise)
            finally:
                self.move(home)
        # a reservoir: each picture so far drew a ticket and the lowest stay, so all are equally likely to be
        # there; copied, because a view would keep its whole batch
        tickets = [(noise.random(), (image.clone(), prompt)) for image, prompt in fresh]
        self.replay = sorted(self.replay + tickets, key=lambda pair: pair[0])[: self.cfg.replay]
        return row

    def move(self, device):
        for part in (self.reward.model, self.student.model, self.start):
            part.to(device)  # parameters stay the same objects
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # a trick: it follows its parameters

    def learn(self, fresh, held, noise):
        """Optimizer steps until the accuracy on what is held back is reached -> metrics"""
        images, prompts, labels = self.photos.beside(held, noise, held_back=True)

        def accuracy():
            scores = score({self.name: self.reward}, images, prompts, self.micro_batch)[self.name]  # (2n,)
            return ((scores >= 0.5) == labels).float().mean().item()

        reached = [accuracy()]
        while reached[-1] < self.cfg.accuracy and len(reached) <= self.cfg.max_steps:
            self.train_step(fresh, noise)
            reached.append(accuracy())
        return {
            "steps": len(reached) - 1,
            "accuracy_before": reached[0],
            "accuracy_after": reached[-1],
        }

    def train_step(self, fresh, noise):
        """One step of the student, and of the detector after it; see the head of this file"""
        n = self.cfg.batch_size
        old = min(n // 2, len(self.replay))
        pictures = [fresh[i] for i in noise.integers(len(fresh), size=n - old)]
        pictures += [self.replay[i][1] for i in noise.integers(len(self.replay), size=old)]
        images, prompts, labels = self.photos.beside(pictures, noise)
        logits = self.student.logits(augment(images, noise), prompts).cpu()  # (2n, 2) [fake, real]
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)  # 0.05 for either label
        loss.backward()
        nn.utils.clip_grad_norm_(self.live, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        decay = min(self.cfg.ema, self.steps / (self.steps + 9))
        with torch.no_grad():
            for live, start, ema in zip(self.live, self.start, self.ema):
                live.lerp_(start, self.cfg.anchor)
                ema.lerp_(live, 1 - decay)

    def state(self):
        """What torch.save must write of it, and torch.load(weights_only=True) reads; by reference"""
        return {
            "ema": self.ema.state_dict(),
            "live": self.live.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "replay": self.replay,
        }

    def load_state(self, state):
        """Back to a `state`, to the bit; its tensors are kept. RuntimeError where it is another model's."""
        self.ema.load_state_dict(state["ema"])
        self.live.load_state_dict(state["live"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.replay = state["replay"]
