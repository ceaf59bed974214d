"""Laws of bench.py: intervals."""

import numpy as np
import torch

import bench


def test_bootstrap_interval_covers_the_truth():
    """Nominal 95% over prompts whose pictures are alike: the true mean lies inside in 88-99% of 200 simulations; narrower with more prompts."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        values = rng.normal(size=(32, 1)) + 0.3 * rng.normal(size=(32, 8))
        v = bench.bootstrap(values, 300, rng)
        inside += v["low"] <= 0 <= v["high"]
    assert 176 <= inside <= 198
    many, few = (bench.bootstrap(np.random.default_rng(1).normal(size=(n, 1)), 300, rng) for n in (400, 25))
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])


def test_paired_difference_is_narrower_than_unpaired():
    """Prompts differ more than contestants do: pairing removes that."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 4))
    better = base + 0.2 + 0.1 * rng.normal(size=(40, 4))
    paired = bench.bootstrap(better - base, 500, np.random.default_rng(1))
    alone = bench.bootstrap(better, 500, np.random.default_rng(1))
    assert paired["low"] > 0 and paired["high"] - paired["low"] < 0.5 * (alone["high"] - alone["low"])


def test_kid_interval_covers_the_whole_and_its_difference():
    """Nearer to the photographs than base: a difference below 0 whose interval excludes 0; base against base: exactly 0."""
    g = torch.Generator().manual_seed(0)
    photos = torch.randn(200, 8, generator=g)
    base, near = torch.randn(32, 4, 8, generator=g) + 0.6, torch.randn(32, 4, 8, generator=g) + 0.2
    value, difference = bench.kid_interval(near, base, photos, 200, np.random.default_rng(0))
    assert value["low"] < value["mean"] < value["high"] and difference["high"] < 0
    _, same = bench.kid_interval(base, base, photos, 50, np.random.default_rng(0))
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_table_shows_every_metric_and_difference():
    """Means with intervals, signed differences, a blank where a metric does not apply."""
    v = {"mean": 0.5, "low": 0.4, "high": 0.6}
    lines = bench.table(
        {"base": {"a": v, "kid": v}, "photographs": {"a": v}}, {"base": {"a": v}, "both": {"a": v, "kid": v}}
    )
    assert (
        lines[0] == "| contestant | a | kid |" and lines[2] == "| base | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |"
    )
    assert lines[3].endswith("|  |") and lines[4].startswith("| both - base | +0.500 [+0.400, +0.600]")
