"""Each text-to-image pipeline of diffusers, with tiny random weights, through the code that real models go through.

    python tests/pipelines.py                               prints the table of docs/real_models.md
    python tests/pipelines.py FluxPipeline SanaPipeline     some of its rows

A row says what was tried and what came out. pytest does not run this file.
"""

import contextlib
import re
import sys
import tempfile
import traceback
import warnings
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from conftest import ROOT, perturb

import generator
from common import ConfigError
from generator import Generator, GeneratorConfig

PROMPTS = ["a cat", "a cat", "a dog", "a tabby cat, wide view, in soft light"]
KEYS = [("test", row) for row in range(4)]
ROWS = [0, 1, 2, 3]
STEPS = 4
SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16)


# ---------------------------------------------------------------- parts


def tokens(**options):
    return transformers.AutoTokenizer.from_pretrained(ROOT / "nano/refiner", **options)


def llm(name, **options):
    """A language model of three layers, "Qwen3ForCausalLM" or another class of transformers, and its tokenizer"""
    tokenizer = tokens(**options)
    kind = getattr(transformers, name)
    config = kind.config_class(vocab_size=len(tokenizer), max_position_embeddings=1024, pad_token_id=0, bos_token_id=0, eos_token_id=0, **TEXT)
    return kind(config), tokenizer


def vl_text(tokenizer, layers=2):
    """The language half of a Qwen-VL"""
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=1024, num_hidden_layers=layers)
    return TEXT | sizes | dict(rope_parameters=rope)


def qwen_vl(tokenizer, **options):
    """An image-text model, which is also the text encoder of Qwen-Image"""
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32)
    config = transformers.Qwen2_5_VLConfig(text_config=vl_text(tokenizer), vision_config=vision, **options)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(tokenizer, layers=3):
    vision = dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[0])
    return transformers.Qwen3VLConfig(text_config=vl_text(tokenizer, layers), vision_config=vision)


def clip_text(projection=False):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(ROOT / "nano/clip")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config), tokenizer


def t5(kind=transformers.T5EncoderModel, tokenizer=None):
    tokenizer = tokenizer or transformers.T5TokenizerFast.from_pretrained(ROOT / "nano/flux/tokenizer_2")
    config = kind.config_class(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return kind(config), tokenizer


def blocks(count):
    """Of an autoencoder, each but the first of which halves height and width"""
    return dict(
        down_block_types=["DownEncoderBlock2D"] * count,
        up_block_types=["UpDecoderBlock2D"] * count,
        block_out_channels=[8] * count,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )


def vae(latent_channels=4, count=2):
    return diffusers.AutoencoderKL(
        **blocks(count),
        latent_channels=latent_channels,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def flux2_vae():
    return diffusers.AutoencoderKLFlux2(**blocks(2), latent_channels=4)


def vae8():
    """Eight pixels a latent, where a pipeline takes that for granted"""
    return vae(count=4)


def qwen_vae():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )


def dc_vae():
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


SMALL = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2)  # of most transformers
FLUX = dict(patch_size=1, in_channels=16, num_single_layers=1, joint_attention_dim=32, axes_dims_rope=(4, 6, 6))
DYNAMIC = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


# ---------------------------------------------------------------- families: name -> pipeline, arguments of its call


def flux():
    clip, clip_tokenizer = clip_text()
    encoder, tokenizer = t5()
    transformer = diffusers.FluxTransformer2DModel(**SMALL, **FLUX, pooled_projection_dim=16, guidance_embeds=True)
    pipe = diffusers.FluxPipeline(SCHEDULER, vae(), clip, clip_tokenizer, encoder, tokenizer, transformer)
    return pipe, dict(guidance_scale=3.5, max_sequence_length=32, true_cfg_scale=2.0, negative_prompt="blurry")


