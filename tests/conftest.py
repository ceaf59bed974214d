"""Tiny random checkpoints of the real classes, saved with save_pretrained: tests go through the code that real models go through."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network
os.environ["TRITON_INTERPRET"] = "1"  # before triton is: kernels run on the CPU, in the tests that ask for them
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import kernels  # noqa: F401

del os.environ["TRITON_INTERPRET"]  # the others take the plain path
torch.set_num_threads(1)  # the models are tiny: a second thread would mostly wait
SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """The default config names nano/... relative to the repository."""
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)


def clip_text(projection=False, dim=16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "nano/clip")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=dim,
        max_position_embeddings=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config), tokenizer


def t5(dim=32):
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(ROOT / "nano/flux/tokenizer_2")
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ), tokenizer


def vae(latent_channels=4):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def flux():
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip, clip_tokenizer = clip_text()
    encoder, tokenizer = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        SCHEDULER, vae(), clip, clip_tokenizer, encoder, tokenizer, transformer
    )


def sd3():
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, clip_tokenizer = clip_text(True)
    clip2, clip_tokenizer2 = clip_text(True)
    encoder, tokenizer = t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer,
        SCHEDULER,
        vae(),
        clip,
        clip_tokenizer,
        clip2,
        clip_tokenizer2,
        encoder,
        tokenizer,
    )


def zimage():
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/refiner")
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
        )
    )
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(SCHEDULER, vae(), encoder, tokenizer, transformer)


def qwen_vl(tokenizer, **options):
    """An image-text model, which is also the text encoder of Qwen-Image"""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4),
    )
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **options))


def qwen():
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/refiner")
    encoder = qwen_vl(tokenizer)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return QwenImagePipeline(SCHEDULER, autoencoder, encoder, tokenizer, transformer)


BUILDERS = {"flux": flux, "sd3": sd3, "zimage": zimage, "qwen": qwen}
CALLS = {
    "flux": dict(guidance_scale=3.5, max_sequence_length=16),
    "sd3": dict(guidance_scale=4.5, max_sequence_length=16),
    "zimage": dict(guidance_scale=4.0, max_sequence_length=64),
    "qwen": dict(true_cfg_scale=4.0, negative_prompt="blurry", max_sequence_length=64),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TINY = dict(height=16, width=16, num_steps=5, draw_steps=5, window=2, log_prob="path", extremes=0, lora_targets=TARGETS, lora_rank=4, lora_alpha=8)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name -> folder of a tiny pipeline, built when first asked for"""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(1)
            pipe = BUILDERS[name]()
            for p in pipe.transformer.parameters():  # zero-initialised layers would make every velocity the same
                if p.abs().sum() == 0:
                    torch.nn.init.normal_(p, std=0.02)
            made[name] = tmp_path_factory.mktemp("tiny") / name
            pipe.save_pretrained(made[name])
        return str(made[name])

    return get


@pytest.fixture
def tiny_generator(checkpoints):
    """name, **changes -> a Generator on a tiny pipeline with a LoRA that is not zero"""
    from generator import Generator, GeneratorConfig

    def make(name="flux", micro_batch=4, perturb=0.05, offload=False, dtype=torch.float32, **changes):
        values = dict(model=checkpoints(name), call=CALLS[name], **TINY)
        gen = Generator(GeneratorConfig(**(values | changes)), dtype=dtype, micro_batch=micro_batch, offload=offload)
        gen.add_lora()
        g = torch.Generator().manual_seed(3)
        for key, p in gen.lora.items():
            if perturb and "lora_B" in key:
                p.data = perturb * torch.randn(p.shape, generator=g)
                gen.ema[key].copy_(p.data)
        return gen

    return make


def damage(file, kind):
    """A .safetensors, of which one tensor becomes what libraries pass in silence: they fill in and skip names."""
    weights = load_file(file)
    name, tensor = weights.popitem()
    instead = {
        "missing": {},
        "unexpected": {name: tensor, "extra": tensor.clone()},
        "renamed": {f"{name}.other": tensor},
        "not finite": {name: tensor / 0},
    }
    save_file(weights | instead[kind], file, {"format": "pt"})


REWARDS = """
import torch

def bright(images, prompts):
    return images.mean((1, 2, 3))

def smooth(images, prompts):
    return -images.diff(dim=3).abs().mean((1, 2, 3))

def broken(images, prompts):
    return images.mean((1, 2, 3)) / 0
"""


@pytest.fixture
def config(checkpoints, tmp_path):
    """words -> Config of a run on the tiny FLUX and the nano refiner, with rewards that need no model; <tmp>/config.yaml

    stage: the only one, as a YAML mapping without braces.
    """
    import grpo

    mine = tmp_path / "mine.py"
    mine.write_text(REWARDS)
    prompts = tmp_path / "few.txt"
    prompts.write_text("a cat\na dog\n\na red cup\na tree\n")
    rewards = {name: {"kind": f"{mine}:{name}"} for name in ("bright", "smooth")}
    base = dict(
        out=str(tmp_path / "out"),
        micro_batch=4,
        eval_every=1,
        eval_images=1,
        validation_prompts=str(prompts),
        test_prompts=str(prompts),
        generator=dict(model=checkpoints("flux"), call=CALLS["flux"], **TINY),
        refiner=dict(max_new_tokens=24),
        rewards=dict(train=rewards, validation={"bright": rewards["bright"]}, heldout={"smooth2": rewards["smooth"]}),
        bench=dict(images=2, axes=dict(realism=["smooth2"], detail=[])),
    )

    def make(*words, stage="train: generator, steps: 2, prompts: 2, images: 3"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(base | {"stages": [yaml.safe_load("{" + stage + "}")]}))
        return grpo.load_config([str(tmp_path / "config.yaml"), *words])

    return make
