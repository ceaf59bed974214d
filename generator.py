"""The image policy: a stock diffusers flow-matching pipeline, made trainable by its scheduler.

A flow pipeline ends its loop with `latents = scheduler.step(noise_pred, t, latents)`. `PolicyScheduler`,
a subclass of the pipeline's own scheduler, takes that step in its place and *records* the stochastic ones.
`Trajectory` (pipeline.py) makes the pipeline's own call, to draw, and to *replay* one step with gradients.
So guidance, packing and masks are the pipeline's, and the same in both.

Symbols. t in [0,1] is time: 1 is noise, 0 the picture; a step goes from t to s < t, h = t - s. x (B,...)
latents, v = noise - data the predicted velocity, so that x0 = x - t v and eps = x + (1-t) v. Every step
is linear:

    x_next = mean + std * noise,  mean = c_x x + c_v v
    ode    std = 0                         mean = x - h v
    flow   std = a sqrt(t/(1-t)) sqrt(h)   mean = x (1 - g h/2t) - v (1 + g (1-t)/2t) h,  g = a^2 t/(1-t)
    cps    std = s sin(a pi/2)             mean = (1-s) x0 + sqrt(s^2 - std^2) eps

a is `noise_level`. `flow` is Flow-GRPO's step (arXiv 2505.05470). `cps` (arXiv 2509.05952) keeps the
coefficients of data and noise, so that it leaves no noise in the picture, which is just what a detector
would see.

There are two log-probs of a picture, both means over latent dimensions (nats per dimension), never sums:

    path   of the stochastic steps that drew it, as recorded (Flow-GRPO)
    elbo   of the finished latents x0, noised again (AWM, arXiv 2509.25050; V-GRPO, arXiv 2604.23380):
           log_prob = -1/2 mean (v(x_t, t) - (eps - x0))^2 at x_t = (1-t) x0 + t eps

elbo needs no stochastic step, so a rollout may take few Euler steps, and keeps nothing but x0. The pictures
of a prompt share t and eps, or the luck of the noise would look like their merit.
"""

import itertools
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders import FluxLoraLoaderMixin
from peft.utils import get_peft_model_state_dict

from common import ConfigError, batches, bounded, rng
from kernels import per_sample_mean, sde_log_ratio, velocity_kl
from pipeline import Trajectory, check_replay, load_pipeline
from policy import Policy, old_log_probs

TARGETS = [
    # attention, of the picture's stream and of the text's
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    # MLP
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
]


@dataclass
class GeneratorConfig:
    """See config.yaml for units and reasons."""

    model: str = "nano/flux"
    height: int = bounded("positive", 64)
    width: int = bounded("positive", 64)
    num_steps: int = bounded("positive", 10)
    call: dict[str, Any] = field(default_factory=dict)
    sde: Literal["cps", "flow"] = "cps"
    noise_level: float = bounded("positive", 0.8)
    window: int = bounded("positive", 2)
    last_start: int | None = bounded("natural", None)
    branches: int = bounded("positive", 1)
    log_prob: Literal["path", "elbo"] = "elbo"
    times: int = bounded("positive", 2)
    extremes: int = bounded("natural", 6)
    draw_steps: int = bounded("positive", 5)
    lora_rank: int = bounded("positive", 16)
    lora_alpha: int = bounded("positive", 32)
    lora_targets: list[str] = field(default_factory=TARGETS.copy)
    lr: float = bounded("positive", 2e-3)
    ratio: Literal["guard", "ppo"] = "guard"
    clip_range: float = bounded("positive", 1e-3)
    beta: float = bounded("natural", 0.05)
    ema: float = bounded("decay", 0.9)
    ema_every: int = bounded("positive", 1)
    gradient_checkpointing: bool = False
    quantize: Literal["nf4", "int8"] | None = None
    compile: bool = False

    def check(self):
        if self.log_prob == "path" and self.window + (self.last_start or 0) >= self.draw_steps:
            raise ConfigError(
                f"generator.window: {self.window}, last_start: {self.last_start}; expected less than "
                f"draw_steps, {self.draw_steps}, because the last step is never stochastic"
            )
        if self.log_prob == "elbo" and self.times > self.num_steps:
            raise ConfigError(
                f"generator.times: {self.times}; expected at most num_steps, {self.num_steps}"
            )
        if self.sde == "cps" and self.noise_level > 1:
            raise ConfigError(f"generator.noise_level: {self.noise_level}; cps expects at most 1")


