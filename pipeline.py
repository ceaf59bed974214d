"""A stock diffusers pipeline, called with noise and prompts of ours: the plumbing under generator.py.

Nothing here knows a family of pipelines. Two methods of the instance are wrapped while it runs:
`prepare_latents` calls the original and puts our latents in the place of its own; `encode_prompt` encodes
the distinct prompts of a rollout once and picks rows. So what a pipeline packs, masks or repeats stays
its own business.
"""

import importlib
import inspect
import traceback
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.utils._pytree import tree_map

from common import (
    ConfigError,
    batches,
    check_folder,
    check_tokenizer,
    load_model,
    loading,
    quantized,
)


# arguments of the call that are not generator.call's to set
OURS = (
    "prompt",
    "height",
    "width",
    "num_inference_steps",
    "generator",
    "output_type",
)


def load_pipeline(cfg, dtype):
    """A stock pipeline with a flow-matching Euler scheduler, each model with all weights from its file

    cfg is a GeneratorConfig. ConfigError for any other sampler, and for arguments that its call has not.
    """
    check_folder(cfg.model, "model_index.json")
    # One model at a time, because a pipeline's own from_pretrained does not say what was missing in a file.
    parts = {}
    with loading(cfg.model):
        for name, entry in DiffusionPipeline.load_config(cfg.model).items():
            if isinstance(entry, list) and entry[0] in ("diffusers", "transformers"):
                kind = getattr(importlib.import_module(entry[0]), entry[1])
                if issubclass(kind, torch.nn.Module):
                    options = dict(subfolder=name, dtype=dtype)
                    if name != "vae":  # which is small, and draws
                        options |= quantized(cfg.quantize, kind, dtype)
                    parts[name] = load_model(kind, cfg.model, **options)
        pipe = DiffusionPipeline.from_pretrained(cfg.model, dtype=dtype, **parts)
    for name, part in pipe.components.items():  # some pipelines have two or three
        if name.startswith(("tokenizer", "processor")) and part is not None:
            check_tokenizer(f"{cfg.model}/{name}", getattr(part, "tokenizer", part))
    sampler = type(pipe.scheduler)
    # one that adds noise of its own cannot be replayed
    noisy = pipe.scheduler.config.get("stochastic_sampling")
    needed = {"encode_prompt", "prepare_latents", "transformer"} - set(dir(pipe))
    if sampler is not FlowMatchEulerDiscreteScheduler or noisy or needed:
        raise ConfigError(
            f"generator.model: {cfg.model} is a {type(pipe).__name__} with {sampler.__name__}; expected "
            "encode_prompt, prepare_latents, a transformer, and FlowMatchEulerDiscreteScheduler without "
            "stochastic_sampling"
        )
    with loading("generator.call"):
        inspect.signature(pipe.__call__).bind_partial(**dict.fromkeys(OURS), **cfg.call)
    if cfg.call.get("normalize"):
        raise ConfigError("generator.call.normalize: expected false: it mixes pictures of a batch")
    with loading("generator.lora_targets"):
        pipe.transformer.add_adapter  # PRX's takes none
    return pipe


# ---------------------------------------------------------------- the call, whose prompts are encoded once


def batch_axes(two, three):
    """What encode_prompt gave for two and for three texts -> for each of its results, its batch axis

    It is the one on which they differ; None where a result is the same for all texts. A list with one thing
    a text has axis 0.
    """
    # several values, not a list with one per text
    if isinstance(two, (list, tuple)) and len(two) == len(three):
        return type(two)(map(batch_axes, two, three))
    if isinstance(two, list):
        return 0
    if not torch.is_tensor(two) or two.shape == three.shape:
        return None
    lengths = list(zip(two.shape, three.shape))
    if (2, 3) not in lengths:  # Kandinsky's is where each text ends, counted over the batch
        raise ConfigError("encode_prompt gives a tensor with no row for each text; expected one")
    return lengths.index((2, 3))


def join(axis, *parts):
    """What micro-batches gave -> the same for all their texts: tensors, or lists with one thing a text"""
    # a mask where nothing is masked is None
    if axis is None or all(part is None for part in parts):
        return parts[0]
    return torch.cat(parts, axis) if torch.is_tensor(parts[0]) else sum(parts, [])