def sd3():
    clip, clip_tokenizer = clip_text(True)
    clip2, clip_tokenizer2 = clip_text(True)
    encoder, tokenizer = t5()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        **SMALL,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, SCHEDULER, vae(), clip, clip_tokenizer, clip2, clip_tokenizer2, encoder, tokenizer
    )
    return pipe, dict(guidance_scale=4.5, max_sequence_length=32, negative_prompt="blurry")


def zimage():
    encoder, tokenizer = llm("Qwen3Model")
    transformer = diffusers.ZImageTransformer2DModel(
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
    pipe = diffusers.ZImagePipeline(SCHEDULER, vae(), encoder, tokenizer, transformer)
    return pipe, dict(guidance_scale=4.0, max_sequence_length=96, negative_prompt="blurry")


def qwen():
    tokenizer = tokens()
    transformer = diffusers.QwenImageTransformer2DModel(
        **SMALL,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = diffusers.QwenImagePipeline(SCHEDULER, qwen_vae(), qwen_vl(tokenizer), tokenizer, transformer)
    return pipe, dict(true_cfg_scale=4.0, negative_prompt="blurry", max_sequence_length=96)


def mistral3(tokenizer):
    text = dict(model_type="mistral", vocab_size=len(tokenizer), max_position_embeddings=1024, **TEXT)
    vision = dict(model_type="pixtral", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=0)
    return transformers.Mistral3ForConditionalGeneration(config)


def flux2_transformer(guidance_embeds):
    return diffusers.Flux2Transformer2DModel(**SMALL, **FLUX | dict(axes_dims_rope=(4, 4, 4, 4), joint_attention_dim=64), guidance_embeds=guidance_embeds)


CHAT = "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ c.text }}{% endfor %}\n{% endfor %}"


def flux2():
    tokenizer = tokens(chat_template=CHAT)
    pipe = diffusers.Flux2Pipeline(DYNAMIC, flux2_vae(), mistral3(tokenizer), tokenizer, flux2_transformer(True))
    return pipe, dict(guidance_scale=4.0, max_sequence_length=128, text_encoder_out_layers=[1, 3])


def klein(is_distilled=False):
    encoder, tokenizer = llm("Qwen3ForCausalLM")
    pipe = diffusers.Flux2KleinPipeline(DYNAMIC, flux2_vae(), encoder, tokenizer, flux2_transformer(False), is_distilled=is_distilled)
    return pipe, dict(guidance_scale=1.0 if is_distilled else 4.0, max_sequence_length=96, text_encoder_out_layers=[1, 3])


def sana_transformer(**options):
    return diffusers.SanaTransformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=32,
        **options,
    )


def sana():
    encoder, tokenizer = llm("Gemma2Model")
    pipe = diffusers.SanaPipeline(tokenizer, encoder, dc_vae(), sana_transformer(), SCHEDULER)
    return pipe, dict(guidance_scale=4.5, negative_prompt="blurry", max_sequence_length=32, use_resolution_binning=False, height=32, width=32)


def sana_sprint():
    encoder, tokenizer = llm("Gemma2Model")
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return diffusers.SanaSprintPipeline(tokenizer, encoder, dc_vae(), transformer, diffusers.SCMScheduler()), {}


def lumina2():
    encoder, tokenizer = llm("Gemma2Model")
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(512, 32, 32),
        cap_feat_dim=32,
    )
    pipe = diffusers.Lumina2Pipeline(transformer, DYNAMIC, vae8(), encoder, tokenizer)
    return pipe, dict(guidance_scale=4.0, negative_prompt="blurry", max_sequence_length=96, system_prompt="You draw.", height=32, width=32)


def auraflow():
    encoder, tokenizer = t5(transformers.UMT5EncoderModel)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    pipe = diffusers.AuraFlowPipeline(tokenizer, encoder, vae(), transformer, SCHEDULER)
    return pipe, dict(guidance_scale=3.5, negative_prompt="blurry", max_sequence_length=32)


