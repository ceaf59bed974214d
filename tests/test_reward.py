"""Laws of reward.py: one signature; every kind against an independent computation; bad files, servers and options."""

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import time
import warnings

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import reward as R


def pictures(n=4, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A classifier whose 'real' label stands first or second, saved with save_pretrained"""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    def make(labels):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("detector")
        model = ResNetForImageClassification(
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                id2label=dict(enumerate(labels)),
                label2id={n: i for i, n in enumerate(labels)},
            )
        )
        model.eval().save_pretrained(folder)
        ViTImageProcessorPil(
            size=dict(height=32, width=32), image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
        ).save_pretrained(folder)
        return str(folder)

    return make


def test_classifier_is_p_real_of_the_stock_model(detector):
    """The same as a processor's own normalisation and a softmax by hand; labels are found by name, in any place."""
    from transformers import AutoModelForImageClassification

    first, second = detector(["Real", "fake"]), detector(["fake", "photo"])
    images = pictures(3, 32)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    for folder, index in ((first, 0), (second, 1)):
        reward = R.load_rewards({"d": R.RewardConfig(model=folder)})["d"]
        logits = AutoModelForImageClassification.from_pretrained(folder)(pixel_values=(images - mean) / std).logits
        torch.testing.assert_close(reward(images, [""] * 3), logits.softmax(-1)[:, index])
    assert reward(pictures(3, 50), [""] * 3).shape == (3,)  # any size is resized to the detector's own


def test_a_classifier_without_a_real_label_is_refused(detector):
    """The message lists what the labels are."""
    with pytest.raises(ValueError, match="no label of .*'cat', 'dog'.* means real"):
        R.load_rewards({"d": R.RewardConfig(model=detector(["cat", "dog"]))})


def test_clip_is_the_cosine_of_the_stock_model():
    """CLIPModel's own logits, divided by its temperature, are the reward; it prefers the right subject on held-out photographs."""
    reward = R.load_rewards({"alignment": R.RewardConfig(kind="clip", model="nano/clip")})["alignment"]
    photos, captions = R.read_photos("nano/photos/test.jsonl", (64, 64))
    value = reward(photos[:8], captions[:8])
    tokens = reward.tokenizer(captions[:8], padding=True, return_tensors="pt")
    out = reward.model(pixel_values=reward.preprocess(photos[:8]), **tokens)
    torch.testing.assert_close(
        value, out.logits_per_image.diag() / reward.model.logit_scale.exp(), rtol=1e-4, atol=1e-5
    )
    matched, shuffled = reward(photos, captions).mean(), reward(photos, captions[1:] + captions[:1]).mean()
    assert matched > shuffled + 0.2


def test_every_nano_detector_tells_photographs_from_generated_pictures():
    """All five: photographs of regions that nothing was trained on, through the autoencoder, against the base model's pictures of test prompts."""
    import yaml

    from generator import Generator, GeneratorConfig

    groups = yaml.safe_load(open("config.yaml"))["rewards"]
    configs = {
        n: R.RewardConfig(**r)
        for g in ("train", "validation", "heldout")
        for n, r in groups[g].items()
        if r["kind"] == "classifier"
    }
    assert len(configs) == 5
    generator = Generator(GeneratorConfig())
    photos, captions = R.read_photos("nano/photos/test.jsonl", (64, 64))
    prompts = open("nano/test_prompts.txt").read().splitlines()
    drawn = generator.sample(prompts, [(0, 0, i, 0) for i in range(len(prompts))])
    rewards = R.load_rewards(configs)
    real = R.score(rewards, generator.reconstruct(photos[:64]), captions[:64])
    fake = R.score(rewards, drawn, prompts)
    for name in configs:
        assert real[name].mean() > 0.5 and real[name].mean() > fake[name].mean() + 0.25, name


# ---------------------------------------------------------------- classifier options, LongCLIP, codec


def test_labels_of_another_language_are_named_in_args(detector):
    """args.real says which labels mean real, in any case; a detector all of whose labels mean real is refused."""
    images = pictures(2, 32)
    default = R.load_rewards({"d": R.RewardConfig(model=detector(["real", "fake"]))})["d"](images, ["", ""])
    folder = detector(["ECHT", "künstlich"])
    named = R.load_rewards({"d": R.RewardConfig(model=folder, args={"real": ["echt"]})})["d"](images, ["", ""])
    torch.testing.assert_close(named, default)
    with pytest.raises(ValueError, match="no label of .* means fake"):
        R.load_rewards({"d": R.RewardConfig(model=folder, args={"real": ["echt", "künstlich"]})})


@pytest.mark.parametrize("kind", ["classifier", "omniaid"])
def test_a_detector_can_learn(kind, detector, tmp_path):
    """Gradients of the logits reach every weight of `trainable()`; softmax of the logits is the reward."""
    if kind == "omniaid":
        torch.save({"model": conftest.omniaid("v1")}, tmp_path / "o.pth")
    model = str(tmp_path / "o.pth") if kind == "omniaid" else detector(["real", "fake"])
    reward = R.load_rewards({"d": R.RewardConfig(kind=kind, model=model)})["d"]
    images = pictures(8, 32)
    assert not any(p.requires_grad for p in reward.model.parameters())
    for p in reward.trainable():
        p.requires_grad_(True)
    logits = reward.logits(images)
    torch.testing.assert_close(reward(images, [""] * 8), logits.softmax(-1)[:, 1])
    logits[:, 1].sum().backward()
    assert reward.trainable() and all(p.grad is not None for p in reward.trainable())
    if kind == "omniaid":
        names = {n for n, p in reward.model.named_parameters() if p.requires_grad}
        assert {n for n in names if "experts" not in n} == {"head.weight", "head.bias"}
        assert len(names) == 2 + 2 * 4 * 3 * 6


def test_longclip_reads_248_tokens_and_counts_what_it_cuts(reward_models):
    """Words up to token 248 count, words after it do not, and each doubling of their number is warned about."""
    reward = R.load_rewards({"a": R.RewardConfig(kind="clip", model=reward_models("longclip"))})["a"]
    images = pictures(4, 32)
    long = ["a " * 150 + last for last in ("cat", "dog")]
    assert 77 < len(reward.tokenizer(long[0]).input_ids) <= 248
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = reward(images[:2], [long[0]] * 2), reward(images[:2], [long[1]] * 2)
    assert (first - second).abs().min() > 1e-6 and reward.cut == 0
    over = ["a " * 300 + last for last in ("cat", "dog")]
    with pytest.warns(UserWarning, match="reads 248 tokens; 2 of 6 texts were cut"):
        value = reward(images[:2], over)
    with pytest.warns(UserWarning, match="4 of 8 texts"):
        torch.testing.assert_close(value, reward(images[:2], over[:1] * 2))
    assert reward.cut == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(images[:1], over[:1])  # the fifth
    assert reward.cut == 5


def test_a_processor_of_another_folder(tmp_path):
    """args.processor gives tokenizer and preprocessing to a checkpoint that comes without."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(open(f"nano/clip/{name}", "rb").read())
    with pytest.raises(ValueError, match="rewards: a: "):
        R.load_rewards({"a": R.RewardConfig(kind="clip", model=str(tmp_path))})
    borrowed = R.RewardConfig(kind="clip", model=str(tmp_path), args={"processor": "nano/clip"})
    rewards = R.load_rewards({"a": borrowed, "b": R.RewardConfig(kind="clip", model="nano/clip")})
    scores = R.score(rewards, pictures(2), ["a cat", "a dog"])
    torch.testing.assert_close(scores["a"], scores["b"])


def test_jpeg_is_the_round_trip_of_a_file(detector, tmp_path):
    """A detector with `jpeg: 80` sees what it would see of the picture saved with that quality."""
    folder, images = detector(["real", "fake"]), pictures(2, 32)
    array = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "x.jpg", quality=80)
    file = R.read_image(tmp_path / "x.jpg")[None]
    plain = R.load_rewards({"d": R.RewardConfig(model=folder)})["d"]
    coded = R.load_rewards({"d": R.RewardConfig(model=folder, args={"jpeg": 80})})["d"]
    torch.testing.assert_close(coded(images, ["", ""])[:1], plain(file, [""]))
    assert (plain(images[:1], [""]) - plain(file, [""])).abs() > 1e-6


# ---------------------------------------------------------------- vlm


def vlm_reward(folder, **args):
    return R.load_rewards({"v": R.RewardConfig(kind="vlm", model=folder, args=args)})["v"]


def test_vlm_is_the_sigmoid_of_the_answer_words_at_the_last_position(reward_models):
    """All spellings that are one token, by hand: the stock model's logits after the chat prompt of one picture."""
    reward = vlm_reward(reward_models("vlm"))
    tokenizer, images = reward.processor.tokenizer, pictures(3, 56)
    real, fake = (tokenizer.convert_tokens_to_ids(words) for words in (["real", "Real", " real"], ["fake", "FAKE"]))
    assert set(real) <= set(reward.real) and set(fake) <= set(reward.fake)
    for i in range(3):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": R.QUESTION}]}]
        text = reward.processor.apply_chat_template(chat, add_generation_prompt=True)
        picture = Image.fromarray((images[i] * 255).round().byte().permute(1, 2, 0).numpy())
        inputs = reward.processor(text=[text], images=[[picture]], return_tensors="pt")
        p = reward.model(**inputs).logits[0, -1].softmax(-1)  # (V,)
        expected = p[reward.real].sum() / (p[reward.real].sum() + p[reward.fake].sum())
        torch.testing.assert_close(reward(images, [""] * 3)[i], expected, rtol=1e-4, atol=1e-6)


def test_vlm_batched_equals_one_by_one(reward_models):
    """Prompts of different lengths are padded on the left and change nothing for each other; pictures matter."""
    reward = vlm_reward(reward_models("vlm"), question="Is this a photograph of {prompt}? real or fake")
    images, prompts = pictures(4, 56), ["a cat", "a very long sentence about a dog in the rain", "x", "a cat"]
    lengths = {len(reward.processor.tokenizer(p).input_ids) for p in prompts}
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    assert len(lengths) == 3
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert (together[0] - together[3]).abs() > 1e-4  # the same words, another picture
    assert ((together > 0) & (together < 1)).all()


@pytest.mark.parametrize(
    "args,message",
    [
        (dict(real=["photographic"]), "no spelling of .'photographic'. is one token"),
        (dict(real=["real"], fake=["Real"]), "share a token"),
        (dict(dtype="float8"), "args.dtype: 'float8'; expected float32, bfloat16 or float16"),
    ],
)
def test_vlm_refuses_words_that_cannot_be_read(reward_models, args, message):
    """Words of several tokens, words on both sides, and an unknown dtype, each by name."""
    with pytest.raises(ValueError, match=f"rewards: v: .*{message}"):
        vlm_reward(reward_models("vlm"), **args)


def test_vlm_refuses_a_model_that_reads_no_pictures():
    """A causal language model is named as such."""
    with pytest.raises(ValueError, match="rewards: v: nano/refiner is a qwen3, which reads no pictures"):
        vlm_reward("nano/refiner")


# ---------------------------------------------------------------- omniaid


def omniaid_reward(path, **args):
    return R.load_rewards({"o": R.RewardConfig(kind="omniaid", model=str(path), args=args)})["o"]


def gates_by_hand(state, pixels):
    """(B, experts): softmax over the two largest of the five router outputs, 1 for the sixth; 1 without router"""
    if "gating_network.network.0.weight" not in state:
        return torch.ones(len(pixels), 1)
    w = {k.removeprefix("gating_network.network."): v for k, v in state.items()}
    if "feature_extractor.post_layernorm.weight" in state:
        frozen = stock_vit(state, pixels.shape[-1])
        frozen.load_state_dict({k.removeprefix("feature_extractor."): v for k, v in state.items() if "feature_ex" in k})
        routing = frozen(pixels).pooler_output
    else:
        patches = F.conv2d(pixels, state["embeddings.patch_embedding.weight"], stride=8).flatten(2).transpose(1, 2)
        routing = (patches + state["embeddings.position_embedding.weight"][1:]).mean(1)
    outputs = (routing @ w["0.weight"].T + w["0.bias"]).relu() @ w["2.weight"].T + w["2.bias"]  # (B, 5)
    gates = torch.zeros(len(pixels), 6)
    for b, row in enumerate(outputs.tolist()):
        first, second = sorted(range(5), key=lambda i: -row[i])[:2]
        share = 1 / (1 + np.exp(row[second] - row[first]))
        gates[b, first], gates[b, second], gates[b, 5] = share, 1 - share, 1
    return gates


def stock_vit(state, size):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=8,
        image_size=size,
    )
    return CLIPVisionModel(config).eval()


