"""Laws of bench.py: intervals, ratings, judges, people, what is drawn and asked once, the report."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import bench
import generator as G
import grpo
import reward as R
from conftest import CALLS, TARGETS, vlm


@pytest.fixture(autouse=True)
def one_thread():
    """The pictures are tiny: a second thread only waits, for minutes where the cores are busy"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- statistics


def test_bootstrap_interval_covers_the_truth():
    """Nominal 95% over prompts whose pictures are alike: the true mean lies inside in 90-98% of 400 simulations; narrower with more prompts."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        values = rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 8))
        v = bench.bootstrap(values, 300, rng)
        inside += v["low"] <= 0 <= v["high"]
    assert 360 <= inside <= 392
    many, few = (bench.bootstrap(np.random.default_rng(1).normal(size=(n, 1)), 300, rng) for n in (400, 25))
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])


def test_missing_pictures_leave_the_mean_of_the_others():
    """NaN is a missing picture: a prompt's mean is over what is there, a prompt with nothing is left out, and none at all is None."""
    v = bench.bootstrap([[1, 3], [5, np.nan], [np.nan, np.nan]], 50, np.random.default_rng(0))
    assert v["mean"] == 3.5
    assert bench.bootstrap([[np.nan]], 50, np.random.default_rng(0)) is None


