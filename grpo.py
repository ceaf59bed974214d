"""GRPO for an image generator and the LLM that refines its prompts, with AI-image detectors as the reward (RealGen, arXiv 2512.00473).

    python grpo.py config.yaml                          train, by default on a CPU in minutes
    python grpo.py config.yaml seed=1 out=out/seed1     any key of config.yaml, dotted
    python grpo.py config.yaml profile=quick            a named set of keys from `profiles`
    torchrun --nproc_per_node=8 grpo.py config.yaml     the same run on 8 GPUs: each takes whole prompt groups
    python grpo.py config.yaml resume=true              go on after an interruption, to the same result

One step is a walk. P prompts, N rewrites of each, M images of each rewrite; batches are prompt-major, (P, N, M):

    prompts (P)
      -> refiner.rollout      texts (P*N), token ids, mask, old log-probs
      -> generator.rollout    images (P*N*M, 3, H, W), trajectory of the stochastic steps
      -> reward.score         {name: (P*N*M,)}
      -> advantages           A = clip(sum_r weight_r (r - mean_group r) / (std_group r + 1e-4), -5, 5)
      -> update_*             loss = -min(ratio A, clip(ratio) A) + beta KL, backward one micro-batch at a time

A stage trains `refiner` (generator frozen), `generator` (refiner frozen) or `joint` (one set of pictures trains both).
Read in this order: Config, advantages, Run.step, Run.update_generator, Run.update_refiner, Run.evaluate, main.
"""

import difflib
import json
import os
import platform
import resource
import shutil
import sys
import time
import types
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
import yaml
from einops import rearrange
from PIL import Image
from tqdm import tqdm

import checkpoint as C
import generator as G
import refiner as L
import reward as R

EVALUATION = 10**9  # the "iteration" of evaluation noise, so that no training step shares it


# ---------------------------------------------------------------- config


@dataclass
class StageConfig:
    train: Literal["refiner", "generator", "joint"] = "generator"
    steps: int = 20
    prompts: int = 9  # P
    rewrites: int = 1  # N, the user's own words included where keep_original
    images: int = 12  # M
    keep_original: bool = True

    def __post_init__(self):
        group = self.rewrites - self.keep_original if self.train == "refiner" else self.rewrites * self.images
        if group < 2 or self.train == "joint" and self.rewrites - self.keep_original < 2:
            raise ValueError(
                f"stages: a {self.train} stage with {self.rewrites} rewrites (keep_original {str(self.keep_original).lower()}) and {self.images} images "
                "has groups of one, whose advantage is always 0; expected 2 or more of what it trains"
            )


@dataclass
class JudgeConfig:
    kind: Literal["detector", "vlm", "openai"] = "detector"
    model: str = ""
    base_url: str = "https://api.openai.com/v1"
    key: str = "OPENAI_API_KEY"
    concurrency: int = 8
    retries: int = 3
    timeout: float = 60.0


@dataclass
class BenchConfig:
    images: int = 8  # pictures per test prompt and contestant
    resamples: int = 1000  # bootstrap
    contestants: dict[str, str] = field(default_factory=dict)
    categories: str = ""
    pairs: int = 256
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    human: str = ""
    selftest: bool = False
    gallery: int = 32


