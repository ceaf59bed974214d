"""generator.py, pipeline.py: the steps, record and replay, noise, prompts, LoRA files, what is refused."""

import functools
import math
from collections import Counter

import numpy as np
import generator
import pipelines
import pytest
import torch
from conftest import damage, nudge, perturb, refuses
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from torch.testing import assert_close

from common import ConfigError, rng
from generator import (
    Generator,
    GeneratorConfig,
    draw_times,
    draw_window,
    elbo,
    normal,
    sde_coefficients,
)
from grpo import clipped_loss
from pipeline import reconstruct
from pipelines import KEYS, PROMPTS, ROWS

WINDOW = range(1, 3)


def randomly(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---------------------------------------------------------------- steps

TIMES = [(1.0, 0.9), (0.95, 0.8), (0.4, 0.25), (0.1, 0.0)]
STEPS = pytest.mark.parametrize("t,s", TIMES)


@STEPS
def test_cps_keeps_the_coefficients_of_data_and_noise(t, s):
    """With the true velocity, (1-t) x0 + t eps becomes (1-s) x0 plus noise of std s, old and new."""
    x0 = randomly(1000)
    eps = randomly(1000)
    c_x, c_v, std = sde_coefficients("cps", t, s, 0.7, 0.96)
    mean = c_x * ((1 - t) * x0 + t * eps) + c_v * (eps - x0)
    kept = math.sqrt(s**2 - std**2)
    assert_close(mean, (1 - s) * x0 + kept * eps)
    assert std == pytest.approx(s * math.sin(0.7 * math.pi / 2))


@STEPS
def test_flow_is_euler_maruyama_of_the_sde(t, s):
    """dx = [v - g^2/2 score] dt + g dw, backwards in time by h, with score = -(x + (1-t) v) / t."""
    h = t - s
    x = randomly(7)
    v = randomly(7)
    g2 = (
        0.9**2 * t / (1 - min(t, 0.96))
    )  # finite at t = 1, by the second time of the grid
    score = -(x + (1 - t) * v) / t
    c_x, c_v, std = sde_coefficients("flow", t, s, 0.9, 0.96)
    assert_close(c_x * x + c_v * v, x - h * (v - g2 / 2 * score))
    assert std == pytest.approx(math.sqrt(g2 * h))


@pytest.mark.parametrize("sde", ["ode", "flow", "cps"])
@STEPS
def test_without_noise_a_step_is_eulers(sde, t, s):
    """Noise level 0 gives x - h v."""
    assert sde_coefficients(sde, t, s, 0.0, 0.9) == pytest.approx((1, s - t, 0))


def test_the_window_is_early_and_never_last():
    """Every start in the first half occurs, or up to last_start; even the widest window leaves out the last step."""
    rngs = [np.random.default_rng(i) for i in range(100)]
    for last_start, starts in [(None, 4), (5, 6)]:
        windows = {draw_window(10, 2, last_start, r) for r in rngs}
        assert windows == {range(start, start + 2) for start in range(starts)}
    assert draw_window(10, 9, None, rngs[0]) == range(9)


def test_times_are_spread_over_the_grid():
    """One in each of two equal parts of ten places, each of which comes up"""
    rngs = [np.random.default_rng(i) for i in range(200)]
    drawn = [draw_times(10, 2, r) for r in rngs]
    assert {first for first, _ in drawn} == {0, 1, 2, 3, 4}
    assert {second for _, second in drawn} == {5, 6, 7, 8, 9}
    assert draw_times(5, 5, rngs[0]) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- record and replay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_pass_has_a_ratio_of_1(tiny_generator, dtype):
    """To the bit, by either ratio; its gradient reaches all of the LoRA, in f32, and nothing else."""
    gen = tiny_generator(dtype=dtype)
    _, record = gen.rollout(PROMPTS, KEYS, WINDOW)
    for gen.cfg.ratio in ("ppo", "guard"):
        for log_ratio, *_ in gen.terms(record, ROWS):
            assert torch.equal(log_ratio.exp(), torch.ones(4, 1))
            log_ratio.sum().backward()
    named = gen.model.named_parameters()
    assert [n for n, p in named if p.grad is not None] == list(gen.lora)
    for p in gen.parameters():
        assert p.grad.dtype == torch.float32 and p.grad.any()


@pytest.mark.parametrize("sde", ["cps", "flow"])
def test_a_step_is_its_formula_with_the_noise_of_its_key(
    tiny_generator, sde
):
    """x_next = c_x x + c_v v + std z. A key gives x; with another word it gives z of each step.

    So a picture does not depend on its micro-batch.
    """
    gen = tiny_generator(sde=sde, noise_level=0.6, micro_batch=3)
    _, record = gen.rollout(PROMPTS, KEYS, range(2))
    rngs = [rng("step", *key[1:]) for key in KEYS]
    shape = record.steps[0].x.shape[1:]
    x = normal([rng(*key) for key in KEYS], shape)  # (B, ...)
    assert x.std() == pytest.approx(1, abs=0.05)
    grid = gen.scheduler.grid
    for i, step in enumerate(record.steps):
        assert torch.equal(step.x, x)
        c_x, c_v, std = sde_coefficients(
            sde, grid[i], grid[i + 1], 0.6, grid[1]
        )
        assert step.coefficients == (c_x, c_v, std)
        x = step.x_next
        assert_close(
            x, c_x * step.x + c_v * step.v + std * normal(rngs, shape)
        )


def test_branches_share_what_comes_before_the_window(tiny_generator):
    """Drawn once, equal to drawing it for each; they part at the window, and splits change nothing."""
    cats = ["a cat"] * 6
    keys = [("test", row) for row in range(6)]
    gen = tiny_generator(branches=3, micro_batch=6)
    sizes = []

    def count(module, args, options):
        sizes.append(len(options["hidden_states"]))

    gen.model.register_forward_pre_hook(count, with_kwargs=True)
    whole, record = gen.rollout(cats, keys, range(2, 4))
    assert sizes == [2, 2, 6, 6, 6]  # of 5 steps
    x_next = record.steps[0].x_next  # (B, ...)
    assert torch.pdist(x_next.flatten(1)).min() > 0.1
    _, early = gen.rollout(cats, keys, range(2))
    starts = normal([rng("test", start) for start in (0, 0, 0, 1, 1, 1)], x_next.shape[1:])
    assert torch.equal(early.steps[0].x, starts)
    split, _ = tiny_generator(branches=3, micro_batch=4).rollout(cats, keys, range(2, 4))
    assert_close(split, whole)
    looks, _ = gen.rollout(cats, keys)
    assert torch.pdist(looks.flatten(1)).min() > 0.1  # noise of their own


# ---------------------------------------------------------------- prompts


def test_texts_are_encoded_once_and_a_micro_batch_at_a_time(tiny_generator, monkeypatch):
    """One pass over the distinct texts serves a rollout and all its replays; then the encoders rest."""
    gen = tiny_generator(micro_batch=3, offload=True)
    encode = type(gen.pipe).encode_prompt
    seen = []

    @functools.wraps(encode)
    def spy(self, prompt, *args, **kwargs):
        seen.append(prompt)
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(type(gen.pipe), "encode_prompt", spy)
    prompts = [f"number {i // 2}" for i in range(14)]
    _, record = gen.rollout(prompts, [("test", i) for i in range(14)], WINDOW)
    assert max(map(len, seen)) == 3
    times = Counter(sum(seen, []))
    # the first may stand in an example too
    assert [times[text] for text in prompts[2:]] == [1] * 12
    calls = len(seen)
    list(gen.terms(record, [0, 5, 13]))
    assert len(seen) == calls
    assert [getattr(gen.pipe, name) for name in gen.waiting] == [None, None]


# ---------------------------------------------------------------- what GRPO asks


ADVANTAGE = torch.tensor([[1.0], [-2.0], [0.5], [0.7]])


def published_loss(gen, record):
    """RealGen's released trainer, step by step, transcribed from its formulas and not from ours

    -> its loss, and the plain log-ratio of each step
    """
    total = 0
    plain = []
    for step in record.steps:
        t, s = gen.grid[step.index], gen.grid[step.index + 1]
        h = t - s
        sigma = 0.9 * math.sqrt(t / (1 - (gen.grid[1] if t == 1 else t)))
        std = sigma * math.sqrt(h)

        def mean_of(v):
            score_part = sigma**2 / (2 * t) * (step.x + (1 - t) * v)
            return step.x - h * (v + score_part)

        def log_prob(mean):
            square = (step.x_next - mean) ** 2 / (2 * std**2)
            whole = -square - math.log(std) - math.log(math.sqrt(2 * math.pi))
            return whole.flatten(1).mean(1)

        v = gen.replay(record, step.index, step.x, ROWS)
        with torch.no_grad(), gen.reference():
            ref_v = gen.replay(record, step.index, step.x, ROWS)
        mean, old = mean_of(v), mean_of(step.v)
        bias = ((mean - old) ** 2 / (2 * std**2)).flatten(1).mean(1)
        plain.append(log_prob(mean) - log_prob(old))
        r = ((plain[-1] + bias) * std).exp()
        A = ADVANTAGE[:, 0]
        clip = gen.cfg.clip_range
        policy = torch.max(-A * r, -A * r.clamp(1 - clip, 1 + clip)).mean() / h
        total += policy + gen.cfg.beta * ((v - ref_v) ** 2).mean()
    return total / len(record.steps), torch.cat(plain)


def test_the_gradient_is_that_of_the_published_loss(tiny_generator):
    """Sign, scale, KL and clip, with samples inside and outside of the clip range; and ratio=ppo"""
    gen = tiny_generator(sde="flow", noise_level=0.9, beta=1.0)
    perturb(gen, 0.3)
    _, record = gen.rollout(PROMPTS, KEYS, WINDOW)
    nudge(gen)
    ratios = torch.cat([r.detach().abs() for r, *_ in gen.terms(record, ROWS)])
    gen.cfg.clip_range = ratios.quantile(0.5).item()  # between two samples
    total = 0
    clipped = []
    for log_ratio, kl, scale, weight, _ in gen.terms(record, ROWS):
        loss, acted = clipped_loss(log_ratio, scale * ADVANTAGE, *gen.clip())
        total += ((loss + gen.cfg.beta * kl) * weight).sum()
        clipped.append(acted)
    total /= gen.count(record, ROWS)
    assert 0 < torch.cat(clipped).float().mean() < 1
    published, plain = published_loss(gen, record)
    assert_close(total, published, rtol=1e-3, atol=1e-4)
    got = torch.autograd.grad(total, gen.parameters())
    want = torch.autograd.grad(published, gen.parameters())
    size = max(g.abs().max() for g in want)
    assert_close(got, want, rtol=1e-2, atol=1e-3 * size.item())
    gen.cfg.ratio = "ppo"
    ratios = torch.cat([r for r, *_ in gen.terms(record, ROWS)])
    assert_close(ratios[:, 0], plain, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- elbo

MEMBERS = [("picture", 0, 0, row // 2, row % 2) for row in range(4)]


def test_elbo_is_flow_matching_weighted_by_the_advantage(tiny_generator):
    """At ratio 1 the loss has the gradient of A mean((v - (eps - x0))^2) / 2; the KL is mean((v - v_ref)^2).

    x0 is what the pipeline's own decoder makes the picture of.
    """
    gen = tiny_generator(log_prob="elbo", beta=1.0)
    images, record = gen.rollout(PROMPTS, MEMBERS, times=[1, 4], num_steps=3)
    x0 = record.steps[0].x0  # (4, ...)
    plain, _ = gen.rollout(PROMPTS, MEMBERS, num_steps=3)
    assert torch.equal(images, plain)
    assert torch.equal(gen.scheduler.latest, x0)
    total = 0
    matching = 0
    for place, (log_ratio, kl, *_) in zip((1, 4), gen.terms(record, ROWS), strict=True):
        assert not log_ratio.any()
        total += clipped_loss(log_ratio, ADVANTAGE, *gen.clip())[0].sum()
        keys = [("noised", 0, 0, row // 2, place) for row in ROWS]
        eps = normal([rng(*key) for key in keys], x0.shape[1:])  # (4, ...)
        t = gen.grid[place]
        x = (1 - t) * x0 + t * eps
        v = gen.replay(record, place, x, ROWS)
        square = (v - (eps - x0)).square().flatten(1).mean(1)  # (4,)
        matching += (ADVANTAGE[:, 0] * square).sum() / 2
        with gen.reference():
            ref_v = gen.replay(record, place, x, ROWS)
        assert_close(kl[:, 0], (v - ref_v).square().flatten(1).mean(1))
    got = torch.autograd.grad(total, gen.parameters())
    want = torch.autograd.grad(matching, gen.parameters())
    assert all(g.any() for g in got)
    assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_equal_pictures_of_a_prompt_teach_nothing(tiny_generator):
    """They share t and noise, so what the noise is worth cancels: the advantages of a group sum to 0."""
    gen = tiny_generator(log_prob="elbo", beta=0.0)
    _, record = gen.rollout(PROMPTS, MEMBERS, times=[0, 3])
    x0 = record.steps[0].x0  # (4, ...)
    x0[1] = x0[0]
    for second, nothing in ((-1.0, True), (1.0, False)):
        total = sum((r[0] + second * r[1]).sum() for r, *_ in gen.terms(record, [0, 1]))
        grads = torch.autograd.grad(total, gen.parameters())
        assert (sum(g.square().sum() for g in grads) < 1e-10) == nothing


def test_elbo_points_where_the_exact_gradient_does():
    """x0 ~ N(mu, 1/4), whose best velocity is known: E[A d elbo / d mu] has the sign of E[A d log p / d mu].

    For three rewards: larger, smaller and farther from mu is better; the last moves mu nowhere.
    """
    g = torch.Generator().manual_seed(0)
    mu = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    x0, eps = torch.randn(2, 100_000, generator=g, dtype=torch.float64)
    x0 = x0 / 2
    t = torch.rand(100_000, generator=g, dtype=torch.float64)
    x = (1 - t) * x0 + t * eps
    spread = (1 - t) ** 2 / 4 + t**2  # the variance of x
    v = (t - (1 - t) / 4) / spread * (x - (1 - t) * mu) - mu  # E[eps - x0 | x]
    log_prob = elbo(v[:, None], (eps - x0)[:, None])  # (n,)
    for reward, sign in ((x0, 1), (-x0, -1), (x0**2, 0)):
        A = (reward - reward.mean()) / reward.std()
        (slope,) = torch.autograd.grad((A * log_prob).mean(), mu, retain_graph=True)
        exact = (A * x0 * 4).mean()  # E[A d log p / d mu]
        assert slope.round(decimals=1).sign() == exact.round(decimals=1).sign() == sign


# ---------------------------------------------------------------- LoRA


def test_ema_and_live_weights_never_alias(tiny_generator):
    """It follows each second step by 1 - min(n / (n + 9), ema), acts in ema_weights() alone, and rests meanwhile."""
    gen = tiny_generator(ema=0.25, ema_every=2)
    name, p = next(iter(gen.lora.items()))
    start = p.detach().clone()
    p.data += 1
    moved = []
    for _ in range(4):
        gen.update_ema()
        moved.append((gen.ema[name] - start).mean().item())
    assert moved == pytest.approx([0, 9 / 11, 9 / 11, 1 - 0.25 * 2 / 11], abs=1e-5)
    for _ in range(2):
        with gen.ema_weights():
            assert_close(p.data, start + moved[-1])
        assert_close(p.data, start + 1)
    p.data += 1
    assert_close(gen.ema[name], start + moved[-1])


@pytest.mark.parametrize("kind", ["renamed", "reshaped", "not finite"])
def test_the_saved_lora_is_the_average_and_a_damaged_one_is_refused(tiny_generator, tmp_path, kind):
    """Loaded, it can be trained. Libraries skip names that they do not know."""
    gen = tiny_generator()
    nudge(gen)  # the live weights, which are not saved
    gen.save(tmp_path)
    again = Generator(gen.cfg)
    again.load(tmp_path)
    for name, p in again.lora.items():
        assert p.requires_grad and torch.equal(p, gen.ema[name])
    damage(tmp_path / "pytorch_lora_weights.safetensors", kind)
    with refuses(str(tmp_path)):
        Generator(gen.cfg).load(tmp_path)


# ---------------------------------------------------------------- other families


def test_photographs_pass_through_any_autoencoder():
    """One that takes pictures, one that takes films"""
    photos = torch.rand(3, 3, 16, 16)
    for model in (pipelines.vae(), pipelines.qwen_vae()):
        assert reconstruct(model, photos, "cpu", 2).shape == photos.shape


CHANGED = [
    ("LongCatImagePipeline, enable_prompt_rewrite", "the prompt that"),
    ("QwenImage21Pipeline, two sample_sigmas", "generator.num_steps, draw_steps: 4"),
    ("PRXPipeline", "PRXTransformer2DModel"),
    # from some step number on; the only step of a replay is number 0
    ("StableDiffusion3Pipeline, skip_guidance_layers", "step 1 is another when replayed"),
    (
        "FluxPipeline, negative_prompt without true_cfg_scale",
        "does not encode the negative_prompt",
    ),
]


@pytest.mark.parametrize("name,message", CHANGED)
def test_a_pipeline_that_would_train_otherwise_is_refused(name, message):
    """At load, in one line"""
    with refuses(message):
        pipelines.row(name)


# ---------------------------------------------------------------- what is refused

REFUSED = [
    (dict(height=17), r"height, width: 17, 16; .* draws \(16, 16\)"),
    (dict(lora_targets=["to_z"]), "generator.lora_targets .*to_z"),
    (dict(call=dict(guidance=3.0)), "generator.call .*guidance"),
    (dict(call=dict(height=64)), "generator.call .*height"),
]


@pytest.mark.parametrize("changes,message", REFUSED)
def test_what_cannot_be_trained_is_refused(tiny_generator, changes, message):
    """A size that is not drawn, a wrong layer, what the call does not take, and what we set ourselves."""
    with refuses(message):
        tiny_generator(**changes)


SAMPLERS = [
    DDIMScheduler(),
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_sampler_is_refused(tmp_path, sampler):
    """One that is no flow, and one that adds noise by itself."""
    pipe = DiffusionPipeline.from_pretrained("nano/flux", scheduler=sampler)
    pipe.save_pretrained(tmp_path)
    with refuses("DDIM|stochastic_sampling"):
        Generator(GeneratorConfig(model=str(tmp_path)))


def test_a_bug_of_ours_keeps_its_traceback(tiny_generator, monkeypatch):
    """At load too, where whatever a library raises is one line"""
    bug = lambda *arguments: [][0]
    monkeypatch.setattr(generator, "sde_coefficients", bug)
    with pytest.raises(ConfigError):  # the line stands in this file, so it passes for a library's
        tiny_generator()
    monkeypatch.undo()
    monkeypatch.setattr(generator, "replace", None)
    with pytest.raises(TypeError):
        tiny_generator()
