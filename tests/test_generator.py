"""Laws of generator.py: the SDE steps, record and replay, noise, window, LoRA."""

import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import generator as G

PIPELINES = ["flux", "sd3", "zimage", "qwen"]
KEYS = [(0, 0, p, m) for p in range(3) for m in range(2)]
PROMPTS = [t for t in ["a cat", "a tabby cat, wide view, in soft light", "a dog"] for _ in range(2)]


def randomly(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("t,s", [(1.0, 0.9), (0.95, 0.8), (0.4, 0.25)])
def test_cps_keeps_its_coefficients(t, s):
    """With an oracle velocity, cps turns (1-t) x0 + t eps into (1-s) x0 plus noise of standard deviation exactly s."""
    x0, eps = randomly(4, 1000), randomly(4, 1000, seed=1)
    c_x, c_v, std = G.sde_coefficients("cps", t, s, 0.7, 0.96)
    mean = c_x * ((1 - t) * x0 + t * eps) + c_v * (eps - x0)
    kept = math.sqrt(s**2 - (s * math.sin(0.7 * math.pi / 2)) ** 2)
    torch.testing.assert_close(mean, (1 - s) * x0 + kept * eps)
    assert kept**2 + std**2 == pytest.approx(s**2)


@pytest.mark.parametrize("t,s", [(0.95, 0.8), (0.4, 0.25)])
def test_flow_step_is_euler_maruyama_of_the_sde(t, s):
    """dx = [v + g^2/2t (x + (1-t) v)] dt + g dw, run backwards in time by h: derived here from the score, not from the code."""
    a, h = 0.9, t - s
    x, v = randomly(4, 7), randomly(4, 7, seed=1)
    g2 = a**2 * t / (1 - t)
    score = -(x + (1 - t) * v) / t  # -eps / t
    c_x, c_v, std = G.sde_coefficients("flow", t, s, a, 0.99)
    torch.testing.assert_close(c_x * x + c_v * v, x - h * (v - g2 / 2 * score))
    assert std == pytest.approx(math.sqrt(g2 * h))


def test_flow_is_finite_at_pure_noise():
    """At t = 1 the second time of the grid stands in the denominator."""
    _, _, std = G.sde_coefficients("flow", 1.0, 0.9, 0.7, 0.9)
    assert std == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1))


@pytest.mark.parametrize("sde", ["ode", "flow", "cps"])
@pytest.mark.parametrize("t,s", [(1.0, 0.9), (0.5, 0.2), (0.1, 0.0)])
def test_no_noise_is_euler(sde, t, s):
    """Noise level 0 gives x - h v for every step."""
    c_x, c_v, std = G.sde_coefficients(sde, t, s, 0.0, 0.9)
    assert (c_x, c_v, std) == (pytest.approx(1.0), pytest.approx(-(t - s)), 0.0)


def test_log_prob_and_kl_are_those_of_torch_distributions():
    """Both are means over the latent dimensions of the Gaussian's own log-prob and KL."""
    x, mean, other = randomly(3, 5, 2, 4), randomly(3, 5, 2, 4, seed=1), randomly(3, 5, 2, 4, seed=2)
    normal, reference = torch.distributions.Normal(mean, 0.3), torch.distributions.Normal(other, 0.3)
    torch.testing.assert_close(G.gaussian_log_prob(x, mean, 0.3), normal.log_prob(x).flatten(1).mean(1))
    kl = torch.distributions.kl_divergence(normal, reference)
    torch.testing.assert_close(G.gaussian_kl(mean, other, 0.3), kl.flatten(1).mean(1))


def test_guard_ratio_is_its_definition_for_each_sample():
    """A loop over samples and dimensions gives the same numbers, and the plain log-ratio differs from it by bias and scale alone."""
    x, mean, old = randomly(3, 4, 5), randomly(3, 4, 5, seed=1), randomly(3, 4, 5, seed=2)
    std, c_v = 0.6, -0.08
    ratio = G.guard_log_ratio(x, mean, old, std, c_v)
    for b in range(3):
        terms = [
            (xi - oi) / std * (mi - oi) / abs(c_v)
            for xi, mi, oi in zip(x[b].flatten(), mean[b].flatten(), old[b].flatten())
        ]
        assert ratio[b].item() == pytest.approx((sum(terms) / len(terms)).item())
    plain = G.gaussian_log_prob(x, mean, std) - G.gaussian_log_prob(x, old, std)
    bias = ((mean - old) ** 2).flatten(1).mean(1) / (2 * std**2)
    torch.testing.assert_close(ratio * abs(c_v) / std, plain + bias)


