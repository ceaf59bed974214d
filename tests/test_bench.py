"""Laws of bench.py: intervals, ratings, judges, people, what is drawn and asked once, the
report.
"""

import base64
import io
import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import perturb, refuses
from PIL import Image
from test_rewards import OK, serve

import bench
import grpo
import reward as R

PROMPTS = ["a cat", "a dog <!--<script>", "a red cup", "a tree"]


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("prompts,least", [(32, 0.94), (8, 0.92)])
def test_intervals_of_means_cover(prompts, least):
    """A nominal .95: the mean of pictures that are alike, their paired difference, a rate of the arena."""
    rng = np.random.default_rng(0)

    def mean():
        return rng.beta(2, 5, (prompts, 1)) + 0.1 * rng.normal(size=(prompts, 4))

    def difference():  # of P(real): what prompts differ by is in both
        own = rng.beta(2, 3, (prompts, 1))
        gain = rng.beta(2, 5, (prompts, 1)) * (1 - own)
        return gain + 0.1 * rng.normal(size=(prompts, 4))

    def rate():
        chance = rng.beta(4, 2, (prompts, 1)).repeat(8, 1)
        return rng.binomial(1, chance)

    for draw, truth in ((mean, 2 / 7), (difference, 6 / 35), (rate, 2 / 3)):
        inside = 0
        for _ in range(2000):
            rows = enumerate(draw())  # of a prompt each
            v = bench.mean_interval([(unit, x) for unit, row in rows for x in row])
            inside += v["low"] <= truth <= v["high"]
        assert least <= inside / 2000 <= 0.965


def test_kid_is_the_same_for_any_number_of_pictures_and_its_interval_covers():
    """Pictures of one prompt are alike, the distribution is that of the photographs: 0, at 1, 4 or 8 of each."""
    rng = np.random.default_rng(0)

    def draws(images, shift=0.0):
        own = 0.7 * rng.normal(size=(16, 1, 8)) + 0.714 * rng.normal(size=(16, images, 8))
        units = torch.arange(16).repeat_interleave(images)
        x = torch.tensor(own + shift).reshape(-1, 8)
        return bench.kid_draws(R.mean_kernels(x, torch.tensor(rng.normal(size=(48, 8))), units))

    for images in (1, 4, 8):
        many = [draws(images) for _ in range(150)]
        means = np.array([whole for whole, *_ in many])
        assert abs(means.mean()) < 3 * means.std() / 150**0.5
        intervals = [bench.interval(*one) for one in many]
        assert np.mean([v["low"] <= 0 <= v["high"] for v in intervals]) >= 0.94
    far = bench.interval(*draws(4, shift=0.7))
    assert far["low"] > 0


def test_each_prompt_counts_once_and_missing_values_do_not():
    """A prompt's mean is over what is there; nothing at all is None."""
    pairs = [(0, 1), (0, 3), (1, 5), (1, np.nan), (2, np.nan)]
    assert bench.mean_interval(pairs)["mean"] == 3.5
    assert bench.mean_interval(pairs[-1:]) is None


def test_bradley_terry_recovers_known_strengths():
    """From what 300 games a pair are expected to give; all wins stay finite."""
    strengths = np.array([1300.0, 1100, 900, 700])
    wins = 300 / (1 + 10 ** ((strengths - strengths[:, None]) / 400))  # (4, 4)
    ratings = bench.bradley_terry(wins * (1 - np.eye(4)))
    assert ratings == pytest.approx(strengths, abs=10)
    swept = bench.bradley_terry(np.array([[0, 9.0], [0, 0]]))
    assert swept[0] - swept[1] == pytest.approx(400 * np.log10(9.5 / 0.5))


# ---------------------------------------------------------------- judges


@pytest.fixture
def configure(config, tmp_path):
    """words -> bench.Config of the tiny run"""
    config()
    return lambda *words: grpo.load_config(
        [f"{tmp_path}/config.yaml", *words], bench.Config
    )


@pytest.mark.parametrize(
    "reply,answer",
    [
        ('{"edges": "second", "realism": "first"}', "first"),
        ('Sure!\n```json\n{"detail": "first",\n "realism" : "Second"}\n```', "second"),
        ("<think>realism: first</think> Realism: **second**", "second"),
        ("Realism is the second", "second"),
        ("{'realism': 'tie'}", "tie"),
        ('{"realism": "neither"}', None),
        ("The first has better light, the second better realism.", None),
        ("This is not a real photograph.", None),
        ("", None),
    ],
)
def test_what_is_not_clear_is_no_answer(reply, answer):
    """JSON, near-JSON and a plain word are read, axis by axis; all else is open, never a loss."""
    assert bench.parse(reply).get("realism") == answer
    three = bench.parse('{"realism": "first", "detail": "tie", "aesthetics": "second"}')
    assert three == {"realism": "first", "detail": "tie", "aesthetics": "second"}


