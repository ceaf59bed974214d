"""The image policy: any stock diffusers flow-matching pipeline, made trainable by its scheduler alone.

A flow pipeline ends its loop with `latents = scheduler.step(noise_pred, t, latents)`. So `PolicyScheduler`, a subclass of the
pipeline's own scheduler, is the whole adapter: it *records* the stochastic steps of a rollout, and it *replays* one of them, with
gradients, through the pipeline's own call, which keeps guidance, packing, masks and embeddings the same in both.

Symbols. t in [0,1] is time: 1 is noise, 0 the picture; a step goes from t to s < t, h = t - s. x (B,...) latents, v = noise - data
the predicted velocity, so that x0 = x - t v and eps = x + (1-t) v. Every step is linear in x and v:

    x_next = mean + std * noise,  mean = c_x x + c_v v
    ode    std = 0                              mean = x - h v
    flow   std = a sqrt(t/(1-t)) sqrt(h)        mean = x (1 - g h/2t) - v (1 + g (1-t)/2t) h,  g = a^2 t/(1-t)  Flow-GRPO, arXiv 2505.05470
    cps    std = s sin(a pi/2)                  mean = (1-s) x0 + sqrt(s^2 - std^2) eps      coefficients preserved, arXiv 2509.05952

a is `noise_level`. Log-probs are *means* over latent dimensions (nats per dimension), never sums.
"""

import ast
import inspect
import json
import math
import os
import re
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux: torch does the same work
    triton = None


@dataclass
class GeneratorConfig:
    """See config.yaml for units and reasons."""

    model: str = "nano/flux"
    height: int = 64
    width: int = 64
    num_steps: int = 10
    call: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.5, "max_sequence_length": 40})
    sde: Literal["cps", "flow", "ode"] = "cps"
    noise_level: float = 0.8
    window: int = 2
    share_noise: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_targets: list[str] = field(
        default_factory=lambda: [
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ]
    )
    lr: float = 1e-3
    ratio: Literal["guard", "ppo"] = "guard"
    clip_range: float = 2e-3
    beta: float = 0.01
    ema: float = 0.8
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if self.sde != "ode" and not 0 < self.window < self.num_steps:
            raise ValueError(
                f"generator.window: {self.window} stochastic steps of {self.num_steps}; "
                "expected 1 or more, and fewer than num_steps, because the last step is never stochastic"
            )
        if self.sde == "cps" and not 0 < self.noise_level <= 1:
            raise ValueError(f"generator.noise_level: {self.noise_level}; cps takes a number in (0, 1]")


@dataclass
class Trajectory:
    """The stochastic steps of one rollout; each list has one entry per step of the window, each tensor B rows."""

    embeds: dict  # what the pipeline's call takes instead of prompts, a row per *distinct* prompt
    embed_rows: list  # (B,) row of `embeds` of each sample
    index: list = field(default_factory=list)  # place in the full time grid
    coefficients: list = field(default_factory=list)  # (c_x, c_v, std)
    x: list = field(default_factory=list)  # (B, ...) latents before the step, as the pipeline keeps them
    x_next: list = field(default_factory=list)  # (B, ...) latents after it
    v: list = field(default_factory=list)  # (B, ...) the velocity that drew it
    log_prob: list = field(default_factory=list)  # (B,) f32


# ---------------------------------------------------------------- pure maths


def sde_coefficients(sde, t, s, noise_level, t_1):
    """(c_x, c_v, std) of the step from t to s, floats. t_1, the second time of the grid, keeps `flow` finite at t = 1."""
    h = t - s
    if sde == "ode":
        return 1.0, -h, 0.0
    if sde == "flow":
        g = noise_level**2 * t / (1 - (t_1 if t == 1 else t))
        return 1 - g * h / (2 * t), -(1 + g * (1 - t) / (2 * t)) * h, math.sqrt(g * h)
    std = s * math.sin(noise_level * math.pi / 2)
    k = math.sqrt(max(s * s - std * std, 0.0))
    return (1 - s) + k, -(1 - s) * t + k * (1 - t), std