def cogview4():
    encoder, tokenizer = llm("GlmModel", padding_side="left")
    transformer = diffusers.CogView4Transformer2DModel(
        **SMALL, in_channels=4, out_channels=4, text_embed_dim=32, time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16)
    )
    pipe = diffusers.CogView4Pipeline(tokenizer, encoder, vae(), transformer, DYNAMIC)
    return pipe, dict(guidance_scale=5.0, negative_prompt="blurry", max_sequence_length=32)


def chroma():
    encoder, tokenizer = t5()
    transformer = diffusers.ChromaTransformer2DModel(
        **SMALL, **FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )
    pipe = diffusers.ChromaPipeline(DYNAMIC, vae(), encoder, tokenizer, transformer)
    return pipe, dict(guidance_scale=5.0, negative_prompt="blurry", max_sequence_length=32)


def hidream():
    clip, clip_tokenizer = clip_text(True)
    clip2, clip_tokenizer2 = clip_text(True)
    encoder, tokenizer = t5()
    llama, llama_tokenizer = llm("LlamaForCausalLM")
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 32],
        text_emb_dim=32,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(128, 128),
        llama_layers=(0, 1),
    )
    pipe = diffusers.HiDreamImagePipeline(
        DYNAMIC, vae(), clip, clip_tokenizer, clip2, clip_tokenizer2, encoder, tokenizer, llama, llama_tokenizer, transformer
    )
    targets = ["to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3"]  # of the experts too
    return pipe, dict(guidance_scale=5.0, negative_prompt="blurry", max_sequence_length=32, height=256, width=256, lora_targets=targets)


def ovis():
    encoder, tokenizer = llm("Qwen3Model")
    transformer = diffusers.OvisImageTransformer2DModel(**SMALL, **FLUX, out_channels=16)
    pipe = diffusers.OvisImagePipeline(DYNAMIC, vae(), encoder, tokenizer, transformer)
    return pipe, dict(guidance_scale=5.0, negative_prompt="blurry", max_sequence_length=96)


def longcat():
    tokenizer = tokens()
    encoder = qwen_vl(tokenizer)
    transformer = diffusers.LongCatImageTransformer2DModel(**SMALL, **FLUX | dict(in_channels=64), pooled_projection_dim=32)
    pipe = diffusers.LongCatImagePipeline(DYNAMIC, vae(16), encoder, tokenizer, tokenizer, transformer)
    return pipe, dict(guidance_scale=4.5, negative_prompt="blurry", enable_prompt_rewrite=False)


def bria():
    encoder, tokenizer = t5()
    transformer = diffusers.BriaTransformer2DModel(**SMALL, **FLUX)
    pipe = diffusers.BriaPipeline(transformer, DYNAMIC, vae(), encoder, tokenizer)
    return pipe, dict(guidance_scale=5.0, negative_prompt="blurry", max_sequence_length=32)


def hunyuan():
    tokenizer = tokens()
    encoder = qwen_vl(tokenizer)
    glyph_encoder, glyphs = t5(tokenizer=transformers.ByT5Tokenizer())
    transformer = diffusers.HunyuanImageTransformer2DModel(
        **SMALL,
        in_channels=4,
        out_channels=4,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=True,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(8, 8),
    )
    autoencoder = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1, spatial_compression_ratio=2, sample_size=16, scaling_factor=1.0
    )
    pipe = diffusers.HunyuanImagePipeline(SCHEDULER, autoencoder, encoder, tokenizer, glyph_encoder, glyphs, transformer)
    return pipe, dict(distilled_guidance_scale=3.25)


def processor():
    """Tokenizer and image processor together; the class that Qwen3-VL has would need torchvision"""
    return transformers.LlavaProcessor(transformers.CLIPImageProcessor(), tokens(chat_template=CHAT), patch_size=4, chat_template=CHAT)


