"""What a run on real models takes of a GPU, by arithmetic: no weights, no GPU. A script, not a test.

    python tests/sizes.py profile=flux                  any words of grpo.py
    python tests/sizes.py profile=klein card=24         the card's GiB, 80 if not given

Models are built on the meta device, in the published sizes of sizes.yaml. Weights and LoRA are counted. What a
forward and a backward take is watched: the most bytes that their tensors hold at once, with attention as
FlashAttention keeps it: q, k, v, its output and a number a row. Prints Markdown tables in GiB: the parts, those
of a micro-batch or of one picture among them, and the peak of each phase of a step.

Not counted: CUDA's own memory, the allocator's gaps, workspaces of kernels, activations of text encoders and
rewards, and what a detector takes to learn.
"""

import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import torch
import torch.nn.functional as F
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
import kernels

SIZES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
CHAT = 128  # tokens before a rewrite: system prompt, the user's words, template


# ---------------------------------------------------------------- counting


def build(entry):
    """An entry of sizes.yaml -> the model, with nothing in its weights"""
    changes = dict(entry)
    name = changes.pop("class")
    if hasattr(diffusers, name):
        return getattr(diffusers, name)(**changes).requires_grad_(False)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**changes)).requires_grad_(False)


def gib(tree):
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree)) / 2**30


def weights(model):
    return gib(list(model.parameters()))


class Watch(TorchDispatchMode):
    """The most bytes that the tensors made inside hold at once"""

    now = 0
    most = 0

    def free(self, count):
        self.now -= count

    def see(self, tree, new):
        for tensor in tree_leaves(tree):
            storage = torch.is_tensor(tensor) and tensor.untyped_storage()
            if storage and not hasattr(storage, "seen"):  # a view has its tensor's storage
                storage.seen = True
                if new:
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.free, storage.nbytes())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.see([args, kwargs], new=False)
        out = function(*args, **kwargs or {})
        self.see(out, new=True)
        return out


def peak(work):
    """GiB that a function takes beyond what was there"""
    with Watch() as watch:
        work()
    return watch.most / 2**30


def learning(model, forward):
    """GiB of a LoRA in f32, and of a micro-batch's forward and backward beside the gradients of an earlier one"""
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in lora:
        p.data = p.data.float()
        p.requires_grad_(True)

    def two():
        for _ in range(2):
            forward().float().square().mean().backward()

    most = peak(two)
    for p in lora:
        p.grad = None
    return gib(lora), most - gib(lora)


def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = [
        part.repeat_interleave(groups, 1) if groups > 1 else part for part in (key, value)
    ]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


# ---------------------------------------------------------------- the parts, {what: GiB}