@dataclass
class Step:
    """One stochastic step of a rollout, as it was taken; tensors have B rows."""

    index: int  # place in the time grid
    coefficients: tuple  # c_x, c_v, std
    h: float  # how far it goes
    x: torch.Tensor  # (B, ...) latents before it, as the pipeline keeps them
    x_next: torch.Tensor  # (B, ...) latents after it
    v: torch.Tensor  # (B, ...) the velocity that drew it

    def at(self, rows):
        """Latents, and the velocity that drew from there, (b, ...) each"""
        return self.x[rows], self.v[rows]

    def measure(self, rows, x, old_v, v, ref_v, ratio):
        """-> log_ratio (b,) of the recorded step, KL (b,): mean((v - ref_v)^2), scale of the advantage

        guard   ratio = exp(mean(eps_old (mu - mu_old))), eps_old = (x_next - mu_old) / std
                GRPO-Guard's (arXiv 2510.22319): the plain ratio has a bias and a scale that differ from step
                to step. This one has neither, so that one clip range fits all steps. Its advantages are
                divided by h, as published, because a step moves the mean by about h times the velocity.
        ppo     ratio = exp(log_prob - old_log_prob), the plain one
        """
        x_next = self.x_next[rows]  # (b, ...)
        # each (b,)
        log_prob, log_ratio, kl = sde_log_ratio(x, v, x_next, old_v, ref_v, *self.coefficients)
        if ratio == "guard":
            return log_ratio, kl, 1 / self.h
        old_log_prob = sde_log_ratio(x, old_v, x_next, old_v, old_v, *self.coefficients)[0]
        return log_prob - old_log_prob, kl, 1.0


@dataclass
class Noised:
    """Finished pictures, noised again to one time of the grid; tensors have B rows."""

    index: int  # place in the time grid
    t: float
    x0: torch.Tensor  # (B, ...) finished latents, the same tensor for all times
    keys: list  # B keys of the noise, for `rng`
    kept: dict = field(default_factory=dict)  # row -> its log-prob, where `remember` kept it

    def at(self, rows):
        """x_t and the velocity eps - x0 of the straight line through it, (b, ...) each, in f32"""
        x0 = self.x0[rows].float()  # (b, ...)
        eps = normal([rng(*self.keys[row]) for row in rows], x0.shape[1:]).to(x0.device)  # (b, ...)
        return (1 - self.t) * x0 + self.t * eps, eps - x0

    def measure(self, rows, x, target, v, ref_v, ratio):
        """-> log_ratio = log_prob - old_log_prob (b,), KL (b,): mean((v - ref_v)^2), scale

        Called as Step's is: x it has no use for, and there is one ratio here, whatever `ratio` says.
        """
        log_prob = elbo(v, target)  # (b,)
        old = old_log_probs(self.kept, rows, log_prob)  # (b,)
        return log_prob - old, velocity_kl(v, ref_v), 1.0


def join_rows(parts):
    """The same step of each micro-batch -> the Step of the whole batch

    Place and coefficients are those of the window, the same in all.
    """
    return replace(
        parts[0],
        x=torch.cat([part.x for part in parts]),
        x_next=torch.cat([part.x_next for part in parts]),
        v=torch.cat([part.v for part in parts]),
    )


# ---------------------------------------------------------------- maths


def sde_coefficients(sde, t, s, noise_level, t_1):
    """(c_x, c_v, std) of the step from t to s. t_1, the grid's second time, keeps `flow` finite at t = 1."""
    h = t - s
    if sde == "ode":
        return 1.0, -h, 0.0
    if sde == "flow":
        g = noise_level**2 * t / (1 - (t_1 if t == 1 else t))
        return 1 - g * h / (2 * t), -(1 + g * (1 - t) / (2 * t)) * h, math.sqrt(g * h)
    std = s * math.sin(noise_level * math.pi / 2)
    k = math.sqrt(max(s * s - std * std, 0.0))  # what stays of eps
    return (1 - s) + k, -(1 - s) * t + k * (1 - t), std


