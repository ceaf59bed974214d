"""Laws of learning detectors: when they learn, from what, that scores are the EMA, that state restores; and of stop_if_hacked."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import omniaid, small_detector
from PIL import Image
from safetensors.torch import load_file, save_file
from test_walk import config  # noqa: F401  the fixture

import grpo
import reward as R

UPDATE = dict(threshold=0.0, accuracy=0.95, max_steps=40, lr=3e-3, batch_size=8, replay=20, ema=0.9)


def gray(n, level, seed=0):
    """n pictures (n,3,16,16) around a level of gray"""
    return (level + 0.1 * torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 bright photographs beside photos.jsonl, which names them"""
    (tmp_path / "photos").mkdir()
    lines = []
    for i, picture in enumerate(R.to_pil(gray(40, 0.7, seed=1))):
        picture.save(tmp_path / "photos" / f"{i:02d}.png")
        lines.append(json.dumps({"image": f"photos/{i:02d}.png", "prompt": f"photo {i}"}))
    (tmp_path / "photos.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


@pytest.fixture
def detector(tmp_path):
    """-> folder of a tiny detector"""
    return small_detector(tmp_path / "detector")


@pytest.fixture
def learner(detector, photos):
    """changes of UPDATE -> a Learner on the tiny detector and the bright photographs"""

    def make(seed=0, args=None, **changes):
        cfg = R.RewardConfig(model=detector, args=args or {}, update=R.UpdateConfig(**(UPDATE | changes)))
        rewards = R.load_rewards({"d": cfg})
        source = R.Photographs(photos / "photos.jsonl", (16, 16))
        return R.load_learners({"d": cfg, "frozen": R.RewardConfig()}, rewards, source, seed, 16)["d"]

    return make


def weights(one):
    return [t.clone() for t in one.reward.model.state_dict().values()] + [t.clone() for t in one.live]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


PROMPTS = [f"picture {i}" for i in range(24)]


# ---------------------------------------------------------------- when and what


def test_it_learns_what_tells_pictures_from_photographs(learner):
    """Held-back accuracy reaches the limit before max_steps, the reward of the same pictures falls, that of photographs does not."""
    one, dark = learner(), gray(24, 0.3)
    real, texts = one.photos.draw(5, np.random.default_rng(0), held_back=True)
    photographs = one.score(real, texts).mean()
    before = one.score(dark, PROMPTS).mean().item()
    row = one.step(dark, PROMPTS, before, 0)
    assert row["accuracy_before"] < 0.95 <= row["accuracy_after"] and 0 < row["steps"] < 40
    assert row["reward_before"] == before and row["reward_after"] < before - 0.1
    assert row["reward_after"] == pytest.approx(one.score(dark, PROMPTS).mean().item(), abs=1e-6)
    assert one.score(real, texts).mean() > photographs and np.isfinite(row["loss"])


def test_it_learns_only_when_fooled_and_only_every_few_steps(learner):
    """At or below the threshold, or off `every`, no weight moves; the replay fills all the same."""
    one, dark = learner(threshold=0.5, every=2), gray(24, 0.3)
    before = weights(one)
    assert one.step(dark, PROMPTS, 0.5, 0) is None and one.step(dark, PROMPTS, 0.9, 1) is None
    assert same(before, weights(one)) and one.seen == 36 and len(one.replay) == 20
    assert one.step(dark, PROMPTS, 0.51, 2)["steps"] > 0 and not same(before, weights(one))


def test_max_steps_bounds_what_cannot_be_learnt(learner):
    """Pictures like the photographs: it gives up after max_steps; an accuracy that is already there costs no step."""
    row = learner(max_steps=3, accuracy=1.0).step(gray(24, 0.7, seed=5), PROMPTS, 0.9, 0)
    assert row["steps"] == 3 and row["accuracy_after"] < 1.0
    done = learner(accuracy=0.01)
    before = weights(done)
    row = done.step(gray(24, 0.3), PROMPTS, 0.9, 0)
    assert row["steps"] == 0 and same(before, weights(done))


def test_only_what_is_trainable_moves(learner, tmp_path):
    """`learn` names parts of a classifier; batch statistics never move; omniaid moves head and experts alone."""
    one = learner(args={"learn": ["classifier"]}, accuracy=1.0, max_steps=2)
    start = {n: t.clone() for n, t in one.reward.model.state_dict().items()}
    one.step(gray(24, 0.7), PROMPTS, 1.0, 0)
    moved = {n for n, t in one.reward.model.state_dict().items() if not torch.equal(t, start[n])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}
    assert not one.reward.model.training and not any(p.requires_grad for p in one.reward.model.parameters())
    torch.save({"model": omniaid("v2")}, tmp_path / "v2.pth")
    cfg = R.RewardConfig(kind="omniaid", model=str(tmp_path / "v2.pth"), args={"resize": 0})
    two = R.Learner("o", R.load_rewards({"o": cfg})["o"], R.UpdateConfig(max_steps=1, accuracy=1.0), one.photos)
    start = {n: t.clone() for n, t in two.reward.model.state_dict().items()}
    assert two.step(gray(24, 0.7), PROMPTS, 1.0, 0)["steps"] == 1
    moved = {n for n, t in two.reward.model.state_dict().items() if not torch.equal(t, start[n])}
    assert moved and all(n.startswith("head.") or "_experts." in n for n in moved) and "head.weight" in moved


def test_the_score_is_the_ema(learner):
    """After k steps the detector holds e_k = d e_{k-1} + (1-d) live_k with d = min(ema, k / (k + 9)), and live moved further."""
    one = learner(accuracy=1.0, max_steps=1, ema=0.15)
    ema = [p.detach().clone() for p in one.weights]
    for k in range(1, 4):
        one.step(gray(24, 0.7, seed=k), PROMPTS, 1.0, k)
        decay = min(0.15, k / (k + 9))
        ema = [decay * e + (1 - decay) * live for e, live in zip(ema, one.live)]
        for p, e in zip(one.weights, ema):
            torch.testing.assert_close(p.detach(), e, atol=1e-6, rtol=1e-5)
    assert not same([p.detach() for p in one.weights], one.live)


def test_the_anchor_pulls_the_live_weights_back(learner):
    """After each AdamW step the live weights go the share `anchor` of the way to the start; near 1 hardly any is learnt."""
    free, held = learner(accuracy=1.0, max_steps=1), learner(accuracy=1.0, max_steps=1, anchor=0.25)
    start = [p.detach().clone() for p in held.weights]
    for one in (free, held):
        one.step(gray(24, 0.3), PROMPTS, 1.0, 0)
    for p, moved, back in zip(start, free.live, held.live):
        torch.testing.assert_close(back, moved + 0.25 * (p - moved), atol=1e-6, rtol=1e-5)
    assert not same(start, held.live)
    rows = [learner(anchor=a, max_steps=10, accuracy=1.0).step(gray(24, 0.3), PROMPTS, 0.9, 0) for a in (0.0, 0.99)]
    assert rows[0]["reward_after"] < rows[1]["reward_after"] - 0.05


def test_a_batch_is_balanced_rounded_and_half_replayed(learner, monkeypatch):
    """Photographs and pictures in equal number, half of the pictures from the replay once it has them, held-back ones in none."""
    one, batches = learner(max_steps=3, accuracy=1.0, replay=12), []
    monkeypatch.setattr(R, "augment", lambda images, g: batches.append(images) or images)
    levels = torch.linspace(0.0, 0.4, 24).view(24, 1, 1, 1).expand(24, 3, 16, 16)  # each picture has its own level
    one.step(levels, PROMPTS, 1.0, 0)
    held = {prompt for prompt in PROMPTS} - {prompt for _, prompt in one.replay}
    trained = {round(x.item(), 3) for batch in batches for x in batch[:8].mean((1, 2, 3))}
    known = {round(x.item(), 3) for x in (levels.mean((1, 2, 3)) * 255).round() / 255}
    assert trained <= known and len(trained) <= 18 and len(held) >= 6
    for batch in batches:
        assert batch.shape == (16, 3, 16, 16) and batch[:8].mean() < 0.5 < batch[8:].mean((1, 2, 3)).min()
        torch.testing.assert_close(batch * 255, (batch * 255).round(), atol=1e-3, rtol=0)
    batches.clear()
    one.step(torch.full((24, 3, 16, 16), 0.45), PROMPTS, 1.0, 1)
    assert all((abs(b[:8].mean((1, 2, 3)) - 0.45) > 0.01).sum() == 4 for b in batches)


def test_held_back_pictures_never_train(learner, monkeypatch):
    """The quarter that measures accuracy is neither trained on nor replayed."""
    one, used, measured = learner(max_steps=4, accuracy=1.0, replay=100), set(), set()
    level = lambda x: [round(v) for v in (x.float().mean((1, 2, 3)) * 255).tolist()]
    monkeypatch.setattr(R, "augment", lambda images, g: used.update(level(images[:8])) or images)
    score = one.score
    one.score = lambda images, prompts: (len(images) == 6 and measured.update(level(images))) or score(images, prompts)
    levels = (torch.arange(24) / 255 * 4).view(24, 1, 1, 1).expand(24, 3, 16, 16)
    one.photos.draw = lambda n, rng, held_back=False, draw=one.photos.draw: draw(5 if held_back else n, rng, held_back)
    one.step(levels, PROMPTS, 1.0, 0)
    assert len(measured) == 6 and used and not measured & (used | {level(i[None] / 255)[0] for i, _ in one.replay})


# ---------------------------------------------------------------- replay and state


def test_the_replay_is_bounded_and_every_picture_is_as_likely(learner):
    """uint8, never more than `replay`; after 600 pictures the kept ones are spread evenly over time; 0 keeps none."""
    one = learner(replay=20)
    for i in range(600):
        one.remember([(torch.full((3, 2, 2), 7, dtype=torch.uint8), str(i))], np.random.default_rng([9, i]))
    assert len(one.replay) == 20 and one.seen == 600 and one.replay[0][0].dtype == torch.uint8
    when = np.array([int(prompt) for _, prompt in one.replay])
    assert len(set(when)) == 20 and abs(when.mean() - 300) < 4 * 600 / 12**0.5 / 20**0.5
    none = learner(replay=0)
    assert none.step(gray(24, 0.3), PROMPTS, 1.0, 0)["steps"] > 0 and none.replay == []


def test_saved_and_loaded_equals_never_stopped(learner, tmp_path):
    """Through a safetensors file into a new detector: the next update is the same to the bit, weights and metrics."""
    one, two = learner(max_steps=3, accuracy=1.0), learner(max_steps=3, accuracy=1.0)
    (one.photos.path.parent / "photos" / "03.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="03.png is not a picture"):
        for i in range(3):
            one.step(gray(24, 0.7, seed=i), PROMPTS, 1.0, i)
    save_file(one.state(), tmp_path / "state.safetensors")
    two.load_state(load_file(tmp_path / "state.safetensors"))
    assert same(weights(one), weights(two)) and one.replay[3][1] == two.replay[3][1]
    for i in (3, 4):
        rows = [x.step(gray(24, 0.7, seed=i), PROMPTS, 1.0, i) for x in (one, two)]
        assert rows[0] == rows[1] and rows[0]["steps"] == 3 and rows[0]["bad_photos"] == 1 and same(weights(one), weights(two))
    a, b = one.state(), two.state()
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a) and a["replay"].dtype == torch.uint8


def test_a_fresh_state_restores_and_a_foreign_one_is_refused(learner):
    """Before the first update there is no AdamW state and no replay; another detector's state is named, nothing moves."""
    one = learner()
    fresh = {k: v.clone() for k, v in one.state().items()}
    start = weights(one)
    one.step(gray(24, 0.3), PROMPTS, 1.0, 0)
    one.load_state(fresh)
    assert same(start, weights(one)) and one.replay == [] and one.steps == one.seen == 0
    assert not one.optimizer.state_dict()["state"]
    other = learner(args={"learn": ["classifier"]})
    with pytest.raises(ValueError, match="rewards: d: the saved detector has no ema.0 of shape"):
        other.load_state(fresh)


def test_everything_random_follows_from_seed_and_iteration(learner):
    """Two ranks with the same pictures hold the same detector; global generators play no part; another seed differs."""
    a, b, c = learner(), learner(), learner(seed=1)
    for i, one in enumerate((a, b, c)):
        torch.manual_seed(i)
        np.random.seed(i)
        one.step(gray(24, 0.3), PROMPTS, 1.0, 5)
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))
    assert [p for _, p in a.replay] == [p for _, p in b.replay]


