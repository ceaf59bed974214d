"""Laws of rewards/naturalness.py and of the distortions that RealBench's selftest orders by it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import bench
import reward as R
from rewards.naturalness import Naturalness, statistics

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def natural(tmp_path_factory):
    """Naturalness of 300 photographs, ranked among 100 others, and 64 pictures (64,3,64,64) of neither"""
    folder = tmp_path_factory.mktemp("photographs")
    counts = {"train": 300, "validation": 100, "test": 64}
    for split, count in counts.items():
        lines = Path(f"{ROOT}/nano/photos/{split}.jsonl").read_text().splitlines()[:count]
        lines = [line.replace('"image": "', f'"image": "{ROOT}/nano/photos/') for line in lines]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    measure = Naturalness(folder / "train.jsonl", reference=folder / "validation.jsonl")
    return measure, R.read_photos(folder / "test.jsonl", (64, 64))[0]


def test_there_are_111_statistics_and_54_more_for_each_doubling():
    """Of any size from 32 pixels on, square or not, flat or not: finite, a row a picture."""
    for shape, count in (((64, 64), 111), ((32, 48), 111), ((128, 128), 165), ((256, 130), 219)):
        images = torch.rand(2, 3, *shape)
        images[1] = 0.5
        found = statistics(images)
        assert found.shape == (2, count) and found.isfinite().all()


def test_statistics_of_a_picture_ignore_its_batch_and_its_mirror_image_keeps_most(natural):
    """Splits change nothing; a photograph mirrored is as natural, give or take the diagonals' places."""
    measure, images = natural
    whole = measure(images, None)
    parts = torch.cat([measure(part, None) for part in images.split(10)])
    assert torch.allclose(whole, parts, atol=1e-4)
    assert (measure(images.flip(3), None) - whole).abs().mean() < 0.05


def test_other_photographs_have_about_half_and_every_distortion_less(natural):
    """Between .3 and .7; strong distortions of each kind far below; all in [0, 1]."""
    measure, images = natural
    untouched = measure(images, None)
    assert 0.3 < untouched.mean() < 0.7
    assert untouched.min() >= 0 and untouched.max() <= 1
    pictures = R.to_pil(images)
    for name, (distort, strengths) in bench.DISTORTIONS.items():
        spoiled = [np.asarray(distort(picture, strengths[2]).convert("RGB")) for picture in pictures]
        spoiled = torch.from_numpy(np.stack(spoiled)).permute(0, 3, 1, 2) / 255
        assert measure(spoiled, None).mean() < 0.75 * untouched.mean(), name


def test_distortions_grow_with_their_strength():
    """Mean absolute change rises from weak to strong, and weak is visible but small."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((64, 64), Image.BICUBIC)
    pixels = np.asarray(picture).astype(float)
    for name, (distort, strengths) in bench.DISTORTIONS.items():
        changes = [np.abs(np.asarray(distort(picture, s).convert("RGB")) - pixels).mean() for s in strengths]
        assert 0.1 < changes[0] < changes[1] < changes[2], name


def test_too_few_or_broken_photographs_are_told():
    """A list that is not there is one line."""
    with pytest.raises(R.ConfigError, match="nowhere.jsonl"):
        Naturalness("nowhere.jsonl", reference="nowhere.jsonl").features(torch.rand(1, 3, 64, 64))