def elbo(v, target):
    """-1/2 mean (v - target)^2, a bound on log p(x0) but for constants and a weight by t: (b, ...) -> (b,)"""
    return -per_sample_mean((v.float() - target) ** 2) / 2


def draw_window(num_steps, window, last_start, chance):
    """The stochastic steps of an iteration: neighbours, never the last step; in the first half of the grid
    unless last_start says more"""
    if last_start is None:
        last_start = max(num_steps // 2 - window, 0)
    start = int(chance.integers(0, last_start + 1))
    return range(start, start + window)


def draw_times(num_steps, times, chance):
    """The places in the grid at which pictures are noised again: one in each of `times` equal parts

    Two parts may share a place where `times` does not divide num_steps.
    """
    return [int((part + chance.random()) * num_steps / times) for part in range(times)]


def normal(rngs, shape):
    """One standard normal sample of `shape` from each random generator: (B, *shape) f32"""
    return torch.from_numpy(np.stack([r.standard_normal(shape, dtype=np.float32) for r in rngs]))


# ---------------------------------------------------------------- the scheduler is the adapter


class PolicyScheduler(FlowMatchEulerDiscreteScheduler):
    """The stock scheduler's Euler ODE; after `begin` of a part of the grid alone, until `off`.

    Steps in a window are stochastic, and recorded. A replay is a part of one step without a window;
    `velocity` is what the pipeline predicts there.
    """

    part = slice(None)  # all of the grid
    window = ()

    def begin(self, cfg, part, window, noise):
        """part: range of the grid's steps. noise: shape -> (B, *shape) standard normal"""
        self.cfg = cfg
        self.part = part
        self.window = window
        self.noise = noise
        self.steps = []

    def off(self):
        del self.part, self.window  # which uncovers those of the class

    # by its names: diffusers reads the signature to see whether sigmas and mu are allowed
    @wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.grid = self.sigmas.tolist()  # num_steps + 1 times, from near 1 down to 0
        self.timesteps = self.timesteps[self.part.start : self.part.stop]
        self.upcoming = itertools.count(self.part.start or 0)  # in the grid, of the steps to come

    def scale_model_input(self, sample, timestep):
        # Bria asks for it where the scheduler is not of the stock class itself
        return sample

    def step(self, model_output, timestep, sample, **_):
        i = next(self.upcoming)
        stochastic = i in self.window
        sde = self.cfg.sde if stochastic else "ode"
        noise_level = self.cfg.noise_level if stochastic else 0.0
        t = self.grid[i]
        s = self.grid[i + 1]
        c_x, c_v, std = sde_coefficients(sde, t, s, noise_level, self.grid[1])
        # (B, ...), in f32 whatever the pipeline's dtype is
        x_next = c_x * sample.float() + c_v * model_output.float()
        if stochastic:
            x_next = x_next + std * self.noise(sample.shape[1:]).to(sample.device)
        x_next = x_next.to(sample.dtype)
        self.latest = x_next  # (B, ...), in the end the finished latents
        self.velocity = model_output  # (B, ...)
        if stochastic:
            self.steps.append(Step(i, (c_x, c_v, std), t - s, sample, x_next, model_output))
        return (x_next,)


# ---------------------------------------------------------------- the pipeline is the policy


class Generator(Policy):
    """A diffusers pipeline with a LoRA: `rollout` draws and records, `terms` replays with gradients."""

    name = "generator"
    lora_file = "pytorch_lora_weights.safetensors"
    prefix = "transformer"

    def __init__(
        self, cfg, device="cpu", dtype=torch.float32, micro_batch=32, offload=False, shard=None
    ):
        """offload: it waits on the CPU, as text encoders do, outside `at_work`. shard: spreads a module's
        weights over ranks, where it stays.

        Raises ConfigError for what is no flow pipeline, and for one whose steps cannot be replayed.
        """
        self.cfg = cfg
        self.device = torch.device(device)
        self.micro_batch = micro_batch
        self.pipe = load_pipeline(cfg, dtype)
        self.model = self.pipe.transformer
        self.lora_options = dict(init_lora_weights="gaussian", target_modules=cfg.lora_targets)
        parts = torch.nn.ModuleDict(
            {n: p for n, p in self.pipe.components.items() if isinstance(p, torch.nn.Module)}
        )
        parts.requires_grad_(False).eval()  # what trains is the LoRA, which is added later
        for part in self.model.modules():
            # HiDream's experts, which have gradients in this mode alone
            if hasattr(part, "moe_infer"):
                part.training = True
        self.text_encoder = getattr(self.pipe, "text_encoder", None)
        self.without_lora = nullcontext  # of a refiner that is the text encoder
        self.waiting = torch.nn.ModuleDict(
            {n: p for n, p in parts.items() if offload and n.startswith("text_encoder")}
        )
        self.pipe.register_modules(**dict.fromkeys(self.waiting))
        if shard:  # before it moves to the device, which may not hold the whole
            shard(self.model, self.device.type)
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.scheduler = PolicyScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.scheduler = self.scheduler
        if cfg.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        # on a CPU it takes longer than a short run gains
        if cfg.compile and self.device.type == "cuda":
            self.model.compile_repeated_blocks()
        if cfg.height * cfg.width > 256**2 and hasattr(self.pipe.vae, "enable_slicing"):
            # decodes one picture at a time: at 1024 px a batch would not fit
            self.pipe.vae.enable_slicing()
        self.grid = check_replay(self)  # num_steps + 1 times
        if offload and not shard:
            self.model.to("cpu")

    # ------------------------------------------------ LoRA

    def read(self, folder):
        self.model.load_lora_adapter(folder, weight_name=self.lora_file, adapter_name="default")

    def adopt(self):
        super().adopt()
        self.ema = {n: p.detach().clone() for n, p in self.lora.items()}
        self.optimizer_steps = torch.zeros(())  # () optimizer steps so far

    def save(self, folder):
        """The EMA weights, as `load_lora_weights(folder)` of the stock pipeline reads them

        A pipeline that has none, such as Ovis, takes them by `transformer.load_lora_adapter`.
        """
        with self.ema_weights():
            # of any pipeline: the file is the same, and not every pipeline can write one
            FluxLoraLoaderMixin.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(self.model),
                transformer_lora_adapter_metadata=self.model.peft_config["default"].to_dict(),
            )

    def state(self):
        average = {f"ema.{name}": p for name, p in self.ema.items()}
        return super().state() | average | {"optimizer_steps": self.optimizer_steps}

    @torch.no_grad()
    def update_ema(self):
        """The average over updates, each of which follows from few pictures; shorter at first"""
        self.optimizer_steps += 1
        n = self.optimizer_steps.item()
        if n % self.cfg.ema_every == 0:
            decay = min(n / (n + 9), self.cfg.ema)
            for name, p in self.lora.items():
                self.ema[name].lerp_(p.to(self.ema[name].device), 1 - decay)

    @contextmanager
    def ema_weights(self):
        """Inside, the LoRA is its EMA, which looks and files use. Contents change places, never names."""

        def swap():
            for name, p in self.lora.items():
                live = p.detach().clone()
                p.data.copy_(self.ema[name])
                self.ema[name].copy_(live)

        swap()
        try:
            yield
        finally:
            swap()

    # ------------------------------------------------ drawing

    @contextmanager
    def encoders(self):
        """Inside, the text encoders can be called, and give what they gave before anything was trained"""
        self.pipe.register_modules(**self.waiting.to(self.device))
        try:
            with self.without_lora():
                yield
        finally:
            # or the pipeline would take its device from them
            self.pipe.register_modules(**dict.fromkeys(self.waiting))
            self.waiting.to("cpu")

    def rollout(self, prompts, keys, window=(), times=(), num_steps=None):
        """Draw one picture per prompt in num_steps, the config's if None -> images, Trajectory

        Steps in `window`, a range, are stochastic and recorded, all others Euler; or the finished latents are
        kept, to be noised again to `times`, places in the config's grid. prompts: B texts. keys: B tuples for
        `rng`, such as ("picture", seed, iteration, prompt, sample); noise depends on nothing else, so a batch
        may be split in any way. images: (B,3,H,W) in [0,1] on the CPU, in the pipeline's dtype: in bf16
        504 of 1024 px take 3 GB.
        """
        record = Trajectory(self, prompts, num_steps or self.cfg.num_steps)
        images = []
        finished = []
        steps = []
        with self.at_work():
            for rows in batches(range(len(prompts)), self.micro_batch):
                # (b, 3, H, W)
                images.append(self.draw(record, rows, keys, window).clamp(0, 1).cpu())
                finished.append(self.scheduler.latest)
                steps.append(self.scheduler.steps)
        images = torch.cat(images)
        if not images.isfinite().all():
            raise ConfigError(
                "generator: pictures are not finite: it has diverged; a lower generator.lr may help"
            )
        record.steps = [join_rows(parts) for parts in zip(*steps)]
        if times:
            record.num_steps = self.cfg.num_steps
            x0 = torch.cat(finished)  # (B, ...)
            # a key without its last part, the sample: the pictures of a prompt share their noise
            record.steps = [
                Noised(i, self.grid[i], x0, [("noised", *key[1:-1], i) for key in keys])
                for i in times
            ]
        return images, record

    @torch.no_grad()
    def draw(self, record, rows, keys, window):
        """Some rows of a rollout -> (b, 3, H, W). scheduler.latest and .steps hold what the rollout keeps.

        `branches` neighbours with a window start from the same noise. They part at its first stochastic step,
        so what comes before is drawn once.
        """
        noise = partial(normal, [rng("step", *keys[row][1:]) for row in rows])
        branches = self.cfg.branches if window else 1
        starts = [(*keys[row][:-1], keys[row][-1] // branches) for row in rows]
        first = partial(normal, [rng(*start) for start in starts])
        begin = window.start if branches > 1 else 0
        if begin:
            roots = dict(zip(starts, rows))  # start -> one of the rows that begin with it
            shared = partial(normal, [rng(*start) for start in roots])
            record.call(range(begin), list(roots.values()), shared, "latent")
            x = self.scheduler.latest[[list(roots).index(start) for start in starts]]  # (b, ...)
            first = lambda shape: x
        return record.call(range(begin, record.num_steps), rows, first, "pt", window, noise)

    def replay(self, record, index, x, rows):
        """The velocity at a place in the grid for some rows of latents x, with grad: (b, ...)"""
        record.call(range(index, index + 1), rows, lambda shape: x, "latent")
        return self.scheduler.velocity

    # ------------------------------------------------ what GRPO asks of a policy

    def places(self, chance):
        """What an iteration trains on, drawn by a numpy generator: arguments of `rollout`"""
        cfg = self.cfg
        if cfg.log_prob == "path":
            return {"window": draw_window(cfg.draw_steps, cfg.window, cfg.last_start, chance)}
        return {"times": draw_times(cfg.num_steps, cfg.times, chance)}

    def clip(self):
        """The ratio is clipped to [1 - low, 1 + high]"""
        return self.cfg.clip_range, self.cfg.clip_range

    def count(self, record, rows):
        """What the loss of these rows is divided by: their stochastic steps, or times"""
        return len(rows) * len(record.steps)

    @torch.no_grad()
    def remember(self, record, rows):
        """Old log-probs of rows that an earlier update changes; a path has recorded what gives them."""
        if self.cfg.log_prob == "path":
            return
        for step in record.steps:
            x, target = step.at(rows)  # (b, ...)
            v = self.replay(record, step.index, x, rows)  # (b, ...)
            step.kept |= dict(zip(rows, elbo(v, target)))

    def terms(self, record, rows):
        """One step or time after another -> log_ratio (b, 1) with grad, kl (b, 1), scale, weight, figures"""
        for step in record.steps:
            x, known_v = step.at(rows)  # (b, ...)
            v = self.replay(record, step.index, x, rows)  # (b, ...), with grad
            ref_v = v.detach()
            if self.cfg.beta:
                with torch.no_grad(), self.reference():
                    ref_v = self.replay(record, step.index, x, rows)  # (b, ...)
            # (b,), (b,)
            log_ratio, kl, scale = step.measure(rows, x, known_v, v, ref_v, self.cfg.ratio)
            yield log_ratio[:, None], kl[:, None], scale, 1.0, {}