def dense_omniaid(state, pixels):
    """Logits by a stock CLIP ViT with the weights W_main + sum_i g_i U_i diag(S_i) V_i of each picture; its gates"""
    rows, gates = [], gates_by_hand(state, pixels)
    for b in range(len(pixels)):
        weights = {}
        for key, value in state.items():
            name = key.replace("encoder_layers", "encoder.layers").replace("ln_pre", "pre_layrnorm")
            name = name.replace("ln_post", "post_layernorm")
            if key.endswith("weight_main"):
                stem = key.removesuffix("weight_main")
                for i, g in enumerate(gates[b]):
                    u, s, v = (state[f"{stem}{n}_experts.{i}"] for n in "USV")
                    value = value + g * u @ torch.diag(s) @ v
                name = name.replace("weight_main", "weight")
            weights[name] = value
        vit = stock_vit(state, pixels.shape[-1])
        missing, _ = vit.load_state_dict(weights, strict=False)
        assert not missing
        rows.append(vit(pixels[b : b + 1]).pooler_output[0] @ state["head.weight"].T + state["head.bias"])
    return torch.stack(rows), gates


@pytest.mark.parametrize("file", ["o.pth", "o.safetensors"])
@pytest.mark.parametrize("version", ["v1", "v2", "effort"])
def test_omniaid_equals_the_dense_computation(version, file, tmp_path):
    """Both layouts and Effort, under the published names, from .pth and .safetensors: P(real) by dense weights."""
    from safetensors.torch import save_file

    state = conftest.omniaid(version)
    if file.endswith("safetensors"):
        save_file(state, tmp_path / file)
    else:  # as training scripts save: options and optimizer beside the weights
        torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / file)
    images = pictures(4, 48)
    reward = omniaid_reward(tmp_path / file)
    with torch.no_grad():
        logits, gates = dense_omniaid(state, reward.preprocess(images))
    assert reward.model.size == 32 and len(gates[0]) == reward.model.experts
    if version != "effort":
        assert (gates[:, :5] > 0).sum(1).eq(2).all() and (gates[0] - gates[1]).abs().max() > 1e-3
    torch.testing.assert_close(reward(images, [""] * 4), logits.softmax(-1)[:, 0], rtol=1e-4, atol=1e-5)
    other = omniaid_reward(tmp_path, file=file, real=1)
    torch.testing.assert_close(other(images, [""] * 4), logits.softmax(-1)[:, 1], rtol=1e-4, atol=1e-5)