def test_paired_difference_is_narrower_than_unpaired():
    """Prompts differ more than contestants do: pairing removes that."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 4))
    better = base + 0.2 + 0.1 * rng.normal(size=(40, 4))
    paired = bench.bootstrap(better - base, 500, np.random.default_rng(1))
    alone = bench.bootstrap(better, 500, np.random.default_rng(1))
    assert paired["low"] > 0 and paired["high"] - paired["low"] < 0.5 * (alone["high"] - alone["low"])


def test_kid_interval_covers_the_whole_and_its_difference():
    """Nearer to the photographs than base: a difference below 0 whose interval excludes 0; base against base: exactly 0."""
    g = torch.Generator().manual_seed(0)
    photos = torch.randn(120, 8, generator=g)
    base, near = torch.randn(32, 4, 8, generator=g) + 0.6, torch.randn(32, 4, 8, generator=g) + 0.2
    value, difference = bench.kid_interval(near, base, photos, 40, np.random.default_rng(0))
    assert value["low"] < value["mean"] < value["high"] and difference["high"] < 0
    _, same = bench.kid_interval(base, base, photos, 50, np.random.default_rng(0))
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0}
    holes = near.clone()
    holes[3, 1] = torch.nan  # a missing picture
    assert abs(bench.kid_interval(holes, base, photos, 20, np.random.default_rng(0))[0]["mean"] - value["mean"]) < 0.02


def test_kid_of_photographs_is_about_zero_and_grows_with_noise():
    """Two random halves of the same photographs, by the features of the default config; then one half with more and more noise."""
    photos, _ = R.read_photos("nano/photos/test.jsonl", (64, 64))
    photos = photos[torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))]
    model, layer = R.ClipReward(R.RewardConfig(model="nano/clip"), "cpu"), 1
    with torch.no_grad():
        one, two = photos[:168], photos[168:]
        g = torch.Generator().manual_seed(1)
        noisy = [(one + std * torch.randn(one.shape, generator=g)).clamp(0, 1) for std in (0.0, 0.1, 0.2, 0.4)]
        kids = [R.kid(model.features(x, layer), model.features(two, layer)) for x in noisy]
    assert abs(kids[0]) < 0.2 * kids[1] and kids[1] < kids[2] < kids[3]


STRENGTHS = np.array([1300.0, 1100.0, 900.0, 700.0])  # mean 1000


def simulate(rng, units=60, games=4):
    """Matches of four contestants of known ratings -> results of the arena"""
    results = []
    for i in range(4):
        for j in range(i + 1, 4):
            chance = 1 / (1 + 10 ** ((STRENGTHS[j] - STRENGTHS[i]) / 400))
            won = rng.random((units, games)) < chance
            results += [(str(i), str(j), p, 1 if w else -1) for p in range(units) for w in won[p]]
    return results


def test_bradley_terry_recovers_known_ratings():
    """From simulated matches: within 100 points, and the 95% intervals hold the truth in 90-98% of 400 cases; ties alone rate all alike."""
    rng, inside, names = np.random.default_rng(0), 0, ["0", "1", "2", "3"]
    for _ in range(100):
        arena, rating, _ = bench.rate(simulate(rng), names, 60, 150)
        means = np.array([rating[n]["mean"] for n in names])
        assert np.abs(means - STRENGTHS).max() < 100
        inside += sum(rating[n]["low"] <= s <= rating[n]["high"] for n, s in zip(names, STRENGTHS))
    assert 360 <= inside <= 392
    assert arena["0"]["1"]["win"] + arena["0"]["1"]["loss"] == 240 and arena["0"]["1"]["rate"] > 0.6
    assert arena["1"]["0"]["rate"] == pytest.approx(1 - arena["0"]["1"]["rate"])
    ties = bench.bradley_terry(np.array([[0, 5, 5], [5, 0, 5], [5, 5, 0]], dtype=float))
    assert np.allclose(ties, 1000)
    swept = bench.bradley_terry(np.array([[0, 9.0], [0, 0]]))  # who won everything is ahead by a finite number
    assert np.isfinite(swept).all() and swept[0] - swept[1] == pytest.approx(400 * np.log10(9.5 / 0.5))


def test_rank_correlations_equal_published_examples():
    """tau-b and rho with ties, against values worked out elsewhere; 0 where one side has no order; batches too."""
    assert bench.kendall([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452)
    assert bench.spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.82078268)
    assert bench.kendall([1, 1, 1], [1, 2, 3]) == 0 and bench.spearman([1, 1, 1], [1, 2, 3]) == 0
    both = bench.kendall(np.array([[1, 2, 3], [3, 2, 1]]), np.array([[1, 2, 3], [1, 2, 3]]))
    assert both.tolist() == [1, -1]


# ---------------------------------------------------------------- judges


@pytest.fixture
def server():
    """reply(question kind, pictures, number of the call) -> (status, text): an endpoint that speaks chat completions, on 127.0.0.1"""
    made = []

    def start(reply):
        calls = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][0]["content"]
                urls = [c["image_url"]["url"] for c in content if c["type"] == "image_url"]
                pictures = [Image.open(io.BytesIO(base64.b64decode(u.partition(",")[2]))) for u in urls]
                calls.append((self.path, self.headers.get("Authorization"), body, pictures))
                kind = "pair" if len(pictures) == 2 else "single"
                status, text = reply(kind, pictures, len(calls))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

            def log_message(self, *_):
                pass

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        made.append(httpd)
        return SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}/v1", calls=calls)

    yield start
    for httpd in made:
        httpd.shutdown()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """<out>/bench with six pictures, a0 ... a2 brighter than b0 ... b2; retries without waiting; a key"""
    monkeypatch.setattr(bench, "BACKOFF", 0.01)
    monkeypatch.setenv("STUB_KEY", "secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "pictures").mkdir()
    for name, level in (("a", 0.8), ("b", 0.2)):
        for i in range(3):
            bench.write_picture(torch.full((3, 16, 16), level + 0.05 * i), tmp_path / "pictures" / f"{name}{i}.jpg")
    return tmp_path


ROWS = [("a", "b", p, f"a{p}", f"b{p}") for p in range(3)]


def judge(folder, url, **changes):
    values = dict(kind="openai", model="stub", base_url=url, key="STUB_KEY", concurrency=2, retries=2, timeout=5.0)
    return bench.Judge(grpo.JudgeConfig(**(values | changes)), folder, {}, "cpu")


def brighter(kind, pictures, _):
    """A judge that is always right, if brighter is more real"""
    light = [np.asarray(p).mean() for p in pictures]
    if kind == "single":
        return 200, json.dumps({"answer": "real" if light[0] > 128 else "fake"})
    return 200, '```json\n{"lighting": "tie", "answer": "%s"}\n```' % ("first" if light[0] > light[1] else "second")


def test_a_judge_that_always_says_first_yields_ties_and_full_bias(folder, server):
    """Each pair is asked in both orders: position alone wins nothing, and the bias is reported as 100%."""
    stub = server(lambda kind, pictures, _: (200, '{"answer": "first"}'))
    j = judge(folder, stub.url)
    results = bench.hold(j, ROWS)
    assert [o for *_, o in results] == [0, 0, 0] and len(stub.calls) == 6
    arena, rating, _ = bench.rate(results, ["a", "b"], 3, 50)
    assert arena["a"]["b"] == {"win": 0, "tie": 3, "loss": 0, "errors": 0, "rate": 0.5, "low": 0.5, "high": 0.5}
    assert rating["a"]["mean"] == pytest.approx(1000)
    figures = bench.summary(j, results)
    assert figures["position_bias"] == 1 and figures["order_changed"] == 1 and figures["calls"] == 6


def test_a_perfect_judge_yields_all_wins_and_no_bias(folder, server):
    """100% to 0%, position bias 50%; both pictures come as JPEG of one size without metadata, the key in the header alone."""
    stub = server(brighter)
    j = judge(folder, stub.url)
    results = bench.hold(j, ROWS)
    arena, rating, _ = bench.rate(results, ["a", "b"], 3, 50)
    assert arena["a"]["b"]["rate"] == arena["a"]["b"]["low"] == 1 and arena["b"]["a"]["rate"] == 0
    assert rating["a"]["low"] > 1100 > 900 > rating["b"]["high"]
    assert bench.summary(j, results)["position_bias"] == 0.5 and bench.summary(j, results)["order_changed"] == 0
    for path, authorization, body, pictures in stub.calls:
        assert path == "/v1/chat/completions" and authorization == "Bearer secret" and body["model"] == "stub"
        assert {(p.format, p.size) for p in pictures} == {("JPEG", (16, 16))} and not any(p.getexif() for p in pictures)
    assert "secret" not in (folder / "judgements.jsonl").read_text()


def test_what_is_answered_is_not_asked_again(folder, server):
    """Garbled and failed replies are counted apart and are the only ones that the next run asks; a half-written line does no harm."""

    def reply(kind, pictures, n):
        bad = round(np.asarray(pictures[0]).mean()) in (round(0.2 * 255), round(0.25 * 255))  # b0 first, b1 first
        if not bad:
            return brighter(kind, pictures, n)
        return (200, "I like both") if round(np.asarray(pictures[0]).mean()) == round(0.2 * 255) else (500, "")

    stub = server(reply)
    first = judge(folder, stub.url)
    results = bench.hold(first, ROWS)
    figures = bench.summary(first, results)
    assert [o for *_, o in results] == [None, None, 1] and (figures["unparsed"], figures["failed"]) == (1, 1)
    assert figures["calls"] == len(stub.calls) == 4 + 1 + 3  # a 500 is tried again twice
    assert bench.rate(results, ["a", "b"], 3, 50)[0]["a"]["b"]["errors"] == 2
    with open(folder / "judgements.jsonl", "a") as log:
        log.write('{"judge": "openai stub')
    again = server(brighter)
    second = judge(folder, stub.url)
    second.cfg.base_url = again.url  # the same judge, now in good health
    assert [o for *_, o in bench.hold(second, ROWS)] == [1, 1, 1]
    assert len(again.calls) == 2 and second.calls_total == 8 + 2
    third = judge(folder, stub.url)
    assert [o for *_, o in bench.hold(third, ROWS)] == [1, 1, 1] and third.calls == 0
    other = judge(folder, again.url, model="another")  # another model shares nothing
    bench.hold(other, ROWS)
    assert len(again.calls) == 2 + 6


def test_429_and_time_outs_are_tried_again(folder, server):
    """Two bad replies, then a good one: the answer counts. A judge that is always too slow fails after its retries."""
    stub = server(lambda kind, pictures, n: (429, "") if n <= 2 else brighter(kind, pictures, n))
    j = judge(folder, stub.url, concurrency=1)
    assert [o for *_, o in bench.hold(j, ROWS[:1])] == [1] and j.calls == 4
    slow = server(lambda kind, pictures, n: time.sleep(0.6) or brighter(kind, pictures, n))
    j = judge(folder, slow.url, model="slow", timeout=0.1, retries=1)
    assert j.ask_one(("single", "a0")) == "timed out" and j.calls == 2
    assert j.ask_one(("single", "b0")) and not j.answers


def test_a_wrong_key_and_an_unreachable_judge_are_one_line(folder, server):
    """What was answered before is kept."""
    stub = server(lambda kind, pictures, n: brighter(kind, pictures, n) if n <= 3 else (401, ""))
    with pytest.raises(ValueError, match="answers HTTP 401; check the key in STUB_KEY.*judgements so far are kept"):
        bench.hold(judge(folder, stub.url, concurrency=1), ROWS)
    assert len(judge(folder, stub.url).answers) == 3
    with pytest.raises(ValueError, match="questions in a row failed, the last: .*refused"):
        bench.hold(judge(folder, "http://127.0.0.1:1/v1"), ROWS)


def test_a_refused_picture_does_not_stop_the_others(folder, server):
    """HTTP 400 is not tried again and counts as failed, even as the only open question; a judge that refuses all of them stops the run."""

    def reply(kind, pictures, n):
        return (400, "") if round(np.asarray(pictures[0]).mean()) == round(0.2 * 255) else brighter(kind, pictures, n)

    stub = server(reply)
    for calls in (6, 1):  # the second run asks what was refused, and ends well
        j = judge(folder, stub.url)
        assert [o for *_, o in bench.hold(j, ROWS)] == [None, 1, 1]
        assert (bench.summary(j, [])["failed"], j.calls) == (1, calls)
    with pytest.raises(ValueError, match="6 questions in a row failed, the last: refused with HTTP 400"):
        bench.hold(judge(folder, server(lambda *_: (400, "")).url, model="wrong"), ROWS)


@pytest.mark.parametrize(
    "reply,answer",
    [
        ('{"anatomy": "second", "answer": "first"}', "first"),
        ('Sure!\n```json\n{"edges": "first",\n "answer" : "Second"}\n```', "second"),
        ("{'answer': 'tie'}", "tie"),
        ("<think>the first, so answer: first</think> Answer: **second**", "second"),
        ("First.", "first"),
        ("The second picture", "second"),
        ('{"answer": "neither"}', None),
        ("The first has better light, the second better edges.", None),
        ('{"anatomy": "first", "edges": ', None),
        ("", None),
    ],
)
def test_parse(reply, answer):
    """JSON, near-JSON and a bare word are read; what is not clear is no answer, never a loss."""
    assert bench.parse(reply, bench.QUESTIONS["pair"][1]) == answer


def test_a_negated_verdict_is_not_read_as_its_opposite():
    """Free text that holds the word 'real' says nothing."""
    assert bench.parse("This is not a real photograph.", ("real", "fake")) is None
    assert bench.parse('{"answer": "fake"}', ("real", "fake")) == "fake"


def test_detector_judge_is_symmetric():
    """The higher mean wins in both orders; a tie only where equal; the verdict is P(real) > 0.5."""
    j = bench.Judge(grpo.JudgeConfig(), Path("nowhere"), {"a": 0.7, "b": 0.2, "c": 0.2}, "cpu")
    results = bench.hold(j, [("x", "y", 0, "a", "b"), ("x", "y", 1, "b", "a"), ("x", "y", 2, "b", "c")])
    assert [o for *_, o in results] == [1, -1, 0]
    assert bench.summary(j, results)["position_bias"] == 0.5
    j.ask([("single", "a"), ("single", "b")])
    assert (j.answers["single", "a"], j.answers["single", "b"]) == ("real", "fake")


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    """A random LLaVA whose generation config makes it say 'first' and stop"""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen3Config,
    )

    tokenizer = AutoTokenizer.from_pretrained("nano/refiner")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(["first"])
    image, first = tokenizer.convert_tokens_to_ids(["<image>", "first"])
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=image))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.sequence_bias = [[[first], 1e3], [[first, tokenizer.eos_token_id], 1e4]]
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
        "<image>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    target = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return str(target)


def test_a_local_vlm_sees_both_pictures_in_one_message(folder, tiny_vlm):
    """Its chat template gets two pictures, in the order asked; 'first' every time makes ties; the reply is logged like any judge's."""
    j = judge(folder, "", kind="vlm", model=tiny_vlm)
    j.load_vlm()
    seen, generate = [], j.model.generate
    j.model.generate = lambda **inputs: seen.append(inputs) or generate(**inputs)
    j.load_vlm = lambda: None
    results = bench.hold(j, ROWS[:1])
    assert [o for *_, o in results] == [0] and bench.summary(j, results)["position_bias"] == 1
    there, back = (x["pixel_values"] for x in seen)  # (2, 3, 16, 16)
    assert len(there) == 2 and there[0].mean() > there[1].mean() and torch.equal(there.flip(0), back)
    again = judge(folder, "", kind="vlm", model=tiny_vlm)
    assert bench.hold(again, ROWS[:1]) == results and again.model is None  # all answered: not even loaded
    with pytest.raises(ValueError, match="bench.judge.model: .*cannot be loaded"):
        judge(folder, "", kind="vlm", model=str(folder)).ask([("single", "a0")])