def per_sample_mean(x):
    return x.flatten(1).mean(1)  # (B, ...) -> (B,)


def gaussian_log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), mean over latent dimensions: (B, ...) -> (B,)"""
    return per_sample_mean(-((x_next - mean) ** 2) / (2 * std**2)) - math.log(std) - 0.5 * math.log(2 * math.pi)


def guard_log_ratio(x_next, mean, old_mean, std, c_v):
    """GRPO-Guard, arXiv 2510.22319, in velocity units: mean(eps_old * (mean - old_mean)) / |c_v| -> (B,)

    eps_old = (x_next - old_mean) / std. The plain log-ratio has the bias -mean((mean - old_mean)^2) / 2 std^2 and a scale 1/std that
    differs from step to step; this one has neither, so one clip range fits every step.
    """
    return per_sample_mean((x_next - old_mean) / std * (mean - old_mean)) / abs(c_v)


def gaussian_kl(mean, ref_mean, std):
    """Exact KL(N(mean, std^2) || N(ref_mean, std^2)), mean over latent dimensions: (B, ...) -> (B,). std includes sqrt(h)."""
    return per_sample_mean((mean - ref_mean) ** 2) / (2 * std**2)


def draw_window(num_steps, window, rng):
    """The stochastic steps [l, l+w): drawn once per iteration, in the first half of the grid, never the last step."""
    last_start = max(min(num_steps // 2, num_steps - 1) - window, 0)
    start = int(rng.integers(0, last_start + 1))
    return range(start, start + window)


# ---------------------------------------------------------------- the scheduler is the adapter


class PolicyScheduler(FlowMatchEulerDiscreteScheduler):
    """Records the stochastic steps of a rollout, or replays one of them. Outside both it is the Euler ODE."""

    sde, noise_level = "cps", 0.8
    window = ()  # record: indices that are stochastic
    noise = None  # record: shape -> standard normal, per-sample seeds
    trajectory = None  # record: where the steps go
    only = None  # replay: the index of the one step
    velocity = None  # replay: what the pipeline predicted there

    # the names of the parameters matter: diffusers reads this signature to see whether sigmas and mu are allowed
    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.grid = self.sigmas.tolist()
        if self.only is not None:
            self.timesteps, self.sigmas = self.timesteps[self.only :][:1], self.sigmas[self.only :][:2]

    def step(self, model_output, timestep, sample, return_dict=True, **_):
        if self.only is not None:
            self.velocity = model_output
            return (sample,) if not return_dict else {"prev_sample": sample}
        if self.step_index is None:
            self._init_step_index(timestep)
        i, self._step_index = self._step_index, self._step_index + 1
        sde = self.sde if i in self.window else "ode"
        coefficients = sde_coefficients(sde, self.grid[i], self.grid[i + 1], self.noise_level, self.grid[1])
        noise = self.noise(sample.shape).to(sample.device) if i in self.window else None  # (B, ...)
        x_next, log_prob = sde_step(sample, model_output, noise, *coefficients)
        if i in self.window:
            self.trajectory.append((i, coefficients, sample, x_next, model_output, log_prob))
        return (x_next,) if not return_dict else {"prev_sample": x_next}


# ---------------------------------------------------------------- the pipeline is the policy



def embeds_returned(pipe):
    """What this pipeline's encode_prompt returns, by the names in its return statement, which its call takes: [name or None]

    So prompts are encoded once for any diffusers pipeline, with no table of pipelines here. None: the call makes that one again.
    """
    code = ast.parse(textwrap.dedent(inspect.getsource(type(pipe).encode_prompt)))
    value = [node for node in ast.walk(code) if isinstance(node, ast.Return)][-1].value
    names = [getattr(e, "id", None) for e in (value.elts if isinstance(value, ast.Tuple) else [value])]
    taken = inspect.signature(type(pipe).__call__).parameters
    return [n if n in taken else None for n in names]


class Generator:
    """A diffusers pipeline with a LoRA. `rollout` draws and records, `replay` gives a recorded step's velocity with grad, `sample` draws."""

    def __init__(self, cfg, device="cpu", dtype=torch.float32, micro_batch=32, offload=False, fsdp=False):
        """offload: text encoders wait on the CPU. fsdp: the ranks of torch.distributed share the transformer's weights.

        Raises ValueError, in one line, for a folder that is no pipeline and for a pipeline that cannot be trained.
        """
        self.cfg, self.device, self.micro_batch = cfg, torch.device(device), micro_batch
        self.pipe = load_pipeline(cfg, dtype)
        self.waiting = {n: m for n, m in self.pipe.components.items() if offload and n.startswith("text_encoder") and m}
        for name in self.waiting:
            setattr(self.pipe, name, None)
        if fsdp:
            shard(self.pipe.transformer, self.device.type)
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.scheduler = PolicyScheduler.from_config(self.pipe.scheduler.config)
        self.scheduler.sde, self.scheduler.noise_level = cfg.sde, cfg.noise_level
        self.pipe.scheduler = self.scheduler
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        for encoder in self.waiting.values():
            encoder.requires_grad_(False).eval()
        self.transformer = self.pipe.transformer
        if cfg.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if cfg.height * cfg.width > 256**2 and hasattr(self.pipe.vae, "enable_slicing"):
            self.pipe.vae.enable_slicing()  # decodes one picture at a time: at 1024 px a batch would not fit
        self.lora = None
        self.latent_shape = self._probe()  # one sample's, as the pipeline packs it

    def add_lora(self, seed=0):
        """A new LoRA (down gaussian, up zero, so that nothing changes yet), trainable, f32, with an EMA copy."""
        cfg = self.cfg
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer.add_adapter(
                LoraConfig(
                    r=cfg.lora_rank,
                    lora_alpha=cfg.lora_alpha,
                    init_lora_weights="gaussian",
                    target_modules=cfg.lora_targets,
                )
            )
        self._adopt_lora()

    def load_lora(self, folder):
        """The LoRA that `save_lora` wrote, to draw with or to train further; ValueError for one that is cut off."""
        try:
            self.pipe.load_lora_weights(str(folder), adapter_name="default")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder} cannot be read ({error}); expected a LoRA that save_lora wrote") from error
        self._adopt_lora()

    def _adopt_lora(self):
        self.lora = {n: p for n, p in self.transformer.named_parameters() if "lora_" in n}
        for p in self.lora.values():
            p.data = p.data.float()
            p.requires_grad_(True)
        self.ema = {n: p.detach().clone() for n, p in self.lora.items()}

    def save_lora(self, folder):
        """The EMA weights, as `pipe.load_lora_weights(folder)` reads them."""
        config = self.transformer.peft_config["default"].to_dict()
        with self.ema_weights():
            self.pipe.save_lora_weights(
                str(folder),
                transformer_lora_layers=get_peft_model_state_dict(self.transformer),
                transformer_lora_adapter_metadata=config,
            )

    def parameters(self):
        return list(self.lora.values())

    @torch.no_grad()
    def update_ema(self):
        for n, p in self.lora.items():
            self.ema[n].lerp_(p, 1 - self.cfg.ema)

    @contextmanager
    def ema_weights(self):
        """Inside, the pipeline draws with the EMA of the LoRA. Contents are exchanged, never aliased."""
        if self.lora is None:
            yield
            return
        live = {n: p.detach().clone() for n, p in self.lora.items()}
        try:
            for n, p in self.lora.items():
                p.data.copy_(self.ema[n])
            yield
        finally:
            for n, p in self.lora.items():
                p.data.copy_(live[n])

    @contextmanager
    def reference(self):
        """Inside, the LoRA is off: the reference policy, with no second copy of the weights."""
        if self.lora is None:
            yield
            return
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    # ------------------------------------------------ drawing

    def rollout(self, prompts, keys, window=()):
        """Draw one picture per prompt; steps in `window` are stochastic and recorded.

        prompts: B texts. keys: B tuples of integers (seed, iteration, prompt, sample); noise depends on nothing else, so a batch may be split
        in any way. Returns images (B,3,H,W) f32 in [0,1] and a Trajectory.
        """
        distinct = list(dict.fromkeys(prompts))
        where = {p: i for i, p in enumerate(distinct)}
        trajectory = Trajectory(self.encode(distinct), [where[p] for p in prompts])
        images, steps = [], []
        for rows in self.chunks(len(prompts)):
            rngs = [np.random.default_rng(keys[r]) for r in rows]
            first = [np.random.default_rng(keys[r][:3]) for r in rows] if self.cfg.share_noise else rngs
            self.scheduler.window, self.scheduler.trajectory = window, []
            self.scheduler.noise = lambda shape: normal(rngs, shape[1:])
            with torch.no_grad():
                image = self._call(trajectory, rows, normal(first, self.latent_shape), output_type="pt")
            images.append(image.float().clamp(0, 1))  # (b, 3, H, W)
            steps.append(self.scheduler.trajectory)
        self.scheduler.window, self.scheduler.trajectory = (), None
        for step in zip(*steps):  # the same step of every chunk
            index, coefficients, *tensors = zip(*step)
            trajectory.index.append(index[0])
            trajectory.coefficients.append(coefficients[0])
            for name, parts in zip(("x", "x_next", "v", "log_prob"), tensors):
                getattr(trajectory, name).append(torch.cat(parts))
        return torch.cat(images), trajectory

    def sample(self, prompts, keys):
        """ODE sampling with no stochastic step: images (B,3,H,W) f32 in [0,1]"""
        return self.rollout(prompts, keys)[0]

    def replay(self, trajectory, k, rows):
        """The velocity of step k of the window for some rows, with grad: (b, ...)"""
        self.scheduler.only = trajectory.index[k]
        try:
            self._call(trajectory, rows, trajectory.x[k][rows], output_type="latent")
            return self.scheduler.velocity
        finally:
            self.scheduler.only = self.scheduler.velocity = None

    def chunks(self, n):
        """Rows 0..n-1 in micro-batches; rollout and replay share them, so that their matrix products have the same shapes."""
        return [list(range(i, min(i + self.micro_batch, n))) for i in range(0, n, self.micro_batch)]

    @torch.no_grad()
    def encode(self, prompts):
        """Prompt embeddings, once per distinct prompt -> {argument of the call: tensor (n, ...) or list of n}"""
        self.pipe._guidance_scale = self.cfg.call.get("guidance_scale", 1.0)
        accepted = inspect.signature(self.pipe.encode_prompt).parameters

        def call(texts):
            args = dict(
                prompt=list(texts),
                device=self.device,
                max_sequence_length=self.cfg.call.get("max_sequence_length"),
                do_classifier_free_guidance=getattr(self.pipe, "do_classifier_free_guidance", False),
            )
            args |= {n: None for n in ("prompt_2", "prompt_3") if n in accepted}
            values = self.pipe.encode_prompt(
                **{n: v for n, v in args.items() if n in accepted and (v is not None or n.startswith("prompt_"))}
            )
            values = values if isinstance(values, tuple) else (values,)
            return {n: v for n, v in zip(embeds_returned(self.pipe), values) if n and v is not None and len(v)}

        with self.encoders():
            embeds = call(prompts)
            if self.cfg.call.get("true_cfg_scale", 1.0) > 1:  # FLUX and Qwen-Image ask for the negative prompt apart
                negative = call([self.cfg.call.get("negative_prompt", " ")] * len(prompts))
                embeds |= {"negative_" + n: v for n, v in negative.items()}
        return embeds

    @contextmanager
    def encoders(self):
        """Inside, the text encoders are on the device; outside, where `offload`, they wait on the CPU, out of the pipeline."""
        for name, encoder in self.waiting.items():
            setattr(self.pipe, name, encoder.to(self.device))
        try:
            yield
        finally:
            for name, encoder in self.waiting.items():
                encoder.to("cpu")
                setattr(self.pipe, name, None)

    def _call(self, trajectory, rows, latents, output_type):
        """The pipeline's own call, without its no_grad decorator."""
        pick = [trajectory.embed_rows[r] for r in rows]
        embeds = {n: v[pick] if torch.is_tensor(v) else [v[i] for i in pick] for n, v in trajectory.embeds.items()}
        extra = {n: v for n, v in self.cfg.call.items() if n != "negative_prompt"}
        call = inspect.unwrap(type(self.pipe).__call__)
        return call(
            self.pipe,
            latents=latents.to(self.device),
            height=self.cfg.height,
            width=self.cfg.width,
            num_inference_steps=self.cfg.num_steps,
            output_type=output_type,
            return_dict=False,
            **embeds,
            **extra,
        )[0]

    @torch.no_grad()
    def _probe(self):
        """One step of one sample tells the shape in which this pipeline keeps latents, and that the whole call works."""
        embeds = self.encode(["a photo"])
        seen = []
        self.scheduler.only = 0
        self.scheduler.step = lambda v, t, x, **_: seen.append(x.shape) or (x,)
        try:
            extra = {n: v for n, v in self.cfg.call.items() if n != "negative_prompt"}
            self.pipe(
                height=self.cfg.height,
                width=self.cfg.width,
                num_inference_steps=self.cfg.num_steps,
                output_type="latent",
                **embeds,
                **extra,
            )
        finally:
            del self.scheduler.step
            self.scheduler.only = None
        return tuple(seen[0][1:])

    @torch.no_grad()
    def reconstruct(self, images):
        """Pictures through the pipeline's autoencoder, as its own pictures come: (B,3,H,W) in [0,1] -> same"""
        out = []
        for x in images.split(self.micro_batch):
            x = (x * 2 - 1).to(self.device, self.pipe.vae.dtype)
            x = self.pipe.vae.decode(self.pipe.vae.encode(x).latent_dist.mode()).sample
            out.append((x.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(out)


def normal(rngs, shape):
    """One standard normal sample of `shape` from each random generator: (B, *shape) f32"""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))


