"""What every file here needs: one kind of user error, bounds, counted noise, whole weights."""

import math
import re
import zlib
from contextlib import contextmanager
from dataclasses import field, fields, is_dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers


# ---------------------------------------------------------------- errors


class ConfigError(Exception):
    """A user's mistake, in one line: value, expectation, remedy. `grpo.cli` prints it and exits with 2.

    Nothing else becomes one line: a bug, in a fork too, keeps its traceback.
    """


@contextmanager
def loading(path):
    """Inside, whatever a library raises for a file or a model is a ConfigError with path and reason."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # what libraries raise for a damaged file has no common kind
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from error


# ---------------------------------------------------------------- bounds

# A bound is a word here and at the field, so that an error can say in words what was expected.
BOUNDS = {
    "positive": (lambda x: x > 0, "above 0"),
    "natural": (lambda x: x >= 0, "0 or more"),
    "share": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "decay": (lambda x: 0 <= x < 1, "0 or more and below 1"),
}


def bounded(bound, default):
    """A config field with a bound of BOUNDS by its name: `lr: float = bounded("positive", 1e-3)`"""
    return field(default=default, metadata={"bound": bound})


def check_bounds(value, where="", bound=None):
    """ConfigError where a field of a config, or of what it holds, is outside its bound or not finite."""
    parts = {}
    bounds = {}
    if is_dataclass(value):
        parts = vars(value)
        bounds = {f.name: f.metadata.get("bound") for f in fields(value)}
    elif isinstance(value, dict):
        parts = value
    elif isinstance(value, list):
        parts = dict(enumerate(value))
    for name, part in parts.items():
        place = f"{where}.{name}" if where else name
        if name == "key" and isinstance(part, str) and not re.fullmatch("[A-Z_][A-Z0-9_]*|", part):
            # a key that was typed would be copied to config.yaml; it is not printed either
            raise ConfigError(f"{place}: expected the name of an environment variable, not a key")
        check_bounds(part, place, bounds.get(name))
    if hasattr(value, "check"):  # what a config's fields must be together
        value.check()
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value}; expected a finite number")
    if bound and value is not None and not BOUNDS[bound][0](value):
        raise ConfigError(f"{where}: {value}; expected a number {BOUNDS[bound][1]}")


# ---------------------------------------------------------------- noise


def rng(use, *numbers):
    """A random generator that follows from its use and from numbers: (seed, iteration, prompt, sample).

    Noise is counted, never stateful: a batch may be split in any way, ranks change nothing and resume
    needs no state. The word comes first because numpy pads a seed with zeros: (s, i, p) would draw what
    (s, i, p, 0) draws.
    """
    return np.random.default_rng([zlib.crc32(use.encode()), *numbers])


def torch_seed(use, *numbers):
    """A seed for torch's own generators, counted as `rng` is"""
    return int(rng(use, *numbers).integers(2**31))


# ---------------------------------------------------------------- batches and weights


def repeat(items, times):
    """[a, b] -> [a, a, b, b]: what belongs to a prompt, for each of its pictures"""
    return [item for item in items for _ in range(times)]


def batches(items, size):
    """A list, range or tensor, `size` at a time: a batch bounds memory, and changes no result."""
    return (items[i : i + size] for i in range(0, len(items), size))


def check_folder(path, file):
    """ConfigError for a local folder without `file`, and for what is neither a folder nor a Hub's name.

    A mistyped folder would else be looked for on the Hub, with 40 seconds of retries.
    """
    local = Path(path)
    if local.exists() and not (local / file).is_file():
        raise ConfigError(f"{path} has no {file}; expected a folder of save_pretrained")
    if not local.exists() and (len(local.parts) != 2 or Path(local.parts[0]).exists()):
        raise ConfigError(
            f"{path} is no folder; expected one of save_pretrained, or a Hub repository owner/name"
        )


def load_model(cls, path, **options):
    """cls.from_pretrained(path), with all weights from the file: what is missing would silently be random"""
    with loading(path):
        model, info = cls.from_pretrained(path, output_loading_info=True, **options)
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[fault]:
                raise ConfigError(
                    f"{path}: weights do not match {type(model).__name__}: {fault} {few(info[fault])}"
                )
        check_finite(path, model.state_dict())
    return model


def quantized(kind, cls, dtype):
    """Options of cls.from_pretrained for frozen weights of 4 or 8 bits; {} for None"""
    if not kind:
        return {}
    with loading(f"quantize: {kind} (pip install bitsandbytes for nf4, torchao for int8)"):
        library = transformers if cls.__module__.startswith("transformers") else diffusers
        if kind == "nf4":
            config = library.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        else:  # not bitsandbytes, whose 8-bit weights cannot wait on the CPU
            from torchao.quantization import Int8WeightOnlyConfig

            config = library.TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": config}


def check_finite(path, tensors):
    """ConfigError for {name: tensor} that holds NaN or infinity: it would spread to all that it meets."""
    bad = [
        name
        for name, t in tensors.items()
        # of another type are quantised weights, which cannot be asked
        if type(t) is torch.Tensor and t.is_floating_point() and not t.isfinite().all()
    ]
    if bad:
        raise ConfigError(f"{path}: not finite: {few(bad)}; expected whole weights")


def few(names, most=4):
    """The first names of many, for a message of one line"""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_tokenizer(path, tokenizer):
    """ConfigError for a tokenizer without its vocabulary: a missing file gives an empty one."""
    with loading(path):
        text = tokenizer.decode(tokenizer("a photo").input_ids)
    if "photo" not in text:
        raise ConfigError(
            f"{path}: its tokenizer reads {'a photo'!r} as {text!r}; expected one with its vocabulary"
        )
