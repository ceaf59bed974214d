"""Well-typed nonsense, damaged files and stray words end in one line that names key and value: the three places of errors."""

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grpo
from common import BOUNDS, ConfigError, check_bounds, loading
from pipeline import load_pipeline
from ranks import pick_device

NONSENSE = [
    "max_grad_norm=-1",
    "max_grad_norm=nan",
    "weight_decay=inf",
    "seed=-1",
    "micro_batch=0",
    "updates=0",
    "eval_every=0",
    "eval_images=1e8",
    "save_every=-2",
    "generator.ema=2",
    "generator.ema=1",
    "generator.lora_alpha=0",
    "generator.lora_rank=0",
    "generator.lr=-1",
    "generator.clip_range=-0.1",
    "generator.num_steps=0",
    "generator.window=0",
    "generator.noise_level=1.5",
    "generator.noise_level=0",
    "generator.height=0",
    "generator.beta=-1",
    "generator.sde=ode",
    "refiner.temperature=inf",
    "refiner.temperature=0",
    "refiner.clip_range_high=-1",
    "refiner.max_new_tokens=0",
    "rewards.train.semantic.weight=-1",
    "rewards.train={semantic: {weight: 0}, feature: {weight: 0}, alignment: {weight: 0}}",
    "rewards.kid_layer=-1",
    "stages=[{train: generator, steps: -3}]",
    "stages=[{train: refiner, rewrites: -2}]",
    "learners.semantic.accuracy=2",
    "learners.semantic.lr=0",
    "dtype=float16",
    "keep=best",
    "generator.call=[",
]


# what the message names where a key alone is not at fault
KEY = {
    "stages=[{train: generator, steps: -3}]": "stages.0.steps",
    "stages=[{train: refiner, rewrites: -2}]": "stages.0.rewrites",
}


@pytest.fixture
def small(tmp_path):
    """config.yaml without its profiles, which take longest to load"""
    values = yaml.safe_load(Path("config.yaml").read_text())
    del values["profiles"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize("word", NONSENSE)
def test_nonsense_is_refused_by_its_key(small, word):
    """Before any model loads, with the key, or the word itself, in the message."""
    with pytest.raises(ConfigError) as error:
        grpo.load_config([small, word])
    assert KEY.get(word, word.split("=")[0].split(".")[-1]) in str(error.value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("seed: 1\nseed: 2\n", "duplicate key"),
        ("a: &a {b: *a}\n", "recursive"),
        ("- 1\n- 2\n", "config.yaml cannot be loaded"),
        ("seed: [\n", "config.yaml cannot be loaded"),
        ("\x00\x01", "config.yaml cannot be loaded"),
        ("profiles: 3\n", "profile"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, text, message):
    """Duplicate keys, a file that contains itself, a list, bytes: one line with the file's name."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        grpo.load_config([str(tmp_path / "config.yaml"), "profile=quick"])


def test_a_file_that_expands_without_end_does_not_hang(tmp_path):
    """Ten aliases of ten aliases, nine deep, are refused at once."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        grpo.load_config([str(tmp_path / "config.yaml")])
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:7", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name):
    """One line with the name, on a machine without a GPU."""
    with pytest.raises(ConfigError, match=f"device: {name}"):
        pick_device(name)


@pytest.mark.parametrize("call", [{"output_type": "pil"}, {"guidance": 3.0}, {"height": 64}])
def test_arguments_of_the_call_that_are_not_its_own_are_refused(small, call):
    """What we set ourselves, and what the pipeline does not take, is named before a picture is drawn."""
    cfg = grpo.load_config([small]).generator
    cfg.call = call
    with pytest.raises(ConfigError, match=next(iter(call))):
        load_pipeline(cfg, None)


@given(st.recursive(st.floats() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_bounds_pass_or_name_the_place(value):
    """Any nested value passes or is a ConfigError; one without odd floats passes."""
    try:
        check_bounds(value, "key")
    except ConfigError as error:
        assert str(error).startswith("key")
        assert any(odd in repr(value) for odd in ("nan", "inf"))


@pytest.mark.parametrize("place", ["bench.judge.key", "rewards.train.semantic.args.key"])
def test_a_key_that_is_typed_is_refused_and_not_printed(small, place):
    """Keys come from the environment by name: a typed one would be copied to config.yaml and checkpoints."""
    with pytest.raises(ConfigError, match="name of an environment variable") as error:
        grpo.load_config([small, f"{place}=sk-secret123"])
    assert "secret" not in str(error.value)


@given(st.sampled_from(sorted(BOUNDS)), st.floats(allow_nan=False, allow_infinity=False))
def test_a_bound_is_what_it_says(bound, value):
    """positive, natural, share and decay hold on both sides of their ends."""
    expected = {"positive": value > 0, "natural": value >= 0, "share": 0 < value <= 1, "decay": 0 <= value < 1}
    try:
        check_bounds(value, "key", bound)
        assert expected[bound]
    except ConfigError:
        assert not expected[bound]


@given(st.text())
def test_whatever_a_library_raises_becomes_one_kind(text):
    """loading() names the path and keeps the reason; a ConfigError inside is left as it is."""
    for kind in (ValueError, KeyError, OSError, RuntimeError, UnicodeError):
        with pytest.raises(ConfigError, match="some/path cannot be loaded"):
            with loading("some/path"):
                raise kind(text)
    with pytest.raises(ConfigError, match="^inside$"):
        with loading("some/path"):
            raise ConfigError("inside")
