"""GRPO for an image generator and the LLM that refines its prompts, with AI-image detectors as the reward.

The method is RealGen's (arXiv 2512.00473).

    python grpo.py config.yaml                          train, by default on a CPU in minutes
    python grpo.py config.yaml seed=1 out=out/seed1     any key of config.yaml, dotted
    python grpo.py config.yaml profile=quick            a named set of keys from `profiles`
    python grpo.py config.yaml resume=true              go on after an interruption, to the same result
    torchrun --nproc_per_node=4 grpo.py config.yaml profile=flux     on 4 GPUs: each takes whole prompt groups

One step is a walk. P prompts, N texts of each (rewrites, and the user's words where keep_original), M
images of each text. Batches are prompt-major, (P, N, M):

    prompts (P)
      -> refiner.rollout      texts (P*N), and a record of how
      -> generator.rollout    images (P*N*M, 3, H, W), and a record of how
      -> score                {name: (P*N*M,)}, higher = more real
      -> advantages           A = clip(mean by weight of (r - mean_group r) / (std_group r + 1e-4), -5, 5)
      -> update               loss = -min(ratio A, clip(ratio) A) + beta KL, for either policy

A stage trains `refiner` (generator frozen), `generator` (refiner frozen) or `joint` (one set of pictures
trains both). GRPO does not know which policy is a diffusion model and which an LLM. Both have:

    rollout(...)            what it made, and a record of how
    terms(record, rows)     log-ratios and KL of some rows of the record, with gradients; scale of the
                            advantage, weight in the loss, figures
    count(record, rows)     what the loss of these rows is divided by
    remember(record, rows)  keep old log-probs, before the first of several updates
    clip(), parameters(), state(), update_ema(), at_work(), save(folder), load(folder)

Read on in this order: Config, standardise, advantages, clipped_loss, Run.step, Run.update, Run.evaluate,
train.
"""

import copy
import math
import signal
import sys
import warnings
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from omegaconf import OmegaConf
from torch.utils._pytree import tree_map

import ranks
from common import (
    ConfigError,
    batches,
    bounded,
    check_bounds,
    loading,
    repeat,
    rng,
    torch_seed,
)
from folder import Log, checkpoints, load_checkpoint, lock, save_checkpoint
from generator import Generator, GeneratorConfig
from learner import Learner, Photographs, UpdateConfig
from pipeline import reconstruct
from plots import save_before_after, save_curves, save_grid
from refiner import Refiner, RefinerConfig, cue_share
from reward import (
    Clip,
    RewardsConfig,
    as_bytes,
    kid,
    load_rewards,
    read_photos,
    score,
)

# ---------------------------------------------------------------- config


@dataclass
class StageConfig:
    """One of the stages of a run. A group, whose members are compared, has 2 or more of them."""

    train: Literal["refiner", "generator", "joint"] = "generator"
    steps: int = bounded("natural", 16)
    prompts: int = bounded("positive", 9)  # P
    rewrites: int = bounded("natural", 0)  # how many are sampled
    keep_original: bool = True  # one more text: the user's words
    images: int = bounded("positive", 24)  # M

    @property
    def texts(self):  # N
        return self.rewrites + self.keep_original