def load_pipeline(cfg, dtype):
    """A stock pipeline, checked: flow-matching Euler scheduler, a transformer, prompts given as embeddings."""
    folder = Path(cfg.model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"generator.model: {cfg.model} has no model_index.json; expected a diffusers pipeline saved with save_pretrained"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(cfg.model, dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"generator.model: {cfg.model} cannot be loaded ({str(error).splitlines()[0]}); give a folder or a repository of the Hub"
        ) from error
    name = type(pipe).__name__
    takes = inspect.signature(type(pipe).__call__).parameters
    if type(pipe.scheduler) is not FlowMatchEulerDiscreteScheduler:
        raise ValueError(
            f"generator.model: {cfg.model} samples with {type(pipe.scheduler).__name__}; only FlowMatchEulerDiscreteScheduler can be trained"
        )
    if pipe.scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            f"generator.model: {cfg.model} is distilled for a stochastic sampler of its own (stochastic_sampling); its steps cannot be replayed"
        )
    if not hasattr(pipe, "transformer") or "latents" not in takes or not hasattr(pipe, "encode_prompt") or not any(embeds_returned(pipe)):
        raise ValueError(
            f"generator.model: {cfg.model} is a {name}, which cannot be replayed; expected a transformer pipeline whose call takes `latents` "
            "and what its encode_prompt returns, such as FLUX, SD3, Z-Image or Qwen-Image"
        )
    for key in cfg.call:
        if key not in takes:
            raise ValueError(f"generator.call.{key}: {name} takes no such argument; it takes {', '.join(takes)}")
    return pipe


