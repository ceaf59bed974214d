"""Laws of reward.py: one signature, labels by name, standardisation, KID, bad rewards."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import reward as R


def pictures(n=4, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A classifier whose 'real' label stands first or second, saved with save_pretrained"""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    def make(labels):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("detector")
        model = ResNetForImageClassification(
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                id2label=dict(enumerate(labels)),
                label2id={n: i for i, n in enumerate(labels)},
            )
        )
        model.eval().save_pretrained(folder)
        ViTImageProcessorPil(
            size=dict(height=32, width=32), image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
        ).save_pretrained(folder)
        return str(folder)

    return make


def test_classifier_is_p_real_of_the_stock_model(detector):
    """The same as a processor's own normalisation and a softmax by hand; labels are found by name, in any place."""
    from transformers import AutoModelForImageClassification

    first, second = detector(["Real", "fake"]), detector(["fake", "photo"])
    images = pictures(3, 32)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    for folder, index in ((first, 0), (second, 1)):
        reward = R.load_rewards({"d": R.RewardConfig(model=folder)})["d"]
        logits = AutoModelForImageClassification.from_pretrained(folder)(pixel_values=(images - mean) / std).logits
        torch.testing.assert_close(reward(images, [""] * 3), logits.softmax(-1)[:, index])
    assert reward(pictures(3, 50), [""] * 3).shape == (3,)  # any size is resized to the detector's own


def test_a_classifier_without_a_real_label_is_refused(detector):
    """The message lists what the labels are."""
    with pytest.raises(ValueError, match="no label of .*'cat', 'dog'.* means real"):
        R.load_rewards({"d": R.RewardConfig(model=detector(["cat", "dog"]))})


def test_clip_is_the_cosine_of_the_stock_model():
    """CLIPModel's own logits, divided by its temperature, are the reward; it prefers the right subject on held-out photographs."""
    reward = R.load_rewards({"alignment": R.RewardConfig(kind="clip", model="nano/clip")})["alignment"]
    photos, captions = R.read_photos("nano/photos/test.jsonl", (64, 64))
    value = reward(photos[:8], captions[:8])
    tokens = reward.tokenizer(captions[:8], padding=True, return_tensors="pt")
    out = reward.model(pixel_values=reward.preprocess(photos[:8]), **tokens)
    torch.testing.assert_close(
        value, out.logits_per_image.diag() / reward.model.logit_scale.exp(), rtol=1e-4, atol=1e-5
    )
    matched, shuffled = reward(photos, captions).mean(), reward(photos, captions[1:] + captions[:1]).mean()
    assert matched > shuffled + 0.2


def test_every_nano_detector_tells_photographs_from_generated_pictures():
    """All five: photographs of regions that nothing was trained on, through the autoencoder, against the base model's pictures of test prompts."""
    import yaml

    from generator import Generator, GeneratorConfig

    groups = yaml.safe_load(open("config.yaml"))["rewards"]
    configs = {
        n: R.RewardConfig(**r)
        for g in ("train", "validation", "heldout")
        for n, r in groups[g].items()
        if r["kind"] == "classifier"
    }
    assert len(configs) == 5
    generator = Generator(GeneratorConfig())
    photos, captions = R.read_photos("nano/photos/test.jsonl", (64, 64))
    prompts = open("nano/test_prompts.txt").read().splitlines()
    drawn = generator.sample(prompts, [(0, 0, i, 0) for i in range(len(prompts))])
    rewards = R.load_rewards(configs)
    real = R.score(rewards, generator.reconstruct(photos[:64]), captions[:64])
    fake = R.score(rewards, drawn, prompts)
    for name in configs:
        assert real[name].mean() > 0.5 and real[name].mean() > fake[name].mean() + 0.25, name


# ---------------------------------------------------------------- maths