def test_an_error_inside_an_update_leaves_the_scoring_weights(learner):
    """The EMA is back in place and nothing asks for gradients."""
    one = learner(max_steps=2, accuracy=1.0)
    one.step(gray(24, 0.7), PROMPTS, 1.0, 0)
    start, logits, calls = weights(one), one.reward.logits, []

    def fail(images, prompts=None):
        calls.append(1)
        if torch.is_grad_enabled():
            raise RuntimeError("out of memory")
        return logits(images, prompts)

    one.reward.logits = fail
    with pytest.raises(RuntimeError):
        one.step(gray(24, 0.7), PROMPTS, 1.0, 1)
    assert calls and same(start, weights(one)) and not any(p.requires_grad for p in one.weights)


# ---------------------------------------------------------------- photographs and augmentation


def test_photographs_of_a_list_or_a_folder(photos):
    """Both give the same pictures at the asked size; each eighth is held back; prompts come with the list alone."""
    listed, folder = R.Photographs(photos / "photos.jsonl", (16, 16)), R.Photographs(photos / "photos", (8, 12))
    for held_back, expected in ((True, set(range(7, 40, 8))), (False, set(range(40)) - set(range(7, 40, 8)))):
        images, prompts = listed.draw(100, np.random.default_rng(0), held_back)
        assert {int(p.split()[1]) for p in prompts} == expected and len(prompts) == len(expected) == len(images)
        others, empty = folder.draw(100, np.random.default_rng(0), held_back)
        assert others.shape == (len(expected), 3, 8, 12) and set(empty) == {""}
    for image, prompt in zip(*listed.draw(3, np.random.default_rng(4))):
        torch.testing.assert_close(image, R.read_image(photos / "photos" / f"{int(prompt.split()[1]):02d}.png"))
    calls = []
    halved = R.Photographs(photos / "photos", (16, 16), prepare=lambda x: calls.append(len(x)) or x / 2)
    first = halved.draw(4, np.random.default_rng(0))[0]
    assert first.max() <= 0.51 and calls == [1] * 4
    assert torch.equal(first, halved.draw(4, np.random.default_rng(0))[0]) and len(calls) == 4  # kept