def shard(transformer, device_type):
    """FSDP2: each rank keeps its part of the frozen weights, and a block's are gathered while it runs. In place.

    A LoRA that is added afterwards is none of FSDP's: it stays whole on every rank.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for blocks in transformer.children():
        if isinstance(blocks, torch.nn.ModuleList):
            for block in blocks:  # moved to the device one at a time: it never holds the whole
                fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True)  # the root would stay whole otherwise


# ---------------------------------------------------------------- main


def main(words):
    """[config.yaml, prompts and key=value in any order]: refine and draw, with the LoRAs of <out> where there are any; PNGs in <out>/drawn.

    Each PNG carries prompt, rewrite, seed and model as text fields; bench and reward.py read them.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    import grpo
    import refiner as L

    prompts = [w for w in words[1:] if not re.match(r"[\w.]+=", w)]
    refine = "refiner=null" not in words  # here it only means: draw the words as they are; stages may still need a refiner
    cfg = grpo.load_config([w for w in words if w not in prompts and w != "refiner=null"])
    if not prompts:
        raise ValueError('no prompt; expected python generator.py config.yaml "a prompt" ... [key=value ...]')
    device, dtype = grpo.pick_device(cfg.device), getattr(torch, cfg.dtype)
    texts, out = prompts, Path(cfg.out)
    if cfg.refiner and refine:
        texts = L.trained(cfg, device, dtype).rollout(prompts, 1, cfg.seed).texts
    gen = Generator(cfg.generator, device, dtype, cfg.micro_batch, cfg.offload)
    if (out / "generator").is_dir():
        gen.load_lora(out / "generator")
    images = gen.sample(texts, [(cfg.seed, i) for i in range(len(texts))])  # (B, 3, H, W)
    (out / "drawn").mkdir(parents=True, exist_ok=True)
    first = len(list((out / "drawn").glob("*.png")))
    for i, (image, prompt, text) in enumerate(zip(images, prompts, texts)):
        info = PngInfo()
        fields = dict(prompt=prompt, rewrite=text, seed=str(cfg.seed), model=cfg.generator.model)
        for name, value in fields.items():
            info.add_itxt(name, value)
        path = out / "drawn" / f"{first + i:05d}.png"
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()).save(path, pnginfo=info)
        print(json.dumps({"image": str(path), **fields}, ensure_ascii=False))