def test_a_qwen_vl_judges_two_pictures(folder, tmp_path):
    """The family of Forensic-Chat, whose own processor would want torchvision; a random one is read, and its reply logged."""
    vlm(tmp_path / "qwen")
    j = judge(folder, "", kind="vlm", model=str(tmp_path / "qwen"))
    j.load_vlm()
    files = [folder / "pictures" / n for n in ("a0.jpg", "b0.jpg")]
    reply, error, calls = j.reply_vlm(files, "Which is more real, first or second?")
    assert error is None and calls == 1 and isinstance(reply, str)


# ---------------------------------------------------------------- matches


def test_matches_share_prompt_and_noise_and_spread_over_prompts():
    """Picture m of a prompt meets picture m of the same prompt; a limit takes each prompt once before any twice; gaps are left out."""
    pictures = {n: [[f"{n}{p}{m}" for m in range(3)] for p in range(5)] for n in "ab"} | {"photographs": [["q"]] * 5}
    rows = bench.matches(pictures, 5)
    ab = [r for r in rows if r[:2] == ("a", "b")]
    assert sorted(p for *_, p, _, _ in ab) == [0, 1, 2, 3, 4] and all(x[1:] == y[1:] for *_, x, y in ab)
    assert len(bench.matches(pictures, 100)) == 3 * 15
    pictures["b"][2] = []
    assert not [r for r in bench.matches(pictures, 100) if "b" in r[:2] and r[2] == 2]