@dataclass
class Config:
    """The whole of config.yaml, which says each key's unit and reason."""

    out: str = "out"
    seed: int = bounded("natural", 0)
    device: str = "auto"
    # no float16: at the size of a picture's latents its gradients underflow, and nothing is trained
    dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False
    fsdp: bool = False
    prompts: str = "nano/prompts.txt"
    validation_prompts: str = "nano/validation_prompts.txt"
    test_prompts: str = "nano/test_prompts.txt"
    photos: str = "nano/photos/train.jsonl"
    validation_photos: str = "nano/photos/validation.jsonl"
    test_photos: str = "nano/photos/test.jsonl"
    autoencode_photos: bool = True
    stages: list[StageConfig] = field(
        default_factory=lambda: [StageConfig("joint", rewrites=7, images=3)]
    )
    micro_batch: int = bounded("positive", 36)
    updates: int = bounded("positive", 1)
    lr_schedule: Literal["constant", "linear"] = "linear"
    weight_decay: float = bounded("natural", 1e-4)
    max_grad_norm: float = bounded("positive", 1.0)
    eval_every: int = bounded("positive", 4)
    eval_images: int = bounded("positive", 4)
    keep: Literal["score", "reward", "last"] = "last"
    keep_within: dict[str, float] = field(default_factory=dict)
    save_every: int = bounded("positive", 4)
    resume: bool = False
    log: Literal["wandb", "trackio"] | None = None
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    refiner: RefinerConfig | None = field(default_factory=RefinerConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    learners: dict[str, UpdateConfig | None] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)  # bench.py's, which knows its keys

    def __post_init__(self):  # a profile or a word drops a learner by setting it to null
        self.learners = {name: update for name, update in self.learners.items() if update}


def load_config(argv, schema=Config):
    """[config.yaml, key=value ...] -> schema's object. Words win over profile=NAME, that over the file."""
    if not argv:
        raise ConfigError("no config file; expected python grpo.py config.yaml [key=value ...]")
    path, *words = argv
    with loading(path):
        file = OmegaConf.load(path)
        profiles = file.pop("profiles", {})
        whole = OmegaConf.merge(OmegaConf.structured(schema), file)  # checks keys and types
    for word in sorted(words, key=lambda word: not word.startswith("profile=")):  # profiles first
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: expected key=value, such as generator.num_steps=4")
        with loading(word):
            change = profiles[value] if key == "profile" else OmegaConf.from_dotlist([word])
            whole = OmegaConf.merge(whole, change)
    with loading(path):
        cfg = OmegaConf.to_object(whole)
    check_bounds(cfg)
    return cfg


def check_run(cfg):
    """What training needs of stages and learners together, told before a model loads"""
    parts = cfg.updates * ranks.WORLD
    path = cfg.generator.log_prob == "path"
    for i, stage in enumerate(cfg.stages):
        few_images = stage.train != "refiner" and stage.images < 2
        few_texts = stage.train != "generator" and stage.texts < 2
        fault = None
        if few_images or few_texts:
            fault = "a group of one teaches nothing; expected 2 or more texts or images, of what is trained"
        elif stage.texts == 0:
            fault = "no text to draw; expected rewrites of 1 or more, or keep_original: true"
        elif stage.rewrites and not cfg.refiner:
            fault = f"rewrites: {stage.rewrites}, but refiner is null; expected 0, or a refiner"
        elif path and stage.train != "refiner" and stage.images % cfg.generator.branches:
            fault = f"images: {stage.images}; expected a multiple of generator.branches"
        elif stage.prompts % parts:
            fault = f"prompts: {stage.prompts}; expected a multiple of {parts}, updates x processes"
        if fault:
            raise ConfigError(f"stages[{i}], {stage.train}: {fault}")
    ranks.mine(read_prompts(cfg.validation_prompts))  # as many on each rank
    for name in cfg.learners:
        if name not in cfg.rewards.train:
            raise ConfigError(f"learners.{name}: not a training reward; expected a name of those")


def read_prompts(path):
    """One prompt a line -> list of texts; empty lines are skipped"""
    with loading(path):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: no prompt in it; expected one a line")
    return prompts


# ---------------------------------------------------------------- the heart of GRPO


def standardise(rewards):
    """(groups, G) -> (r - mean) / (std + 1e-4) in each group

    Population std. 1e-4 because a group whose pictures all score the same would turn rounding into
    advantages.
    """
    mean = rewards.mean(1, keepdim=True)  # (groups, 1)
    std = rewards.std(1, keepdim=True, correction=0)  # (groups, 1)
    return (rewards - mean) / (std + 1e-4)


def advantages(scores, weights, groups):
    """{name: (B,)} -> (groups, G), B = groups * G: the weighted mean of standardised rewards, clipped to +-5

    Standardising before the mean makes a weight mean the same for every reward, whatever its scale.
    """
    # each (groups, G)
    parts = [weights[name] * standardise(r.view(groups, -1)) for name, r in scores.items()]
    return (sum(parts) / sum(weights.values())).clamp(-5, 5)