def qwen21():
    both = processor()
    autoencoder = diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    transformer = diffusers.QwenImage21Transformer2DModel(**SMALL, in_channels=8, out_channels=8, context_in_dim=32, axes_dims_rope=(4, 6, 6))
    encoder = transformers.Qwen3VLForConditionalGeneration(qwen3_vl(both.tokenizer))
    pipe = diffusers.QwenImage21Pipeline(DYNAMIC, autoencoder, encoder, both, transformer)
    return pipe, dict(true_cfg_scale=4.0, negative_prompt="blurry", height=64, width=64)


def krea2():
    tokenizer = tokens()
    transformer = diffusers.Krea2Transformer2DModel(
        **SMALL,
        in_channels=16,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    encoder = transformers.Qwen3VLModel(qwen3_vl(tokenizer))
    pipe = diffusers.Krea2Pipeline(DYNAMIC, qwen_vae(), encoder, tokenizer, transformer, text_encoder_select_layers=(1, 3))
    return pipe, dict(guidance_scale=4.5, negative_prompt="blurry", max_sequence_length=96)


def nucleus():
    both = processor()
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        **SMALL | dict(num_layers=5),
        in_channels=16,
        out_channels=4,
        num_key_value_heads=1,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=[2.0] * 5,
    )
    for name, p in transformer.named_parameters():
        if "experts" in name:  # torch.empty, which may be anything
            torch.nn.init.normal_(p, std=0.1)
    encoder = transformers.Qwen3VLForConditionalGeneration(qwen3_vl(both.tokenizer))
    pipe = diffusers.NucleusMoEImagePipeline(transformer, SCHEDULER, qwen_vae(), encoder, both)
    return pipe, dict(guidance_scale=4.0, negative_prompt="blurry", max_sequence_length=256, return_index=-2)


def prx():
    tokenizer = tokens()
    config = transformers.T5GemmaModuleConfig(vocab_size=len(tokenizer), **TEXT)
    encoder = transformers.T5GemmaEncoderModel(transformers.T5GemmaConfig(encoder=config, decoder=config, is_encoder_decoder=False))
    transformer = diffusers.PRXTransformer2DModel(in_channels=4, patch_size=2, context_in_dim=32, hidden_size=32, num_heads=2, depth=1, axes_dim=[8, 8])
    return diffusers.PRXPipeline(transformer, SCHEDULER, encoder, tokenizer, vae(), default_sample_size=None), dict(use_resolution_binning=False)


def kandinsky5():
    both = processor()
    clip, clip_tokenizer = clip_text()
    clip = type(clip)(transformers.CLIPTextConfig(**clip.config.to_dict() | dict(max_position_embeddings=77)))
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
    )
    pipe = diffusers.Kandinsky5T2IPipeline(transformer, vae8(), qwen_vl(both.tokenizer), both, clip, clip_tokenizer, SCHEDULER)
    return pipe, dict(guidance_scale=3.5, negative_prompt="blurry", max_sequence_length=64, height=1024, width=1024)


def lumina():
    encoder, tokenizer = llm("GemmaModel")
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16, cross_attention_dim=32
    )
    pipe = diffusers.LuminaPipeline(transformer, SCHEDULER, vae8(), encoder, tokenizer)
    return pipe, dict(guidance_scale=4.0, negative_prompt="blurry", height=32, width=32)


def fibo():
    encoder, tokenizer = llm("SmolLM3ForCausalLM")
    transformer = diffusers.BriaFiboTransformer2DModel(**SMALL, **FLUX | dict(in_channels=4, joint_attention_dim=64), text_encoder_dim=32)
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False] * 3, patch_size=2, in_channels=12, out_channels=12,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )
    pipe = diffusers.BriaFiboPipeline(transformer, DYNAMIC, autoencoder, encoder, tokenizer)
    return pipe, dict(guidance_scale=5.0, negative_prompt="blurry", max_sequence_length=96, height=64, width=64)


def ernie():
    tokenizer = tokens()
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=16, out_channels=16, text_in_dim=32, rope_axes_dim=(4, 6, 6)
    )
    encoder = mistral3(tokenizer).model
    return diffusers.ErnieImagePipeline(transformer, flux2_vae(), encoder, tokenizer, SCHEDULER), {}