def test_a_photograph_meets_the_prompts_whose_subject_it_shows():
    """The same words first, the closest words otherwise; all that are equally close."""
    captions = ["a red cup", "a tabby cat, close-up", "a red cup", "a dog"]
    assert bench.same_subject(["a red cup", "a tabby cat", "one dog"], captions) == [[0, 2], [1], [3]]


# ---------------------------------------------------------------- people

PROMPTS = ["a cat", 'a dog, "big"', "a cup", "a tree"]
NAMES = ["base", "both", "photographs"]


def write_votes(path, rows, head="prompt,left,right,vote"):
    quote = lambda text: '"' + text.replace('"', '""') + '"'
    path.write_text("\n".join([head, *(",".join([quote(p), a, b, v]) for p, a, b, v in rows)]) + "\n")
    return str(path)


def test_people_who_agree_and_people_who_do_not(tmp_path):
    """The arena's own answers as votes: tau, rho and agreement 1; all reversed: -1, -1, 0; a tie against an answer is half."""
    results = [
        (a, b, p, -1) for p in range(4) for a, b in (("base", "both"), ("both", "photographs"), ("base", "photographs"))
    ]
    for word, sign in (("right", 1), ("left", -1)):
        votes = bench.read_votes(
            write_votes(tmp_path / "v.csv", [(PROMPTS[p], a, b, word) for a, b, p, _ in results]), NAMES, PROMPTS
        )
        human = bench.compare_people(votes, results, NAMES, 4, 100)
        assert human["tau"]["mean"] == human["rho"]["mean"] == pytest.approx(sign)
        assert human["agreement"]["mean"] == (1 + sign) / 2 and human["votes"] == human["compared"] == 12
    swapped = [("both", "base", 0, 1), ("base", "both", 1, 0), ("base", "both", 2, 1)]  # agrees, half, opposite
    human = bench.compare_people(swapped, results, NAMES, 4, 200)
    assert human["agreement"]["mean"] == 0.5 and human["agreement"]["low"] < 0.5 < human["agreement"]["high"]
    assert set(human["rating"]) == {"base", "both"}