def extremes(advantage, k):
    """(groups, G) -> bool: the k worst and k best of each group, whose |A| is largest; all where k is 0"""
    G = advantage.shape[1]
    k = k or G
    rank = advantage.argsort(1).argsort(1)  # (groups, G), 0 for the worst
    return (rank < k) | (rank >= G - k)


def clipped_loss(log_ratio, advantage, low, high):
    """PPO's pessimistic bound, -min(r A, clip(r, 1 - low, 1 + high) A) -> loss, whether the clip acted

    log_ratio (b, L), L tokens of a text or 1 step of a picture; advantage (b, 1); both results (b, L). In
    the first update after a rollout r is 1, nothing is clipped, and the gradient is that of -A log_prob.
    """
    ratio = log_ratio.exp()
    loss = -ratio * advantage
    bound = -ratio.clamp(1 - low, 1 + high) * advantage
    return torch.maximum(loss, bound), bound > loss


def means(scores):
    """{name: (B,)} -> {name: number}, for people"""
    return {name: r.mean().item() for name, r in scores.items()}


# ---------------------------------------------------------------- the run


class Run:
    """Both policies, the rewards and the optimizers; `step` is the walk."""

    def __init__(self, cfg, train=True):
        """train: whether policies get a new LoRA and its optimizer, and detectors a learner"""
        self.cfg = cfg
        self.device = ranks.pick_device(cfg.device)
        self.prompts = read_prompts(cfg.prompts)
        self.validation_prompts = read_prompts(cfg.validation_prompts)
        # Rewards come first: one that is mistyped is told before minutes go into loading a large generator.
        # Under offload they rest on the CPU, and each visits the GPU when its turn comes.
        home = "cpu" if cfg.offload else self.device
        self.rewards = load_rewards(cfg.rewards.train, home)
        self.validation = load_rewards(cfg.rewards.validation, home)
        self.weights = {name: reward.weight for name, reward in cfg.rewards.train.items()}
        self.kid_model = Clip(cfg.rewards.kid, self.device)
        place = (self.device, getattr(torch, cfg.dtype), cfg.micro_batch, cfg.offload)
        shard = ranks.shard if cfg.fsdp and ranks.WORLD > 1 else None
        self.generator = Generator(cfg.generator, *place, shard)
        self.policies = {"generator": self.generator}
        self.refiner = None
        if cfg.refiner:
            self.refiner = Refiner(cfg.refiner, *place, self.generator)
            self.policies["refiner"] = self.refiner
        self.optimizers = {}
        self.learners = {}
        if train:
            self.prepare_training()

    def prepare_training(self):
        """What looks compare with, a LoRA and AdamW for each policy, and the detectors that learn"""
        cfg = self.cfg
        shape = (cfg.generator.height, cfg.generator.width)
        photos, _ = read_photos(cfg.validation_photos, shape)  # (n, 3, H, W)
        self.photo_features = self.features(self.real(photos))  # (n, D)
        for name, policy in self.policies.items():
            policy.add_lora(cfg.seed)
            self.optimizers[name] = torch.optim.AdamW(
                policy.parameters(), lr=policy.cfg.lr, weight_decay=cfg.weight_decay
            )
        # nobody needs these photographs where nothing learns
        photos = Photographs(cfg.photos, shape, self.real) if cfg.learners else None
        for name, update in cfg.learners.items():
            self.learners[name] = Learner(
                name, self.rewards[name], update, photos, cfg.seed, cfg.micro_batch, self.device
            )

    def real(self, photos):
        """Photographs as pictures come, through the autoencoder: its blur would give the pictures away."""
        if not self.cfg.autoencode_photos:
            return photos
        return reconstruct(self.generator.pipe.vae, photos, self.device, self.cfg.micro_batch)

    @torch.no_grad()
    def features(self, images):
        """What KID compares: images (B,3,H,W) -> (B, D) on the CPU"""
        layer = self.cfg.rewards.kid_layer
        chunks = images.split(self.cfg.micro_batch)
        return torch.cat([self.kid_model.features(c.float(), layer).cpu() for c in chunks])

    def score(self, rewards, images, prompts, P=None):
        """{name: (P*k,)} of this rank's pictures and those of the others, which show P prompts together

        With `offload` each reward visits the GPU in turn.
        """
        visit = self.device if self.cfg.offload else None
        scores = score(rewards, images, prompts, self.cfg.micro_batch, visit)  # {name: (p*k,)}
        return {name: ranks.gather(r, P) for name, r in scores.items()}

    def combine(self, scores):
        """{name: r} -> the mean by weight, for people and for `keep`; training standardises each first"""
        total = sum(weight * scores[name] for name, weight in self.weights.items())
        return total / sum(self.weights.values())

    # ------------------------------------------------ the walk

    def step(self, stage, iteration):
        """One training step: rollout, score, advantages, update -> a row of metrics

        A rank draws and replays its own p of the P prompts. Scores are gathered, so that advantages and
        metrics are those of the whole batch on every rank; gradients are summed.
        """
        P, N, M = stage.prompts, stage.texts, stage.images
        prompts = self.next_prompts(iteration, P)
        # images (p*N*M, 3, H, W)
        rewrites, images, trajectory = self.rollout(ranks.mine(prompts), stage, iteration)
        # against what the user typed, not what was drawn: a rewrite that drifts off the subject loses
        words = repeat(ranks.mine(prompts), N * M)
        scores = self.score(self.rewards, images, words, P)  # {name: (P*N*M,)}
        row = self.reward_figures(scores, stage)
        if stage.train != "refiner":
            # A picture is compared with the pictures of its own text. Among all pictures of the prompt, a
            # good text would give its pictures an advantage that they did nothing for.
            advantage = advantages(scores, self.weights, P * N).view(P, N * M)
            with self.generator.at_work():
                row["generator"] = self.update(
                    "generator", trajectory, advantage, self.cfg.generator.extremes
                )
        if stage.train != "generator":
            advantage = self.text_advantages(rewrites, scores, stage)  # (P, rewrites)
            with self.refiner.at_work():
                row["refiner"] = self.update("refiner", rewrites, advantage)
            shares = {
                "cue_share": cue_share(rewrites.texts, self.cfg.refiner.cues) / ranks.WORLD,
                "bad_format": rewrites.bad_format.mean().item() / ranks.WORLD,
            }
            row["refiner"] |= ranks.sum_figures(shares)
        if self.learners:
            # Last, so that they judge the next step. In this one, pictures that a detector has just learnt
            # would stand below those of their group that it has not.
            words = repeat(prompts, N * M)  # of all ranks
            images = ranks.gather(as_bytes(images), P)  # (P*N*M, 3, H, W) uint8
            row["detectors"] = {
                name: learner.step(images, words, row["rewards"][name], iteration)
                for name, learner in self.learners.items()
            }  # None for one that was not fooled
        return row

    def reward_figures(self, scores, stage):
        """{name: (P*N*M,)} -> what people want to know of a step's rewards"""
        reward = self.combine(scores).view(stage.prompts, stage.texts, -1)  # (P, N, M)
        # (groups, G), what is compared: the pictures of a text, or the texts of a prompt
        compared = reward.mean(2) if stage.train == "refiner" else reward.flatten(0, 1)
        spread = compared.std(1, correction=0)  # (groups,)
        return {
            "reward": reward.mean().item(),
            "reward_std": spread.mean().item(),
            "zero_std": (spread < 1e-6).float().mean().item(),  # groups that teach nothing
            "rewards": means(scores),
        }

    def rollout(self, prompts, stage, iteration):
        """This rank's p prompts -> Rewrites or None, images (p*N*M, 3, H, W), Trajectory"""
        cfg = self.cfg
        numbers = ranks.mine(range(stage.prompts))
        texts = prompts
        rewrites = None
        if stage.rewrites:
            keys = [("rewrite", cfg.seed, iteration, p) for p in numbers]
            sampled, rewrites = self.refiner.rollout(
                prompts, stage.rewrites, keys, cfg.refiner.temperature
            )
            texts = []  # p*N: in each group the user's words first, if they are kept
            for prompt, written in zip(prompts, batches(sampled, stage.rewrites)):
                texts += [prompt] * stage.keep_original + written
        M = stage.images
        if stage.train == "refiner":
            # Rewrites are compared on the same noise (common random numbers), or the luck of the noise would
            # hide what the words are worth.
            samples = [*range(M)] * stage.texts
            places = {}
        else:
            # Pictures that train have noise of their own: it is what they explore with.
            samples = range(stage.texts * M)
            # the same for the whole step, or the log-ratios of a group would differ in scale
            places = self.generator.places(rng("window", cfg.seed, iteration))
        keys = [("picture", cfg.seed, iteration, p, sample) for p in numbers for sample in samples]
        texts = repeat(texts, M)  # p*N*M
        images, trajectory = self.generator.rollout(
            texts, keys, num_steps=cfg.generator.draw_steps, **places
        )
        return rewrites, images, trajectory

    def next_prompts(self, iteration, P):
        """The P prompts of a step; within a stage each is drawn once before any twice, in another order"""
        n = len(self.prompts)
        epoch, start = divmod(iteration * P, n)  # counted: resume needs no state
        order = []  # of whole epochs
        while len(order) < start + P:
            order += [*rng("prompts", self.cfg.seed, epoch).permutation(n)]
            epoch += 1
        return [self.prompts[i] for i in order[start : start + P]]

    def text_advantages(self, rewrites, scores, stage):
        """(P, rewrites): a rewrite is compared with the texts of its prompt, by the mean over its M images

        A bad format counts as one more reward. The user's words stand in the group, but nobody chose them.
        """
        P = stage.prompts
        scores = {name: r.view(P * stage.texts, -1).mean(1) for name, r in scores.items()}  # (P*N,)
        bad = ranks.gather(rewrites.bad_format, P).view(P, -1)  # (P, rewrites)
        users = int(stage.keep_original)
        # (P*N,), a name that no reward has
        scores["(format)"] = -torch.nn.functional.pad(bad, (users, 0)).flatten()
        weights = self.weights | {"(format)": self.cfg.refiner.format_penalty}
        return advantages(scores, weights, P)[:, users:]

    def update(self, name, record, advantage, k=0):
        """`updates` optimizer steps of either policy, each on an equal part of the prompt groups -> figures

        advantage (P, G) of all ranks; the record is this rank's, p*G rows, of which `extremes` takes k of
        each end of a group. The loss is a sum over rows, divided by what the policy counts in all of the
        part, so that micro-batches and ranks change nothing.
        """
        policy = self.policies[name]
        updates = self.cfg.updates
        advantage = ranks.mine(advantage)  # (p, G)
        # rows, as many of each group
        trained = extremes(advantage, k).flatten().nonzero().flatten()
        parts = [part.tolist() for part in trained.chunk(updates)]
        advantage = advantage.flatten()[:, None].to(self.device)  # (p*G, 1)
        figures = defaultdict(float)
        norm = 0.0
        # the first part needs no old log-probs: when it is trained, the policy is the one that drew it
        for rows in batches(sum(parts[1:], []), self.cfg.micro_batch):
            policy.remember(record, rows)
        for part in parts:
            count = ranks.total(policy.count(record, part))
            for rows in batches(part, self.cfg.micro_batch):
                for log_ratio, kl, scale, weight, more in policy.terms(record, rows):  # (b, L)
                    A = scale * advantage[rows]  # (b, 1)
                    loss, clipped = clipped_loss(log_ratio, A, *policy.clip())
                    loss = loss + policy.cfg.beta * kl
                    terms = {"loss": loss, "kl": kl, "clip_fraction": clipped.float(), **more}
                    sums = {key: (term * weight).sum() / count for key, term in terms.items()}
                    # here: the graph of one step at a time is all that is kept
                    sums["loss"].backward()
                    for key, value in sums.items():
                        figures[key] += value.item() / updates
            norm += self.optimize(name) / updates
        return ranks.sum_figures(figures) | {"grad_norm": norm}

    def set_lr(self, share):
        """Each policy's learning rate: a share of its own"""
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = share * self.policies[name].cfg.lr

    def optimize(self, name):
        """One AdamW step -> the gradient's norm. It is left out where that is not finite."""
        policy = self.policies[name]
        parameters = policy.parameters()
        ranks.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.cfg.max_grad_norm).item()
        if math.isfinite(norm):  # one NaN would stay in AdamW's moments for ever
            self.optimizers[name].step()
            policy.update_ema()
        self.optimizers[name].zero_grad()
        return norm

    # ------------------------------------------------ a look

    def evaluate(self, stage):
        """A look at the validation prompts: Euler steps, EMA weights, the same noise each time

        -> figures, images (P*M, 3, H, W) uint8. score = mean of the validation detectors - KID; reward = that
        of training, by weight.
        """
        seed = self.cfg.seed
        P = len(self.validation_prompts)
        M = self.cfg.eval_images
        numbers = ranks.mine(range(P))
        prompts = ranks.mine(self.validation_prompts)
        words = repeat(prompts, M)  # p*M
        texts = words
        if stage.rewrites:  # another one for each picture
            keys = [("look rewrite", seed, p) for p in numbers]
            texts, _ = self.refiner.rollout(prompts, M, keys)
        keys = [("look", seed, p, m) for p in numbers for m in range(M)]
        with self.generator.ema_weights():
            images, _ = self.generator.rollout(texts, keys)  # (p*M, 3, H, W)

        # KID beside the detectors: they learned from fakes that resemble those of training, so what fools the
        # training detectors may fool these too. KID asks about texture and colour, and knows no fakes.
        look = means(self.score(self.validation, images, words, P))
        realism = sum(look.values()) / max(len(look), 1)
        units = torch.arange(P).repeat_interleave(M)  # (P*M,), the prompt of each picture
        look["kid"] = kid(ranks.gather(self.features(images), P), self.photo_features, units)
        look["score"] = realism - look["kid"]
        trained = means(self.score(self.rewards, images, words, P))
        look["reward"] = self.combine(trained)
        look |= {f"train_{name}": mean for name, mean in trained.items()}
        # one judgement, so that all keep the same weights
        return ranks.from_rank_0(look), ranks.gather(as_bytes(images), P)

    # ------------------------------------------------ state

    def tensors(self):
        """{policy: {name: tensor}} of all that training changes in them, by reference"""
        return {name: policy.state() for name, policy in self.policies.items()}

    @torch.no_grad()
    def set_tensors(self, values):
        """What `tensors` gave, or a copy of it, in place; an error where names differ or shapes do not fit"""
        tree_map(torch.Tensor.copy_, self.tensors(), values)

    def state(self):
        """All that `restore` takes to go on as if never interrupted"""
        return {
            "tensors": self.tensors(),
            "optimizers": {name: adamw.state_dict() for name, adamw in self.optimizers.items()},
            "learners": {name: learner.state() for name, learner in self.learners.items()},
        }

    def restore(self, state):
        self.set_tensors(state["tensors"])
        for name, optimizer in self.optimizers.items():
            with self.policies[name].at_work():  # AdamW keeps its moments where the weights are now
                optimizer.load_state_dict(state["optimizers"][name])
        for name, learner in self.learners.items():
            learner.load_state(state["learners"][name])


