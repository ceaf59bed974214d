"""Whole steps on tiny models: what moves, what stays, and that learning learns."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

import grpo
from conftest import CALLS, TARGETS


@pytest.fixture
def config(checkpoints, tmp_path):
    """changes -> Config of a run on the tiny FLUX and the nano refiner, with rewards that need no model"""
    (tmp_path / "mine.py").write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\n\n"
        "def smooth(images, prompts):\n    return -images.diff(dim=3).abs().mean((1, 2, 3))\n\n"
        "def broken(images, prompts):\n    return images.mean((1, 2, 3)) / 0\n"
    )

    def make(
        *words, stage="train: generator, steps: 2, prompts: 2, rewrites: 2, images: 3, keep_original: true", **values
    ):
        base = yaml.safe_load(f"""
out: {tmp_path / "out"}
stages: [{{{stage}}}]
micro_batch: 4
eval_every: 1
eval_images: 1
autoencode_photos: true
generator: {{model: {checkpoints("flux")}, height: 16, width: 16, num_steps: 5, window: 2, lora_targets: {TARGETS}, lora_rank: 4, lora_alpha: 8}}
refiner: {{max_new_tokens: 24}}
rewards:
  train: {{bright: {{kind: '{tmp_path}/mine.py:bright'}}, smooth: {{kind: '{tmp_path}/mine.py:smooth'}}}}
  validation: {{bright: {{kind: '{tmp_path}/mine.py:bright'}}}}
  heldout: {{smooth2: {{kind: '{tmp_path}/mine.py:smooth'}}}}
bench: {{images: 2, resamples: 50}}
""")
        base["generator"]["call"] = CALLS["flux"]
        for name in ("validation_prompts", "test_prompts"):
            (tmp_path / f"{name}.txt").write_text("a cat\na dog\n\na red cup\na tree\n")
            base[name] = str(tmp_path / f"{name}.txt")
        grpo.merge(base, values)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(base))
        return grpo.load_config([str(tmp_path / "config.yaml"), *words])

    return make


def snapshot(run):
    return {
        n: {k: p.detach().clone() for k, p in m.named_parameters()}
        for n, m in (
            ("generator", run.generator.transformer),
            ("refiner", run.refiner.model),
            ("vae", run.generator.pipe.vae),
            ("t5", run.generator.pipe.text_encoder_2),
        )
    }


@pytest.mark.parametrize(
    "stage,moves", [("refiner", {"refiner"}), ("generator", {"generator"}), ("joint", {"refiner", "generator"})]
)
def test_two_steps_move_only_the_lora_of_what_the_stage_trains(config, stage, moves):
    """Base weights, autoencoder and text encoders never move; the frozen policy's LoRA does not either."""
    cfg = config(stage=f"train: {stage}, steps: 2, prompts: 2, rewrites: 4, images: 2, keep_original: true")
    run = grpo.Run(cfg)
    before = snapshot(run)
    rows = [run.step(cfg.stages[0], i) for i in range(2)]
    after = snapshot(run)
    for model in before:
        changed = {n for n in before[model] if not torch.equal(before[model][n], after[model][n])}
        assert bool(changed) == (model in moves) and all("lora_" in n for n in changed)
    for row in rows:
        assert all(np.isfinite(row[m]["loss"]) and row[m]["grad_norm"] > 0 for m in moves) and not (
            set(row) & ({"refiner", "generator"} - moves)
        )
    if (
        "generator" in moves
    ):  # on the first pass the ratio is 1: nothing is clipped, and the LoRA starts as the reference
        assert (
            rows[0]["generator"]["clip_fraction"] == 0
            and rows[0]["generator"]["kl"] == 0
            and rows[1]["generator"]["kl"] > 0
        )