def generator(cfg):
    """Of the diffusion policy; latents and embeddings are those of one picture"""
    entry = SIZES["pipelines"][cfg.generator.model]
    b = cfg.micro_batch * entry["passes"]
    h = cfg.generator.height // 8
    w = cfg.generator.width // 8
    numbers = {"b": b, "h": h, "w": w, "n": h * w // 4}

    def tensor(shape):
        made = torch.empty([numbers.get(n, n) for n in shape])
        return [made] * b if entry.get("each") and "b" not in shape else made

    inputs = {name: tensor(shape) for name, shape in entry["inputs"].items()}
    latents, embeddings, *_ = [gib(value) / b for value in inputs.values()]
    if "grid" in entry:
        inputs[entry["grid"]] = [[(1, h // 2, w // 2)]] * b
    latents *= entry["bytes"] / 2
    vae = build(entry["vae"])
    picture = torch.empty([numbers.get(n, n) for n in entry["picture"]])
    model = build(entry["transformer"])
    part = {
        "transformer": weights(model),
        "text encoders": sum(weights(build(encoder)) for encoder in entry["encoders"]),
        "autoencoder": weights(vae),
    }
    c = cfg.generator
    model.add_adapter(LoraConfig(r=c.lora_rank, target_modules=c.lora_targets))
    forward = lambda: torch.stack(tree_leaves(model(**inputs, return_dict=False)))
    lora, whole = learning(model, forward)
    model.enable_gradient_checkpointing()
    _, checkpointed = learning(model, forward)
    with torch.no_grad():
        drawing = max(peak(forward), peak(lambda: vae.decode(picture)))
    return part | {
        "LoRA": lora,
        "gradients": lora,
        "AdamW": 2 * lora,
        "EMA": lora,
        "activations": whole,
        "activations with checkpointing": checkpointed,
        "drawing": drawing,
        "embeddings": embeddings * entry["passes"],
        "latents, path": latents * 3 * c.window,  # x, x_next and v of each step
        "latents, elbo": latents,
    }


def refiner(cfg):
    """Of the language policy"""
    c = cfg.refiner
    # text_encoder: the one that writes is the first of the pipeline
    encoder = SIZES["pipelines"][cfg.generator.model]["encoders"][0]
    model = build(encoder if c.model == "text_encoder" else SIZES["models"][c.model])
    part = {"refiner": weights(model)}
    config = LoraConfig(r=c.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config)
    head = model.get_output_embeddings().weight
    ids = torch.zeros(cfg.micro_batch, CHAT + c.max_new_tokens, dtype=torch.long)
    causal = {"full_attention": None}  # a mask of which transformers need read no number

    def forward():
        out = model.base_model(ids, attention_mask=causal, use_cache=False)
        hidden = out.last_hidden_state[:, CHAT:]
        return kernels.token_log_probs(hidden, head, ids[:, CHAT:])[0]

    lora, activations = learning(model, forward)
    m = model.config
    cache = ids.numel() * m.num_hidden_layers * m.num_key_value_heads * m.head_dim * 4  # bytes
    return part | {
        "refiner's LoRA": lora,
        "refiner's gradients": lora,
        "refiner's AdamW": 2 * lora,
        "refiner's activations": activations,
        "KV cache": cache / 2**30,
    }


def rewards(cfg):
    part = {"KID's CLIP": 2 * weights(build(SIZES["models"][cfg.rewards.kid]))}  # f32, twice bf16
    for name, reward in (cfg.rewards.train | cfg.rewards.validation).items():
        bf16 = reward.args.get("dtype") == "bfloat16"
        part[f"reward {name}"] = weights(build(SIZES["models"][reward.model])) * (1 if bf16 else 2)
    return part


# ---------------------------------------------------------------- the phases of a step

# What is on the GPU under offload. AdamW's moments stay where they were made. In a look the live LoRA lies beside its EMA.
STAYS = "KID's CLIP, autoencoder, AdamW, refiner's AdamW, kept embeddings, kept latents"
PHASES = {
    "the refiner writes": "refiner, refiner's LoRA, KV cache",
    "texts are encoded": "transformer, LoRA, text encoders",
    "pictures are drawn": "transformer, LoRA, EMA, drawing",
    "a reward scores": "largest reward",
    "the generator learns": "transformer, LoRA, gradients, activations",
    "the refiner learns": "refiner, refiner's LoRA, refiner's gradients, refiner's activations",
}
# what waits on the CPU under offload, and is on the GPU without
WAITS = "transformer, LoRA, EMA, text encoders, refiner, refiner's LoRA, all rewards, best look"


def phases(cfg, stage, part):
    """[(phase, GiB at its peak)] of one stage"""
    texts = stage.prompts * stage.texts
    pictures = texts * stage.images * (stage.train != "refiner")
    judges = [size for name, size in part.items() if name.startswith("reward ")]
    part = part | {
        "kept embeddings": texts * part["embeddings"],
        "kept latents": pictures * part["latents, " + cfg.generator.log_prob],
        "largest reward": max(judges),
        "all rewards": sum(judges),
        "best look": part["LoRA"] + part["EMA"] + part["refiner's LoRA"],
    }
    if cfg.generator.gradient_checkpointing:
        part["activations"] = part["activations with checkpointing"]

    def total(*names):
        return sum(part[name] for name in set(", ".join(names).split(", ")))

    waits = WAITS
    if cfg.refiner.model == "text_encoder":  # it is counted there
        waits = waits.replace("refiner, ", "")
    always = [STAYS] if cfg.offload else [STAYS, waits]
    idle = {"generator": "the refiner learns", "refiner": "the generator learns"}.get(stage.train)
    rows = [(name, total(work, *always)) for name, work in PHASES.items() if name != idle]
    return rows + [("on the CPU", total(waits))] * cfg.offload


def table(*head, rows):
    for row in [head, ["---"] * len(head), *rows]:
        print(
            "|",
            " | ".join(
                (f"{x:.2f}" if x > 0.1 else f"{x:.4f}") if isinstance(x, float) else x for x in row
            ),
            "|",
        )
    print()


def main(words):
    card = next((word for word in words if word.startswith("card=")), "card=80")
    cfg = grpo.load_config(["config.yaml", *[word for word in words if word != card]])
    torch.set_default_dtype(torch.bfloat16)
    kernels.TILE["cpu"] = kernels.TILE["cuda"]
    F.scaled_dot_product_attention = flash
    with torch.device("meta"):
        part = generator(cfg) | refiner(cfg) | rewards(cfg)
    table("part", "GiB", rows=part.items())
    for i, stage in enumerate(cfg.stages):
        table(f"stage {i}, {stage.train}", f"GiB; {card}", rows=phases(cfg, stage, part))


if __name__ == "__main__":
    main(sys.argv[1:])
