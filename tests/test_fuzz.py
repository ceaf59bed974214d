"""Whatever a user's file or a model's answer holds: a value, or one clear ValueError; never another exception."""

import io
import json
import types

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file as safetensors_save

import grpo
import refiner as L
import reward as R
from conftest import ROOT

SAFE = [HealthCheck.function_scoped_fixture]  # each example writes its files anew
few = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=SAFE)
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text())
number = st.booleans() | st.integers() | st.floats()
leaf = st.none() | number | st.text(max_size=8) | st.sampled_from(["1e-5", "cps", ""])
anything = st.recursive(leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))


def value_or_line(function, *args, naming=""):
    """The value, or None after a ValueError whose message is not empty and names the file"""
    try:
        return function(*args)
    except ValueError as error:
        assert str(error).strip() and str(naming) in str(error)


# ---------------------------------------------------------------- config


def paths(values, above=()):
    """Every key of a nested mapping, as a tuple"""
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


@few
@given(st.sampled_from(list(paths(DEFAULT))), anything)
def test_any_value_of_any_key(tmp_path, path, value):
    """One key of config.yaml holds anything that YAML can hold."""
    values = yaml.safe_load(yaml.safe_dump(DEFAULT))
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    cfg = value_or_line(grpo.load_config, [str(tmp_path / "c.yaml")], naming="c.yaml")
    assert cfg is None or isinstance(cfg, grpo.Config)


@few
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_config(tmp_path, data):
    """The whole file is anything."""
    (tmp_path / "c.yaml").write_bytes(data)
    value_or_line(grpo.load_config, [str(tmp_path / "c.yaml")], naming="c.yaml")


keys = st.sampled_from(["seed", "profile", "stages", "rewards.train", "generator.call.x", "a.b"])


@few
@given(st.lists(st.text(max_size=12) | st.builds("{}={}".format, keys, st.text(max_size=8)), max_size=3))
def test_any_words(words):
    """What follows config.yaml on the command line is anything."""
    value_or_line(grpo.load_config, ["config.yaml", *words])


# ---------------------------------------------------------------- files


@few
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_bytes_as_prompts(tmp_path, data):
    """Every prompt that comes out is stripped text that the file holds, in its order."""
    (tmp_path / "p.txt").write_bytes(data)
    prompts = value_or_line(grpo.read_prompts, tmp_path / "p.txt", naming="p.txt")
    if prompts is not None:
        text, at = data.decode(), 0
        for prompt in prompts:
            assert prompt and prompt == prompt.strip() and prompt in text[at:]
            at = text.index(prompt, at) + len(prompt)


def picture(mode="RGB", size=(5, 4), kind="PNG", **values):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **values)
    return file.getvalue()


good_line = st.just(b'{"image": "good.png", "prompt": "a cat"}')


lines_of_json = st.lists(st.binary(max_size=20) | st.builds(json.dumps, anything).map(str.encode) | good_line, max_size=3)


@few
@given(lines_of_json)
def test_any_bytes_as_json_lines(tmp_path, lines):
    """Good lines are all read; a bad one names the file."""
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    read = value_or_line(R.read_photos, tmp_path / "p.jsonl", (8, 8), naming=tmp_path)
    if read is not None:
        assert len(read[0]) == len(read[1]) > 0 and read[0].shape[1:] == (3, 8, 8)


@few
@given(lines_of_json)
def test_any_bytes_as_photographs_to_learn_from(tmp_path, lines):
    """With enough good lines beside them: every photograph is drawn, or the file is named with the bad line."""
    (tmp_path / "good.png").write_bytes(picture())
    good = b'{"image": "good.png", "prompt": "a cat"}'
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([*[good] * R.HELD_BACK, *lines]))
    photos = value_or_line(R.Photographs, tmp_path / "p.jsonl", (8, 8), naming="p.jsonl")
    if photos is not None:
        assert len(photos.draw(99, np.random.default_rng(0))[1]) == len(photos.rows) - len(photos.rows) // R.HELD_BACK