def test_the_experts_matter(tmp_path):
    """Without its experts the picture's score is another, so that the law above is not one of W_main alone."""
    state = conftest.omniaid("v1")
    torch.save({"model": state}, tmp_path / "a.pth")
    torch.save({"model": {k: v * 0 if "S_experts" in k else v for k, v in state.items()}}, tmp_path / "b.pth")
    images = pictures(2, 32)
    a, b = (omniaid_reward(tmp_path / f)(images, ["", ""]) for f in ("a.pth", "b.pth"))
    assert (a - b).abs().min() > 1e-3


def test_omniaid_preprocess_is_the_published_one(tmp_path):
    """PIL's bilinear resize to 512 x 512, then to the model's size, CLIP's mean and std, up to rounding."""
    torch.save({"model": conftest.omniaid("v1", depth=1)}, tmp_path / "o.pth")
    reward = omniaid_reward(tmp_path / "o.pth")
    array = (pictures(2, 80) * 255).round().byte()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for picture, ours in zip(array, reward.preprocess(array.float() / 255)):
        pil = Image.fromarray(picture.permute(1, 2, 0).numpy())
        pil = pil.resize((512, 512), Image.BILINEAR).resize((32, 32), Image.BILINEAR)
        expected = (np.array(pil) / 255 - mean) / std
        assert np.abs(expected - ours.permute(1, 2, 0).numpy()).max() < 1.5 / 255 / 0.26