# ---------------------------------------------------------------- training


def train(cfg):
    """All stages, one after another; each starts from the weights that the one before it kept."""
    check_run(cfg)
    # A stage of n steps has n + 1 turns. A look belongs to the weights before the step whose turn it shares,
    # and the last turn of a stage only looks.
    turns = [(i, s, step) for i, s in enumerate(cfg.stages) for step in range(s.steps + 1)]
    with lock(cfg), ranks.meeting(ranks.pick_device(cfg.device)):
        run = Run(cfg)
        progress = {"turn": 0, "looks": {}, "rows": []}
        if cfg.resume and checkpoints(cfg.out):
            progress = load_checkpoint(cfg, run.restore)
        with closing(Log(run, progress["rows"])) as log:
            stop = []  # signals that came: the turn is finished and saved first
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, lambda signum, frame: stop.append(signum))
            for number, stage, step in turns[progress["turn"] :]:
                # training steps so far: each stage before this one had one turn more than it has steps
                iteration = progress["turn"] - number
                over = step == stage.steps
                # for rewards that draw from the global generators: what they draw is counted too
                transformers.set_seed(torch_seed("globals", cfg.seed, iteration))
                row = {"step": iteration, "stage": f"{number} {stage.train}"}
                if over or step % cfg.eval_every == 0:
                    row["validation"] = look(run, stage, iteration, progress["looks"])
                if not over:
                    run.set_lr(1 - step / stage.steps if cfg.lr_schedule == "linear" else 1.0)
                    row |= run.step(stage, iteration)
                log.record(row)
                if over:
                    finish_stage(run, number, progress, log)
                progress["turn"] += 1
                # a signal may have reached one rank alone: all stop at the same turn
                stopped = ranks.total(len(stop)) > 0
                if stopped or over or progress["turn"] % cfg.save_every == 0:
                    save_checkpoint(cfg, run.state(), progress)
                if stopped:
                    ranks.total(0)  # a rank that left now would have rank 0 killed while it writes
                    # as a shell counts it, so that && goes no further
                    sys.exit(128 + max(stop, default=signal.SIGTERM))