def test_window_is_early_and_never_the_last_step():
    """Over many draws every start in the first half occurs, and the last step of the grid never."""
    windows = [G.draw_window(10, 2, np.random.default_rng([0, i])) for i in range(200)]
    assert {w.start for w in windows} == {0, 1, 2, 3} and all(len(w) == 2 for w in windows)
    assert all(9 not in G.draw_window(10, 9, np.random.default_rng(i)) for i in range(20))


# ---------------------------------------------------------------- record and replay


@pytest.mark.parametrize("name", PIPELINES)
def test_replay_repeats_the_recorded_log_probs_exactly(tiny_generator, name):
    """FLUX, SD3 with CFG, Z-Image with CFG, Qwen-Image with true CFG: the same numbers, a ratio of exactly 1, gradient in the LoRA alone."""
    gen = tiny_generator(name)
    images, trajectory = gen.rollout(PROMPTS, KEYS, range(1, 3))
    assert images.shape == (6, 3, 16, 16) and 0 <= images.min() and images.max() <= 1 and images.std() > 0
    assert trajectory.index == [1, 2]
    for k in range(2):
        for rows in gen.chunks(6):
            log_prob, mean, std, c_v = gen.replay(trajectory, k, rows)
            assert torch.equal(log_prob.detach(), trajectory.log_prob[k][rows])
            ratio = G.guard_log_ratio(trajectory.x_next[k][rows], mean, trajectory.mean[k][rows], std, c_v).exp()
            assert torch.equal(ratio.detach(), torch.ones(len(rows)))
            log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in gen.lora.items() if "lora_A" in n)
    assert all(p.grad is None for n, p in gen.transformer.named_parameters() if n not in gen.lora)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("sde", ["cps", "flow"])
def test_recorded_steps_follow_from_the_velocity(tiny_generator, name, sde):
    """The recorded mean is the step's formula applied to the transformer's own output at the recorded x."""
    gen = tiny_generator(name, sde=sde, noise_level=0.5)
    seen = []
    step = type(gen.scheduler).step

    def spy(self, v, t, x, **kw):
        seen.append((v.detach().clone(), x.detach().clone()))
        return step(self, v, t, x, **kw)

    gen.scheduler.step = spy.__get__(gen.scheduler)
    _, trajectory = gen.rollout(PROMPTS[:4], KEYS[:4], range(0, 2))
    grid = gen.scheduler.grid
    for k in range(2):
        v, x = seen[k]
        c_x, c_v, std = G.sde_coefficients(sde, grid[k], grid[k + 1], 0.5, grid[1])
        torch.testing.assert_close(trajectory.mean[k], c_x * x.float() + c_v * v.float())
        z = (trajectory.x_next[k] - trajectory.mean[k]) / std
        assert 0.8 < z.std() < 1.2  # standard normal


def test_a_rollout_without_window_is_the_stock_pipeline(checkpoints, tiny_generator):
    """No stochastic step: the stock Euler scheduler draws the same picture from the same latents."""
    gen = tiny_generator(perturb=0)
    keys = KEYS[:2]
    images = gen.sample(["a cat", "a dog"], keys)
    stock = DiffusionPipeline.from_pretrained(checkpoints("flux"))
    stock.set_progress_bar_config(disable=True)
    latents = G.normal([np.random.default_rng(k) for k in keys], gen.latent_shape)
    want = stock(
        ["a cat", "a dog"],
        latents=latents,
        height=16,
        width=16,
        num_inference_steps=5,
        output_type="pt",
        **gen.cfg.call,
    ).images
    torch.testing.assert_close(images, want)


def test_the_pipeline_is_stock(tiny_generator):
    """Only the scheduler differs: no method of the pipeline or of the transformer is replaced."""
    gen = tiny_generator()
    assert type(gen.pipe).__module__.startswith("diffusers.") and type(gen.transformer).__module__.startswith(
        "diffusers."
    )
    assert not [n for n, v in vars(gen.pipe).items() if inspect.isfunction(v) or inspect.ismethod(v)]


# ---------------------------------------------------------------- noise


def test_noise_is_distinct_and_independent_of_the_split(tiny_generator):
    """Every sample has its own noise, in x_T and in each step; splitting the batch in other ways changes nothing that is drawn."""
    prompts = ["a cat"] * 6
    _, whole = tiny_generator(micro_batch=6).rollout(prompts, KEYS, range(0, 2))
    _, split = tiny_generator(micro_batch=4).rollout(prompts, KEYS, range(0, 2))
    for k in range(2):
        torch.testing.assert_close(whole.x_next[k], split.x_next[k], rtol=1e-4, atol=1e-4)
        z = (whole.x_next[k] - whole.mean[k]).flatten(1)
        correlation = torch.corrcoef(torch.cat([z, whole.x[0].flatten(1)])) - torch.eye(12)
        assert correlation.abs().max() < 0.6  # no two rows share noise, nor do steps and starts