class Trajectory:
    """What a rollout leaves to learn from: its prompts, the call that drew them, for replays, and `steps`.

    In the call, `encode` takes the place of encode_prompt; text encoders may wait on the CPU. The distinct
    prompts are encoded once for each set of other arguments, such as a negative prompt.
    """

    def __init__(self, policy, prompts, num_steps):
        self.policy = policy  # a Generator
        self.encode_prompt = policy.pipe.encode_prompt
        self.prompts = prompts  # B texts
        self.num_steps = num_steps  # of the time grid in which `steps` have their places
        self.steps = []  # Step of each place in the window, or Noised of each time
        self.distinct = list(dict.fromkeys(prompts))
        self.encoded = {}  # arguments of encode_prompt -> batch axes, what it gave

    def encode(self, *args, **kwargs):
        arguments = inspect.signature(self.encode_prompt).bind(*args, **kwargs).arguments
        guided = arguments.get("do_classifier_free_guidance", True)
        self.asked += [
            value
            for name, value in arguments.items()
            if isinstance(value, list) and (guided or "negative" not in name)
        ]
        # the arguments but for the chunk's prompts and its length, which differ from call to call
        key = repr(self.for_texts([None], arguments))
        if key not in self.encoded:
            self.encoded[key] = self.encode_all(arguments)
        rows = [self.distinct.index(text) for text in self.chunk]

        def pick(axis, whole):
            if axis is None or whole is None:
                return whole
            if isinstance(whole, list):
                return [whole[row] for row in rows]
            return whole.index_select(axis, torch.tensor(rows, device=whole.device))

        return tree_map(pick, *self.encoded[key])

    def for_texts(self, texts, arguments):
        """The arguments of a call for other texts: they replace the chunk's, other prompts are repeated."""
        changed = dict(arguments)
        for name, value in arguments.items():
            if isinstance(value, list) and value == self.chunk:
                changed[name] = list(texts)  # Z-Image writes into it
            elif name == "batch_size":
                changed[name] = len(texts)
            # LongCat encodes its negative prompt as a `prompt` of one text
            elif name == "prompt" and isinstance(value, str):
                changed[name] = [value] * len(texts)
            # not Sana's list of instructions, which is no prompt
            elif "prompt" in name and isinstance(value, list) and isinstance(value[0], str):
                changed[name] = value[:1] * len(texts)
        return changed

    @torch.no_grad()
    def encode_all(self, arguments):
        """-> the batch axes, and what the distinct prompts give"""

        def call(texts):
            return self.encode_prompt(**self.for_texts(texts, arguments))

        with self.policy.encoders():
            # of two lengths, or Qwen-Image would return no mask at all
            axes = batch_axes(call(["a", "a longer text"]), call(["a", "a longer text", "a"]))
            # micro_batch bounds the memory of a large text encoder as it does that of the transformer
            parts = [call(texts) for texts in batches(self.distinct, self.policy.micro_batch)]
            try:
                return axes, tree_map(join, axes, *parts)
            # each part is as long as its longest text: only together are they padded alike
            except (RuntimeError, TypeError):
                return axes, call(self.distinct)

    def check(self, texts):
        """ConfigError unless the call has asked for these texts: {name: as many as pictures}"""
        for name, wanted in texts.items():
            # a rewriter changes prompts; without guidance no pipeline needs a negative one
            if wanted not in self.asked:
                raise ConfigError(
                    f"generator.call: the pipeline does not encode the {name} that it is given; "
                    "expected no rewriting, and guidance where there is a negative_prompt"
                )

    def call(self, part, rows, latents, output_type, window=(), noise=None):
        """The pipeline's own call for some rows, without its no_grad -> what it draws, (b, ...)

        part, window, noise: as `PolicyScheduler.begin` takes them. latents: shape -> (b, *shape), what it
        starts from; FLUX.2 takes the call's own `latents` in another shape than its scheduler sees.
        """
        pipe = self.policy.pipe
        cfg = self.policy.cfg
        self.chunk = [self.prompts[row] for row in rows]  # the texts of the call under way
        self.asked = []  # the lists of texts that it asks to be encoded
        texts = {"prompt": self.chunk}
        negative = cfg.call.get("negative_prompt")
        # as many as there are prompts, or some pipelines refuse it and others would use it once
        if isinstance(negative, str):
            texts["negative_prompt"] = [negative] * len(rows)
        prepare_latents = pipe.prepare_latents

        def prepare(*args, **kwargs):
            made = prepare_latents(*args, **kwargs)
            theirs, *rest = made if isinstance(made, tuple) else [made]  # (b, ...)
            ours = latents(theirs.shape[1:]).to(theirs)
            return (ours, *rest) if rest else ours

        # on the instance, so that `del` below uncovers the methods of the class
        pipe.encode_prompt = self.encode
        pipe.prepare_latents = prepare
        pipe.scheduler.begin(cfg, part, window, noise)
        try:
            drawn = inspect.unwrap(type(pipe).__call__)(
                pipe,
                height=cfg.height,
                width=cfg.width,
                num_inference_steps=self.num_steps,
                generator=torch.Generator(),  # for the latents that are replaced
                output_type=output_type,
                **cfg.call | texts,
            )[0]
        finally:
            del pipe.encode_prompt
            del pipe.prepare_latents
            pipe.scheduler.off()
        self.check(texts)
        return drawn