@pytest.mark.parametrize(
    "rows,head,message",
    [
        ([], "prompt,left,right,winner", "columns .*winner.*expected prompt, left, right, vote"),
        ([], "prompt,left,right,vote", "holds no vote"),
        (
            [("a cat", "base", "both", "yes")],
            "prompt,left,right,vote",
            "line 2: vote is 'yes'; expected one of left, tie, right",
        ),
        (
            [("a cat", "base", "krea", "left")],
            "prompt,left,right,vote",
            "line 2: right is 'krea'; expected one of base",
        ),
        (
            [("a cow", "base", "both", "left")],
            "prompt,left,right,vote",
            "prompt is 'a cow'; expected a line of test_prompts",
        ),
    ],
)
def test_a_bad_vote_is_named(tmp_path, rows, head, message):
    """File, line, value and what was expected."""
    with pytest.raises(ValueError, match=message):
        bench.read_votes(write_votes(tmp_path / "v.csv", rows, head), NAMES, PROMPTS)


# ---------------------------------------------------------------- selftest

JUDGE = dict(name="x", pairs=0, unparsed=0, failed=0, calls=0, calls_total=0, position_bias=None, order_changed=None)
EMPTY = dict(pictures=0, missing={}, scores={"base": {}}, difference={}, real={}, arena={}, rating={}, judge=JUDGE)


def test_each_strength_is_further_from_the_photograph():
    """Every distortion changes the picture, a stronger one more, and stays a picture."""
    photos, _ = R.read_photos("nano/photos/test.jsonl", (64, 64))
    for name, (function, strengths) in bench.DISTORTIONS.items():
        for photo in photos[:4]:
            away = [(function(photo, s).clamp(0, 1) - photo).pow(2).mean().item() for s in strengths]
            assert 0 < away[0] < away[1] < away[2], (name, away)
            assert function(photo, strengths[0]).shape == photo.shape