def look(run, stage, iteration, looks):
    """Evaluate -> figures. looks: the stage's first and its best, which is kept with its weights."""
    cfg = run.cfg
    figures, images = run.evaluate(stage)
    if ranks.RANK == 0:
        path = f"{cfg.out}/samples/{iteration:05d}_{stage.train}.png"
        save_grid(images[:96], path, columns=16)
    this = {
        "step": iteration,
        "worth": iteration if cfg.keep == "last" else figures[cfg.keep],
        "figures": figures,
        "images": images[:: cfg.eval_images],  # (P, 3, H, W), one a prompt
    }
    first = looks.setdefault("first", this)["figures"]
    within = all(
        first[f"train_{name}"] - figures[f"train_{name}"] <= limit
        for name, limit in cfg.keep_within.items()
        # the fall of a reward that learns says nothing
        if name in run.weights and name not in cfg.learners
    )
    if "best" not in looks or within and this["worth"] > looks["best"]["worth"]:
        looks["best"] = this | {"tensors": copy.deepcopy(run.tensors())}
    return figures


def finish_stage(run, number, progress, log):
    """Back to the weights of the best look: they are saved, and the next stage starts from them."""
    cfg = run.cfg
    looks = progress["looks"]
    best = looks["best"]
    run.set_tensors(best["tensors"])
    stage = cfg.stages[number].train
    if ranks.RANK == 0:
        for name, policy in run.policies.items():
            policy.save(f"{cfg.out}/{name}")
        path = f"{cfg.out}/samples/before_after_{number}_{stage}.png"
        save_before_after(looks["first"]["images"], best["images"], path)
        save_curves(progress["rows"], f"{cfg.out}/curves.png")
    shown = "score" if cfg.keep == "last" else cfg.keep
    log.say(
        f"stage {number} ({stage}) keeps the weights of step {best['step']}: "
        f"{shown} {best['figures'][shown]:.3f}"
    )
    looks.clear()  # the next stage has its own


def cli(main):
    """Run a main: a ConfigError is one line and exit code 2, everything else keeps its traceback."""
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' notes to each other
    for library in (diffusers, transformers):  # one progress bar, ours
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        main()
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli(lambda: train(load_config(sys.argv[1:])))