def test_a_checkpoint_with_other_keys_is_refused(tmp_path):
    """Missing and unexpected names and other shapes are listed, a few of each, in one line."""
    state = conftest.omniaid("v1")
    del state["ln_post.bias"]
    state["head.weight"] = state["head.weight"][:, :5]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(6)}
    torch.save({"model": state}, tmp_path / "o.pth")
    message = (
        r"rewards: o: .*missing: ln_post.bias; unexpected: extra.0, extra.1, extra.2, extra.3 and 2 more; "
        r"of another shape: head.weight"
    )
    with pytest.raises(ValueError, match=message):
        omniaid_reward(tmp_path / "o.pth")
    torch.save({"model": conftest.omniaid("v1") | {"only.this": torch.zeros(1)}}, tmp_path / "o.pth")
    with pytest.raises(ValueError, match="missing: none; unexpected: only.this; of another shape: none"):
        omniaid_reward(tmp_path / "o.pth")
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "o.pth")
    with pytest.raises(ValueError, match="is no OmniAID .*it holds conv.weight"):
        omniaid_reward(tmp_path / "o.pth")
    torch.save({"model": conftest.omniaid("v1")}, tmp_path / "o.pth")
    with pytest.raises(ValueError, match="args.top_k: 6; expected 1 to 5"):
        omniaid_reward(tmp_path / "o.pth", top_k=6)


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    """A .pth whose unpickling would call a function is named, and the function is not called."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"model": conftest.omniaid("v1", depth=1), "args": Trap()}, tmp_path / "o.pth")
    with pytest.raises(ValueError, match="o.pth holds more than weights, or is damaged"):
        omniaid_reward(tmp_path / "o.pth")
    assert not (tmp_path / "trapped").exists()
    (tmp_path / "o.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="o.pth holds more than weights, or is damaged"):
        omniaid_reward(tmp_path / "o.pth")
    with pytest.raises(ValueError, match="nothing.pth is not a file; expected a .pth or .safetensors"):
        omniaid_reward(tmp_path / "nothing.pth")


# ---------------------------------------------------------------- remote

REAL_80 = [("Real", np.log(0.6)), (" fake", np.log(0.2)), ("real", np.log(0.2))]


def remote(url, **args):
    defaults = dict(url=url, timeout=5.0, retries=3, backoff=0.01)
    return R.load_rewards({"far": R.RewardConfig(kind="remote", model="judge", args=defaults | args)})


def test_remote_asks_with_picture_and_reads_log_probs(endpoint, monkeypatch):
    """P(real) is renormalised over both words in all spellings; the request has picture and question."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    server = endpoint(REAL_80)
    images = (pictures(2, 16) * 255).round() / 255
    scores = R.score(remote(server.url, question="Is {prompt} real?"), images, ["a cat", "a dog"])
    torch.testing.assert_close(scores["far"], torch.tensor([0.8, 0.8]))
    body = next(r for r in server.requests if "a cat" in json.dumps(r))
    options = {k: body[k] for k in ("model", "logprobs", "top_logprobs", "max_tokens")}
    assert options == dict(model="judge", logprobs=True, top_logprobs=20, max_tokens=1)
    picture, question = body["messages"][0]["content"]
    assert question["text"] == "Is a cat real?"
    head, data = picture["image_url"]["url"].split(",")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png;base64" and sent.format == "PNG"
    np.testing.assert_array_equal(np.array(sent), (images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert all("hf_of_the_user" not in json.dumps(h) for h in server.headers)  # the Hub token is not the endpoint's


def test_remote_answers_stay_in_order_and_requests_run_together(endpoint):
    """Each picture gets its own answer although they run at the same time, and no more of them than `concurrency`."""

    def brightness(body):
        data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]
        p = np.array(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 255
        return [("real", np.log(p)), ("fake", np.log(1 - p))]

    server = endpoint(brightness)
    images = torch.linspace(0.2, 0.8, 12).view(12, 1, 1, 1).expand(12, 3, 8, 8)
    scores = R.score(remote(server.url, concurrency=3), images, [""] * 12)
    torch.testing.assert_close(scores["far"], torch.linspace(0.2, 0.8, 12), atol=0.003, rtol=0)
    assert 1 < server.most <= 3


def test_a_side_that_is_not_listed_gets_its_upper_bound(endpoint):
    """`fake` is not among the alternatives: it counts as likely as the least likely one, and the score is finite."""
    server = endpoint([("real", -0.1), ("maybe", -3.0)])
    expected = torch.sigmoid(torch.tensor([-0.1 + 3.0]))
    torch.testing.assert_close(R.score(remote(server.url), pictures(1, 8), [""])["far"], expected)


@pytest.mark.parametrize("trouble", [[429, 429], [500, 503], ["garbled"], ["silent"], [[("perhaps", -0.1)]]])
def test_remote_tries_again(endpoint, trouble):
    """429, 5xx, an answer that is no JSON, without log-probs or neither word: asked again, right in the end."""
    server = endpoint(*trouble, REAL_80)
    torch.testing.assert_close(R.score(remote(server.url), pictures(1, 8), [""])["far"], torch.tensor([0.8]))
    assert len(server.requests) == len(trouble) + 1


@pytest.mark.parametrize(
    "trouble,message,requests",
    [
        (429, r"status 429 .*gave up after 4 attempts", 4),
        (500, r"status 500 .*gave up after 4 attempts", 4),
        (401, r"status 401 .*gave up after 1 attempts", 1),
        ("garbled", r"cannot be read .*gave up after 4 attempts", 4),
        ("silent", r"no log-probs; the server must support logprobs", 4),
        ([("perhaps", -0.1), ("so", -3.0)], r"starts with perhaps, so, neither real nor fake", 4),
        ("slow", r"no answer within 0.2 seconds; gave up after 4 attempts", 4),
        ("trickle", r"no answer within 0.2 seconds; gave up after 4 attempts", 4),
    ],
)
def test_remote_ends(endpoint, trouble, message, requests):
    """What does not pass ends in one ValueError with reward, URL and cause, in bounded time, trickles included."""
    server, start = endpoint(trouble), time.perf_counter()
    with pytest.raises(ValueError, match=f"rewards: far: {server.url}, model judge: .*{message}"):
        R.score(remote(server.url, timeout=0.2 if trouble in ("slow", "trickle") else 5.0), pictures(1, 8), [""])
    assert len(server.requests) == requests and time.perf_counter() - start < 10


def test_remote_waits_longer_each_time(endpoint):
    """Exponential backoff: three retries wait backoff x (1 + 2 + 4)."""
    server, start = endpoint(503), time.perf_counter()
    with pytest.raises(ValueError, match="503"):
        R.score(remote(server.url, backoff=0.1), pictures(1, 8), [""])
    assert 0.7 <= time.perf_counter() - start < 5


def test_a_server_that_is_not_there(endpoint):
    """A refused connection is tried again and then named."""
    server = endpoint(REAL_80)
    server.server.server_close()
    with pytest.raises(ValueError, match=r"rewards: far: .*no connection .*gave up after 4 attempts"):
        R.score(remote(server.url), pictures(1, 8), [""])


def test_offline_mode_is_named():
    """HF_HUB_OFFLINE forbids every request of the client, a local server included; the message says so."""
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids the request"):
        R.score(remote("http://127.0.0.1:9/v1"), pictures(1, 8), [""])


def test_the_key_comes_from_the_environment(endpoint, monkeypatch):
    """args.key_env names the variable, whose value is sent; what is none is refused without repeating it."""
    server = endpoint(REAL_80)
    with pytest.raises(ValueError, match="no such environment variable") as caught:
        remote(server.url, key_env="sk-secret")
    assert "sk-secret" not in str(caught.value)
    monkeypatch.setenv("JUDGE_KEY", "k123")
    R.score(remote(server.url, key_env="JUDGE_KEY", jpeg=90), pictures(1, 8), [""])
    assert {k.lower(): v for k, v in server.headers[0].items()}["authorization"] == "Bearer k123"
    assert "data:image/jpeg" in json.dumps(server.requests[0])


# ---------------------------------------------------------------- options and the table


@pytest.mark.parametrize(
    "config,message",
    [
        (dict(kind="vlm", args=dict(quesion="?")), r"args.quesion is not an option .* did you mean question\?"),
        (dict(kind="clip", args=dict(zzz=1)), "args.zzz is not an option of this kind; known are processor"),
        (dict(kind="remote", args=dict(model="m")), "args.model is not an option"),
        (dict(kind="remote"), "args.url is missing"),
        (dict(kind="remote", args=dict(url="localhost:8000")), "args.url: 'localhost:8000'; expected http"),
        (dict(kind="remote", args=dict(url="http://x", retries=True)), "args.retries: True; expected int, 0 or more"),
        (dict(kind="remote", args=dict(url="http://x", timeout="9")), "args.timeout: '9'; expected float, 0 or more"),
        (dict(kind="vlm", args=dict(real=[True])), r"args.real: \[True\]; expected a list of words"),
        (dict(kind="vlm", args=dict(real="real")), "args.real: 'real'; expected a list of words"),
        (dict(kind="omniaid", args=dict(real=2)), "args.real: 2; expected 0 or 1"),
        (dict(kind="classifier", args=dict(jpeg=-1)), "args.jpeg: -1; expected int, 0 or more"),
    ],
)
def test_a_bad_option_is_named_before_a_model_loads(config, message):
    """Each with its reward, its value and what was expected; the model is none that could be loaded."""
    with pytest.raises(ValueError, match=f"rewards: x: {message}"):
        R.load_rewards({"x": R.RewardConfig(model="no/such", **config)})


def test_the_table_of_pictures(tmp_path):
    """python reward.py config.yaml pictures: a row each, alignment where a PNG holds its prompt."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", "a tabby cat")
    Image.fromarray(np.full((70, 90, 3), 128, np.uint8)).save(tmp_path / "drawn.png", pnginfo=info)
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / "a=b.jpg")
    words = [str(tmp_path / "drawn.png"), str(tmp_path / "a=b.jpg"), "rewards.train.feature=null"]
    command = [sys.executable, "reward.py", "config.yaml", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    header, first, second = result.stdout.splitlines()
    assert header.split() == ["picture", "semantic", "alignment", "validation"]
    one, two = first.split(), second.split()
    assert one[0] == words[0] and two[0] == words[1] and two[2] == "-"
    expected = R.score(
        R.load_rewards({"alignment": R.RewardConfig(kind="clip", model="nano/clip")}),
        R.read_image(words[0], (64, 64))[None],
        ["a tabby cat"],
    )
    assert float(one[2]) == pytest.approx(expected["alignment"].item(), abs=6e-4)


@pytest.mark.parametrize(
    "words,message",
    [
        (["config.yaml"], "error: no picture; expected python reward.py config.yaml picture.jpg"),
        (["config.yaml", "no.jpg"], "error: no.jpg is not a picture that can be read"),
        (["config.yaml", "no.jpg", "sed=1"], "error: config.yaml: sed is not a key; did you mean seed?"),
    ],
)
def test_the_table_ends_in_one_line(words, message):
    """Bad input is one line on stderr and exit code 2."""
    result = subprocess.run([sys.executable, "reward.py", *words], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1


# ---------------------------------------------------------------- maths


def test_standardise_is_per_group():
    """Mean 0 and population std 1 in every group, whatever the scale; a group of equal rewards gives 0, rounding included."""
    r = torch.tensor([[1.0, 2.0, 3.0], [100.0, 500.0, 900.0], [0.7, 0.7, 0.7 + 1e-7]])
    z = R.standardise(r)
    torch.testing.assert_close(z[:2].sum(1), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z[:2].std(1, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    assert z[2].abs().max() < 2e-3


def test_kid_is_zero_for_one_distribution_and_grows_with_distance():
    """Two samples of the same features: about 0, on average; a shifted one: more, and more with the shift."""
    g = torch.Generator().manual_seed(0)
    same = [R.kid(torch.randn(100, 8, generator=g), torch.randn(120, 8, generator=g)) for _ in range(30)]
    assert abs(np.mean(same)) < 0.05
    x = torch.randn(200, 8, generator=g)
    values = [R.kid(x + shift, torch.randn(200, 8, generator=g)) for shift in (0.0, 0.3, 0.6)]
    assert values[0] < values[1] < values[2]


def test_kid_against_a_double_loop():
    """The unbiased estimate by its definition."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 3, generator=g).double(), torch.randn(4, 3, generator=g).double()
    k = lambda a, b: ((a @ b).item() / 3 + 1) ** 3
    xx = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    xy = sum(k(a, b) for a in x for b in y) / 20
    assert R.kid(x, y) == pytest.approx(xx + yy - 2 * xy)


# ---------------------------------------------------------------- the user's own reward, and bad ones


def test_user_reward_needs_no_fork(tmp_path):
    """file.py:function is the reward; with args the name is a factory, called once."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n\n"
        "def scaled(by):\n    return lambda images, prompts: by * images.mean((1, 2, 3))\n"
    )
    rewards = R.load_rewards(
        {"a": R.RewardConfig(kind=f"{file}:brightness"), "b": R.RewardConfig(kind=f"{file}:scaled", args={"by": 2.0})}
    )
    scores = R.score(rewards, pictures(), ["x"] * 4, micro_batch=3)
    torch.testing.assert_close(scores["a"], pictures().mean((1, 2, 3)))
    torch.testing.assert_close(scores["b"], 2 * scores["a"])


@pytest.mark.parametrize(
    "function,message",
    [
        (lambda i, p: i.mean(), r"bad returned shape \(\) for 4 pictures; expected \(4,\)"),
        (lambda i, p: i.mean((1, 2)), r"bad returned shape \(4, 64\)"),
        (lambda i, p: torch.tensor([0.0, float("nan"), 0.0, 0.0]), "bad returned a value that is not finite for 'b'"),
        (lambda i, p: torch.full((4,), float("inf")), "not finite"),
    ],
)
def test_a_bad_reward_is_named(function, message):
    """A wrong shape, NaN and infinity stop the run with the reward's name."""
    with pytest.raises(ValueError, match=message):
        R.score({"bad": function}, pictures(), ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    "config,message",
    [
        (dict(kind="nonsense"), "kind 'nonsense'; expected classifier, clip, vlm, omniaid, remote or path"),
        (dict(kind="no/such.py:f"), "kind 'no/such.py:f'; expected"),
        (dict(kind="classifier", model="tests"), "tests has no config.json"),
    ],
)
def test_a_bad_reward_config_is_named(config, message):
    """Each with its value and what was expected."""
    with pytest.raises(ValueError, match=message):
        R.load_rewards({"x": R.RewardConfig(**config)})


def test_photographs_are_read_cropped_and_named(tmp_path):
    """Any size and mode becomes (3,H,W) in [0,1]; a file that is no picture is named."""
    Image.fromarray(np.full((90, 50), 255, np.uint8)).save(tmp_path / "gray.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "gray.png", "prompt": "white"}) + "\n")
    images, prompts = R.read_photos(tmp_path / "list.jsonl", (64, 48))
    assert images.shape == (1, 3, 64, 48) and images.min() == 1 and prompts == ["white"]
    with pytest.raises(ValueError, match="text.jpg is not a picture"):
        R.read_image(tmp_path / "text.jpg")
    with pytest.raises(ValueError, match="nothing.jsonl is not a file"):
        R.read_photos(tmp_path / "nothing.jsonl", (64, 64))