@few
@given(st.data())
def test_any_bytes_as_picture(tmp_path, data):
    """Files of five kinds, cut off anywhere, with bytes changed: a picture of the right size and range, or one line."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF"]))
    good = bytearray(picture("RGB", (9, 7), kind))
    for _ in range(data.draw(st.integers(0, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.bin").write_bytes(good[: data.draw(st.integers(0, len(good)))])
    image = value_or_line(R.read_image, tmp_path / "x.bin", (8, 6), naming="x.bin")
    assert image is None or image.shape == (3, 8, 6) and image.dtype == torch.float32
    assert image is None or 0 <= image.min() and image.max() <= 1


@few
@given(st.data())
def test_any_bytes_as_weights(tmp_path, data):
    """Files of three kinds, cut off anywhere, with bytes changed, or holding something else: tensors, or one line."""
    name = data.draw(st.sampled_from(["x.pth", "old.pth", "x.safetensors"]))
    path, weights = tmp_path / name, {"a": torch.zeros(3, 3), "b": torch.ones(2)}
    if name == "x.safetensors":
        safetensors_save(weights, path)
    else:
        content = data.draw(st.sampled_from([{"model": weights}, weights, {"model": 1}, [1], torch.zeros(2)]))
        torch.save(content, path, _use_new_zipfile_serialization=name == "x.pth")
    good = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(good[: data.draw(st.integers(len(good) // 2, len(good)))])
    state = value_or_line(R.read_state, path, naming=name)
    assert state is None or all(isinstance(t, torch.Tensor) for t in state.values())


def test_odd_pictures(tmp_path):
    """1x1, 16 bits, CMYK, alpha, palette and animated ones are pictures; bombs, folders, empty files are one line."""
    frames = [Image.new("RGB", (6, 6), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "animated", "GIF", save_all=True, append_images=frames[1:])
    for name, data in {
        "one": picture(size=(1, 1)), "sixteen": picture("I;16"), "cmyk": picture("CMYK", kind="JPEG"),
        "alpha": picture("LA"), "palette": picture("P"), "animated": (tmp_path / "animated").read_bytes(),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        image = R.read_image(tmp_path / name, (8, 8))
        assert image.shape == (3, 8, 8) and 0 <= image.min() and image.max() <= 1
    white = Image.new("I;16", (4, 4), 65535)
    white.save(tmp_path / "white", "PNG")
    grey = Image.new("I;16", (4, 4), 32768)
    grey.save(tmp_path / "grey", "PNG")
    assert R.read_image(tmp_path / "white").min() == 1
    assert R.read_image(tmp_path / "grey").max() == pytest.approx(0.5, abs=0.01)
    bomb = bytearray(picture("1", (8, 8)))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    (tmp_path / "bomb").write_bytes(bomb)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("bomb", "empty", "folder", "nowhere"):
        with pytest.raises(ValueError, match=name):
            R.read_image(tmp_path / name, (8, 8))


# ---------------------------------------------------------------- answers of models


parts_of_answers = st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", " ", "\n", "a cat"])


@few
@given(st.lists(parts_of_answers | st.text(max_size=6), max_size=8))
def test_any_answer_of_the_refiner(parts):
    """None, or one line of text that the answer holds, without tags of its own kind around it."""
    answer = L.read_answer("".join(parts))
    assert answer is None or answer and answer == " ".join(answer.split()) and "</answer>" not in answer


token = st.fixed_dictionaries({"token": st.sampled_from(["real", " Fake", "the", ""]) | leaf, "logprob": leaf})


@few
@given(st.lists(token, max_size=4) | leaf)
def test_any_answer_of_a_judge(listed):
    """A probability, or one of the errors after which the question is asked again, and the run ends with one line."""
    judge = R.RemoteReward(R.RewardConfig("remote", "m"), url="http://127.0.0.1:1/v1")
    tops = [types.SimpleNamespace(**t) for t in listed] if isinstance(listed, list) else listed
    content = [types.SimpleNamespace(top_logprobs=tops)]
    answer = types.SimpleNamespace(choices=[types.SimpleNamespace(logprobs=types.SimpleNamespace(content=content))])
    try:
        assert 0 <= judge.parse(answer) <= 1
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):  # what `ask` takes for unreadable
        pass
