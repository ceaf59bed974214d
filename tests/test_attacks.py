"""Well-typed nonsense, damaged files and stray words end in one line that names key and value: the three places of errors."""

import shutil

import pytest
from conftest import damage, refuses

import grpo
from common import ConfigError, loading
from generator import Generator, GeneratorConfig
from ranks import pick_device
from refiner import Refiner, RefinerConfig

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
    "refiner.temperature=inf",
    "refiner.temperature=0",
    "refiner.clip_range_high=-1",
    "refiner.max_new_tokens=0",
    "rewards.train.semantic.weight=-1",
    "rewards.train={semantic: {weight: 0}, feature: {weight: 0}, alignment: {weight: 0}}",
    "rewards.kid_layer=-1",
    "stages=[{train: generator, steps: -3}]",
    "stages=[{train: refiner, rewrites: -2}]",
    "learners.semantic.accuracy=0",
    "learners.semantic.accuracy=2",
    "learners.semantic.lr=0",
    "dtype=float16",
    "keep=best",
    "generator.call=[",
]


@pytest.mark.parametrize("word", NONSENSE)
def test_nonsense_is_refused_by_its_key(word):
    """Before any model loads, with the key, or the word itself, in the message."""
    key = word.split("=")[0].split(".")[-1]
    with refuses(key):
        grpo.load_config(["config.yaml", word])


@pytest.mark.parametrize(
    "text,message",
    [
        ("- 1\n- 2\n", "config.yaml cannot be loaded"),
        ("seed: [\n", "config.yaml cannot be loaded"),
        ("\x00\x01", "config.yaml cannot be loaded"),
        ("profiles: 3\n", "profile"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, text, message):
    """A list, half a list, bytes, no profiles: one line with the file's name."""
    (tmp_path / "config.yaml").write_text(text)
    with refuses(message):
        grpo.load_config([str(tmp_path / "config.yaml"), "profile=quick"])


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:7", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name):
    """One line with the name, on a machine without a GPU."""
    with refuses(f"device: {name}"):
        pick_device(name)


@pytest.mark.parametrize("place", ["bench.judge.key", "rewards.train.semantic.args.key"])
def test_a_key_that_is_typed_is_refused_and_not_printed(place):
    """Keys come from the environment by name: a typed one would be copied to config.yaml and checkpoints."""
    with refuses("name of an environment variable") as error:
        grpo.load_config(["config.yaml", f"{place}=sk-secret123"])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("kind", [ValueError, KeyError, OSError, UnicodeError])
def test_whatever_a_library_raises_becomes_one_kind(kind):
    """loading() names the path and keeps the reason; a ConfigError inside is left as it is."""
    with refuses("some/path cannot be loaded: .*why"):
        with loading("some/path"):
            raise kind("why")
    with refuses("^inside$"):
        with loading("some/path"):
            raise ConfigError("inside")


POLICIES = {"flux": (Generator, GeneratorConfig), "refiner": (Refiner, RefinerConfig)}
PARTS = [
    "flux/transformer/diffusion_pytorch_model.safetensors",
    "flux/text_encoder/model.safetensors",
    "flux/tokenizer_2/tokenizer.json",
    "flux/tokenizer_2",
    "refiner/model.safetensors",
    "refiner/config.json",
    "refiner/tokenizer.json",
    "refiner/chat_template.jinja",
]


@pytest.mark.parametrize("part", PARTS)
def test_a_model_that_is_not_whole_is_refused(tmp_path, part):
    """Libraries fill in random weights and empty vocabularies."""
    model = part.partition("/")[0]
    folder = shutil.copytree(f"nano/{model}", tmp_path / model)
    if part.endswith("safetensors"):
        damage(tmp_path / part, "missing")
    else:
        (tmp_path / part).rename(tmp_path / "elsewhere")
    policy, config = POLICIES[model]
    with refuses(str(folder)):
        policy(config(model=str(folder)))
