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
            v = gen.replay(trajectory, k, rows)
            assert torch.equal(v.detach(), trajectory.v[k][rows])
            stored = trajectory.x_next[k][rows], trajectory.v[k][rows], None
            log_prob, guard, _ = G.sde_log_ratio(trajectory.x[k][rows], v, *stored, *trajectory.coefficients[k])
            assert torch.equal(log_prob.detach(), trajectory.log_prob[k][rows])
            assert torch.equal(guard.exp().detach(), torch.ones(len(rows)))
            log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in gen.lora.items() if "lora_A" in n)
    assert all(p.grad is None for n, p in gen.transformer.named_parameters() if n not in gen.lora)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("sde", ["cps", "flow"])
def test_recorded_steps_follow_from_the_velocity(tiny_generator, name, sde):
    """x_next minus the step's formula, applied to the transformer's own output at the recorded x, is standard normal noise times std."""
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
        assert trajectory.coefficients[k] == (c_x, c_v, std)
        assert torch.equal(trajectory.v[k], v) and torch.equal(trajectory.x[k], x)
        z = (trajectory.x_next[k] - (c_x * x.float() + c_v * v.float())) / std
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
        c_x, c_v, _ = whole.coefficients[k]
        z = (whole.x_next[k] - c_x * whole.x[k] - c_v * whole.v[k]).flatten(1)
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


# ---------------------------------------------------------------- the kernel


@pytest.fixture(params=["torch", "triton"])
def path(request, monkeypatch):
    """torch, then the Triton kernel in its interpreter, in blocks that no size below is a multiple of"""
    monkeypatch.setattr(G, "BLOCK", 64)
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert G.use_triton(torch.zeros(1))
    return request.param


STEP = dict(c_x=0.97, c_v=-0.08, std=0.6)
SHAPES = [(3, 4, 5, 7), (2, 33, 9), (2, 3, 2, 5, 7), (1, 1)]


def latents(shape, dtype=torch.float32):
    """x, v, x_next, old_v, ref_v"""
    g = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_log_ratio_against_its_definitions_in_float64(path, shape, dtype):
    """4-D, packed 3-D, 5-D and a single number: log-prob, Guard ratio, KL, and the gradient of a mix of them to v."""
    x, v, x_next, old_v, ref_v = latents(shape, dtype)
    got_v, want_v = v.clone().requires_grad_(True), v.double().requires_grad_(True)
    got = G.sde_log_ratio(x, got_v, x_next, old_v, ref_v, **STEP)
    doubles = [t.double() for t in (x_next, old_v, ref_v)]
    means = [0.97 * x.double() + -0.08 * u for u in (want_v, *doubles[1:])]
    normal = torch.distributions.Normal(means[0], 0.6)
    eps = (doubles[0] - means[1]) / 0.6
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(means[2], 0.6))
    want = [t.flatten(1).mean(1) for t in (normal.log_prob(doubles[0]), eps * (means[0] - means[1]) / 0.08, kl)]
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    for weights in ((1.0, -2.0, 3.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        (a,) = torch.autograd.grad(sum(w * t.sum() for w, t in zip(weights, got) if w), got_v, retain_graph=True)
        (b,) = torch.autograd.grad(sum(w * t.sum() for w, t in zip(weights, want) if w), want_v, retain_graph=True)
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_the_reference_is_the_definition(path):
    """sde_log_ratio_ref and sde_log_ratio: one number, with coefficients of each sample its own too."""
    tensors = latents((3, 6, 5))
    for a, b in zip(G.sde_log_ratio(*tensors, **STEP), G.sde_log_ratio_ref(*tensors, **STEP)):
        torch.testing.assert_close(a, b)
    c_x, c_v, std = torch.tensor([0.9, 0.8, 1.0]), torch.tensor([-0.1, 0.2, -0.3]), torch.tensor([0.5, 0.1, 0.9])
    whole = G.sde_log_ratio(*tensors, c_x, c_v, std)
    for i in range(3):
        alone = G.sde_log_ratio(*(t[i : i + 1] for t in tensors), float(c_x[i]), float(c_v[i]), float(std[i]))
        for a, b in zip(whole, alone):
            torch.testing.assert_close(a[i : i + 1], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_step_draws_and_its_log_prob_is_the_replayed_one(path, shape, dtype):
    """x_next is c_x x + c_v v + std noise as stored, and replaying it gives the same bits of log-prob; noise None is the mean."""
    x, v, noise, *_ = latents(shape, dtype)
    x_next, log_prob = G.sde_step(x, v, noise.float(), **STEP)
    want = (0.97 * x.double() - 0.08 * v.double() + 0.6 * noise.double()).to(dtype)
    assert x_next.dtype == dtype
    torch.testing.assert_close(x_next, want)
    assert torch.equal(G.sde_log_ratio(x, v, x_next, v, None, **STEP)[0], log_prob)
    euler, nothing = G.sde_step(x, v, None, 1.0, -0.1, 0.0)
    torch.testing.assert_close(euler, (x.double() - 0.1 * v.double()).to(dtype))
    assert nothing is None


def test_strided_latents_and_none_at_all(path):
    """Views give what their copies give, forward and gradient; a batch of none gives empty results."""
    tensors = [torch.randn(5, 3, 4).transpose(0, 1) for _ in range(5)]
    grads = []
    for args in (tensors, [t.contiguous() for t in tensors]):
        args[1] = args[1].detach().requires_grad_(True)
        values = G.sde_log_ratio(*args, **STEP)
        sum(t.sum() for t in values).backward()
        grads.append((*values, args[1].grad))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    assert all(t.shape == (0,) for t in G.sde_log_ratio(*(torch.zeros(0, 3, 4) for _ in range(5)), **STEP))


def test_every_element_is_written_and_sums_repeat_bit_for_bit(path, monkeypatch):
    """torch.empty filled with NaN beforehand leaves none behind; a second run gives the same bits."""
    poisoned = lambda make: lambda *a, **k: make(*a, **k).fill_(float("nan"))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    x, v, x_next, old_v, ref_v = latents((2, 33, 9))
    v.requires_grad_(True)
    runs = []
    for _ in range(2):
        values = G.sde_log_ratio(x, v, x_next, old_v, ref_v, **STEP)
        (grad,) = torch.autograd.grad(sum(t.sum() for t in values), v)
        runs.append([*values, grad, *G.sde_step(x, v.detach(), old_v, **STEP)])
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(*runs))


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