@dataclass
class Config:
    """The whole of config.yaml, which says each key's unit and reason."""

    out: str = "out"
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    fsdp: bool = False
    prompts: str = "nano/prompts.txt"
    validation_prompts: str = "nano/validation_prompts.txt"
    test_prompts: str = "nano/test_prompts.txt"
    photos: str = "nano/photos/train.jsonl"
    validation_photos: str = "nano/photos/validation.jsonl"
    test_photos: str = "nano/photos/test.jsonl"
    autoencode_photos: bool = True
    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig()])
    offload: bool = False
    micro_batch: int = 36
    updates: int = 1
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    eval_every: int = 4
    eval_images: int = 4
    keep_within: dict[str, float] = field(default_factory=dict)
    save_every: int = 4
    resume: bool = False
    stop_if_hacked: int = 0
    generator: G.GeneratorConfig = field(default_factory=G.GeneratorConfig)
    refiner: L.RefinerConfig | None = field(default_factory=L.RefinerConfig)
    rewards: R.RewardsConfig = field(default_factory=R.RewardsConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)

    def __post_init__(self):
        for name in ("micro_batch", "updates", "eval_every", "eval_images", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 1 or more")
        if not self.rewards.train:
            raise ValueError("rewards.train: empty; expected at least one reward to optimise")
        if not self.stages:
            raise ValueError("stages: empty; expected at least one stage")
        for name in self.keep_within:
            if name not in self.rewards.train:
                raise ValueError(f"keep_within.{name}: no training reward; expected {', '.join(self.rewards.train)}")
            if self.rewards.train[name].update:
                raise ValueError(f"keep_within.{name}: it learns, so its falls say nothing; expected one that does not")
        if self.stop_if_hacked < 0 or self.stop_if_hacked and not self.rewards.validation:
            raise ValueError(f"stop_if_hacked: {self.stop_if_hacked}; expected 0, or looks and rewards.validation")
        if self.generator.sde == "ode" and any(s.train != "refiner" for s in self.stages):
            raise ValueError(
                "generator.sde: ode explores nothing, so nothing can be learnt from it; expected cps or flow to train the generator"
            )
        if self.refiner is None and any(s.train != "generator" or s.rewrites > s.keep_original for s in self.stages):
            raise ValueError(
                "refiner: null, but a stage needs rewrites; expected train: generator, rewrites: 1, keep_original: true"
            )


def build(kind, value, where):
    """YAML value -> typed value, strictly: unknown keys, wrong types and values outside a Literal raise ValueError with the key's path."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else build(args[0], value, where)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(
                f"{where or 'the file'}: {value!r}; expected a mapping of {', '.join(f.name for f in fields(kind))}"
            )
        hints = get_type_hints(kind)
        for key in value:
            if key not in hints:
                path = f"{where}.{key}" if where else str(key)
                close = difflib.get_close_matches(str(key), hints, 1)
                hint = (
                    f"; did you mean {f'{where}.' if where else ''}{close[0]}?"
                    if close
                    else f"; known are {', '.join(hints)}"
                )
                raise ValueError(f"{path} is not a key{hint}")
        return kind(**{k: build(hints[k], v, f"{where}.{k}" if where else k) for k, v in value.items()})
    if origin is list and isinstance(value, list):
        return [build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(k): build(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{where}: {value!r}; expected one of {', '.join(map(str, args))}")
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # 1 is a float here, and 1e-5 is a string in YAML 1.1
        except (ValueError, OverflowError):
            pass
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{where}: {value!r} is {type(value).__name__}; expected {getattr(kind, '__name__', kind)}")


def merge(base, over):
    """Nested mappings; lists and scalars of `over` replace. A reward set to null is removed."""
    for key, value in over.items():
        if isinstance(value, dict):  # never the mapping of `over` itself, which a YAML alias may have in two places
            base[key] = merge(base[key] if isinstance(base.get(key), dict) else {}, value)
        else:
            base[key] = value
    return base


def load_config(argv):
    """[config.yaml, key=value ...] -> Config. Later words win; profile=NAME merges profiles.NAME of the file first."""
    if not argv:
        raise ValueError("expected a config file: python grpo.py config.yaml [key=value ...]")
    path, words = argv[0], argv[1:]
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; expected a config such as config.yaml")
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
        pairs = [(w.partition("=")[0], yaml.safe_load(w.partition("=")[2])) for w in words]
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # bytes, dates, odd tags
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r}: expected key=value, such as generator.num_steps=4")
    values = merge({}, values)
    profiles = values.pop("profiles", None) or {}
    if not isinstance(profiles, dict) or not all(isinstance(p, dict) for p in profiles.values()):
        raise ValueError(f"{path}: profiles: {profiles!r}; expected a mapping of names to mappings of keys")
    for key, value in pairs:
        if key == "profile":
            if value not in list(profiles):
                raise ValueError(f"profile={value}: {path} has no such profile; it has {', '.join(profiles) or 'none'}")
            merge(values, profiles[value])
    for key, value in pairs:
        if key != "profile":
            for part in reversed(key.split(".")):
                value = {part: value}
            merge(values, value)
    for kind in ("train", "validation", "heldout"):  # a profile or an override drops a reward by setting it to null
        rewards = values.get("rewards")
        group = rewards.get(kind) if isinstance(rewards, dict) else None
        if isinstance(group, dict):
            values["rewards"][kind] = {n: r for n, r in group.items() if r is not None}
    try:
        return build(Config, values, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_prompts(path):
    """One prompt a line -> list of texts; empty lines are skipped, an empty list is an error"""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; expected one prompt a line")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); expected one prompt a line") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompt with text in it; expected one prompt a line")
    return prompts


# ---------------------------------------------------------------- advantages


def advantages(scores, weights, groups):
    """{name: (B,)} -> (B,): each reward standardised in its own prompt group, summed by weight, clipped to +-5. B = groups * G, prompt-major."""
    total = sum(weights[n] * R.standardise(r.view(groups, -1)) for n, r in scores.items())  # (P, G)
    return total.clamp(-5, 5).flatten()


def zero_std(scores, groups):
    """(P,) bool: groups in which every reward is the same for all, so that nothing can be learnt from them"""
    return torch.stack([r.view(groups, -1).std(1, correction=0) < 1e-6 for r in scores.values()]).all(0)


def clipped_loss(log_ratio, advantage, clip_range):
    """(b,), (b,) -> per-sample loss (b,), clipped (b,) bool"""
    ratio = log_ratio.exp()
    loss, bound = -ratio * advantage, -ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    return torch.maximum(loss, bound), bound > loss


# ---------------------------------------------------------------- many GPUs


def world():
    """(rank, number of processes) as torchrun sets them; (0, 1) without it, where torch.distributed is never touched"""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    """Rank 0 writes and prints"""
    return world()[0] == 0


def pick_device(name):
    """config's `device` -> a torch device's name; under torchrun each process of a machine has a GPU of its own"""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if name != "cuda" or world()[1] == 1:
        return name
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"torchrun: process {local + 1} of a machine with {found} GPUs; use --nproc_per_node={found}")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def join(device):
    """Meet the other ranks. One that hangs ends the run after half an hour: loading a large model may take a while."""
    if world()[1] > 1:
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))


def share_of(count):
    """The numbers of 0..count-1 that are this rank's: neighbours, near-equal parts; none where ranks outnumber them"""
    rank, size = world()
    return np.array_split(np.arange(count), size)[rank].tolist()


def check_equal_work(cfg, validation_prompts):
    """Ranks that share one model's weights run it together; ValueError where one would run it more often than another."""
    size = world()[1]
    counts = {f"stages[{i}].prompts": stage.prompts for i, stage in enumerate(cfg.stages)}
    for name, count in (counts | {"validation_prompts": validation_prompts}).items():
        if count % size:
            raise ValueError(f"fsdp: {name}: {count} on {size} ranks; expected a multiple, so that all ranks do the same")
    if cfg.updates > 1:
        raise ValueError(f"fsdp: updates: {cfg.updates}; expected 1, so that all ranks take part in each update")


def all_sum(tensor):
    """The sum over the ranks, in place"""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(values, mine, groups):
    """The rows of this rank's prompts -> those of all prompts, on every rank: (p*k, ...) -> (groups*k, ...)"""
    if world()[1] == 1:
        return values
    k = len(values) // max(len(mine), 1)
    whole = values.new_zeros(groups * k, *values.shape[1:])
    if mine:
        whole[mine[0] * k : (mine[-1] + 1) * k] = values
    return all_sum(whole)


def sum_gradients(parameters):
    """p.grad summed over the ranks, in one buffer; None where no rank has any: the optimizer then skips it on all"""
    if world()[1] == 1:
        return
    found = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    found, *grads = all_sum(torch.cat([found, *grads])).split([len(found), *map(len, grads)])
    for p, n, grad in zip(parameters, found.tolist(), grads):
        p.grad = grad.view_as(p) if n else None


def sum_metrics(values):
    """{name: this rank's part} -> {name: sum over the ranks}"""
    return dict(zip(values, all_sum(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()))


# ---------------------------------------------------------------- the run


class Run:
    """Both policies, the rewards and the optimizers; `step` is the walk."""

    def __init__(self, cfg, train=True):
        self.cfg = cfg
        self.device = pick_device(cfg.device)
        dtype = getattr(torch, cfg.dtype)
        self.prompts, self.validation_prompts = read_prompts(cfg.prompts), read_prompts(cfg.validation_prompts)
        for kind in ("train", "validation", "heldout"):  # before the first model loads, which may take minutes
            R.check(getattr(cfg.rewards, kind))
        size = cfg.generator.height, cfg.generator.width
        photos, _ = R.read_photos(cfg.validation_photos, size)
        learning = train and any(r.update for r in cfg.rewards.train.values())
        learn_from = R.Photographs(cfg.photos, size, self.real) if learning else None
        fsdp = cfg.fsdp and world()[1] > 1
        if fsdp:
            check_equal_work(cfg, len(self.validation_prompts))
        self.generator = G.Generator(cfg.generator, self.device, dtype, cfg.micro_batch, cfg.offload, fsdp)
        self.refiner = L.Refiner(cfg.refiner, self.device, dtype, cfg.micro_batch) if cfg.refiner else None
        home = "cpu" if cfg.offload else self.device
        self.rewards = R.load_rewards(cfg.rewards.train, home)
        self.validation = R.load_rewards(cfg.rewards.validation, home)
        self.weights = {n: r.weight for n, r in cfg.rewards.train.items()}
        self.learners = {}  # name -> the Learner of a training reward
        if learning:
            self.learners = R.load_learners(cfg.rewards.train, self.rewards, learn_from, cfg.seed, cfg.micro_batch)
        self.kid_model = R.ClipReward(R.RewardConfig(model=cfg.rewards.kid), self.device)
        self.photo_features = self.features(self.real(photos))  # (n, D)
        self.seconds, self.skipped, self.halved = {}, 0, False
        if train:
            self.generator.add_lora(cfg.seed)
            self.optimizers = {"generator": self.adamw(self.generator.parameters(), cfg.generator.lr)}
            if self.refiner:
                self.refiner.add_lora(cfg.seed)
                self.optimizers["refiner"] = self.adamw(self.refiner.parameters(), cfg.refiner.lr)

    def adamw(self, parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=self.cfg.weight_decay)

    def real(self, photos):
        """Photographs as the generator's pictures come: through the autoencoder, whose own blur would give the pictures away."""
        return self.generator.reconstruct(photos) if self.cfg.autoencode_photos else photos

    @torch.no_grad()
    def features(self, images):
        layer = self.cfg.rewards.kid_layer
        return torch.cat(
            [self.kid_model.features(x.to(self.device), layer) for x in images.split(self.cfg.micro_batch)]
        ).cpu()  # (n, D)

    def score(self, rewards, images, prompts):
        """{name: (B,)}; with `offload` each reward visits the GPU in turn"""
        return R.score(rewards, images, prompts, self.cfg.micro_batch, self.device if self.cfg.offload else None)

    @contextmanager
    def phase(self, name):
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    # ------------------------------------------------ the walk

    def step(self, stage, iteration):
        """One training step: rollout, score, advantages, update -> a row of metrics.

        A rank draws and replays the pictures of its own prompts. Scores are gathered, so that advantages, normalisers and
        metrics are those of the whole batch on every rank; gradients are summed.
        """
        cfg, P, N, M = self.cfg, stage.prompts, stage.rewrites, stage.images
        self.seconds, self.skipped = {}, 0
        rng = np.random.default_rng([cfg.seed, iteration])  # decides what all samples of a step share
        mine = share_of(P)  # numbers of this rank's prompts
        here = mine or [0]  # a rank without any walks along with one that does not count
        drawn = self.next_prompts(iteration, P)
        prompts = [drawn[p] for p in here]
        owners = [p for p in prompts for _ in range(N * M)]  # the user's words behind each picture
        window = () if stage.train == "refiner" else G.draw_window(cfg.generator.num_steps, cfg.generator.window, rng)
        # rewrites are compared on the same noise (common random numbers); where pictures are trained, each has its own
        own = 0 if stage.train == "refiner" else M
        keys = [(cfg.seed, iteration, p, n * own + m) for p in here for n in range(N) for m in range(M)]
        with self.phase("rewrite"):
            texts, rewrites = self.rewrite(prompts, stage, seed=[(cfg.seed, iteration, p) for p in here])  # (P*N)
        with self.phase("draw"):  # (P*N*M, 3, H, W)
            images, trajectory = self.generator.rollout([t for t in texts for _ in range(M)], keys, window)
        with self.phase("reward"):  # against what the user typed: a rewrite that drifts loses
            scores = self.score(self.rewards, images, owners)
        scores = {n: gather(r, mine, P) for n, r in scores.items()}  # {name: (P*N*M,)}
        reward = self.combine(scores)  # (P*N*M,), for people; training standardises each reward first
        row = {
            "reward": reward.mean().item(),
            "reward_std": reward.view(P, -1).std(1).mean().item(),
            "zero_std": zero_std(scores, P).float().mean().item(),
            "rewards": {n: r.mean().item() for n, r in scores.items()},
        }
        if stage.train != "refiner":
            with self.phase("update generator"):
                advantage = advantages(scores, self.weights, P).to(self.device)  # (P*N*M,)
                row["generator"] = self.update_generator(trajectory, advantage, P, mine) | {"window": window[0]}
        if stage.train != "generator":
            with self.phase("update refiner"):
                row["refiner"] = self.update_refiner(rewrites, scores, stage, mine)
            means = {"cue_share": L.cue_share(rewrites.texts, cfg.refiner.cues)}
            means["bad_format"] = rewrites.bad_format.mean().item()
            row["refiner"] |= sum_metrics({n: value * len(mine) / P for n, value in means.items()})
        if self.learners:
            with self.phase("update detectors"):
                whole = [p for p in self.next_prompts(iteration, P) for _ in range(N * M)]  # of all ranks, as scores
                row["detectors"] = self.update_detectors(gather(images, mine, P), whole, scores, iteration)
        return row | {"skipped": self.skipped, "seconds": dict(self.seconds)}

    def next_prompts(self, iteration, P):
        """The prompts of a step: one permutation an epoch, so that each prompt is drawn once before any is drawn twice"""
        size, first = len(self.prompts), iteration * P
        epochs = range(first // size, (first + P - 1) // size + 1)
        order = np.concatenate([np.random.default_rng([self.cfg.seed, e]).permutation(size) for e in epochs])
        return [self.prompts[i] for i in order[first % size : first % size + P]]

    def combine(self, scores):
        """{name: (B,)} -> (B,): the mean of the training rewards by weight"""
        return sum(w * scores[n] for n, w in self.weights.items()) / sum(self.weights.values())

    def rewrite(self, prompts, stage, seed):
        """P prompts -> P*N texts, prompt-major, the user's own words first where keep_original, and the sampled Rewrites (None if there are none)"""
        sampled = stage.rewrites - stage.keep_original
        if sampled == 0:
            return list(prompts), None
        rewrites = self.refiner.rollout(prompts, sampled, seed)
        texts = []
        for p, prompt in enumerate(prompts):
            texts += [prompt] * stage.keep_original + rewrites.texts[p * sampled : (p + 1) * sampled]
        return texts, rewrites

    def update_generator(self, trajectory, advantage, groups, mine):
        """Replay the window with grad; `updates` optimizer steps, each on an equal share of the prompt groups.

        advantage (P*N*M,) of all ranks; the trajectory holds the pictures of this rank's prompts, whose numbers are `mine`.
        """
        cfg, gen, window = self.cfg.generator, self.generator, len(trajectory.index)
        total, norm, size = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0}, 0.0, len(advantage) // groups
        advantage = advantage.view(groups, size)[mine].flatten()  # (B,), this rank's
        shares = self.shares(groups, size, mine)
        for prompts, share in shares:
            for b in share:
                for k in range(window):
                    v, ref_v = gen.replay(trajectory, k, b), None  # (b, ...)
                    if cfg.beta:
                        with torch.no_grad(), gen.reference():
                            ref_v = gen.replay(trajectory, k, b)
                    x, x_next, old_v = trajectory.x[k][b], trajectory.x_next[k][b], trajectory.v[k][b]
                    log_prob, guard, kl = G.sde_log_ratio(x, v, x_next, old_v, ref_v, *trajectory.coefficients[k])
                    log_ratio = guard if cfg.ratio == "guard" else log_prob - trajectory.log_prob[k][b]  # (b,)
                    loss, clipped = clipped_loss(log_ratio, advantage[b], cfg.clip_range)
                    loss = (loss + cfg.beta * kl).sum() / (len(prompts) * size * window)
                    loss.backward()
                    total["loss"] += loss.item()
                    total["kl"] += kl.sum().item() / (groups * size * window)
                    total["clip_fraction"] += clipped.sum().item() / (groups * size * window)
            norm += self.optimize("generator", gen.parameters(), total["loss"]) / len(shares)
        return sum_metrics(total) | {"grad_norm": norm}

    def update_refiner(self, rewrites, scores, stage, mine):
        """A rewrite's reward is the mean over its M images; a bad format counts as one more reward, weighted by format_penalty."""
        cfg, llm, P, N = self.cfg.refiner, self.refiner, stage.prompts, stage.rewrites
        scores = {n: r.view(P, N, -1).mean(2).flatten() for n, r in scores.items()}  # (P*N,)
        bad = gather(rewrites.bad_format, mine, P).view(P, -1)
        lengths = gather(rewrites.mask.sum(1), mine, P).view(P, -1).sum(1).cpu()  # (P,) tokens
        scores["format"] = -torch.cat([torch.zeros(P, N - bad.shape[1]), bad], 1).flatten()
        own = int(stage.keep_original)  # the user's own words stand first in each group, without LLM gradient
        weights = self.weights | {"format": cfg.format_penalty}
        advantage = advantages(scores, weights, P).view(P, N)[mine, own:].flatten()  # (B,), this rank's
        alive = ~zero_std(scores, P)  # (P,), zero-variance groups are dropped
        total, norm = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "entropy": 0.0}, 0.0
        shares = self.shares(P, N - own, mine, alive.tolist())
        with torch.no_grad():  # the first share needs none: the policy is still the one that sampled
            old = [[llm.log_probs(rewrites, b)[0] for b in share] for _, share in shares[1:]]
        for n, (prompts, share) in enumerate(shares):
            count = max(len(prompts) * (N - own), 1)
            tokens = max(lengths[prompts].sum().item(), 1.0)
            for i, b in enumerate(share):
                (log_probs, entropy), mask = llm.log_probs(rewrites, b), rewrites.mask[b]  # (b, L)
                old_log_probs = old[n - 1][i] if n else log_probs.detach()
                loss, clipped = L.token_loss(
                    log_probs, old_log_probs, advantage[b].to(self.device), mask, cfg, count, tokens
                )
                if cfg.beta:
                    with torch.no_grad(), llm.reference():
                        ref = llm.log_probs(rewrites, b)[0]
                    kl = (L.k3_kl(log_probs, ref) * mask).sum() / tokens
                    loss = loss + cfg.beta * kl
                    total["kl"] += kl.item()
                loss.backward()
                total["loss"] += loss.item()
                total["clip_fraction"] += clipped.item()
                total["entropy"] += entropy.sum().item() / tokens
            norm += self.optimize("refiner", llm.parameters(), total["loss"]) / len(shares)
        return sum_metrics(total) | {"grad_norm": norm}

    def update_detectors(self, images, prompts, scores, iteration):
        """Detectors that this step's pictures fooled learn, to judge the next step -> {name: metrics}

        Not this step: in a group, pictures that a detector has just trained on would stand below those held back.
        """
        rows = {n: d.step(images, prompts, scores[n].mean().item(), iteration) for n, d in self.learners.items()}
        return {n: row for n, row in rows.items() if row}

    def shares(self, groups, size, mine, alive=None):
        """`updates` equal shares of the prompt groups -> [(its prompts, this rank's rows of them in micro-batches), ...]

        size: rows of a group. mine: numbers of this rank's prompts, whose rows are numbered from 0. alive: P bools, the
        groups that count; all by default.
        """
        shares, m = [], self.cfg.micro_batch
        for part in np.array_split(np.arange(groups), min(self.cfg.updates, groups)):
            prompts = [p for p in part.tolist() if alive is None or alive[p]]
            rows = [i * size + j for i, p in enumerate(mine) if p in prompts for j in range(size)]
            shares.append((prompts, [rows[i : i + m] for i in range(0, len(rows), m)]))
        return shares

    def optimize(self, name, parameters, loss):
        """One AdamW step -> gradient norm. It is left out, and counted, where loss or gradient is not finite."""
        with self.phase("optimizer"):
            sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.cfg.max_grad_norm).item()
            infinite = all_sum(torch.tensor([float(not np.isfinite(loss))])).item()  # on any rank
            if np.isfinite(norm) and not infinite:
                self.optimizers[name].step()
                if name == "generator":
                    self.generator.update_ema()
            else:
                self.skipped += 1
            self.optimizers[name].zero_grad(set_to_none=True)
        return norm

    # ------------------------------------------------ evaluation

    def draw(self, prompts, images, seed, rewritten, mine=None):
        """ODE pictures with the EMA weights, fixed noise per (seed, prompt, image): images (P*M, 3, H, W), the texts that were drawn (P*M)

        mine: numbers of the prompts to draw, without which all are.
        """
        mine = range(len(prompts)) if mine is None else mine
        texts = [prompts[p] for p in mine for _ in range(images)]
        if rewritten:  # another rewrite for each picture
            texts = self.refiner.rollout(texts[::images], images, [(seed, EVALUATION, p) for p in mine]).texts
        keys = [(seed, EVALUATION, p, m) for p in mine for m in range(images)]
        with self.generator.ema_weights():
            return self.generator.sample(texts, keys), texts

    def evaluate(self, stage):
        """Validation detectors and KID on validation prompts; `score` = mean detector - KID chooses the weights that are kept."""
        self.seconds = {}
        with self.phase("evaluate"):
            prompts, M = self.validation_prompts, self.cfg.eval_images
            mine = share_of(len(prompts))
            here = mine or [0]  # as in `step`
            images, _ = self.draw(prompts, M, self.cfg.seed, stage.train != "generator", here)
            owners = [prompts[p] for p in here for _ in range(M)]

            def means(rewards):  # {name: mean over the pictures of all ranks}
                scores = self.score(rewards, images, owners)
                return {n: gather(r, mine, len(prompts)).mean().item() for n, r in scores.items()}

            result = means(self.validation)
            detectors = sum(result.values()) / max(len(result), 1)
            result["kid"] = R.kid(gather(self.features(images), mine, len(prompts)), self.photo_features)
            result["score"] = detectors - result["kid"]
            result |= {f"train_{n}": r for n, r in means(self.rewards).items()}
            result = sum_metrics({n: r * is_main() for n, r in result.items()})  # one judgement: all keep the same weights
            images = gather(images, mine, len(prompts))
        return result, images

    def weights_of(self, stage):
        """The trained tensors of a stage, by reference: live, and EMA where there is one"""
        tensors = []
        if stage.train != "refiner":
            tensors += [*self.generator.lora.values(), *self.generator.ema.values()]
        if stage.train != "generator":
            tensors += self.refiner.parameters()
        return tensors

    def trained(self):
        """{name: tensor} of all that training changes but the optimizers, by reference"""
        tensors = {f"generator.lora.{n}": p for n, p in self.generator.lora.items()}
        tensors |= {f"generator.ema.{n}": p for n, p in self.generator.ema.items()}
        if self.refiner:
            named = self.refiner.model.named_parameters()
            tensors |= {f"refiner.lora.{n}": p for n, p in named if p.requires_grad}
        return tensors

    def state(self):
        """What `restore` takes: {name: tensor}, by reference, AdamW moments included; a JSON-able dict of the rest"""
        tensors = self.trained()
        for name, optimizer in self.optimizers.items():
            for i, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"adamw.{name}.{i}.{n}": t for n, t in moments.items()}
        for name, learner in self.learners.items():
            tensors |= {f"detector.{name}.{n}": t for n, t in learner.state().items()}
        return tensors, {"micro_batch": self.cfg.micro_batch, "halved": self.halved}

    @torch.no_grad()
    def restore(self, tensors, rest):
        """Back to a `state`. ValueError if it is another model's. An optimizer without moments has made no step yet."""
        for name, tensor in self.trained().items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                found = tuple(tensors[name].shape) if name in tensors else "missing"
                own = tuple(tensor.shape)
                raise ValueError(f"{name} is {found}, this run's model has {own}; expected the same models")
            tensor.copy_(tensors[name])
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad(set_to_none=True)
            packed, moments = optimizer.state_dict(), {}
            for key in tensors:
                if key.startswith(f"adamw.{name}."):
                    i, moment = key.split(".")[2:]
                    moments.setdefault(int(i), {})[moment] = tensors[key]
            optimizer.load_state_dict(packed | {"state": moments})
        for name, learner in self.learners.items():
            prefix = f"detector.{name}."
            learner.load_state({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.halved = rest["halved"]
        self.set_micro_batch(min(self.cfg.micro_batch, rest["micro_batch"]))

    def set_micro_batch(self, size):
        self.cfg.micro_batch = self.generator.micro_batch = size
        if self.refiner:
            self.refiner.micro_batch = size

    def within_memory(self, work, *args):
        """work(*args); the first time that memory runs out, micro_batch is halved and it is done again from the start."""
        tensors, rest = self.state()
        before = {n: t.detach().to("cpu", copy=True) for n, t in tensors.items()}
        try:
            return work(*args)
        except torch.OutOfMemoryError:
            size = self.cfg.micro_batch
            if self.halved or size < 2 or world()[1] > 1:  # ranks must do the same work
                halved = ", halved already" if self.halved else ""
                raise ValueError(f"out of memory with micro_batch {size}{halved}; expected a smaller micro_batch") from None
        tqdm.write(f"out of memory with micro_batch {size}: goes on with {size // 2}, which changes rounding alone")
        torch.cuda.empty_cache()
        self.restore(before, {"micro_batch": size // 2, "halved": True})
        return work(*args)

    def save(self, out):
        self.generator.save_lora(out / "generator")
        if self.refiner:
            self.refiner.save_lora(out / "refiner")

    def load(self, out):
        self.generator.load_lora(out / "generator")
        if self.refiner:
            self.refiner.load_lora(out / "refiner")


# ---------------------------------------------------------------- pictures


def save_grid(images, path, columns, scale=2):
    """images (B,3,H,W) in [0,1] -> PNG, row by row; an incomplete last row is left out"""
    columns = min(columns, len(images))
    images = images[: len(images) // columns * columns]
    grid = rearrange(images, "(row column) c h w -> (row h) (column w) c", column=columns)
    picture = Image.fromarray((grid * 255).round().byte().cpu().numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST).save(path)


def save_before_after(before, after, path, columns=12):
    """Rows in turn: before, after, before, after; the same prompts and noise above each other"""
    columns = min(columns, len(before))  # rows of the two must alternate
    pairs = [
        x[i : i + columns]
        for i in range(0, min(len(before), 3 * columns) - columns + 1, columns)
        for x in (before, after)
    ]
    save_grid(torch.cat(pairs), path, columns)


def save_curves(rows, path):
    """Trained rewards, validation and, where there is one, the refiner, over steps; dotted lines part the stages"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def series(kind, names=None):  # {name: (steps, values)} of one kind of metric
        found = [r for r in rows if kind in r]
        names = names or [n for n in (found[0][kind] if found else []) if not n.startswith("train_")]
        return {n: ([r["step"] for r in found], [r[kind][n] for r in found]) for n in names if found}

    panels = {
        "trained rewards, on each step's pictures": series("rewards"),
        "validation prompts, held back from training": series("validation"),
        "refiner": series("refiner", ["cue_share", "bad_format"]),
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    bounds = [r["step"] - 0.5 for before, r in zip(rows, rows[1:]) if before["stage"] != r["stage"]]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.2))
    for axis, (title, lines) in zip(np.atleast_1d(axes), panels.items()):
        for name, (steps, values) in lines.items():
            axis.plot(steps, values, "o-", ms=3, label=name)
        for bound in bounds:
            axis.axvline(bound, color="gray", lw=0.8, ls=":")
        axis.set(title=title, xlabel="step", xlim=(-0.5, rows[-1]["step"] + 0.5))
        axis.legend(frameon=False)
        axis.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------- main


@dataclass
class Progress:
    """Where a run stands between two steps: what a checkpoint holds besides `Run.state`."""

    stage: int = 0  # number of the stage
    step: int = 0  # passes done in it
    iteration: int = 0  # training steps done in all stages
    first: tuple | None = None  # the stage's first look: values, pictures (n, 3, H, W) in [0,1]
    best: tuple | None = None  # its best look: score, iteration, weights, pictures


def train(cfg):
    """All stages, one after another; each starts from the weights that the one before it kept."""
    out, start = Path(cfg.out), time.perf_counter()
    main = C.locked(out) if is_main() else nullcontext()  # rank 0 writes and prints
    with main, C.Stop() as stop:
        join(pick_device(cfg.device))
        if not is_main():
            sys.stdout = open(os.devnull, "w")
        found = bool(all_sum(torch.tensor([float(is_main() and begun(cfg))])).item())
        run = Run(cfg)
        describe(cfg, run)
        progress, rows = load_checkpoint(run) if found else (Progress(), [])
        if not found:  # before anything else, so that there is always one to go on from
            save_checkpoint(run, progress, 0)
        log = Log(cfg, progress, rows, load_seconds=time.perf_counter() - start)
        try:
            with C.naming(out):
                while progress.stage < len(cfg.stages):
                    stop.now(out)
                    progress = train_stage(run, log, progress, stop)
                    if is_main():
                        run.save(out)
                    save_checkpoint(run, progress, len(log.rows))
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; {C.kept(out)}") from error
        finally:
            log.close()
    log.report(time.perf_counter() - start)
    if dist.is_initialized():
        dist.barrier()  # rank 0 has written: leaving earlier would break what it still holds open
        dist.destroy_process_group()


def hacked(looks, k):
    """looks: (validation score, trained reward), oldest first -> True for a policy that games its reward

    At each of the last k looks, the first fell and the second rose. k = 0 never tells. The score is the mean of the
    validation detectors less the KID, because what fools the trained detectors may fool those too: see nano/hacking.py.
    """
    last = looks[-k - 1 :]
    return 0 < k < len(last) and all(b[0] < a[0] and b[1] > a[1] for a, b in zip(last, last[1:]))


def looks_of(run, log, row):
    """The looks of this stage so far, that of `row` included -> [(validation score, trained reward)]"""
    looks = [r["validation"] for r in [*log.rows, row] if "validation" in r and r["stage"] == row["stage"]]
    return [(v["score"], run.combine({n: v[f"train_{n}"] for n in run.weights})) for v in looks]


def train_stage(run, log, progress, stop):
    """`steps` steps with a look at the validation prompts every few; ends with the weights of the best look.

    Goes on from `progress`; -> where the next stage starts.
    """
    number, iteration, first, best = progress.stage, progress.iteration, progress.first, progress.best
    stage, every = run.cfg.stages[number], run.cfg.eval_images
    for step in range(progress.step, stage.steps + 1):  # the last pass only looks
        C.seed_globals(run.cfg.seed, iteration)
        row = {"step": iteration, "stage": f"{number} {stage.train}", "seconds": {}}
        if step % run.cfg.eval_every == 0 or step == stage.steps:
            row["validation"], images = run.within_memory(run.evaluate, stage)
            row["seconds"] = dict(run.seconds)
            if is_main():
                save_grid(images[:96], log.out / "samples" / f"{iteration:05d}_{stage.train}.png", 16)
            look, score, images = row["validation"], row["validation"]["score"], images[::every].cpu()
            first = first or (look, images)
            limits = run.cfg.keep_within.items()
            within = all(look[f"train_{n}"] >= first[0][f"train_{n}"] - fall for n, fall in limits)
            if best is None or within and score > best[0]:
                best = score, iteration, [t.detach().clone() for t in run.weights_of(stage)], images
        gamed = "validation" in row and hacked(looks_of(run, log, row), run.cfg.stop_if_hacked)
        if step < stage.steps and not gamed:
            looked = row["seconds"]
            row |= run.within_memory(run.step, stage, iteration)
            row["seconds"] = row["seconds"] | looked
            iteration += 1
        if gamed:
            row["hacked"] = True
        log.record(row)
        check_finite(log.rows)
        stop.agree(all_sum(torch.tensor([float(bool(stop.number))])).item())
        if stop.number or iteration % run.cfg.save_every == 0 and step < stage.steps:
            done = stage.steps + 1 if gamed else step + 1  # passes: a gamed stage has no more to go on with
            save_checkpoint(run, Progress(number, done, iteration, first, best), len(log.rows))
            stop.now(log.out)
        if gamed:
            why = f"the trained reward rose and the validation score fell at {run.cfg.stop_if_hacked} looks in a row"
            log.bar.write(f"stage {number} ({stage.train}) stops at step {row['step']}: {why}")
            break
    score, kept, weights, images = best
    with torch.no_grad():
        for tensor, value in zip(run.weights_of(stage), weights):
            tensor.copy_(value)
    log.bar.write(f"stage {number} ({stage.train}) keeps the weights of step {kept}: validation score {score:.3f}")
    if is_main():
        save_before_after(first[1], images, log.out / "samples" / f"before_after_{number}_{stage.train}.png")
        save_curves(log.rows, log.out / "curves.png")
    return Progress(number + 1, 0, iteration)


def check_finite(rows, most=3):
    """ValueError where the last `most` training steps all left an update out."""
    last = [r for r in rows if "skipped" in r][-most:]
    if len(last) == most and all(r["skipped"] for r in last):
        raise ValueError(
            f"step {last[-1]['step']}: loss or gradient was not finite in {most} steps in a row; "
            "expected finite ones: a lower lr, a larger beta or dtype float32 may help"
        )


def begun(cfg):
    """Is there a checkpoint to go on from? ValueError for a folder in use without resume=true, or by something else."""
    out, found = Path(cfg.out), C.complete(cfg.out)
    held = {p.name for p in out.iterdir()} - {C.LOCK}
    if held and not cfg.resume:
        raise ValueError(
            f"out: {cfg.out} is in use and is never overwritten; choose another with out=NAME, "
            "go on from its checkpoint with resume=true, or remove it"
        )
    if cfg.resume and not found:
        if held - {"checkpoint"}:
            raise ValueError(f"resume: {cfg.out} holds no checkpoint; train anew with out=NAME and without resume=true")
        print(f"resume: {cfg.out} holds nothing yet; starts at the beginning")
    return bool(found)


def load_checkpoint(run):
    """The newest checkpoint that can be read, into `run` -> Progress, rows of metrics.jsonl, which is cut off there."""
    out, unusable = Path(run.cfg.out), []
    for path in C.complete(out):
        try:
            tensors, state = C.read(path)
            C.check_config(path, state["config"], asdict(run.cfg))
            rows = C.read_rows(out / "metrics.jsonl", state["rows"])
        except C.Unreadable as error:
            unusable.append(path)
            print(f"resume: {error}; falls back to the one before")
            continue
        run.restore(tensors, state["run"])
        all_sum(torch.zeros(1))  # all ranks have read
        for bad in unusable if is_main() else ():
            shutil.rmtree(bad.with_suffix(".unreadable"), ignore_errors=True)
            bad.rename(bad.with_suffix(".unreadable"))
        print(f"resume: goes on from {path}")
        return unpack(tensors, state), rows
    raise ValueError(f"resume: no checkpoint of {out} can be read; train anew with out=NAME")


def save_checkpoint(run, progress, rows):
    """After `rows` rows of metrics.jsonl, which reach the disk first"""
    if not is_main():
        return
    out = Path(run.cfg.out)
    if rows:
        C.fsync(out / "metrics.jsonl")
    (tensors, rest), (looks, state) = run.state(), pack(progress)
    state |= {"config": asdict(run.cfg), "run": rest, "rows": rows}
    C.write(out, progress.iteration, tensors | looks, state)


def pack(progress):
    """Progress -> {name: tensor} and a JSON-able dict; pictures as bytes, which is what a grid shows"""
    tensors, state = {}, {"stage": progress.stage, "step": progress.step, "iteration": progress.iteration}
    if progress.first:
        state |= {"first": progress.first[0], "best": progress.best[:2]}
        tensors = {f"best.weights.{i}": t for i, t in enumerate(progress.best[2])}
        pictures = {"first.images": progress.first[1], "best.images": progress.best[3]}
        tensors |= {n: (x * 255).round().byte() for n, x in pictures.items()}
    return tensors, state


def unpack(tensors, state):
    """What `pack` made -> Progress"""
    progress = Progress(state["stage"], state["step"], state["iteration"])
    if "first" in state:
        weights = [tensors[f"best.weights.{i}"] for i in range(sum(n.startswith("best.weights.") for n in tensors))]
        first, best = (tensors[f"{n}.images"].float() / 255 for n in ("first", "best"))  # (n, 3, H, W)
        progress.first, progress.best = (state["first"], first), (*state["best"], weights, best)
    return progress


class Log:
    """metrics.jsonl, a line a step for people, the progress bar, and where the time went."""

    def __init__(self, cfg, progress, rows, load_seconds):
        self.out, self.rows, self.seconds = Path(cfg.out), rows, {"load": load_seconds}
        if is_main():
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            (self.out / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False, allow_unicode=True))
        self.metrics = open(self.out / "metrics.jsonl" if is_main() else os.devnull, "a")
        total = sum(s.steps for s in cfg.stages)
        self.bar = tqdm(
            total=total, initial=progress.iteration, desc="train", smoothing=0.1, disable=not is_main()
        )

    def record(self, row):
        row["seconds"] = {n: round(s, 3) for n, s in row["seconds"].items()}
        self.rows.append(json.loads(json.dumps(row), parse_constant=lambda _: None))  # JSON knows no NaN
        with C.naming(self.out / "metrics.jsonl"):
            self.metrics.write(json.dumps(self.rows[-1]) + "\n")
            self.metrics.flush()
        for name, s in row["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + s
        self.bar.update(int("reward" in row))
        self.bar.write(line(row))

    def close(self):
        self.bar.close()
        with suppress(OSError):  # a full disk was reported when the row was written
            self.metrics.close()

    def report(self, total):
        parts = ", ".join(f"{n} {s:.0f}" for n, s in self.seconds.items())
        print(f"seconds: {parts}; in all {total:.0f}. Peak memory {peak_memory():.1f} GiB. Wrote {self.out}/")


def peak_memory():
    """GiB of this process; ru_maxrss is in bytes on macOS and in KiB elsewhere"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def line(row):
    """One line a step, for people."""
    text = f"step {row['step']:4d} {row['stage']:12s}"
    if "reward" in row:
        text += f" reward {row['reward']:.3f} +- {row['reward_std']:.3f}"
    for name in ("generator", "refiner"):
        if name in row:
            text += "".join(f" {k} {v:.3g}" for k, v in row[name].items() if k in ("kl", "grad_norm", "cue_share"))
    if row.get("skipped"):
        text += " not finite: update left out"
    for name, learnt in row.get("detectors", {}).items():
        text += f" | {name} learnt, {learnt['steps']} steps:" + "".join(
            f" {key} {learnt[f'{key}_before']:.3f} -> {learnt[f'{key}_after']:.3f}" for key in ("accuracy", "reward")
        )
    if "validation" in row:
        text += " | " + " ".join(f"{k} {v:.3f}" for k, v in row["validation"].items())
    return text


def describe(cfg, run):
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}; "
        f"device {run.device} x {world()[1]}, {torch.get_num_threads()} threads, {cfg.dtype}"
    )
    for name, policy in (("generator", run.generator), ("refiner", run.refiner)):
        if policy:
            whole = sum(p.numel() for p in (policy.transformer if name == "generator" else policy.model).parameters())
            own = sum(p.numel() for p in policy.parameters())
            print(f"{name}: {getattr(cfg, name).model}, {(whole - own) / 1e6:.2f} M parameters, LoRA {own / 1e6:.2f} M")
    for n, s in enumerate(cfg.stages):
        print(
            f"stage {n}: {s.train}, {s.steps} steps of {s.prompts} prompts x {s.rewrites} rewrites x {s.images} images = {s.prompts * s.rewrites * s.images} images"
        )


def cli(main):
    """Run a main; bad input is one line on stderr and exit code 2. `python -X dev` shows the traceback."""
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' notes to each other
    for library in (diffusers, transformers):  # one progress bar, ours
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        main()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli(lambda: train(load_config(sys.argv[1:])))
