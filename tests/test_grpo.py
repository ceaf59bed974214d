"""Laws of grpo.py: the config, advantages, the clipped loss. test_walk.py takes whole steps."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml

import grpo


def load(tmp_path, text, *words):
    (tmp_path / "c.yaml").write_text(text)
    return grpo.load_config([str(tmp_path / "c.yaml"), *words])


MINIMAL = "rewards: {train: {a: {kind: classifier, model: nano/semantic}}}\n"


# ---------------------------------------------------------------- config


def test_config_yaml_has_every_key_and_every_key_is_read():
    """The file's keys are the dataclasses' fields, each with a comment, and the code reads each one."""
    source = "".join(Path(f).read_text() for f in ("grpo.py", "generator.py", "refiner.py", "reward.py", "bench.py"))
    values, text = yaml.safe_load(Path("config.yaml").read_text()), Path("config.yaml").read_text()
    values.pop("profiles")

    def check(kind, mapping):
        hints = get_type_hints(kind)
        assert set(mapping) == {f.name for f in fields(kind)}
        for name in mapping:
            assert re.search(rf"\.{name}\b", source), f"{name} is never read"
            if is_dataclass(hints[name]) and name != "rewards":
                check(hints[name], mapping[name])

    check(grpo.Config, values)
    check(grpo.L.RefinerConfig, values["refiner"])
    check(grpo.R.RewardsConfig, values["rewards"])
    for stage in values["stages"]:
        check(grpo.StageConfig, stage)
    for key in values:
        assert re.search(rf"(#.*\n)?^{key}:.*|^# .*\n^{key}:", text, flags=re.M)


def test_every_profile_loads():
    """Each named profile of config.yaml is a valid config and changes something."""
    default = grpo.load_config(["config.yaml"])
    for name in yaml.safe_load(Path("config.yaml").read_text())["profiles"]:
        assert grpo.load_config(["config.yaml", f"profile={name}"]) != default


def test_types_are_strict_and_numbers_convert(tmp_path):
    """1e-5, a string in YAML 1.1, and 1 are floats where a float is due; a bool is no int; null takes the refiner away."""
    cfg = load(tmp_path, MINIMAL + "generator: {lr: 1e-5, beta: 1}\nrefiner: null\n")
    assert cfg.generator.lr == 1e-5 and isinstance(cfg.generator.beta, float) and cfg.refiner is None
    for text, message in [
        ("seed: true", "seed: True is bool; expected int"),
        ("seed: 1.5", "seed: 1.5 is float; expected int"),
        ("generator: {lr: fast}", "generator.lr: 'fast' is str; expected float"),
        ("autoencode_photos: 1", "expected bool"),
        ("generator: {sde: ddpm}", "generator.sde: 'ddpm'; expected one of cps, flow, ode"),
        ("generator: 3", "generator: 3; expected a mapping"),
        ("stages: [{train: all}]", r"stages\[0\].train: 'all'; expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, MINIMAL + text)


@pytest.mark.parametrize(
    "text,message",
    [
        ("generator: {num_step: 4}", "generator.num_step is not a key; did you mean generator.num_steps?"),
        ("sed: 1", "sed is not a key; did you mean seed?"),
        ("zzz: 1", "zzz is not a key; known are out, seed"),
        ("stages: [{train: generator, images: 1}]", "groups of one"),
        ("stages: [{train: refiner, rewrites: 2, keep_original: true}]", "groups of one"),
        ("stages: []", "stages: empty"),
        ("generator: {sde: ode}", "generator.sde: ode explores nothing"),
        ("refiner: null\nstages: [{train: refiner, rewrites: 4}]", "refiner: null, but a stage needs rewrites"),
        ("seed: [", "not YAML"),
    ],
)
def test_config_errors_name_value_expectation_and_remedy(tmp_path, text, message):
    """One line each, before any model is loaded."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, MINIMAL + text)