def test_images_per_step_are_prompt_major(config, monkeypatch):
    """P prompts x N rewrites x M images: the reward sees the user's prompt, the generator the rewrite, and the first rewrite is the user's."""
    cfg = config(stage="train: joint, steps: 1, prompts: 2, rewrites: 3, images: 2, keep_original: true")
    run = grpo.Run(cfg)
    seen = {}
    rollout, score = run.generator.rollout, grpo.R.score
    monkeypatch.setattr(
        run.generator,
        "rollout",
        lambda texts, keys, window: seen.update(texts=texts, keys=keys) or rollout(texts, keys, window),
    )
    monkeypatch.setattr(
        grpo.R,
        "score",
        lambda rewards, images, prompts, *rest: seen.update(prompts=prompts) or score(rewards, images, prompts, *rest),
    )
    run.step(cfg.stages[0], 0)
    p0, p1 = seen["prompts"][0], seen["prompts"][6]
    assert seen["prompts"] == [p0] * 6 + [p1] * 6 and p0 != p1
    assert seen["texts"][0:2] == [p0, p0] and seen["texts"][6:8] == [p1, p1] and seen["texts"][2] == seen["texts"][3]
    assert len(set(seen["keys"])) == 12


def test_rewrites_are_compared_on_the_same_noise(config, monkeypatch):
    """In a refiner stage image m of every rewrite of a prompt starts from the same noise; other prompts and other m have their own."""
    cfg = config(stage="train: refiner, steps: 1, prompts: 2, rewrites: 3, images: 2, keep_original: false")
    run = grpo.Run(cfg)
    seen = []
    rollout = run.generator.rollout
    monkeypatch.setattr(
        run.generator, "rollout", lambda texts, keys, window: seen.extend(keys) or rollout(texts, keys, window)
    )
    run.step(cfg.stages[0], 0)
    assert seen[0:2] == seen[2:4] == seen[4:6] and len(set(seen)) == 4


def test_every_prompt_once_an_epoch(config, monkeypatch, tmp_path):
    """Steps go through a fresh permutation each epoch, across its border too."""
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(5)))
    cfg = config(
        f"prompts={tmp_path / 'p.txt'}",
        stage="train: generator, steps: 5, prompts: 2, rewrites: 1, images: 2, keep_original: true",
    )
    run = grpo.Run(cfg)
    drawn = []
    monkeypatch.setattr(run, "rewrite", lambda prompts, stage, seed: drawn.extend(prompts) or (list(prompts), None))
    for i in range(5):
        run.step(cfg.stages[0], i)
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [f"prompt {i}" for i in range(5)]


def gradients(cfg, micro_batch):
    """The generator's accumulated gradient of one step, before clipping and the optimizer"""
    cfg.micro_batch = micro_batch
    run = grpo.Run(cfg)
    kept = {}
    run.optimize = lambda name, parameters, loss: kept.setdefault(name, [p.grad.clone() for p in parameters]) and 0.0
    run.step(cfg.stages[0], 0)
    return kept


