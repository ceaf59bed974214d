"""Laws of the detector that learns, on a tiny random ResNet: pictures are dark, photographs are bright."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

import learner as L
from reward import Classifier, as_bytes, to_pil

QUICK = dict(
    threshold=0.5,
    accuracy=1.0,
    max_steps=3,
    lr=3e-3,
    batch_size=8,
    ema=0.9,
)
PROMPTS = [f"picture {i}" for i in range(24)]
DARK = torch.linspace(0.1, 0.4, 24 * 768).view(24, 3, 16, 16)  # each picture a level of gray
BLACK = [(torch.zeros(3, 16, 16), "")] * 24
BRIGHT = DARK + 0.5  # the photographs themselves: nothing tells these pictures apart from them


@pytest.fixture
def photos(tmp_path):
    """24 photographs, of which those with the prompt 7 are held back"""
    file = tmp_path / "photos.jsonl"
    with file.open("w") as lines:
        for i, picture in enumerate(to_pil(BRIGHT)):
            picture.save(tmp_path / f"{i}.png")
            print(f'{{"image": "{i}.png", "prompt": "{i % 8}"}}', file=lines)
    return L.Photographs(file, (16, 16), lambda images: images)


@pytest.fixture
def make(tmp_path, photos):
    """changes of QUICK -> a Learner of a detector with batch norm, which takes everything for real"""
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type="basic",
        id2label={0: "fake", 1: "real"},
    )
    model = ResNetForImageClassification(config)
    model.classifier[1].bias.data[1] = 1.5
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    ViTImageProcessorPil(size=16).save_pretrained(folder)

    def made(learn="", seed=0, device="cpu", **changes):
        detector = Classifier(folder, learn=[learn])
        cfg = L.UpdateConfig(**(QUICK | changes))
        return L.Learner("d", detector, cfg, photos, seed, device=device)

    return made


def step(one, images, iteration=0, mean=1.0):
    return one.step(as_bytes(images), PROMPTS, mean, iteration)


def same(one, two):
    """The same weights score, and the same train"""
    first = [*one.ema, *one.live]
    second = [*two.ema, *two.live]
    return all(map(torch.equal, first, second))


def test_it_learns(make):
    """The accuracy reaches its limit; the same pictures score lower than before."""
    one = make(accuracy=0.95, max_steps=40)
    before = one.reward(DARK, None).mean()
    row = step(one, DARK)
    after = one.reward(DARK, None).mean()
    assert row["accuracy_after"] >= 0.95
    assert 0 < row["steps"] < 40
    assert after < before - 0.1


def test_it_learns_when_it_is_fooled(make):
    """Not at the threshold or below, nor off `every`."""
    one = make(every=2)
    assert step(one, DARK, 0, mean=0.5) is None
    assert step(one, DARK, 1) is None
    assert same(one, make())
    assert step(one, DARK, 2, mean=0.51)["steps"] > 0


@pytest.mark.parametrize("learn", ["classifier", ""])
def test_only_what_is_trainable_moves(make, learn):
    """Other weights and the statistics of batch norm stay as they were."""
    one = make(learn)
    before = make().reward.model.state_dict()
    step(one, BRIGHT)
    after = one.reward.model.state_dict()
    weights = dict(one.reward.model.named_parameters())
    for name in after:
        stays = torch.equal(after[name], before[name])
        assert stays != (name in weights and learn in name)


@pytest.mark.parametrize("limit", [0.15, 0.9])
def test_the_ema_scores_and_live_trains(make, limit):
    """ema <- d ema + (1 - d) live with d = min(limit, k / (k + 9)), here at step 6; contents never alias."""
    one = make(max_steps=1, ema=limit)
    one.steps = 5
    step(one, BRIGHT)
    decay = min(limit, 6 / 15)
    for scores, start, live in zip(one.reward.trainable(), one.start, one.live):
        expected = decay * start + (1 - decay) * live
        assert_close(scores, expected)
        places = {scores.data_ptr(), start.data_ptr(), live.data_ptr()}
        assert len(places) == 3


def test_the_anchor_pulls_back(make):
    """After an AdamW step the live weights go half of the way to the start with 0.5, none of it with 0."""
    free = make(max_steps=1)
    held = make(max_steps=1, anchor=0.5)
    step(free, DARK)
    step(held, DARK)
    assert not same(free, held)
    for start, far, near in zip(free.start, free.live, held.live):
        assert_close(near, (start + far) / 2)


def test_what_is_held_back_never_trains(make, monkeypatch):
    """A quarter of the pictures, an eighth of the photographs. From the second step on, half is replayed."""
    one = make()
    trained = []
    logits = one.student.logits

    def record(images, prompts):
        trained.extend(prompts)
        return logits(images)

    monkeypatch.setattr(one.student, "logits", record)
    step(one, BRIGHT)
    remembered = {prompt for _, (_, prompt) in one.replay}
    assert len(remembered) == 18
    assert set(trained) - remembered == set("0123456")
    one.step(as_bytes(BRIGHT), ["new"] * 24, 1.0, 1)
    assert trained.count("new") == 12


def test_the_replay_is_a_uniform_reservoir(make):
    """Each picture that was not held back is as likely to be in it, whenever it came."""
    one = make(replay=300)
    for i in range(100):
        one.step(as_bytes(DARK), [i] * 24, 0.0, i)
    when = [i for _, (_, i) in one.replay]
    counts, _ = np.histogram(when, 10, (0, 100))
    assert sum((counts - 30) ** 2 / 30) < 28  # chi squared of 9 degrees of freedom, p 0.001


def test_augmentation_has_one_law():
    """In [0,1], half are flipped; the place in a batch tells nothing, so neither does the side."""
    ramp = torch.linspace(0.2, 0.8, 16).expand(400, 3, 16, 16)  # brighter to the right
    out = L.augment(ramp, np.random.default_rng(0))
    assert 0 <= out.min() <= out.max() <= 1
    flipped = (out[..., 0].mean((1, 2)) > out[..., -1].mean((1, 2))).float()
    assert abs(flipped.mean() - 0.5) < 0.1
    for figure in (flipped, out.mean((1, 2, 3))):
        first, second = figure.view(2, 200).mean(1)
        assert abs(first - second) < 0.4 * figure.std()  # four standard errors


def test_photographs_are_held_back_from_training(photos):
    """The accuracy is measured on others than those that train, again and again where there are too few."""
    _, prompts, _ = photos.beside(BLACK, np.random.default_rng(0), held_back=True)
    assert prompts == [""] * 24 + ["7"] * 24


def test_a_broken_photograph_is_named_once(photos):
    """It is counted and skipped, and what is drawn is the same before and after it was found out."""
    photos.rows[3][0].write_text("<html>")
    with pytest.warns(UserWarning, match=r"3\.png .*, as 1 of 24 ") as warned:
        first = photos.beside(BLACK, np.random.default_rng(0))
        again = photos.beside(BLACK, np.random.default_rng(0))
    assert len(warned) == 1
    assert torch.equal(first[0], again[0])


def test_the_state_of_another_model_is_refused(make):
    """One with other weights to train"""
    with pytest.raises(RuntimeError):
        make("classifier").load_state(make().state())


def test_ranks_agree(make):
    """The same pictures make the same detector, whatever global generators hold; another seed does not."""
    first = make()
    second = make()
    other = make(seed=1)
    for one in (first, second, other):
        step(one, DARK)
    assert same(first, second)
    assert not same(first, other)


def test_it_trains_on_its_device(make, monkeypatch):
    """Detector and student visit `device` for an update, and go back after an exception, too."""
    one = make(device="cpu:0")
    calls = []
    monkeypatch.setattr(one.reward.model, "to", calls.append)
    monkeypatch.setattr(one.student.model, "to", calls.append)
    monkeypatch.setattr(one.student, "logits", lambda *_: calls.append("trains"))
    with pytest.raises(AttributeError):  # None, instead of logits
        step(one, BRIGHT)
    home = torch.device("cpu")
    assert calls == ["cpu:0", "cpu:0", "trains", home, home]