def ideogram4():
    tokenizer = tokens(chat_template=CHAT)
    sizes = dict(**SMALL, in_channels=16, intermediate_size=32, adaln_dim=16)
    models = [diffusers.Ideogram4Transformer2DModel(**sizes, llm_features_dim=13 * 32, mrope_section=(4, 2, 2)) for _ in range(2)]
    encoder = transformers.Qwen3VLModel(qwen3_vl(tokenizer, layers=36))
    pipe = diffusers.Ideogram4Pipeline(SCHEDULER, flux2_vae(), encoder, tokenizer, *models)
    return pipe, dict(guidance_scale=7.0, guidance_schedule=None, max_sequence_length=96)


def fibo2():
    both = processor()
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=96,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=64,
        axes_dims=(4, 6, 6),
        axes_lens=(512, 64, 64),
    )
    encoder = transformers.Qwen3VLForConditionalGeneration(qwen3_vl(both.tokenizer, layers=36))
    pipe = diffusers.BriaFibo2Pipeline(transformer, DYNAMIC, flux2_vae(), encoder, both)
    return pipe, dict(guidance_scale=4.0, negative_prompt="blurry")


def zimage_omni():
    pipe, call = zimage()
    config = transformers.Siglip2VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    parts = dict(siglip=transformers.Siglip2VisionModel(config), siglip_processor=transformers.Siglip2ImageProcessor())
    transformer = diffusers.ZImageTransformer2DModel.from_config(pipe.transformer.config, siglip_feat_dim=16)
    return diffusers.ZImageOmniPipeline(**pipe.components | parts | dict(transformer=transformer)), call


def kontext():
    pipe, call = flux()
    return diffusers.FluxKontextPipeline(**pipe.components), call | dict(_auto_resize=False, max_area=256)


def klein_kv():
    pipe, call = klein(True)
    call.pop("guidance_scale")
    return diffusers.Flux2KleinKVPipeline(**pipe.components, is_distilled=True), call


def dreamlite():
    pipe, _ = krea2()
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    encoder = transformers.Qwen3VLForConditionalGeneration(qwen3_vl(pipe.tokenizer))
    return diffusers.DreamLitePipeline(encoder, pipe.tokenizer, processor(), tiny, unet, SCHEDULER), {}


def sana_pag():
    pipe, call = sana()
    return diffusers.SanaPAGPipeline(**pipe.components, pag_applied_layers="transformer_blocks.0"), call | dict(pag_scale=2.0)


def sd3_pag():
    pipe, call = sd3()
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    return diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"]), call | dict(pag_scale=2.0)


def but(family, **changes):
    """The same with other arguments: what would train wrongly must be refused"""

    def build():
        pipe, call = family()
        return pipe, call | changes

    return build


def short_grid():
    pipe, call = qwen21()
    pipe.register_to_config(sample_sigmas=[1.0, 0.5])
    return pipe, call


def guided_hunyuan():
    pipe, call = hunyuan()
    pipe.register_modules(guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1))
    return pipe, call | dict(negative_prompt="blurry")