def test_no_more_photographs_are_kept_than_fit(photos, monkeypatch):
    """Beyond CACHE bytes a picture is read again each time, and is the same."""
    monkeypatch.setattr(R, "CACHE", 3 * 3 * 16 * 16)
    one = R.Photographs(photos / "photos", (16, 16))
    first, again = (one.draw(8, np.random.default_rng(0))[0] for _ in range(2))
    assert torch.equal(first, again) and len(one.kept) == 3


def test_bad_pictures_are_named_once_counted_and_skipped(photos):
    """Missing, truncated and foreign files; the draw is the same whether they are known as bad or not."""
    whole = (photos / "photos" / "01.png").read_bytes()
    (photos / "photos" / "00.png").unlink()
    (photos / "photos" / "01.png").write_bytes(whole[: len(whole) // 2])
    (photos / "photos" / "02.png").write_text("<html>")
    one = R.Photographs(photos / "photos.jsonl", (16, 16))
    with pytest.warns(UserWarning) as seen:
        first = one.draw(100, np.random.default_rng(0))
    texts = [str(w.message) for w in seen if w.category is UserWarning]
    assert len(texts) == 3 == len(one.bad) and "3 of 40 photographs so far" in texts[-1]
    assert all(any(f"0{i}.png is not a picture" in t for t in texts) for i in range(3)) and len(first[1]) == 32
    again = one.draw(100, np.random.default_rng(0))  # and no warning, which the configuration of this test would raise
    assert first[1] == again[1] and torch.equal(first[0], again[0])
    for file in (photos / "photos").iterdir():
        file.write_text("")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="has no picture that can be read"):
        R.Photographs(photos / "photos.jsonl", (16, 16)).draw(2, np.random.default_rng(1))


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"image": "a.png", "prompt": ""}\n' * 3, "names 3 photographs; expected 8 or more"),
        ('{"image": "a.png", "prompt": ""}\n' * 8 + "{", 'line 9: \'{\'; expected {"image": path, "prompt": text}'),
        ('{"picture": "a.png"}\n' * 8, "line 1: "),
        ("[1]\n" * 8, "line 1: "),
        ('{"image": 3, "prompt": ""}\n' * 8, "line 1: "),
    ],
)
def test_a_bad_list_is_one_line(tmp_path, text, message):
    """File, line and what was expected; a path that is nothing is named."""
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        R.Photographs(tmp_path / "p.jsonl", (16, 16))
    with pytest.raises(ValueError, match="is neither JSON lines .* nor a folder"):
        R.Photographs(tmp_path / "nothing", (16, 16))