@pytest.fixture
def judge(configure, tmp_path, monkeypatch):
    """reply(light of the first picture, of the second) -> Judge whose server says that of the pixels
    it gets; an error where that is a number. a0 to a3 are brighter than b0 to b3.
    """
    folder = tmp_path / "bench" / "pictures"
    folder.mkdir(parents=True)
    for i in range(4):
        for name, level in (("a", 200), ("b", 50)):
            Image.new("RGB", (16, 16), (level + i,) * 3).save(folder / f"{name}{i}.jpg")

    server = serve(None)
    # in order, one at a time
    monkeypatch.delattr(bench.Endpoint, "map")

    def make(reply, model="m"):
        words = ["kind=openai", f"model={model}", f"base_url={server.url}", "key=''", "retries=0"]
        made = bench.Judge(configure(*[f"bench.judge.{word}" for word in words]), folder, {}, "cpu")
        made.asked = []

        def answer(request):
            *pictures, _ = request["messages"][0]["content"]
            urls = [picture["image_url"]["url"] for picture in pictures]
            files = [io.BytesIO(base64.b64decode(url.partition(",")[2])) for url in urls]
            made.asked.append([np.asarray(Image.open(file)).mean() for file in files])
            said = reply(*made.asked[-1])
            if isinstance(said, int):
                return [f"HTTP/1.0 {said} x\r\n\r\n".encode()]
            return [OK, json.dumps({"choices": [{"message": {"content": said}}]}).encode()]

        server.answer = answer
        return made

    yield make
    server.shutdown()


ROWS = [("a", "b", p, f"a{p}", f"b{p}") for p in range(4)]
BRIGHTER = lambda x, y: json.dumps(
    {"detail": "tie", "realism": "first" if x > y else "second"}
)


@pytest.mark.parametrize(
    "reply,rate,bias",
    [(lambda *_: '{"realism": "first"}', 0.5, 1), (BRIGHTER, 1, 0.5)],
)
def test_both_orders_take_position_out(judge, reply, rate, bias):
    """Who always says `first` makes ties and is found out; who looks at the pictures wins all,
    without bias.
    """
    one = judge(reply)
    results = bench.hold(one, ROWS)
    arena = bench.arena(results["realism"])
    assert arena["a"]["b"]["rate"] == 1 - arena["b"]["a"]["rate"] == rate
    figures = one.summary(4)
    assert figures["position_bias"] == bias and figures["calls"] == 8
    assert one.asked[-2:] == [[203, 53], [53, 203]]  # the pixels on disk


def test_only_what_is_open_is_asked(judge):
    """Unparsed and failed questions are counted apart and asked again; a kill's half line does
    no harm; another model starts anew.
    """

    def moody(x, y):
        if x == 50:
            return 500
        return "I like both" if x == 51 else BRIGHTER(x, y)

    first = judge(moody)
    arena = bench.arena(bench.hold(first, ROWS)["realism"])
    assert (arena["a"]["b"]["win"], arena["a"]["b"]["errors"]) == (2, 2)
    assert (first.summary(4)["unparsed"], first.summary(4)["failed"]) == (1, 1)
    with open(first.log, "a") as log:
        log.write('{"judge": "openai')
    again = judge(BRIGHTER)
    assert bench.hold(again, ROWS)["realism"]["a", "b"] == [(p, 1) for p in range(4)]
    assert len(again.asked) == 2
    other = judge(BRIGHTER, "another")
    bench.hold(other, ROWS)
    assert len(other.asked) == 8


@pytest.mark.parametrize("cause,stops", [(401, True), (400, False)])
def test_a_judge_that_is_gone_ends_the_run_and_a_refused_picture_does_not(
    judge, cause, stops
):
    """One line after GIVE_UP failures in a row, and what was answered is kept; 400 is one
    picture's own fault.
    """

    def failing(x, y):
        if len(one.asked) > 2:
            return cause
        return BRIGHTER(x, y)

    one = judge(failing)
    questions = [
        (f"a{p % 3}", f"{n}{p // 3 % 3}") for p in range(9) for n in "ab"
    ]
    if stops:
        with refuses("bench.judge: .*HTTP 401"):
            one.ask(questions)
    else:
        one.ask(questions)
    assert len(one.asked) == (2 + bench.GIVE_UP if stops else 18)
    assert len(judge(BRIGHTER).answers) == 2