FAMILIES = {
    "FluxPipeline": flux,
    "StableDiffusion3Pipeline": sd3,
    "ZImagePipeline": zimage,
    "QwenImagePipeline": qwen,
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": klein,
    "Flux2KleinPipeline, distilled": partial(klein, True),
    "SanaPipeline": sana,
    "SanaSprintPipeline": sana_sprint,
    "Lumina2Pipeline": lumina2,
    "AuraFlowPipeline": auraflow,
    "CogView4Pipeline": cogview4,
    "ChromaPipeline": chroma,
    "HiDreamImagePipeline": hidream,
    "OvisImagePipeline": ovis,
    "LongCatImagePipeline": longcat,
    "BriaPipeline": bria,
    "HunyuanImagePipeline": hunyuan,
    "QwenImage21Pipeline": qwen21,
    "Krea2Pipeline": krea2,
    "NucleusMoEImagePipeline": nucleus,
    "BriaFiboPipeline": fibo,
    "BriaFibo2Pipeline": fibo2,
    "ZImageOmniPipeline": zimage_omni,
    "FluxKontextPipeline": kontext,
    "Flux2KleinKVPipeline": klein_kv,
    "Ideogram4Pipeline": ideogram4,
    "SanaPAGPipeline": sana_pag,
    "StableDiffusion3PAGPipeline": sd3_pag,
    "PRXPipeline": prx,
    "Kandinsky5T2IPipeline": kandinsky5,
    "LuminaPipeline": lumina,
    "ErnieImagePipeline": ernie,
    "DreamLitePipeline": dreamlite,
    "FluxPipeline, negative_prompt without true_cfg_scale": but(flux, true_cfg_scale=1.0),
    "StableDiffusion3Pipeline, skip_guidance_layers": but(sd3, skip_guidance_layers=[0], skip_layer_guidance_stop=0.9),
    "Lumina2Pipeline, cfg_trunc_ratio 0.5": but(lumina2, cfg_trunc_ratio=0.5),
    "LongCatImagePipeline, enable_prompt_rewrite": but(longcat, enable_prompt_rewrite=True),
    "BriaPipeline, normalize": but(bria, normalize=True),
    "HunyuanImagePipeline, with a guider": guided_hunyuan,
    "QwenImage21Pipeline, two sample_sigmas": short_grid,
}


# ---------------------------------------------------------------- what is tried


def differ(got, want):
    """Largest difference in parts of the largest value"""
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()