def test_augmentation_treats_every_picture_alike():
    """In [0,1], the same for the same generator; half are flipped; the law does not depend on the place in the batch."""
    ramp = torch.linspace(0.2, 0.8, 16).expand(400, 3, 16, 16)  # brighter to the right
    make = lambda: R.augment(ramp, torch.Generator().manual_seed(0))
    out = make()
    assert torch.equal(out, make()) and out.shape == ramp.shape and 0 <= out.min() and out.max() <= 1
    flipped = out[..., 0].mean((1, 2)) > out[..., -1].mean((1, 2))
    assert 0.4 < flipped.float().mean() < 0.6 and abs(out.mean() - ramp.mean()) < 0.01
    level = out.mean((1, 2, 3))  # brightness alone moves it: by a tenth on average where it acts
    assert 0.02 < level.std() < 0.05 and 0.4 < ((level - 0.5).abs() < 2e-3).float().mean() < 0.6
    assert abs(level[:200].mean() - level[200:].mean()) < 4 * level.std() * (2 / 200) ** 0.5
    board = torch.tensor([[0.3, 0.7], [0.7, 0.3]]).repeat(8, 8).expand(200, 3, 16, 16)
    contrast = R.augment(board, torch.Generator().manual_seed(1)).std((2, 3)).mean(1)  # only blur takes this much away
    assert 0.3 < (contrast < 0.15).float().mean() < 0.6 and (contrast > 0.15).any()
    colour = torch.tensor([0.7, 0.4, 0.4]).view(1, 3, 1, 1).expand(200, 3, 8, 8)
    spread = R.augment(colour, torch.Generator().manual_seed(2)).mean((2, 3)).std(1)
    assert spread.min() < 0.16 < 0.18 < spread.max()  # saturation, both ways; 0.173 untouched