def test_selftest_tells_a_measure_that_works_from_one_that_does_not(tmp_path):
    """A detector of noise orders noise with tau 1 and calls blur more real than a photograph; so does the arena that follows it."""
    cfg = grpo.load_config(["config.yaml", f"out={tmp_path}", "bench.resamples=50", "bench.pairs=12"])
    photos, texts = R.read_photos("nano/photos/test.jsonl", (64, 64))
    (tmp_path / "pictures").mkdir()
    files = [tmp_path / "pictures" / f"p{i}.jpg" for i in range(12)]
    for photo, file in zip(photos, files):
        bench.write_picture(photo, file)

    def calm(images, prompts):  # 1 for a flat picture, lower with noise
        return 1 / (1 + 20 * (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3)))

    run = SimpleNamespace(device="cpu", score=R.score)
    j = bench.Judge(cfg.bench.judge, tmp_path, {}, "cpu")
    contestant = bench.Contestant([[f] for f in files], texts[:12])
    result = bench.selftest(run, cfg, j, contestant, {"calm": calm}, tmp_path)
    for measure in ("calm", "arena"):
        noise, blur = result["noise"][measure], result["blur"][measure]
        assert noise["ordered"] and noise["below"] and noise["tau"]["low"] == 1
        assert not blur["ordered"] and not blur["below"] and blur["tau"]["mean"] == -1
    lines = bench.markdown({**EMPTY, "selftest": result})
    verdicts = {tuple(w.strip() for w in x.split("|")[1:3]): x.split("|")[-2].strip() for x in lines if " arena |" in x}
    assert verdicts["noise", "arena"] == "ordered" and verdicts["blur", "arena"] == "**fails**"


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def finished(checkpoints, tmp_path):
    """words -> Config of a finished run on the tiny FLUX, with rewards that need no model"""
    (tmp_path / "mine.py").write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\n\n"
        "def smooth(images, prompts):\n    return 1 - images.diff(dim=3).abs().mean((1, 2, 3))\n"
    )
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for name in ("test", "validation"):  # a few photographs, so that a bench takes seconds
        rows = [json.loads(line) for line in Path(f"nano/photos/{name}.jsonl").read_text().splitlines()[:12]]
        rows = [json.dumps(row | {"image": str(Path("nano/photos", row["image"]).absolute())}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    config = yaml.safe_load(f"""
out: {tmp_path / "out"}
test_photos: {tmp_path / "test.jsonl"}
validation_photos: {tmp_path / "validation.jsonl"}
test_prompts: {tmp_path / "prompts.txt"}
validation_prompts: {tmp_path / "prompts.txt"}
micro_batch: 3
generator: {{model: {checkpoints("flux")}, height: 16, width: 16, num_steps: 3, window: 1, lora_targets: {TARGETS}, lora_rank: 4, lora_alpha: 8}}
refiner: {{max_new_tokens: 24}}
rewards:
  train: {{bright: {{kind: '{tmp_path}/mine.py:bright'}}}}
  heldout: {{smooth: {{kind: '{tmp_path}/mine.py:smooth'}}}}
bench: {{images: 2, resamples: 50, gallery: 3}}
""")
    config["generator"]["call"] = CALLS["flux"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cfg = grpo.load_config([str(tmp_path / "config.yaml")])
    run = grpo.Run(cfg)
    perturb(run.generator)
    run.save(Path(cfg.out))
    return lambda *words: grpo.load_config([str(tmp_path / "config.yaml"), *words])


def perturb(generator, seed=0):
    g = torch.Generator().manual_seed(seed)
    for value in generator.ema.values():
        value.add_(0.2 * torch.randn(value.shape, generator=g))


def elsewhere(folder, sizes=((16, 16),) * 4):
    """A folder of 00000.png ... from somewhere else"""
    folder.mkdir()
    for i, size in enumerate(sizes):
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8))
        picture.save(folder / f"{i:05d}.png")
    return folder


def test_a_whole_bench_and_what_the_second_one_reuses(finished, tmp_path, monkeypatch):
    """Contestants of a folder, categories, votes; files and their schema; the second run draws nothing and finds the same figures."""
    (tmp_path / "categories.txt").write_text("animals\nanimals\nthings\nplants\n")
    votes = write_votes(tmp_path / "votes.csv", [(p, "base", "krea", "right") for p in PROMPTS])
    krea = elsewhere(tmp_path / "krea", ((16, 16),) * 3 + ((16, 16),) * 1)
    cfg = finished(
        f"bench.contestants={{krea: {krea}}}", f"bench.human={votes}", f"bench.categories={tmp_path}/categories.txt"
    )
    bench.main(cfg)
    out = Path(cfg.out)
    first = json.loads((out / "bench.json").read_text())
    own = ["base", "refiner", "generator", "both"]
    assert list(first["scores"]) == [*own, "krea", "photographs"] == list(first["rating"]) and first["pictures"] == 8
    assert set(first["arena"]["base"]) == {"refiner", "generator", "both", "krea", "photographs"}
    assert (
        first["arena"]["base"]["krea"]["win"] == 8 and first["arena"]["krea"]["base"]["loss"] == 8
    )  # noise is not smooth
    assert first["human"]["agreement"]["mean"] == 0 and first["human"]["tau"]["mean"] == -1
    assert (
        first["categories"]["animals"]["krea"]["smooth"]["mean"]
        < first["categories"]["animals"]["base"]["smooth"]["mean"]
    )
    assert first["scores"]["base"] != first["scores"]["generator"] and first["missing"] == {}
    page = (out / "bench.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["result"] == first and [row["prompt"] for row in data["gallery"]] == PROMPTS[:3]
    for row in data["gallery"]:
        for picture in row["pictures"].values():
            assert Image.open(io.BytesIO(base64.b64decode(picture["url"].partition(",")[2]))).size == (16, 16)
    assert not re.findall(r"""(?:src|href)=["']?(?!data:|#)[\w/]""", page) and "http" not in page.replace(
        data["result"]["judge"]["name"], ""
    )
    assert "## Arena-Scoring" in (out / "bench.md").read_text()
    monkeypatch.setattr(G.Generator, "sample", lambda *_: pytest.fail("drew again"))
    monkeypatch.setattr(grpo.L.Refiner, "rollout", lambda *_: pytest.fail("rewrote again"))
    bench.main(cfg)
    assert json.loads((out / "bench.json").read_text()) == first


def test_other_weights_or_steps_share_no_picture(finished, monkeypatch):
    """A picture is known by what made it: the base is drawn once for two runs, another LoRA and other steps are drawn anew."""
    drawn, sample = [], G.Generator.sample
    monkeypatch.setattr(
        G.Generator, "sample", lambda self, texts, keys: drawn.extend(texts) or sample(self, texts, keys)
    )
    cfg, prompts = finished("refiner=null", "stages=[{train: generator}]"), PROMPTS
    folder = Path(cfg.out) / "bench"
    (folder / "pictures").mkdir(parents=True)
    one = bench.draw(grpo.Run(cfg, train=False), cfg, prompts, folder)
    assert len(drawn) == 16 and not {f for fs in one["base"].files for f in fs} & {
        f for fs in one["generator"].files for f in fs
    }
    run = grpo.Run(cfg)
    perturb(run.generator, 1)
    run.save(Path(cfg.out))
    two = bench.draw(grpo.Run(cfg, train=False), cfg, prompts, folder)
    assert (
        len(drawn) == 16 + 8
        and two["base"].files == one["base"].files
        and two["generator"].files != one["generator"].files
    )
    cfg.generator.num_steps = 4
    bench.draw(grpo.Run(cfg, train=False), cfg, prompts, folder)
    assert len(drawn) == 16 + 8 + 16


def test_a_kill_while_drawing_loses_no_finished_picture(finished, monkeypatch):
    """Stopped after two micro-batches, the next run draws the others only."""
    cfg, calls, sample = finished("refiner=null", "stages=[{train: generator}]"), [], G.Generator.sample
    folder = Path(cfg.out) / "bench"
    (folder / "pictures").mkdir(parents=True)

    def stopping(self, texts, keys):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return sample(self, texts, keys)

    monkeypatch.setattr(G.Generator, "sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        bench.draw(grpo.Run(cfg, train=False), cfg, PROMPTS, folder)
    assert len(list((folder / "pictures").glob("*.jpg"))) == 6
    counted = []
    monkeypatch.setattr(
        G.Generator, "sample", lambda self, texts, keys: counted.extend(texts) or sample(self, texts, keys)
    )
    bench.draw(grpo.Run(cfg, train=False), cfg, PROMPTS, folder)
    assert len(counted) == 16 - 6


def test_the_published_layout_and_missing_pictures(finished, tmp_path, capsys):
    """Photographs as 00000.jpg by index pair with the prompt of that line; a missing and a broken one are named and counted."""
    with open(finished().test_prompts, "a") as file:
        file.write("a house\na bridge\n")
    photos = elsewhere(tmp_path / "photos", ((40, 20),) * 6)  # cropped and resized, as photographs are
    (photos / "00001.png").write_bytes(b"not a picture")
    (photos / "00004.png").unlink()
    cfg = finished(f"test_photos={photos}", "refiner=null", "stages=[{train: generator}]", "autoencode_photos=false")
    bench.main(cfg)
    result = json.loads((Path(cfg.out) / "bench.json").read_text())
    assert result["missing"] == {"photographs": ["00001.png", "00004.jpg"]}
    assert "test_photos: 2 of 6 pictures are missing or unreadable: 00001.png, 00004.jpg" in capsys.readouterr().out
    rows = bench.listing("test_photos", photos, [*PROMPTS, "a house", "a bridge"])
    assert [t for *_, t in rows] == [*PROMPTS, "a house", "a bridge"] and rows[2][1].name == "00002.png"


def test_a_contestant_of_json_lines(finished, tmp_path):
    """Pictures find their prompt by its text; a prompt without a picture is named, a picture of another prompt is refused."""
    krea = elsewhere(tmp_path / "krea")
    rows = [
        {"image": f"{i:05d}.png", "prompt": p} for i, p in ((1, "a cat"), (0, "a cup"), (2, "a tree"), (3, "a tree"))
    ]
    (krea / "krea.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["refiner=null", "stages=[{train: generator}]", f"bench.contestants={{krea: {krea}/krea.jsonl}}"]
    cfg = finished(*words)
    (Path(cfg.out) / "bench/pictures").mkdir(parents=True)
    contestants, missing = bench.gather(grpo.Run(cfg, train=False), cfg, PROMPTS, Path(cfg.out) / "bench")
    assert [len(files) for files in contestants["krea"].files] == [1, 0, 1, 2]
    assert missing == {"krea": ['no picture of a dog, "big"']}
    (krea / "krea.jsonl").write_text(json.dumps({"image": "00000.png", "prompt": "a cow"}))
    with pytest.raises(ValueError, match="bench.contestants.krea: .*holds 'a cow', which is no line of test_prompts"):
        bench.main(cfg)


@pytest.mark.parametrize(
    "words,message",
    [
        (["bench.contestants={krea: nowhere}"], "bench.contestants.krea: nowhere does not exist; expected a folder"),
        (["bench.contestants={base: nowhere}"], "bench.contestants.base: the name is taken"),
        (
            ["bench.contestants={krea: PATH/many}"],
            "picture 00004.png, but there are 4 prompts; expected 00000.jpg to 00003.jpg",
        ),
        (["bench.contestants={krea: PATH/large}"], "00001.png is 32 x 32 pixels; expected 16 x 16"),
        (["test_photos=PATH/none"], "no picture named by a number"),
        (["bench.judge.kind=openai"], "bench.judge.model: empty"),
        (
            ["bench.judge.kind=openai", "bench.judge.model=x", "bench.judge.key=NO_SUCH_KEY"],
            "the environment has no NO_SUCH_KEY",
        ),
        (["rewards.heldout.smooth=null"], "detector needs rewards.heldout"),
        (["bench.categories=PATH/prompts2.txt"], "bench.categories: 1 lines for 4 prompts"),
        (["bench.human=nowhere.csv"], "bench.human: nowhere.csv is not a file"),
    ],
)
def test_bad_input_is_one_line(finished, tmp_path, words, message):
    """Value, expectation, remedy."""
    elsewhere(tmp_path / "many", ((16, 16),) * 5)
    elsewhere(tmp_path / "large", ((16, 16), (32, 32), (16, 16), (16, 16)))
    (tmp_path / "none").mkdir()
    (tmp_path / "prompts2.txt").write_text("animals\n")
    with pytest.raises(ValueError, match=message):
        bench.main(finished(*(w.replace("PATH", str(tmp_path)) for w in words)))


def test_a_judge_that_breaks_off_exits_with_2_and_goes_on_later(finished, tmp_path, server, monkeypatch):
    """As the user runs it: a key that stops working ends the run in one line; the next run asks only what is open."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    health = {"limit": 10}
    stub = server(lambda kind, pictures, n: brighter(kind, pictures, n) if n <= health["limit"] else (403, ""))
    words = [
        "refiner=null",
        "stages=[{train: generator}]",
        "bench.pairs=3",
        "bench.judge.kind=openai",
        "bench.judge.model=stub",
    ]
    words += [f"bench.judge.base_url={stub.url}", "bench.judge.key=STUB_KEY", "bench.judge.concurrency=2"]

    def call():
        return subprocess.run(
            [sys.executable, "bench.py", str(tmp_path / "config.yaml"), *words],
            capture_output=True,
            text=True,
            env={**os.environ, "STUB_KEY": "secret"},
        )

    done = call()
    assert done.returncode == 2 and "answers HTTP 403; check the key in STUB_KEY" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "10 judgements so far are kept" in done.stderr
    before, health["limit"] = len(stub.calls), 10**6
    done = call()
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    singles = {
        json.loads(line)["pictures"][1]
        for line in (tmp_path / "out/bench/judgements.jsonl").read_text().splitlines()
        if '"single"' in line
    }
    assert len(stub.calls) - before == 3 * 3 * 2 - 10 + len(singles)  # three pairs of contestants, both orders
    assert set(result["real"]["base"]) == {"judge"} and result["judge"]["failed"] == 0
    assert result["judge"]["name"] == f"openai stub {stub.url}"


def test_table_shows_every_metric_and_difference():
    """Means with intervals, signed differences, a blank where a metric does not apply."""
    v = {"mean": 0.5, "low": 0.4, "high": 0.6}
    lines = bench.table(
        {"base": {"a": v, "kid": v}, "photographs": {"a": v}}, {"base": {"a": v}, "both": {"a": v, "kid": v}}
    )
    assert (
        lines[0] == "| contestant | a | kid |" and lines[2] == "| base | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |"
    )
    assert lines[3].endswith("|  |") and lines[4].startswith("| both - base | +0.500 [+0.400, +0.600]")
