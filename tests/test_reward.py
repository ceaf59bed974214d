"""reward.py: pictures, KID, detectors and alignment, the door for every kind, and `score`."""

import json
import shutil
import traceback
import warnings
from itertools import permutations, product
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import damage, pictures, refuses
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, CLIPConfig, CLIPModel

import reward as R


def make(kind, model="", **args):
    """The reward of one config"""
    return R.load_rewards({"x": R.RewardConfig(kind, str(model), args=args)})["x"]


# ---------------------------------------------------------------- pictures

GREY = np.tile(np.arange(0, 200, 2, np.uint8), (50, 1))  # (H, W), brighter to the right
ALPHA = np.stack([GREY, GREY, GREY, GREY // 50], 2)


@pytest.mark.parametrize("pixels", [GREY, ALPHA])
def test_a_picture_of_any_format_is_rgb_and_cropped_in_its_centre(tmp_path, pixels):
    """(3,H,W) in [0,1], and the long side is cut at both ends."""
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = R.read_image(tmp_path / "x.png", (50, 50)) * 255
    assert_close(image, torch.arange(50.0, 150, 2).expand(3, 50, 50))


@pytest.mark.parametrize("content", [b"no picture", b"\x89PNG\r\n\x1a\n", None])
def test_a_broken_picture_is_named(tmp_path, content):
    """One that is text, one that is cut off, one that is missing."""
    if content:
        (tmp_path / "x.png").write_bytes(content)
    with refuses("x.png"):
        R.read_image(tmp_path / "x.png")


GOOD = '{"image": "x.png", "prompt": "a cat"}\n'
BAD = ["no json", "[]", '{"image": "x.png"}', '{"image": "x.png", "prompt": 3}']


@pytest.mark.parametrize("row", BAD)
def test_a_list_of_photographs_is_read_or_its_row_is_named(tmp_path, row):
    """Paths are relative to the list, pictures of the shape that is asked for."""
    Image.fromarray(GREY).save(tmp_path / "x.png")
    file = tmp_path / "list.jsonl"
    file.write_text(GOOD * 2)
    images, prompts = R.read_photos(file, (64, 48))
    assert images.shape == (2, 3, 64, 48) and prompts == ["a cat", "a cat"]
    file.write_text(GOOD + row)
    with refuses("list.jsonl, row 2"):
        R.read_list(file)


def test_as_file_is_what_a_jpeg_would_hold(tmp_path):
    """Of that quality; 0 leaves pictures as they are."""
    images = pictures(2)
    for picture, coded in zip(R.to_pil(images), R.as_file(images, 80)):
        picture.save(tmp_path / "x.jpg", quality=80)
        assert_close(coded, R.read_image(tmp_path / "x.jpg"))
    assert R.as_file(images, 0) is images


# ---------------------------------------------------------------- KID


def test_kid_is_its_definition():
    """The mean kernel over all pairs, but for those of a picture with itself, or with one of its prompt."""
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)

    def mean(pairs):
        return np.mean([(a @ b / 3 + 1) ** 3 for a, b in pairs])

    rest = mean(permutations(y, 2)) - 2 * mean(product(x, y))
    assert R.kid(x, y, torch.arange(4)) == pytest.approx(mean(permutations(x, 2)) + rest)
    pairs = product(x[:2], x[2:])  # of two prompts with two pictures each
    assert R.kid(x, y, torch.tensor([7, 7, 3, 3])) == pytest.approx(mean(pairs) + rest)


# ---------------------------------------------------------------- kinds


@pytest.fixture
def folder(tmp_path):
    """A copy of a detector"""
    return shutil.copytree("nano/semantic", tmp_path / "detector")


def test_a_classifier_is_p_real_by_the_names_of_its_labels(folder):
    """The stock model's softmax at the label that means real, wherever it stands and in any case."""
    images = pictures(3)
    stock = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    p = stock(images * 2 - 1).logits.softmax(-1)  # (B, 2)
    config = json.loads((folder / "config.json").read_text())

    def relabelled(*labels, **args):
        config["id2label"] = dict(enumerate(labels))
        (folder / "config.json").write_text(json.dumps(config))
        return make("classifier", folder, **args)(images, [""] * 3)

    assert_close(relabelled("Real", "fake"), p[:, 0])
    assert_close(relabelled("fake", "PHOTO"), p[:, 1])
    assert_close(relabelled("falsch", "echt", real=["Echt"]), p[:, 1])
    with refuses("falsch, echt; expected"):
        relabelled("falsch", "echt")


@pytest.mark.parametrize("kind", ["missing", "unexpected", "not finite"])
def test_weights_that_are_not_whole_are_refused(folder, kind):
    """Libraries fill in random ones."""
    damage(folder / "model.safetensors", kind)
    with refuses(f"{folder}.*{kind}"):
        make("classifier", folder)


def test_alignment_is_the_cosine_of_the_stock_model():
    """Prompts of different lengths are padded together; `dot` is the product of raw features / 100."""
    reward = make("clip", "nano/clip")
    images = pictures(2)
    prompts = ["a cat", "a chinese temple in soft light"]
    tokens = reward.tokenizer(prompts, padding=True, return_tensors="pt")
    out = reward.model(pixel_values=reward.preprocess(images), **tokens)
    cosine = out.logits_per_image.diag() / reward.model.logit_scale.exp()
    assert_close(reward(images, prompts), cosine)
    # the stock model gives features of length 1; these are before that
    text = reward.model.get_text_features(**tokens).pooler_output  # (B, D)
    picture = reward.model.get_image_features(reward.preprocess(images)).pooler_output
    dot = make("clip", "nano/clip", dot=True)(images, prompts)
    assert_close(dot, torch.einsum("bd,bd->b", picture, text) / 100)


def test_kid_features_are_the_class_token_of_a_layer():
    """Normalised"""
    reward = make("clip", "nano/clip")
    images = pictures(2)
    vision = reward.model.vision_model
    out = vision(reward.preprocess(images), output_hidden_states=True)
    token = out.hidden_states[1][:, 0]  # (B, D)
    want = torch.nn.functional.layer_norm(token, token.shape[1:])
    assert_close(reward.features(images, 1), want)


def test_longclip_reads_248_tokens_and_warns_of_what_it_cuts(tmp_path):
    """Words behind them do not count, and it is told."""
    config = CLIPConfig.from_pretrained("nano/clip")
    config.text_config.max_position_embeddings = 248
    CLIPModel(config).save_pretrained(tmp_path)
    reward = make("clip", tmp_path, processor="nano/clip")
    images = pictures(1).repeat(2, 1, 1, 1)

    def last_word_counts(length):
        cat, dog = reward(images, ["a " * length + last for last in ("cat", "dog")])
        return abs(cat - dog) > 1e-6

    with warnings.catch_warnings(action="error"):
        assert last_word_counts(100)
    with pytest.warns(UserWarning, match="248 tokens; longer texts are cut"):
        assert not last_word_counts(300)


# ---------------------------------------------------------------- the door

MINE = """
import sys

def bright(images, prompts, times=1):
    return times * images.mean((1, 2, 3))

class Made:
    made = []

    def __init__(self, *args, **options):
        self.made.append((args, options))

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

def breaks(images, prompts):
    raise KeyError("oops")

def leaves(images, prompts):
    sys.exit()

def writes(images, prompts):
    prompts.clear()
    return images.zero_().mean((1, 2, 3))

def scalar(images, prompts):
    return images.mean()

def nan(images, prompts):
    return images.mean((1, 2, 3)) / 0

def huge(images, prompts):
    return 1e300 * images.double().mean((1, 2, 3))
"""


@pytest.fixture
def mine(tmp_path):
    """name -> the kind of a fork's own reward"""
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py:{{}}".format


def test_a_function_is_the_reward_and_a_class_makes_it_once(mine):
    """`args` are a function's keyword arguments and a class's options. They see f32, whatever was drawn."""
    images = pictures(3).bfloat16()
    rewards = {
        "once": make(mine("bright")),
        "twice": make(mine("bright"), times=2),
        "made": make(mine("Made"), "folder", by=3),
    }
    scores = R.score(rewards, images, [""] * 3, micro_batch=2)
    bright = images.float().mean((1, 2, 3))
    assert_close(scores, {"once": bright, "twice": 2 * bright, "made": bright})
    assert rewards["made"].made == [(("folder", "cpu"), {"by": 3})]


WRONG = [
    ("nonsense", {}, "kind 'nonsense'; expected classifier"),
    ("no/such.py:bright", {}, "kind 'no/such.py:bright'"),
    ("dark", {}, "mine.py has no 'dark'"),
    ("bright", {"tims": 2}, "args .*tims"),
    ("clip", {"model": "nano/clip", "procesor": ""}, "args .*procesor"),
    ("clip", {}, "model is empty"),
    ("clip", {"model": "tests"}, "tests has no config.json"),
]


@pytest.mark.parametrize("kind,options,message", WRONG)
def test_a_mistyped_config_is_named(mine, kind, options, message):
    """Kind, name in a file, option and model, each with what was expected."""
    if kind in ("dark", "bright"):
        kind = mine(kind)
    with refuses(message):
        make(kind, **options)


# ---------------------------------------------------------------- score


@pytest.mark.parametrize(
    "name,error", [("breaks", "KeyError"), ("leaves", "SystemExit")]
)
def test_an_exception_keeps_its_traceback(mine, name, error):
    """With the reward's name in front; sys.exit is an exception too."""
    with pytest.raises(RuntimeError, match=f"'yours' failed: {error}") as caught:
        R.score({"yours": make(mine(name))}, pictures(2), ["", ""])
    frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert frames[-1].name == name


@pytest.mark.parametrize("name", ["scalar", "nan", "huge"])
def test_values_that_cannot_be_used_are_named(mine, name):
    """Another shape, and what is not finite as f32."""
    with refuses(f"rewards: {name} returned .*expected"):
        R.score({name: make(mine(name))}, pictures(2), ["", ""])


def test_what_a_reward_writes_into_its_input_stays_with_it(mine):
    """The next one sees the same pictures and prompts."""
    images = pictures(2)
    prompts = ["", ""]
    rewards = {name: make(mine(name)) for name in ("writes", "bright")}
    scores = R.score(rewards, images, prompts)
    assert scores["bright"].all() and images.all() and prompts


def test_a_score_is_that_of_each_picture_alone():
    """Whatever the batch and the lengths of its prompts."""
    rewards = {
        "real": make("classifier", "nano/semantic"),
        "alignment": make("clip", "nano/clip"),
    }
    images = pictures(5)
    prompts = ["a cat", "a chinese temple in soft light", "", "a dog", "a cup"]
    alone = R.score(rewards, images, prompts, micro_batch=1)
    assert_close(R.score(rewards, images, prompts, micro_batch=3), alone)
    assert len(alone["real"]) == 5


def test_a_model_visits_the_device_once_and_returns():
    """After an exception too."""
    reward = Mock(side_effect=[torch.zeros(2), KeyError])
    with pytest.raises(RuntimeError):
        R.score({"x": reward}, pictures(4), [""] * 4, micro_batch=2, visit="cuda")
    assert [name for name, *_ in reward.mock_calls] == ["model.to", "", "", "model.to"]
    assert reward.model.to.mock_calls == [call("cuda"), call("cpu")]