# ---------------------------------------------------------------- matches and people


def contestant(name, prompts, images):
    return [
        [bench.Picture(p, Path(f"{name}{p}{m}.jpg"), "") for m in range(images)]
        for p in range(prompts)
    ]


def test_matches_share_prompt_and_noise_and_spread_over_prompts():
    """Picture m meets picture m of the same prompt; a limit takes each prompt once before any
    twice; gaps are left out.
    """
    pictures = {
        "a": contestant("a", 5, 3),
        "b": contestant("b", 5, 3),
        "photographs": contestant("q", 5, 1),
    }
    rows = [row for row in bench.matches(pictures, 5) if row[:2] == ("a", "b")]
    assert sorted(row[2] for row in rows) == [0, 1, 2, 3, 4]
    assert all(x[1:] == y[1:] for *_, x, y in rows)
    assert len(bench.matches(pictures, 100)) == 3 * 15
    pictures["b"][2] = []
    assert not [
        row for row in bench.matches(pictures, 100) if "b" in row[:2] and row[2] == 2
    ]


def test_every_photograph_meets_someone_and_is_dealt_to_one_prompt():
    """Evenly, first to the prompt whose words its caption shares; none is dealt twice."""
    captions = [f"a photo of {PROMPTS[i % 3]}" for i in range(30)]
    photographs = [bench.Picture(i, Path(f"q{i}.jpg"), text) for i, text in enumerate(captions)]
    dealt = bench.deal(photographs, PROMPTS)
    assert sorted(len(one) for one in dealt) == [6, 8, 8, 8]
    assert sorted(x.unit for one in dealt for x in one) == list(range(30))
    assert all(PROMPTS[0] in x.text for x in dealt[0])
    pictures = {name: contestant(name, 4, 2) for name in "abcd"} | {"photographs": dealt}
    met = {row[-1] for row in bench.matches(pictures, 100) if row[1] == "photographs"}
    assert met == {x.name for x in photographs}


def test_people_who_agree_and_people_who_do_not(tmp_path):
    """The arena's own answers as votes: tau, rho, agreement 1. All reversed: -1, -1, 0.
    Strangers are refused by name.
    """
    names = ["base", "both", "photographs"]

    def votes(word, known=names):
        rows = [
            f"{p},{a},{b},{word}"
            for p in PROMPTS
            for a, b in combinations(names, 2)
        ]
        file = tmp_path / "votes.csv"
        file.write_text("\n".join(["prompt,left,right,vote", *rows]))
        return bench.read_votes(file, known, PROMPTS)

    for word, sign in (("left", 1), ("right", -1)):
        human = bench.compare_people(votes(word), votes("left"))
        assert human["tau"] == pytest.approx(sign) and human["rho"] == pytest.approx(sign)
        assert human["agreement"]["mean"] == (1 + sign) / 2
        assert human["votes"] == human["compared"] == 12
    with refuses("'photographs' is not in list"):
        votes("left", names[:2])


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def finished(configure, tmp_path):
    """words -> Config of a trained tiny run"""
    (tmp_path / "few.txt").write_text("\n".join(PROMPTS))
    words = ["generator.num_steps=3", "bench.gallery=3"]
    train(configure(*words), 0.2)
    return lambda *more: configure(*words, *more)


def train(cfg, std):
    """Saves LoRAs that draw something of their own"""
    run = grpo.Run(cfg)
    perturb(run.generator, std)
    for name, policy in run.policies.items():
        policy.save(Path(cfg.out) / name)


def elsewhere(folder, count=4):
    folder.mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:05d}.png")
    return folder