# ---------------------------------------------------------------- the kernel: one pass over the latents


def sde_step(x, v, noise, c_x, c_v, std):
    """x_next = c_x x + c_v v + std noise, stored in x's dtype, and its log-prob (B,), f32, no grad. noise None: no noise, no log-prob."""
    if noise is None:
        return (c_x * x.float() + c_v * v.float()).to(x.dtype), None
    x_next = torch.empty_like(x, memory_format=torch.contiguous_format)  # (B, ...)
    sums = _sums(x, v, x_next, None, None, coefficients_of(x, c_x, c_v, std), noise)
    return x_next, _log_prob(sums, std, x)


def sde_log_ratio_ref(x, v, x_next, old_v, ref_v, c_x, c_v, std):
    """What `sde_log_ratio` computes, by its definitions."""
    mean, old_mean, ref_mean = (c_x * x.float() + c_v * u.float() for u in (v, old_v, ref_v))  # (B, ...)
    return (
        gaussian_log_prob(x_next.float(), mean, std),
        guard_log_ratio(x_next.float(), mean, old_mean, std, c_v),
        gaussian_kl(mean, ref_mean, std),
    )


def sde_log_ratio(x, v, x_next, old_v, ref_v, c_x, c_v, std):
    """A stored step under the velocity v, in one pass -> log_prob, GRPO-Guard's log-ratio to old_v, KL to ref_v; each (B,) f32.

    x, v, x_next, old_v, ref_v (B, ...) of any shape and float dtype; ref_v None: KL 0. c_x, c_v, std: floats or (B,), so every kind of step is
    this one. The gradient goes to v alone. With d = x_next - mean, w = v - old_v, r = v - ref_v and n dimensions, all is in three sums,

        log_prob = -sum d d / 2 std^2 n - log std sqrt(2 pi),   guard = sign(c_v) sum (d + c_v w) w / std n,   KL = c_v^2 sum r r / 2 std^2 n

    and backward is one more pass that makes d, w and r again instead of keeping them.
    """
    return _SdeLogRatio.apply(x, v, x_next, old_v, ref_v, coefficients_of(x, c_x, c_v, std))