# ---------------------------------------------------------------- config


def test_every_key_of_update_is_in_the_profile_and_read():
    """profiles.v2 turns it on for both detectors with every key; each is read; the default has none: a line apart."""
    values = yaml.safe_load(Path("config.yaml").read_text())["profiles"]["v2"]["rewards"]["train"]
    source = Path("reward.py").read_text()
    names = {f.name for f in fields(R.UpdateConfig)}
    assert set(values) == {"semantic", "feature"} and all(set(v["update"]) == names for v in values.values())
    assert all(re.search(rf"cfg\.{name}\b", source) for name in names)
    default, v2 = grpo.load_config(["config.yaml"]), grpo.load_config(["config.yaml", "profile=v2"])
    assert not any(r.update for r in default.rewards.train.values())
    assert [n for n, r in v2.rewards.train.items() if r.update] == ["semantic", "feature"]
    off = grpo.load_config(["config.yaml", "profile=v2", "rewards.train.semantic.update=null"])
    one = grpo.load_config(["config.yaml", "profile=v2", "rewards.train.semantic.update.ema=0.5"])  # an alias is a copy
    assert [one.rewards.train[n].update.ema for n in ("semantic", "feature")] == [0.5, 0.9]
    assert off.rewards.train["semantic"].update is None and off.rewards.train["feature"].update.ema == 0.9


