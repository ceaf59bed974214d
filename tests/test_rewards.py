"""Laws of rewards/: an answer's first token, the experts of OmniAID, what a server cannot do to a client."""

import http.server
import json
import math
import os
import re
import threading
import time
from contextlib import suppress

import pytest
import torch
from conftest import Bomb, pictures, refuses
from pipelines import qwen_vl
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, Qwen2VLImageProcessorPil

from reward import to_pil
from rewards import omniaid, probe
from rewards.omniaid import OmniAid
from rewards.probe import Probe
from rewards.vlm import QUESTION, Endpoint, NoAnswer, Vlm


# ---------------------------------------------------------------- Vlm

# a picture or a text of each message, as Qwen's own template has them
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def vlm(tmp_path_factory, pytestconfig):
    """Folder of a tiny Qwen2.5-VL. Some spellings of the answers are one token, as in its real vocabulary."""
    folder = tmp_path_factory.mktemp("vlm")
    tokenizer = AutoTokenizer.from_pretrained(pytestconfig.rootpath / "nano/refiner")
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.add_tokens(["real", "Real", " real", "fake", "Fake", "FAKE"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size=dict(shortest_edge=28**2, longest_edge=56**2)).save_pretrained(folder)
    torch.manual_seed(3)
    model = qwen_vl(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)  # the default is so small that no picture matters
    model.save_pretrained(folder)
    return str(folder)


def test_vlm_is_the_published_reward_of_forensic_chat(vlm):
    """By hand, from the stock model's logits after the question: two spellings a side, means, a sigmoid."""
    reward = Vlm(vlm)
    images = pictures(1, 56)
    inputs = reward.inputs([to_pil(images)], [QUESTION])
    z = reward.model(**inputs).logits[0, -1]  # (V,)
    ids = reward.processor.tokenizer.convert_tokens_to_ids
    real, Real, fake, Fake = z[ids(["real", "Real", "fake", "Fake"])]
    expected = torch.sigmoid((real + Real) / 2 - (fake + Fake) / 2)
    assert_close(reward(images, [""])[0], expected)


def test_vlm_of_a_batch_is_that_of_each_picture(vlm):
    """Questions of different lengths change nothing for each other; picture and {prompt} matter."""
    reward = Vlm(vlm, question="Is this a photograph of {prompt}?")
    images = pictures(2, 56)[[0, 1, 1]]
    prompts = ["a cat", "a cat", "a very long sentence about a dog in the rain"]
    together = reward(images, prompts)  # (B,)
    alone = [reward(images[[i]], [prompts[i]]) for i in range(3)]
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)
    assert reward.needs_prompt and len(together.unique()) == 3


def test_vlm_replies_to_several_pictures(vlm):
    """A greedy text, another one when the pictures change places."""
    shown = to_pil(pictures(2, 56))
    reward = Vlm(vlm)
    assert reward.reply(shown, "Which?") != reward.reply(shown[::-1], "Which?")


REFUSED = [dict(real="photographic"), dict(fake=""), dict(fake="Real"), dict(dtype="float8")]


@pytest.mark.parametrize("args", REFUSED)
def test_vlm_refuses_what_it_cannot_read(vlm, args):
    """Words of several tokens, none, words of both sides, a dtype that is none."""
    with refuses("args.*expected|float8"):
        Vlm(vlm, **args)


# ---------------------------------------------------------------- OmniAID


def stock_vit():
    """The CLIP ViT that a file of OmniAID is made from, tiny; the same at every call"""
    torch.manual_seed(5)
    vit = CLIPVisionModel(CLIPVisionConfig(**omniaid.SHAPE, image_size=32))
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return vit.eval()