def test_gradient_does_not_depend_on_the_micro_batch(config):
    """12 pictures and 4 rewrites at once or in threes: the same gradient for both policies."""
    stage = "train: joint, steps: 1, prompts: 2, rewrites: 3, images: 2, keep_original: true"
    whole, split = gradients(config(stage=stage), 12), gradients(config(stage=stage), 3)
    for name in ("generator", "refiner"):
        a, b = (torch.cat([g.flatten() for g in x[name]]) for x in (whole, split))
        assert a.norm() > 0 and (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.parametrize("ratio", ["guard", "ppo"])
def test_a_toy_reward_rises(config, ratio):
    """Twelve generator steps on brightness alone: brighter pictures on prompts and noise it never trained on.

    The random autoencoder hardly lets brightness vary, so the gain is measured by the spread of the pictures and by its own error.
    """
    cfg = config(
        "rewards.train.smooth=null",
        "generator.lr=2e-2",
        "generator.beta=0",
        "generator.ema=0.5",
        "generator.clip_range=0.1",
        "micro_batch=32",
        f"generator.ratio={ratio}",
        stage="train: generator, steps: 12, prompts: 4, rewrites: 1, images: 8, keep_original: true",
    )
    run = grpo.Run(cfg)
    look = lambda: run.draw(["a tree", "a stone bridge", "a house", "a boat"], 8, 77, False)[0].mean((1, 2, 3))
    before = look()
    for i in range(12):
        run.step(cfg.stages[0], i)
    gain = look() - before
    assert gain.mean() > 0.05 * before.std() and gain.mean() > 4 * gain.std() / len(gain) ** 0.5


def test_a_toy_reward_rises_for_the_refiner(config, tmp_path):
    """A reward on the rewrite's words alone: the share of rewrites that hold them grows on the training prompts."""
    cfg = config(
        "refiner.lr=3e-3", stage="train: refiner, steps: 12, prompts: 6, rewrites: 8, images: 1, keep_original: false"
    )
    run = grpo.Run(cfg)
    run.generator.rollout = lambda texts, keys, window: (
        torch.tensor([float("photo" in t) for t in texts]).view(-1, 1, 1, 1).expand(-1, 3, 16, 16),
        None,
    )
    share = [run.step(cfg.stages[0], i)["rewards"]["bright"] for i in range(12)]
    assert np.mean(share[-3:]) > np.mean(share[:2]) + 0.2


def test_main_writes_what_it_says_and_refuses_to_overwrite(config, tmp_path):
    """As the user runs it: two stages, then the bench; then a second run on the same folder is refused and nothing is lost."""
    config()
    words = [
        "stages=[{train: refiner, steps: 1, prompts: 2, rewrites: 2, images: 1, keep_original: false}, {train: generator, steps: 2, prompts: 2, images: 3}]"
    ]

    def call(script):
        return subprocess.run(
            [sys.executable, script, str(tmp_path / "config.yaml"), *words], capture_output=True, text=True
        )

    done = call("grpo.py")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "reward" in r] == [0, 1, 2] and all("kid" in r["validation"] for r in rows)
    for name in (
        "curves.png",
        "config.yaml",
        "generator/pytorch_lora_weights.safetensors",
        "refiner/adapter_model.safetensors",
        "samples/before_after_0_refiner.png",
        "samples/before_after_1_generator.png",
    ):
        assert (out / name).stat().st_size > 0
    assert grpo.load_config([str(out / "config.yaml")]) == grpo.load_config([str(tmp_path / "config.yaml"), *words])
    kept = (out / "metrics.jsonl").read_bytes()
    again = call("grpo.py")
    assert again.returncode == 2 and "is in use" in again.stderr and (out / "metrics.jsonl").read_bytes() == kept
    bench = call("bench.py")
    assert bench.returncode == 0, bench.stderr
    result = json.loads((out / "bench.json").read_text())
    assert set(result["scores"]) == {"base", "refiner", "generator", "both", "photographs"} and result["pictures"] == 8
    assert set(result["scores"]["base"]) == {"bright", "smooth", "reward", "smooth2", "heldout", "kid"}
    assert all(v == {"mean": 0.0, "low": 0.0, "high": 0.0} for v in result["difference"]["base"].values())
    for row in result["scores"].values():
        assert all(v["low"] <= v["mean"] <= v["high"] for v in row.values())


def test_a_reward_that_breaks_in_training_is_one_line(config, tmp_path):
    """Exit code 2 and the reward's name; the folder keeps what was written."""
    config()
    done = subprocess.run(
        [
            sys.executable,
            "grpo.py",
            str(tmp_path / "config.yaml"),
            f"rewards.train.bad={{kind: '{tmp_path}/mine.py:broken'}}",
        ],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "rewards: bad returned a value that is not finite" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_bench_without_a_run_says_what_is_missing(config, tmp_path):
    """One line, exit code 2."""
    config()
    done = subprocess.run([sys.executable, "bench.py", str(tmp_path / "config.yaml")], capture_output=True, text=True)
    assert done.returncode == 2 and "holds no trained generator" in done.stderr


def test_the_step_that_perf_compares_with_trains_too():
    """tests/perf.py's published way: every step but the last is stochastic, and its gradient reaches the LoRA."""
    import perf

    run, stage = perf.default_run(), grpo.StageConfig(train="generator", prompts=1, rewrites=1, images=3)
    before = {n: p.detach().clone() for n, p in run.generator.lora.items()}
    perf.published_step(run, stage, 0)
    assert any(not torch.equal(p, before[n]) for n, p in run.generator.lora.items())