@pytest.mark.parametrize(
    "words,message",
    [
        (["rewards.train.semantic.update.treshold=1"], "update.treshold is not a key; did you mean rewards.train.semantic"),
        (["rewards.train.semantic.update.ema=1"], "update.ema: 1.0; expected a decay in [0, 1)"),
        (["rewards.train.semantic.update.anchor=1"], "update.anchor: 1.0; expected a share in [0, 1)"),
        (["rewards.train.semantic.update.every=0"], "update.every: 0; expected 1 or more"),
        (["rewards.train.semantic.update.lr=0"], "update.lr: 0.0; expected a number above 0"),
        (["rewards.validation.validation.update={}"], "rewards: validation: update, but what selects or reports"),
        (["rewards.heldout.heldout_a.update={}"], "rewards: heldout_a: update, but"),
        (["keep_within.semantic=0.1"], "keep_within.semantic: it learns"),
        (["stop_if_hacked=-1"], "stop_if_hacked: -1; expected 0, or looks"),
        (["stop_if_hacked=2", "rewards.validation=null"], "rewards.validation: None is NoneType"),
    ],
)
def test_config_errors(words, message):
    """One line each, before any model is loaded."""
    with pytest.raises(ValueError, match=re.escape(message)):
        grpo.load_config(["config.yaml", "profile=v2", *words])