def test_noise_depends_on_run_iteration_prompt_and_sample(tiny_generator):
    """Each part of the key changes the picture; the same key repeats it."""
    gen = tiny_generator()
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)]
    images = gen.sample(["a cat"] * 6, keys)
    assert torch.allclose(images[0], images[5], atol=1e-5)
    for i in range(5):
        for j in range(i):
            assert (images[i] - images[j]).abs().mean() > 1e-3


def test_share_noise_shares_the_start_of_a_group_alone(tiny_generator):
    """x_T is one per prompt, the stochastic steps stay distinct."""
    _, t = tiny_generator(share_noise=True).rollout(PROMPTS, KEYS, range(0, 2))
    x = t.x[0]
    assert torch.equal(x[0], x[1]) and not torch.equal(x[0], x[2])
    assert not torch.allclose(t.x_next[0][0], t.x_next[0][1])


# ---------------------------------------------------------------- LoRA


def test_lora_file_reproduces_the_samples_in_a_fresh_stock_pipeline(checkpoints, tiny_generator, tmp_path):
    """pipe.load_lora_weights(folder) and nothing else: alpha travels in the file."""
    gen = tiny_generator(perturb=0.5)
    latents = G.normal([np.random.default_rng(1)], gen.latent_shape)
    args = dict(latents=latents, height=16, width=16, num_inference_steps=5, output_type="pt", **gen.cfg.call)
    want = gen.pipe("a cat", **args).images
    gen.save_lora(tmp_path)
    stock = DiffusionPipeline.from_pretrained(checkpoints("flux"))
    stock.set_progress_bar_config(disable=True)
    without = stock("a cat", **args).images
    stock.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(stock("a cat", **args).images, want)
    assert (without - want).abs().mean() > 1e-4


def test_load_lora_gives_the_same_policy(tiny_generator, tmp_path):
    """A saved LoRA loaded into another Generator draws the same pictures and is trainable."""
    gen = tiny_generator(perturb=0.5)
    gen.save_lora(tmp_path)
    again = G.Generator(gen.cfg, micro_batch=4)
    again.load_lora(tmp_path)
    torch.testing.assert_close(again.sample(PROMPTS, KEYS), gen.sample(PROMPTS, KEYS))
    assert len(again.parameters()) == len(gen.parameters()) and all(p.requires_grad for p in again.parameters())


def test_reference_is_the_network_without_its_lora(tiny_generator):
    """Inside reference() the pictures are those before any LoRA, and outside they are not."""
    gen, plain = tiny_generator(perturb=0.5), tiny_generator(perturb=0)
    base = plain.sample(PROMPTS, KEYS)
    with gen.reference():
        assert torch.equal(gen.sample(PROMPTS, KEYS), base)
    assert (gen.sample(PROMPTS, KEYS) - base).abs().mean() > 1e-4


def test_ema_never_aliases_the_live_weights(tiny_generator):
    """Inside ema_weights() the average draws; after it the live weights are back, and training them leaves the average alone."""
    gen = tiny_generator(ema=0.5)
    name, p = next((n, p) for n, p in gen.lora.items() if "lora_B" in n)
    start = p.detach().clone()
    p.data += 1.0
    gen.update_ema()
    torch.testing.assert_close(gen.ema[name], start + 0.5)
    with gen.ema_weights():
        torch.testing.assert_close(p.data, start + 0.5)
        assert p.data_ptr() != gen.ema[name].data_ptr()
    torch.testing.assert_close(p.data, start + 1.0)
    p.data += 1.0
    torch.testing.assert_close(gen.ema[name], start + 0.5)


# ---------------------------------------------------------------- bad input


def test_what_cannot_be_trained_is_refused_with_its_reason(checkpoints, tmp_path):
    """Another scheduler, a folder that is no pipeline, an argument that the call does not take."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model_index.json"):
        G.Generator(G.GeneratorConfig(model=str(tmp_path / "empty")))
    pipe = DiffusionPipeline.from_pretrained(checkpoints("flux"))
    pipe.scheduler = DDIMScheduler()
    pipe.save_pretrained(tmp_path / "ddim")
    with pytest.raises(ValueError, match="DDIMScheduler; only FlowMatchEulerDiscreteScheduler"):
        G.Generator(G.GeneratorConfig(model=str(tmp_path / "ddim")))
    with pytest.raises(ValueError, match="generator.call.guidance: FluxPipeline takes no such argument"):
        G.Generator(G.GeneratorConfig(model=checkpoints("flux"), call={"guidance": 1.0}))
    with pytest.raises(ValueError, match="the last step is never stochastic"):
        G.GeneratorConfig(num_steps=4, window=4)