def test_standardise_is_per_group():
    """Mean 0 and population std 1 in every group, whatever the scale; a group of equal rewards gives 0, rounding included."""
    r = torch.tensor([[1.0, 2.0, 3.0], [100.0, 500.0, 900.0], [0.7, 0.7, 0.7 + 1e-7]])
    z = R.standardise(r)
    torch.testing.assert_close(z[:2].sum(1), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z[:2].std(1, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    assert z[2].abs().max() < 2e-3


def test_kid_is_zero_for_one_distribution_and_grows_with_distance():
    """Two samples of the same features: about 0, on average; a shifted one: more, and more with the shift."""
    g = torch.Generator().manual_seed(0)
    same = [R.kid(torch.randn(100, 8, generator=g), torch.randn(120, 8, generator=g)) for _ in range(30)]
    assert abs(np.mean(same)) < 0.05
    x = torch.randn(200, 8, generator=g)
    values = [R.kid(x + shift, torch.randn(200, 8, generator=g)) for shift in (0.0, 0.3, 0.6)]
    assert values[0] < values[1] < values[2]


def test_kid_against_a_double_loop():
    """The unbiased estimate by its definition."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 3, generator=g).double(), torch.randn(4, 3, generator=g).double()
    k = lambda a, b: ((a @ b).item() / 3 + 1) ** 3
    xx = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    xy = sum(k(a, b) for a in x for b in y) / 20
    assert R.kid(x, y) == pytest.approx(xx + yy - 2 * xy)


# ---------------------------------------------------------------- the user's own reward, and bad ones


def test_user_reward_needs_no_fork(tmp_path):
    """file.py:function is the reward; with args the name is a factory, called once."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n\n"
        "def scaled(by):\n    return lambda images, prompts: by * images.mean((1, 2, 3))\n"
    )
    rewards = R.load_rewards(
        {"a": R.RewardConfig(kind=f"{file}:brightness"), "b": R.RewardConfig(kind=f"{file}:scaled", args={"by": 2.0})}
    )
    scores = R.score(rewards, pictures(), ["x"] * 4, micro_batch=3)
    torch.testing.assert_close(scores["a"], pictures().mean((1, 2, 3)))
    torch.testing.assert_close(scores["b"], 2 * scores["a"])


@pytest.mark.parametrize(
    "function,message",
    [
        (lambda i, p: i.mean(), r"bad returned shape \(\) for 4 pictures; expected \(4,\)"),
        (lambda i, p: i.mean((1, 2)), r"bad returned shape \(4, 64\)"),
        (lambda i, p: torch.tensor([0.0, float("nan"), 0.0, 0.0]), "bad returned a value that is not finite for 'b'"),
        (lambda i, p: torch.full((4,), float("inf")), "not finite"),
    ],
)
def test_a_bad_reward_is_named(function, message):
    """A wrong shape, NaN and infinity stop the run with the reward's name."""
    with pytest.raises(ValueError, match=message):
        R.score({"bad": function}, pictures(), ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    "config,message",
    [
        (dict(kind="nonsense"), "kind 'nonsense'; expected classifier, clip, vlm, omniaid, remote or path"),
        (dict(kind="no/such.py:f"), "kind 'no/such.py:f'; expected"),
        (dict(kind="classifier", model="tests"), "tests has no config.json"),
    ],
)
def test_a_bad_reward_config_is_named(config, message):
    """Each with its value and what was expected."""
    with pytest.raises(ValueError, match=message):
        R.load_rewards({"x": R.RewardConfig(**config)})


def test_photographs_are_read_cropped_and_named(tmp_path):
    """Any size and mode becomes (3,H,W) in [0,1]; a file that is no picture is named."""
    Image.fromarray(np.full((90, 50), 255, np.uint8)).save(tmp_path / "gray.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "gray.png", "prompt": "white"}) + "\n")
    images, prompts = R.read_photos(tmp_path / "list.jsonl", (64, 48))
    assert images.shape == (1, 3, 64, 48) and images.min() == 1 and prompts == ["white"]
    with pytest.raises(ValueError, match="text.jpg is not a picture"):
        R.read_image(tmp_path / "text.jpg")
    with pytest.raises(ValueError, match="nothing.jsonl is not a file"):
        R.read_photos(tmp_path / "nothing.jsonl", (64, 64))