def test_a_whole_bench_and_the_same_a_second_time(finished, tmp_path):
    """Contestants, categories, votes, selftest; the page holds the result whatever the prompts."""
    (tmp_path / "categories.txt").write_text("animals\nanimals\nthings\nplants\n")
    more = elsewhere(tmp_path / "more")
    votes = tmp_path / "votes.csv"
    votes.write_text("prompt,left,right,vote\na cat,base,more,right\n")
    cfg = finished(
        f"bench.contestants.more={more}",
        "bench.selftest=true",
        f"bench.human={votes}",
        f"bench.categories={tmp_path}/categories.txt",
    )
    bench.main(cfg)
    out = Path(cfg.out)
    result = json.loads((out / "bench.json").read_text())
    assert list(result["rating"]["realism"]) == [*bench.OWN, "more", "photographs"]
    assert {v["mean"] for v in result["difference"]["base"].values()} == {0}
    assert result["scores"]["base"] != result["scores"]["generator"]
    assert result["arena"]["realism"]["base"]["more"]["win"] == 8  # noise is not smooth
    assert result["human"]["agreement"]["mean"] == 0
    assert result["categories"]["animals"]["more"]["smooth2"]["mean"] < 0
    # calm pictures are real to it: noise and grids are found, blur and retouching are not
    for measure in ("smooth2", "arena realism"):
        found = {name: rows[measure]["ordered"] for name, rows in result["selftest"].items()}
        assert found["noise"] and found["weave"] and not found["blur"] and not found["smooth"]
    page = (out / "bench.html").read_text()
    data = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page, re.S
    )[1]
    assert "<" not in data and json.loads(data)["result"] == result
    assert [row["prompt"] for row in json.loads(data)["gallery"]] == PROMPTS[:3]
    bench.main(cfg)
    assert json.loads((out / "bench.json").read_text()) == result


def test_a_picture_is_known_by_what_made_it(finished, tmp_path):
    """A kill loses no finished picture; another LoRA or other steps are drawn anew, and the base
    only once.
    """
    cfg = finished("refiner=null")
    folder = tmp_path / "pictures"
    folder.mkdir()
    drawn = []

    def gather(limit=100):
        run = grpo.Run(cfg, train=False)
        rollout = run.generator.rollout

        def counted(texts, keys):
            if len(drawn) == limit:
                raise KeyboardInterrupt
            drawn.extend(texts)
            return rollout(texts, keys)

        run.generator.rollout = counted
        return bench.gather(run, cfg, PROMPTS, {}, folder)

    with pytest.raises(KeyboardInterrupt):
        gather(limit=4)
    assert len(list(folder.glob("*.jpg"))) == 4
    first = gather()
    train(cfg, 0.4)
    second = gather()
    assert len(drawn) == 16 + 8 and first["base"] == second["base"]
    assert not {*first["generator"]} & {*second["generator"], *second["base"]}
    cfg.generator.num_steps = 2
    gather()
    assert len(drawn) == 24 + 16


def test_the_published_layout(tmp_path):
    """00000.jpg is of the first prompt; a prompt without a picture is named; JSON lines find theirs by its text."""
    folder = elsewhere(tmp_path / "published", 3)
    rows = bench.listing("photographs", folder, PROMPTS)
    assert [(row.file.name, row.text) for row in rows][2:] == [("00002.png", "a red cup")]
    with refuses("no picture for prompt 00003, 'a tree'"):
        bench.listing("krea", folder, PROMPTS)
    lines = tmp_path / "krea.jsonl"
    order = [2, 0, 2, 1, 3]
    rows = [json.dumps({"image": f"{i}.png", "prompt": PROMPTS[i]}) for i in order]
    lines.write_text("\n".join(rows))
    for name, units in (("krea", order), ("photographs", [0, 1, 2, 3, 4])):
        assert [row.unit for row in bench.listing(name, lines, PROMPTS)] == units


@pytest.mark.parametrize(
    "word,message",
    [
        ("bench.contestants.krea=nowhere", "nowhere"),
        (
            "bench.contestants.krea=PATH/many",
            "PATH/many, for 4 test prompts, cannot be loaded",
        ),
        ("bench.contestants.base=PATH/many", "expected other names than base"),
        ("bench.judge.kind=vlm", "expected"),
        ("bench.judge.kind=openai", "key"),
        ("rewards.heldout.smooth2=null", "bench.axes: smooth2"),
        ("bench.categories=PATH/one.txt", "PATH/one.txt, for 4 test prompts,"),
        ("bench.human=nowhere.csv", "nowhere.csv"),
        ("out=PATH/new", "PATH/new/generator"),
    ],
)
def test_bad_input_is_one_line_before_a_model_loads(
    finished, tmp_path, monkeypatch, word, message
):
    """ConfigError with what is wrong."""
    elsewhere(tmp_path / "many", 5)
    (tmp_path / "one.txt").write_text("animals\n")
    cfg = finished(word.replace("PATH", str(tmp_path)))
    monkeypatch.setattr(grpo, "Run", lambda *_, **__: pytest.fail("a model loads"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with refuses(message.replace("PATH", str(tmp_path))):
        bench.main(cfg)