def stock_picture(folder, call, size, lora=None):
    """What the untouched pipeline draws with noise of its own -> (B,3,H,W), the latents that its scheduler saw first"""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(lora)
        else:
            pipe.transformer.load_lora_adapter(lora, weight_name="pytorch_lora_weights.safetensors")
    seen = []
    step = pipe.scheduler.step

    def spy(output, timestep, sample, *args, **kwargs):
        seen.append(sample.clone())
        return step(output, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = spy
    call = dict(call)
    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(PROMPTS)
    noise = torch.Generator().manual_seed(0)
    images = pipe(
        prompt=list(PROMPTS), num_inference_steps=STEPS, generator=noise, output_type="pt", return_dict=False, **size, **call
    )[0]
    return images.float(), seen[0]


@contextlib.contextmanager
def starting_from(latents, micro_batch):
    """Inside, a rollout without stochastic steps starts from these latents"""
    normal = generator.normal
    parts = iter(latents.split(micro_batch))
    generator.normal = lambda rngs, shape: next(parts).reshape(-1, *shape)
    try:
        yield
    finally:
        generator.normal = normal


def replay_error(gen):
    _, record = gen.rollout(PROMPTS, KEYS, range(STEPS - 1))
    parts = [ROWS[:3], ROWS[3:]]  # the micro-batches of the rollout: others differ by rounding
    return max(differ(gen.replay(record, step.index, step.x[rows], rows).detach(), step.v[rows]) for step in record.steps for rows in parts)


def reached(gen):
    """Does the gradient reach each LoRA tensor, and is it the slope that the loss has?"""
    gen.cfg.log_prob = "elbo"
    _, record = gen.rollout(PROMPTS, KEYS, times=[1])
    x, target = record.steps[0].at(ROWS)

    def loss():
        return -((gen.replay(record, 1, x, ROWS).double() - target) ** 2).mean() / 2

    loss().backward()
    without = {name: p for name, p in gen.lora.items() if p.grad is None or not p.grad.any()}
    g = torch.Generator().manual_seed(5)
    ways = {name: torch.randn(p.shape, generator=g) for name, p in gen.lora.items()}
    grads = {name: p.grad for name, p in gen.lora.items() if p.grad is not None}
    slope = sum((grad * ways[name]).sum() for name, grad in grads.items())
    typical = sum(grad.square().sum() for grad in grads.values()).sqrt()  # of a slope along a random way

    @torch.no_grad()
    def moved(step):
        for name, p in gen.lora.items():
            p.data += step * ways[name]
        value = loss()
        for name, p in gen.lora.items():
            p.data -= step * ways[name]
        return value

    measured = (moved(0.0005) - moved(-0.0005)) / 0.001
    if abs(measured - slope) > 0.05 * typical:
        return f"slope {slope:.2e}, measured {measured:.2e}"
    v = gen.replay(record, 1, x, ROWS)
    for name, p in without.items():
        p.data += 0.1
        if not torch.equal(gen.replay(record, 1, x, ROWS), v):
            return f"not {name}"
    return f"all but {len(without)}, which act on nothing" if without else "all"


def short(error):
    return "exact" if error == 0 else f"{error:.0e}"


def close(error, bound=2e-5):
    return "same" if error < bound else f"differs by {error:.0e}"


def line(error):
    """An error in short, without the temporary folder"""
    text = re.sub(r"\S+/pipe\b", "MODEL", " ".join(str(error).split()))
    return f"{'refused' if isinstance(error, ConfigError) else type(error).__name__}: {text}"


def attempt(work):
    """What work() gives, or its error"""
    try:
        return work()
    except Exception as error:
        if VERBOSE:
            traceback.print_exc()
        return line(error)


def row(name):
    """The cells of one family"""
    torch.manual_seed(1)
    pipe, call = FAMILIES[name]()
    for p in getattr(pipe, "transformer", pipe.vae).parameters():  # zero-initialised layers would make every velocity the same
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.02)
    size = dict(height=call.pop("height", 16), width=call.pop("width", 16))
    targets = call.pop("lora_targets", ["to_q", "to_k", "to_v", "to_out.0"])
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "pipe"
        pipe.save_pretrained(saved)
        lora = str(Path(folder) / "lora")

        def make(dtype=torch.float32, offload=False):
            cfg = GeneratorConfig(model=str(saved), num_steps=STEPS, draw_steps=STEPS, window=2, log_prob="path", lora_targets=targets, lora_rank=4, lora_alpha=8, call=dict(call), **size)
            gen = Generator(cfg, dtype=dtype, micro_batch=3, offload=offload)
            gen.add_lora()
            perturb(gen)
            return gen

        gen = make()
        images, _ = gen.rollout(PROMPTS, KEYS)

        def stock():
            theirs, latents = stock_picture(saved, call, size)
            if not 0.9 < latents.float().std() < 1.1:
                return f"starts with std {latents.std():.2f}"
            with starting_from(latents, 3), gen.reference():
                ours, _ = gen.rollout(PROMPTS, KEYS)
            return close(differ(ours, theirs))

        def saves():
            gen.save(lora)
            again = Generator(gen.cfg)
            again.load(lora)
            if not torch.allclose(again.rollout(PROMPTS, KEYS)[0], images, atol=1e-5):
                return "another picture"
            theirs, latents = stock_picture(saved, call, size, lora)
            with starting_from(latents, 3):
                ours, _ = gen.rollout(PROMPTS, KEYS)
            return close(differ(ours, theirs))

        return [
            attempt(lambda: short(replay_error(gen))),
            attempt(lambda: short(replay_error(make(torch.bfloat16)))),
            attempt(lambda: close(differ(make(offload=True).rollout(PROMPTS, KEYS)[0], images))),
            attempt(stock),
            attempt(lambda: reached(gen)),
            attempt(saves),
        ]


HEAD = ["pipeline", "replay", "in bf16", "offloaded", "stock picture", "LoRA reached", "LoRA file, in the stock pipeline"]
VERBOSE = "-v" in sys.argv


def main(names):
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    print("|", " | ".join(HEAD), "|")
    print("|" + "---|" * len(HEAD))
    for name in names or FAMILIES:
        cells = attempt(lambda: row(name))
        cells = [cells] if isinstance(cells, str) else cells
        print("|", name, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "-v"])