# ---------------------------------------------------------------- what else is asked of it


@torch.no_grad()
def check_replay(policy):
    """A Generator draws two pictures and replays one, in each grid of its config -> that of num_steps

    ConfigError where a step depends on its number or on the batch: it cannot be trained.
    """
    cfg = policy.cfg
    keys = [("check", 0), ("check", 1)]
    rows = [0] * min(2, policy.micro_batch)  # in a batch as large as it was drawn in
    try:
        for n in dict.fromkeys((cfg.draw_steps, cfg.num_steps)):
            images, record = policy.rollout(["a photo", "a cat"], keys, range(n), num_steps=n)
            grid = policy.scheduler.grid  # n + 1 times
            if sum(0 < t < 1.001 for t in grid) != n:  # Qwen-Image 2.1 may have its own
                raise ConfigError(
                    f"generator.num_steps, draw_steps: {n}; the model's times are {grid}; expected as "
                    "many in (0, 1]"
                )
            for step in record.steps:
                x, recorded = step.at(rows)  # (b, ...)
                v = policy.replay(record, step.index, x, rows)
                bound = 0.001 if v.dtype == torch.float32 else 0.01  # bf16 has two digits
                if (v - recorded).abs().max() > bound * step.v.abs().max():
                    raise ConfigError(
                        f"generator.model: {cfg.model}: step {step.index} is another when replayed; "
                        "expected one that depends on no number and no other picture"
                    )
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        # an error in a line of ours is a bug, in a fork too, and keeps its traceback
        if Path(line.filename).parent == Path(__file__).parent:
            raise
        with loading(f"generator: {type(policy.pipe).__name__} of {cfg.model}"):
            raise
    drawn = tuple(images.shape[2:])
    if drawn != (cfg.height, cfg.width):
        raise ConfigError(
            f"generator.height, width: {cfg.height}, {cfg.width}; {cfg.model} draws {drawn}; expected those"
        )
    return grid


@torch.no_grad()
def reconstruct(vae, images, device, micro_batch):
    """Photographs through an autoencoder, as pictures come: (B,3,H,W) in [0,1] -> the same on the CPU"""
    films = "temperal_downsample" in vae.config  # of which a picture is one frame: Qwen-Image's
    parts = []
    with loading(f"{type(vae).__name__}, for photographs"):
        for x in images.split(micro_batch):
            x = (x * 2 - 1).to(device, vae.dtype)  # (b, 3, H, W)
            found = vae.encode(x[:, :, None] if films else x, return_dict=False)[0]
            # Sana's are no distribution
            latents = found if torch.is_tensor(found) else found.mode()
            x = vae.decode(latents, return_dict=False)[0].reshape(x.shape)
            parts.append((x.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(parts)