def test_overrides_and_profiles(tmp_path):
    """Dotted words win over the profile, the profile over the file; null drops a reward; what is no word is named."""
    text = MINIMAL + "seed: 1\nprofiles: {p: {seed: 2, generator: {lr: 3.0}}}\n"
    assert load(tmp_path, text, "profile=p").seed == 2
    cfg = load(
        tmp_path,
        text,
        "generator.lr=4",
        "profile=p",
        "rewards.train.b={kind: clip, model: nano/clip}",
        "rewards.train.a=null",
    )
    assert cfg.generator.lr == 4.0 and list(cfg.rewards.train) == ["b"]
    for word, message in [
        ("profile=q", "has no such profile; it has p"),
        ("seed", "expected key=value"),
        ("rewards.train.a=null", "rewards.train: empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, text, word)


@pytest.mark.parametrize(
    "words,message",
    [
        (["nothing.yaml"], "nothing.yaml is not a file"),
        ([], "expected a config file"),
        (["config.yaml", "generator.num_step=4"], "did you mean generator.num_steps?"),
        (["config.yaml", "prompts=no.txt"], "no.txt is not a file"),
        (["config.yaml", "prompts=TMP/blank.txt"], "blank.txt has no prompt with text in it"),
        (["config.yaml", "out=tests"], "tests is in use and is never overwritten; choose another with out=NAME"),
        (["config.yaml", "generator.model=tests"], "tests has no model_index.json"),
        (["config.yaml", "refiner.model=tests"], "tests has no config.json"),
        (["config.yaml", "rewards.train.semantic.model=tests"], "tests has no config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, words, message):
    """As the user sees it: no traceback, nothing on stdout, exit code 2."""
    (tmp_path / "blank.txt").write_text("\n   \n")
    words = [w.replace("TMP", str(tmp_path)) for w in words]
    words = words + [f"out={tmp_path / 'run'}"] if len(words) > 1 and not words[1].startswith("out=") else words
    done = subprocess.run([sys.executable, "grpo.py", *words], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- advantages and loss


def test_advantages_of_a_group_sum_to_zero_and_weights_scale_them():
    """Per prompt group and per reward; a reward's own scale does not matter, its weight does."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(12, generator=g), torch.randn(12, generator=g)
    both = grpo.advantages({"a": a, "b": b}, {"a": 1.0, "b": 0.5}, 3)
    torch.testing.assert_close(both.view(3, 4).sum(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        grpo.advantages({"a": 100 * a + 7, "b": b}, {"a": 1.0, "b": 0.5}, 3), both, atol=2e-3, rtol=0
    )
    by_hand = [
        (x - a[4:8].mean()) / (a[4:8].std(correction=0) + 1e-4)
        + 0.5 * (y - b[4:8].mean()) / (b[4:8].std(correction=0) + 1e-4)
        for x, y in zip(a[4:8], b[4:8])
    ]
    torch.testing.assert_close(both[4:8], torch.stack(by_hand))


def test_advantages_are_clipped_to_five():
    """One outlier in 100 would be at 9.9 standard deviations."""
    r = torch.zeros(100)
    r[3] = 1.0
    assert grpo.advantages({"a": r}, {"a": 1.0}, 1).max() == 5.0


def test_a_group_of_equal_rewards_gives_nothing():
    """Its advantages are 0 and zero_std marks it; two prompts with the same text stay two groups."""
    r = torch.tensor([0.3, 0.3, 0.3, 0.1, 0.2, 0.3])
    assert grpo.advantages({"a": r}, {"a": 1.0}, 2)[:3].abs().max() < 1e-3
    assert grpo.zero_std({"a": r, "b": torch.zeros(6)}, 2).tolist() == [True, False]


def test_clipped_loss_is_the_pessimistic_bound():
    """At ratio 1 the gradient is -A; beyond the clip range in the direction of A it is 0; on the other side it is not clipped."""
    for log_ratio, advantage, gradient in [
        (0.0, 2.0, -2.0),
        (0.5, 2.0, 0.0),
        (-0.5, 2.0, -2.0 * 2.718281828**-0.5),
        (-0.5, -2.0, 0.0),
        (0.5, -2.0, 2.0 * 2.718281828**0.5),
    ]:
        x = torch.tensor([log_ratio], requires_grad=True)
        loss, clipped = grpo.clipped_loss(x, torch.tensor([advantage]), 0.2)
        loss.sum().backward()
        assert x.grad.item() == pytest.approx(gradient, rel=1e-5) and clipped.item() == (gradient == 0)