def dimensions(x):
    return math.prod(x.shape[1:])


def coefficients_of(x, *values):
    """c_x, c_v, std, floats or (B,) -> (B, 3) f32"""
    columns = [torch.as_tensor(c, dtype=torch.float32, device=x.device).expand(len(x)) for c in values]
    return torch.stack(columns, 1)


def _log_prob(sums, std, x):
    n = dimensions(x)
    std = torch.as_tensor(std, dtype=torch.float32, device=x.device)
    return -sums[:, 0] / (2 * std**2 * n) - std.log() - 0.5 * math.log(2 * math.pi)


class _SdeLogRatio(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, x_next, old_v, ref_v, coefficients):
        ctx.save_for_backward(x, v, x_next, old_v, ref_v, coefficients)
        ctx.set_materialize_grads(False)
        n, (_, c_v, std) = dimensions(x), coefficients.unbind(1)
        sums = _sums(x, v, x_next, old_v, ref_v, coefficients)  # (B, 3)
        guard = c_v.sign() * sums[:, 1] / (std * n)
        return _log_prob(sums, std, x), guard, c_v**2 * sums[:, 2] / (2 * std**2 * n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, v, x_next, old_v, ref_v, coefficients = ctx.saved_tensors
        n, (_, c_v, std) = dimensions(x), coefficients.unbind(1)
        log_prob, guard, kl = (torch.zeros_like(std) if g is None else g for g in grads)  # (B,)
        factors = torch.stack([log_prob * c_v / std**2, guard * c_v.sign() / std, kl * c_v**2 / std**2], 1) / n  # (B, 3)
        return None, _grad(x, v, x_next, old_v, ref_v, coefficients, factors), None, None, None, None


def _sums(x, v, x_next, old_v, ref_v, coefficients, noise=None):
    """-> (B, 3): sums over a sample's dimensions of d d, (d + c_v w) w, r r; with noise, x_next is drawn first, in place"""
    if use_triton(x):
        return _sums_triton(x, v, x_next, old_v, ref_v, coefficients, noise)
    sums = torch.zeros(len(x), 3)
    for b, (c_x, c_v, std) in enumerate(coefficients.tolist()):  # a sample at a time stays in the cache
        vb = v[b].float().flatten()  # (n,)
        mean = (x[b].float() * c_x).flatten().add_(vb, alpha=c_v)  # (n,)
        if noise is not None:
            x_next[b] = torch.add(mean, noise[b].flatten(), alpha=std).view(x_next[b].shape)
        d = torch.sub(x_next[b].float().flatten(), mean, out=mean)
        sums[b, 0] = d.dot(d)
        if old_v is not None:
            w = vb - old_v[b].float().flatten()
            sums[b, 1] = d.add_(w, alpha=c_v).dot(w)
        if ref_v is not None:
            r = vb - ref_v[b].float().flatten()
            sums[b, 2] = r.dot(r)
    return sums


def _grad(x, v, x_next, old_v, ref_v, coefficients, factors):
    """-> (B, ...), v's dtype: f_0 d + f_1 (d + c_v w) + f_2 r"""
    if use_triton(x):
        return _grad_triton(x, v, x_next, old_v, ref_v, coefficients, factors)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for b, ((c_x, c_v, _), (f0, f1, f2)) in enumerate(zip(coefficients.tolist(), factors.tolist())):
        vb = v[b].float()
        grad = (x[b].float() * -c_x).add_(vb, alpha=-c_v).add_(x_next[b].float()).mul_(f0 + f1)  # (...)
        if f1:
            grad.add_(vb, alpha=f1 * c_v).sub_(old_v[b].float(), alpha=f1 * c_v)
        if ref_v is not None and f2:
            grad.add_(vb, alpha=f2).sub_(ref_v[b].float(), alpha=f2)
        out[b] = grad
    return out


def use_triton(x):
    """On a GPU; TRITON_INTERPRET=1 runs the kernels on a CPU, to check what they compute, not how fast."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


BLOCK = 2048  # elements of one program


def _sums_triton(x, v, x_next, old_v, ref_v, coefficients, noise):
    B, n = len(x), dimensions(x)
    blocks = triton.cdiv(n, BLOCK)
    x, v, old, ref, coefficients, *noise = (t.contiguous() for t in (
        x, v, v if old_v is None else old_v, v if ref_v is None else ref_v, coefficients, *([] if noise is None else [noise])))  # fmt: skip
    x_next = x_next if noise else x_next.contiguous()
    partial = torch.empty(B, blocks, 3, device=x.device)  # two stages, in a fixed order: the same bits every time
    _sums_kernel[(B, blocks)](x, v, x_next, old, ref, coefficients, noise[0] if noise else x, partial, n, BLOCK=BLOCK,
                              DRAW=bool(noise), OLD=old_v is not None, REF=ref_v is not None)  # fmt: skip
    return partial.sum(1)


def _grad_triton(x, v, x_next, old_v, ref_v, coefficients, factors):
    B, n = len(x), dimensions(x)
    x, v, x_next, old, ref, coefficients, factors = (
        t.contiguous() for t in (x, v, x_next, old_v, v if ref_v is None else ref_v, coefficients, factors)
    )
    out = torch.empty_like(v)
    _grad_kernel[(B, triton.cdiv(n, BLOCK))](x, v, x_next, old, ref, coefficients, factors, out, n, BLOCK=BLOCK)
    return out


if triton:

    @triton.jit
    def _sums_kernel(
        x, v, x_next, old_v, ref_v, coefficients, noise, partial, n,
        BLOCK: tl.constexpr, DRAW: tl.constexpr, OLD: tl.constexpr, REF: tl.constexpr,
    ):  # fmt: skip
        """One program a block of a sample; partial is (B, blocks, 3)."""
        b, block = tl.program_id(0), tl.program_id(1)
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside, at = i < n, b.to(tl.int64) * n + i  # (BLOCK,)
        c_x, c_v, std = tl.load(coefficients + 3 * b), tl.load(coefficients + 3 * b + 1), tl.load(coefficients + 3 * b + 2)
        v_ = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        mean = c_x * tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + c_v * v_
        if DRAW:
            drawn = mean + std * tl.load(noise + at, mask=inside, other=0.0)
            tl.store(x_next + at, drawn, mask=inside)
            next_ = drawn.to(x_next.dtype.element_ty).to(tl.float32)  # as it is stored
        else:
            next_ = tl.load(x_next + at, mask=inside, other=0.0).to(tl.float32)
        d = next_ - mean  # 0 outside
        out = partial + (b * tl.num_programs(1) + block) * 3
        tl.store(out, tl.sum(d * d))
        guard, kl = 0.0, 0.0
        if OLD:
            w = v_ - tl.load(old_v + at, mask=inside, other=0.0).to(tl.float32)
            guard = tl.sum((d + c_v * w) * w)
        if REF:
            r = v_ - tl.load(ref_v + at, mask=inside, other=0.0).to(tl.float32)
            kl = tl.sum(r * r)
        tl.store(out + 1, guard)
        tl.store(out + 2, kl)

    @triton.jit
    def _grad_kernel(x, v, x_next, old_v, ref_v, coefficients, factors, out, n, BLOCK: tl.constexpr):
        b = tl.program_id(0)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, at = i < n, b.to(tl.int64) * n + i  # (BLOCK,)
        c_x, c_v = tl.load(coefficients + 3 * b), tl.load(coefficients + 3 * b + 1)
        f0, f1, f2 = tl.load(factors + 3 * b), tl.load(factors + 3 * b + 1), tl.load(factors + 3 * b + 2)
        v_ = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(x_next + at, mask=inside, other=0.0).to(tl.float32) - c_v * v_
        d -= c_x * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        w = v_ - tl.load(old_v + at, mask=inside, other=0.0).to(tl.float32)
        r = v_ - tl.load(ref_v + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, f0 * d + f1 * (d + c_v * w) + f2 * r, mask=inside)


if __name__ == "__main__":
    from grpo import cli

    cli(lambda: main(sys.argv[1:]))
