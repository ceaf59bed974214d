"""Laws of rewards/naturalness.py and of the distortions that RealBench's selftest orders by it."""

import numpy as np
import pytest
import torch
from conftest import list_photos

import bench
import reward as R
from rewards.naturalness import Naturalness, statistics


@pytest.fixture(scope="module")
def natural(tmp_path_factory):
    """Naturalness of 300 photographs, ranked among 100 others, and 64 pictures (64,3,64,64) of neither"""
    folder = tmp_path_factory.mktemp("photographs")
    counts = {"train": 300, "validation": 100, "test": 64}
    train, validation, test = (
        list_photos(folder / f"{split}.jsonl", split, count) for split, count in counts.items()
    )
    return Naturalness(train, reference=validation), R.read_photos(test, (64, 64))[0]


def test_there_are_117_statistics_and_54_more_for_each_doubling():
    """Of any size from 32 pixels on, square or not, flat or not: finite, a row a picture."""
    for shape, count in (((64, 64), 117), ((32, 48), 117), ((128, 128), 171), ((256, 130), 225)):
        images = torch.rand(2, 3, *shape)
        images[1] = 0.5
        found = statistics(images)
        assert found.shape == (2, count) and found.isfinite().all()


def test_a_picture_is_judged_alone(natural):
    """Splits of a batch change nothing."""
    measure, images = natural
    parts = torch.cat([measure(part, None) for part in images.split(10)])
    assert torch.allclose(measure(images, None), parts, atol=1e-4)


def spoil(images, distort, strength):
    pictures = [np.asarray(distort(x, strength).convert("RGB")) for x in R.to_pil(images)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255  # (B,3,H,W)


def test_a_blur_of_one_pixel_is_far_from_photographs(natural):
    """What the local coefficients alone hardly see: they give it a third of what photographs have, not a sixth."""
    measure, images = natural
    blurred = spoil(images, bench.DISTORTIONS["blur"][0], 1.0)
    assert measure(blurred, None).mean() < 0.25 * measure(images, None).mean()


def test_other_photographs_have_about_half_and_every_distortion_less(natural):
    """Between .3 and .7; strong distortions of each kind far below; all in [0, 1]. A stronger one changes more."""
    measure, images = natural
    untouched = measure(images, None)
    assert 0.3 < untouched.mean() < 0.7
    assert untouched.min() >= 0 and untouched.max() <= 1
    for name, (distort, strengths) in bench.DISTORTIONS.items():
        changes = [0.002]  # weak is visible
        for strength in strengths:
            spoiled = spoil(images, distort, strength)
            changes.append((spoiled - images).abs().mean().item())
        assert changes == sorted(set(changes)), name
        assert measure(spoiled, None).mean() < 0.75 * untouched.mean(), name