# published name of a part -> the stock one
NAMES = {"encoder_layers": "encoder.layers", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
TINY = dict(zip(omniaid.SHAPE, (128, 256, 2, 2, 8)))
VERSIONS = ["v1", "v2", "effort", "effort in a module"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Networks of the tiny shape, and a Hub whose repositories are folders here"""
    monkeypatch.setattr(omniaid, "SHAPE", TINY)
    monkeypatch.setattr(omniaid, "hf_hub_download", os.path.join)


def published(version="v1"):
    """A state dict under the published names, and {stock projection: [U, S, V of each expert]}

    v2 has 6 experts and a router on a frozen CLIP, v1 no such CLIP; Effort has one expert of rank 1, no router,
    and buffers of its training.
    """
    effort = version.startswith("effort")
    count, rank = (1, 1) if effort else (6, 2)
    state = {}
    experts = {}
    for name, tensor in stock_vit().state_dict().items():
        if version == "v2":
            state[f"feature_extractor.{name}"] = tensor
        theirs = f"backbone.{name}" if effort else name
        for published, stock in {} if effort else NAMES.items():
            theirs = theirs.replace(stock, published)
        if "_proj.weight" not in name:
            state[theirs] = tensor
            continue
        state[f"{theirs}_main"] = tensor
        theirs = theirs.removesuffix("weight")
        parts = [torch.randn(count, *shape) / 2 for shape in ((128, rank), (rank,), (rank, 128))]
        experts[name.removesuffix(".weight")] = list(zip(*parts))
        for part, tensors in zip("USV", parts):
            for e, tensor in enumerate(tensors):
                state[theirs + (f"{part}_residual" if effort else f"{part}_experts.{e}")] = tensor
            if effort:
                state[f"{theirs}{part}_r"] = torch.randn(3)
    layers = {"head": (2, 128), "gating_network.network.0": (24, 128), "gating_network.network.2": (5, 24)}
    for layer, shape in list(layers.items())[: 1 if effort else 3]:
        state[f"{layer}.weight"] = 0.3 * torch.randn(shape)
        state[f"{layer}.bias"] = torch.randn(shape[0])
    wrap = "module." if "module" in version else ""
    return {wrap + name: tensor for name, tensor in state.items()}, experts


def gates_by_hand(model, pixels):
    """(B, E): a softmax over the two largest outputs of a router, and 1 for experts that it has none for"""
    if model.router is None:
        return torch.ones(len(pixels), 1)
    seen = stock_vit().embeddings(pixels)[:, 1:].mean(1)  # (B, D)
    if model.feature_extractor is not None:
        seen = stock_vit()(pixels).pooler_output  # (B, D)
    outputs = model.router(seen)  # (B, 5)
    outputs[outputs < outputs.topk(2).values[:, 1:]] = -math.inf
    return torch.cat([outputs.softmax(-1), torch.ones(len(pixels), 1)], 1)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_omniaid_is_the_stock_vit_with_a_sum_over_experts(tmp_path, version):
    """A stock ViT whose projections are W + sum_i g_i U_i diag(S_i) V_i, picture by picture, and the head."""
    state, experts = published(version)
    torch.save({"model": state, "epoch": 3}, tmp_path / "o.pth")
    reward = OmniAid(str(tmp_path), file="o.pth")
    pixels = reward.preprocess(pictures(3, 48))  # (B,3,32,32)
    expected = []
    for i, gates in enumerate(gates_by_hand(reward.model, pixels)):
        vit = stock_vit()
        for name, parts in experts.items():
            for g, (u, s, v) in zip(gates, parts, strict=True):
                vit.get_submodule(name).weight += g * u @ s.diag() @ v
        real, fake = reward.model.head(vit(pixels[[i]]).pooler_output[0])
        expected.append((real - fake).sigmoid())
    assert_close(reward(pictures(3, 48), [""] * 3), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_effort_sees_what_its_evaluation_shows_it(tmp_path):
    """224 px in one resize (here 32), with ImageNet's mean and std"""
    torch.save(published("effort")[0], tmp_path / "e.pth")
    reward = OmniAid(str(tmp_path / "e.pth"), resize=0, imagenet=True)
    images = pictures(3, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert_close(reward.preprocess(images), (images - mean) / std)


def test_omniaid_learns_with_head_and_experts(tmp_path):
    """2 of the head; 2 layers of 4 projections with 6 experts of 3 tensors."""
    torch.save(published()[0], tmp_path / "o.pth")
    assert len(OmniAid(str(tmp_path / "o.pth")).trainable()) == 2 + 2 * 4 * 6 * 3


@pytest.mark.parametrize(
    "damage",
    [
        {"code": Bomb("trapped")},
        {"unexpected": torch.ones(1)},
        {"head.weight": torch.ones(3, 128)},
        {"head.bias": torch.tensor([0, math.nan])},
        {"head.bias": None},
    ],
)
def test_what_is_no_whole_omniaid_is_refused(tmp_path, monkeypatch, damage):
    """Code is not run; other names, shapes and numbers are named."""
    monkeypatch.chdir(tmp_path)
    state = published()[0] | damage
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, "o.pth")
    with refuses("o.pth"):
        OmniAid("o.pth")
    assert os.listdir() == ["o.pth"]


# ---------------------------------------------------------------- Probe


def test_a_probe_is_the_logistic_head_of_its_file(tmp_path):
    """Of the pooled features of a picture, standardised; only its head has a gradient."""
    head = torch.nn.Linear(128, 1)  # as wide as the features of nano/clip
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    reward = Probe("nano/clip", head=tmp_path / "head.safetensors")
    for p in reward.trainable():
        p.requires_grad_()
    images = pictures(3, 32)
    scores = reward(images, [""] * 3)  # (B,)
    pooled = reward.model(reward.preprocess(images)).pooler_output  # (B, D)
    features = (pooled - pooled.mean(1, keepdim=True)) / pooled.std(1, keepdim=True, correction=0)
    assert_close(scores, head(features)[:, 0].sigmoid(), rtol=1e-3, atol=1e-4)
    scores.sum().backward()
    moved = [n for n, p in reward.model.named_parameters() if p.grad is not None]
    assert moved == ["probe.weight", "probe.bias"]


def test_a_head_is_at_the_minimum_of_its_loss():
    """The gradient of mean cross entropy + penalty |w|^2, by hand, is 0."""
    features = torch.randn(40, 6)
    labels = torch.arange(40) % 2
    head = probe.fit(features, labels, 0.05)
    w = head.weight[0]
    wrong = head(features)[:, 0].sigmoid() - labels  # (n,)
    assert wrong.mean().abs() < 1e-3
    assert_close(wrong @ features / 40, -2 * 0.05 * w, rtol=0, atol=1e-3)


def test_a_subject_is_no_help(capsys):
    """Features that name the prompt, from which the label follows, tell nothing of prompts held back."""
    prompts = torch.arange(80) // 4
    probe.cross_validate(torch.eye(20)[prompts], prompts // 5 % 2, prompts % probe.FOLDS)
    accuracy = re.findall(r"prompts ([\d.]+)", capsys.readouterr().out)
    assert len(accuracy) == len(probe.PENALTIES) and set(accuracy) == {"0.500"}


def test_a_probe_is_fitted_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Base pictures and photographs -> a head that loads."""
    monkeypatch.setattr(probe, "PICTURES", 20)
    head = str(tmp_path / "new" / "head.safetensors")
    detector = f"{{kind: rewards/probe.py:Probe, model: nano/clip, args: {{head: {head}}}}}"
    probe.main(["config.yaml", "generator.num_steps=2", f"rewards.validation.validation={detector}"])
    assert capsys.readouterr().out.count("held-back") == len(probe.PENALTIES)
    assert len(Probe("nano/clip", head=head)(pictures(2), ["", ""])) == 2


@pytest.mark.parametrize("head", ["nowhere.safetensors", "nano/subject/model.safetensors"])
def test_a_probe_without_its_head_is_refused_with_the_remedy(head):
    """No file; a file of something else."""
    with refuses(f"{head}, which python rewards/probe.py fits"):
        Probe("nano/clip", head=head)


# ---------------------------------------------------------------- Endpoint

SECRET = "sk-secret"
OK = b"HTTP/1.0 200 OK\r\n\r\n"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.sent.append(str(self.headers))
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with suppress(OSError):  # the client gave up
            self.wfile.writelines(self.server.answer(request))


def serve(answer):
    """A server on the loopback: it answers with the bytes of answer(request) and keeps what it was `sent`"""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer = answer
    server.sent = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def completion(request):
    """It says `real` with the probability that the question is, in two spellings"""
    p = float(request["messages"][0]["content"][-1]["text"])
    odds = {"Real": p / 2, " real": p / 2, "fake": 1 - p}
    listed = [{"token": word, "logprob": math.log(odds[word])} for word in odds]
    choice = {"message": {"content": "x" * 9999}, "logprobs": {"content": [{"top_logprobs": listed}]}}
    return [OK, json.dumps({"choices": [choice]}).encode()]


def test_endpoint_is_the_share_of_the_real_words():
    """In the order of the pictures; a side that is not listed counts as the least likely; a reply is cut."""
    args = dict(base_url=serve(completion).url, question="{prompt}", concurrency=2)
    endpoint = Endpoint("m", **args)
    scores = endpoint(pictures(3, 8), ["0.2", "0.5", "0.9"])  # (B,)
    assert_close(scores, torch.tensor([0.2, 0.5, 0.9]))
    unlisted = Endpoint("m", real="photo", **args)
    assert unlisted(pictures(1, 8), ["0.9"]).item() == pytest.approx(0.5)  # 0.1 to 0.1
    assert endpoint.reply(to_pil(pictures(2, 8)), "0.5") == "x" * 4000


@pytest.mark.parametrize("key", ["", "THE_KEY"])
def test_endpoint_asks_a_busy_server_again_and_sends_only_the_named_key(monkeypatch, key):
    """None without a name; nothing else of the environment either."""
    monkeypatch.setenv("THE_KEY", SECRET)
    monkeypatch.setenv("OPENAI_ORG_ID", SECRET)
    busy = [[b"HTTP/1.0 503 busy\r\nRetry-After: 0.01\r\n\r\n"]]
    server = serve(lambda request: busy.pop() if busy else completion(request))
    Endpoint("m", base_url=server.url, key=key, retries=1).reply([], "0.5")
    assert len(server.sent) == 2
    assert "".join(server.sent).count(SECRET) == (2 if key else 0)


@pytest.mark.parametrize(
    "args",
    [
        dict(key=SECRET),
        dict(key="BAD_KEY"),
        dict(base_url=f"http://user:{SECRET}@host/v1"),
        dict(base_url=f"http://host/v1?key={SECRET}"),
        dict(base_url=f"file:///{SECRET}"),
        dict(real="fake"),
    ],
)
def test_endpoint_refuses_without_showing_a_secret(monkeypatch, args):
    """A key in place of its variable's name, one that no header holds, an address with more than a place."""
    monkeypatch.setenv("BAD_KEY", SECRET + "\n")
    with refuses("args.*expected") as caught:
        Endpoint("m", **(dict(base_url="http://host") | args))
    assert SECRET not in str(caught.value)


def endless(start, part=SECRET.encode() * 9999, pause=0):
    """`start`, then `part` for ever"""
    yield start
    while True:
        time.sleep(pause)
        yield part


@pytest.mark.parametrize(
    "cause,answer",
    [
        ("HTTP 307", [b"HTTP/1.0 307 x\r\nLocation: /there\r\n\r\n"]),
        ("HTTP 500", endless(b"HTTP/1.0 500 x\r\n\r\n")),
        ("TimeoutError", endless(b"HTTP/1.0 200 OK\r\nX: ", b"x", 0.05)),
        ("TimeoutError", endless(OK, b" ", 0.05)),
        ("JSONDecodeError", endless(OK)),
        ("IndexError", [OK, b'{"choices": []}']),
    ],
)
def test_a_hostile_server_is_named_with_a_cause_and_without_its_words(monkeypatch, cause, answer):
    """No redirect is followed, time and memory are bounded, no body or key stands in what is raised."""
    monkeypatch.setenv("THE_KEY", SECRET)
    server = serve(lambda request: answer)
    start = time.monotonic()
    with pytest.raises(NoAnswer, match=f"127.0.0.1, model m: .* read: {cause}$") as caught:
        Endpoint("m", base_url=server.url, key="THE_KEY", retries=0, timeout=0.5).reply([], "?")
    assert time.monotonic() - start < 5
    assert len(server.sent) == 1
    assert SECRET not in str(caught.getrepr(chain=True))