def test_what_cannot_learn_is_named(detector, photos, tmp_path):
    """Kinds without trainable weights before they load, a user's function when it is loaded, `learn` that matches nothing."""
    with pytest.raises(ValueError, match="rewards: a: clip cannot learn; expected update: null"):
        R.check({"a": R.RewardConfig(kind="clip", model="nano/clip", update=R.UpdateConfig())})
    source = R.Photographs(photos / "photos", (16, 16))
    (tmp_path / "mine.py").write_text("def mine(images, prompts):\n    return images.mean((1, 2, 3))\n")
    for cfg, message in (
        (R.RewardConfig(kind=f"{tmp_path}/mine.py:mine", update=R.UpdateConfig()), "rewards: a: update needs its logits"),
        (R.RewardConfig(model=detector, args={"learn": ["hed"]}, update=R.UpdateConfig()), "rewards: a: args.learn match"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            R.load_learners({"a": cfg}, R.load_rewards({"a": cfg}), source)


# ---------------------------------------------------------------- the walk


def test_hacked_needs_k_looks_of_both():
    """Score down and reward up at each of the last k looks; a rise, a standstill or too few looks are no sign."""
    down = [(0.5, 0.1), (0.4, 0.2), (0.3, 0.3), (0.2, 0.4)]
    assert [grpo.hacked(down[:n], 2) for n in (1, 2, 3, 4)] == [False, False, True, True]
    assert not grpo.hacked(down, 0) and not grpo.hacked(down, 4) and grpo.hacked(down, 3)
    for last in ((0.35, 0.5), (0.3, 0.5), (0.2, 0.3), (0.2, 0.2)):
        assert not grpo.hacked([*down[:3], last], 1)
    assert grpo.hacked([(0.1, 0.9), *down[:3]], 2)


def learning(detector, photos, **changes):
    update = UPDATE | dict(max_steps=2, accuracy=1.0) | changes
    reward = dict(kind="classifier", model=detector, update=update)
    return dict(rewards={"train": {"d": reward}}, photos=str(photos / "photos.jsonl"))


def test_a_step_reports_each_trigger_and_the_next_one_is_judged_by_it(config, detector, photos):
    """The first step's scores are the frozen detector's; its row holds the update; the detector is another from then on."""
    run = grpo.Run(config(**learning(detector, photos)))
    still = grpo.Run(config("rewards.train.d.update=null", **learning(detector, photos)))
    stage = run.cfg.stages[0]
    rows, frozen = ([r.step(stage, i) for i in range(2)] for r in (run, still))
    assert rows[0]["rewards"] == frozen[0]["rewards"] and "detectors" not in frozen[0] and still.learners == {}
    learnt = rows[0]["detectors"]["d"]
    assert learnt["steps"] == 2 and learnt["reward_before"] == pytest.approx(rows[0]["rewards"]["d"])
    assert learnt["reward_after"] != learnt["reward_before"] and "update detectors" in rows[0]["seconds"]
    assert rows[1]["rewards"]["d"] != frozen[1]["rewards"]["d"] and run.learners["d"].seen == 18
    text = grpo.line(rows[0] | {"step": 0, "stage": "0 generator"})
    assert "d learnt, 2 steps: accuracy 0." in text
    quiet = grpo.Run(config(**learning(detector, photos, threshold=1.0))).step(stage, 0)
    assert quiet["detectors"] == {} and quiet["rewards"] == rows[0]["rewards"]


def test_photographs_pass_through_the_autoencoder_like_pictures(config, detector, photos):
    """autoencode_photos decides; without it they stay as taken. The bench never loads them."""
    for on in (True, False):
        cfg = config(f"autoencode_photos={str(on).lower()}", **learning(detector, photos))
        run = grpo.Run(cfg)
        images, _ = run.learners["d"].photos.draw(2, np.random.default_rng(0))
        plain, _ = R.Photographs(cfg.photos, (16, 16)).draw(2, np.random.default_rng(0))
        expected = [run.generator.reconstruct(x[None]) if on else x[None] for x in plain]
        assert torch.equal(images * 255, torch.cat(expected).mul(255).round())
    assert grpo.Run(cfg, train=False).learners == {}


def test_a_hacked_stage_ends_with_the_best_weights_and_says_so(config, monkeypatch, capfd, tmp_path):
    """Looks are scripted: down twice while the reward rises; steps stop there and the best look's weights are kept.

    A run that dies before it has saved them goes on to the same end without another step.
    """
    cfg = config(
        "stop_if_hacked=2", "save_every=3", stage="train: generator, steps: 6, prompts: 2, images: 3, rewrites: 1, keep_original: true"
    )
    looks = iter([(0.6, 0.1), (0.7, 0.2), (0.5, 0.3), (0.4, 0.4), (0.9, 0.5)])
    kept = {}

    def evaluate(run, stage):
        value, reward = next(looks)
        kept[value] = [t.detach().clone() for t in run.weights_of(stage)]
        run.seconds = {}
        look = {"bright": value, "kid": 0.0, "score": value, "train_bright": reward, "train_smooth": reward}
        return look, torch.zeros(4, 3, 16, 16)

    monkeypatch.setattr(grpo.Run, "evaluate", evaluate)
    def save(run, out):
        died, kept["end"] = "end" not in kept, [t.detach() for t in run.weights_of(cfg.stages[0])]
        if died:
            raise OSError("died")

    monkeypatch.setattr(grpo.Run, "save", save)
    with pytest.raises(ValueError, match="died; the last good checkpoint is .*000003"):
        grpo.train(cfg)
    cfg.resume = True
    grpo.train(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [("reward" in r, r.get("hacked")) for r in rows] == [(True, None)] * 3 + [(False, True)]
    assert same(kept["end"], kept[0.7]) and not same(kept["end"], kept[0.4])
    said = "".join(capfd.readouterr())
    assert "stops at step 3: the trained reward rose and the validation score fell at 2 looks in a row" in said


def test_a_missing_folder_of_photographs_is_one_line_and_exit_code_2(tmp_path):
    """Before any model is loaded; not asked for where no detector learns."""
    words = ["config.yaml", "profile=v2", "photos=nothing", f"out={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "grpo.py", *words], capture_output=True, text=True)
    assert done.returncode == 2 and "error: photos: nothing is neither JSON lines" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_the_experiment_runs_end_to_end(tmp_path):
    """python nano/hacking.py with a tiny budget: two runs, looks, table and figure; again, it reuses them; changed, it refuses."""
    (tmp_path / "p.txt").write_text("a tabby cat\na sunset over the hills\n")
    words = ["--steps", "1", "--seeds", "1", "--lessons", "1", "--out", str(tmp_path / "h"), "--figure", str(tmp_path / "h.png"),
             "generator.num_steps=3", "generator.window=1", "eval_every=1", "eval_images=1", "bench.images=2",
             "rewards.train.feature.weight=0.5", f"validation_prompts={tmp_path / 'p.txt'}",
             f"test_prompts={tmp_path / 'p.txt'}"]  # fmt: skip

    def call(*more):
        return subprocess.run([sys.executable, "nano/hacking.py", *words, *more], capture_output=True, text=True)

    done = call()
    assert done.returncode == 0, done.stderr
    looks = [json.loads((tmp_path / "h" / f"{kind}0" / "looks.json").read_text()) for kind in ("frozen", "learning")]
    assert all(look["steps"] == [0, 1] and np.shape(look["scores"]["heldout_b"]) == (2, 2, 2) for look in looks)
    assert np.shape(looks[0]["scores"]["taught"]) == (2, 2, 2) and 0 <= np.min(looks[0]["scores"]["taught"]) <= 1
    assert looks[0]["scores"]["heldout_a"][0] == looks[1]["scores"]["heldout_a"][0]  # the same start
    assert all(f"| {name} | " in done.stdout for name in ("heldout", "taught", "kid")) and "nan" not in done.stdout
    assert (tmp_path / "h.png").stat().st_size > 0
    again = call()
    assert again.returncode == 0 and "runs:" not in again.stderr and again.stdout == done.stdout
    other = call("generator.lr=1")
    assert other.returncode == 2 and "one of another config; remove it, or choose another --out" in other.stderr


def test_picture_files_of_any_kind_make_a_photograph(tmp_path):
    """Gray, 16 bits, palette, CMYK and 1x1 pictures are read as photographs are."""
    (tmp_path / "f").mkdir()
    for mode, name in (("L", "a.png"), ("I;16", "b.png"), ("P", "c.png"), ("CMYK", "d.jpg"), ("RGBA", "e.png")):
        Image.new(mode, (20, 30)).save(tmp_path / "f" / name)
    for i in range(4):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(tmp_path / "f" / f"g{i}.webp")
    images, _ = R.Photographs(tmp_path / "f", (16, 12)).draw(20, np.random.default_rng(0))
    assert images.shape == (8, 3, 16, 12) and 0 <= images.min() and images.max() <= 1
