"""RealBench: did pictures become more real, and how sure is that?

    python bench.py config.yaml [key=value ...]             after python grpo.py config.yaml
    python bench.py config.yaml bench.human=votes.csv       votes that the voting page of bench.html saved
    python bench.py config.yaml bench.judge.kind=openai bench.judge.model=gpt-5 bench.pairs=64

Contestants: `base`, `refiner` (rewritten prompts, base generator), `generator` (plain prompts, trained
generator), `both`, the pictures of bench.contestants, and `photographs`; the same test prompts and noise for
all, Euler sampling. Every picture, a photograph too, becomes one JPEG of one size under <out>/bench/pictures,
named by what made it (LoRA, config, text, noise): nothing is drawn twice, no two models share a picture, and
detectors, judges and people see the same pixels. Detector-Scoring asks every reward and held-out measure.
Arena-Scoring asks a judge which of two pictures is better on each axis (realism, detail, aesthetics), in both
orders: an answer that changes with the order is a tie. A model's answers stand in
<out>/bench/judgements.jsonl, and only what is open is asked.

<out>/bench/<contestant>.jsonl lists the pictures. <out>/bench.json, in which v = {"mean", "low", "high"}, a
95% interval (null: of one unit), or null; a tie is half a win:

    pictures                                per own contestant
    axes.<axis>                             the metrics that speak for it
    scores.<contestant>.<metric>            v
    difference.<contestant>.<metric>        v, contestant - base, paired by prompt
    real.<contestant>.<detector>            v, share of pictures with P(real) > 0.5
    categories.<category>.<contestant>.<metric>   v
    arena.<axis>.<a>.<b>                    {"win", "tie", "loss", "errors", "rate", "low", "high"}, a over b
    rating.<axis>.<contestant>              v, Bradley-Terry; 400 points are odds of 10 to 1, the mean is 1000
    judge                                   {"name", "pairs", "answered", "unparsed", "failed", "calls",
                                             "position_bias", "order_changed"}
    human                                   {"votes", "compared", "tau", "rho", "agreement": v,
                                             "rating": {contestant: v}}
    selftest.<distortion>.<measure>         {"levels": [untouched, weak, middle, strong], "below", "ordered"}

Metrics: each training reward (`alignment` is against the user's prompt), each held-out one, `reward`
(training rewards by weight), `heldout` (mean of the held-out metrics of realism), and KID to the
photographs, lower is better: `kid`, and `kid_<name>` on the features of a held-out reward that has them.
position_bias: share of answers that name the first picture, 0.5 is none.

Intervals: pictures of one prompt are alike, so prompts are what is left out, one at a time (a jackknife,
with Student's t); for photographs, pictures. tests/test_bench.py shows by simulation that those of means,
differences, rates and KID cover; those of ratings were not simulated.
"""

import base64
import csv
import hashlib
import io
import json
import re
import sys
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations, cycle, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from scipy import stats
from tqdm import tqdm

import grpo
import reward as R
from common import ConfigError, batches, bounded, check_folder, few, loading, rng
from folder import peak_memory
from generator import Generator
from policy import on_device
from refiner import Refiner
from rewards.vlm import Endpoint, NoAnswer, Vlm

# contestants of the run itself, in the order of drawing
OWN = ["base", "refiner", "generator", "both"]
# how the kinds of rewards begin that give P(real)
P_REAL = ("classifier", "rewards/vlm", "rewards/omniaid", "rewards/probe")
# RealBench's, which a judge that reads is asked
AXES = ("realism", "detail", "aesthetics")
GIVE_UP = 10  # questions that fail in a row before a judge is given up

# ---------------------------------------------------------------- config


@dataclass
class JudgeConfig:
    """Who says which of two pictures is better; config.yaml gives units and reasons."""

    kind: Literal["detector", "vlm", "openai"] = "detector"
    model: str = ""
    base_url: str = "https://api.openai.com/v1"
    key: str = "OPENAI_API_KEY"  # the NAME of an environment variable
    concurrency: int = bounded("positive", 8)
    retries: int = bounded("natural", 3)
    timeout: float = bounded("positive", 60.0)


@dataclass
class BenchConfig:
    """What is drawn, compared and shown; config.yaml gives units and reasons."""

    images: int = bounded("positive", 6)
    contestants: dict[str, str] = field(default_factory=dict)
    categories: str = ""
    axes: dict[str, list[str]] = field(
        default_factory=dict
    )  # {axis: held-out measures}
    pairs: int = bounded("positive", 256)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    human: str = ""
    selftest: bool = False
    gallery: int = bounded("natural", 32)


@dataclass
class Config(grpo.Config):
    """grpo.py's, with the part that only the bench reads typed and bounded."""

    bench: BenchConfig = field(default_factory=BenchConfig)


class Picture(NamedTuple):
    """One picture; a contestant is a list of them."""

    unit: int  # what is left out: the number of its prompt; for a photograph, its own number
    file: Path
    text: str  # the user's prompt, or the caption

    @property
    def name(self):
        return self.file.stem


# ---------------------------------------------------------------- statistics


def interval(whole, *left_out):
    """A figure, and what it is without each unit (n,) -> v by the jackknife; None where there is no unit

    var = (n - 1) / n sum (left_out - mean)^2, Student's t with n - 1; no interval from one unit. For a mean
    of units this is the t interval. Two samples, as prompts and photographs are, add their variances.
    """
    v = {"mean": float(whole), "low": None, "high": None}
    units = min(map(len, left_out))
    if units > 1:
        variance = sum((len(values) - 1) * np.var(values) for values in left_out)
        spread = float(stats.t.ppf(0.975, units - 1) * np.sqrt(variance))
        v["low"] = v["mean"] - spread
        v["high"] = v["mean"] + spread
    return v if units else None


def mean_draws(pairs):
    """[(unit, value)], NaN a missing one -> the mean over units, each counts once, and without each, (n,)"""
    groups = defaultdict(list)
    for unit, value in pairs:
        if np.isfinite(value):
            groups[unit].append(value)
    means = np.array([np.mean(groups[unit]) for unit in sorted(groups)])  # (n,)
    n = len(means)
    return means.sum() / max(n, 1), (means.sum() - means) / max(n - 1, 1)


def mean_interval(pairs):
    """[(unit, value)] -> v of the mean over units; None if there are none"""
    return interval(*mean_draws(pairs))


def all_but_one(square):
    """(n, n) -> n masks (n,), each of which leaves one out"""
    return ~torch.eye(len(square), dtype=bool)


def kid_draws(kernels):
    """reward.mean_kernels -> KID, without each prompt (U,), without each photograph (n,)"""
    xx, xy, yy = kernels  # (U, U), (U, n), (n, n)
    prompts = [R.mmd(xx[rest][:, rest], xy[rest], yy) for rest in all_but_one(xx)]
    photographs = [
        R.mmd(xx, xy[:, rest], yy[rest][:, rest]) for rest in all_but_one(yy)
    ]
    return R.mmd(xx, xy, yy), np.array(prompts), np.array(photographs)


def bradley_terry(wins):
    """wins (..., n, n), how often i beat j, ties as half -> ratings (..., n), 400 log10 of odds; mean 1000

    Hunter's MM iteration (2004). One tie is added to each pair: who won or lost everything stays finite.
    """
    wins = wins + 0.5 * (1 - np.eye(wins.shape[-1]))
    games = wins + wins.mT
    strength = np.ones(wins.shape[:-1])  # (..., n)
    for _ in range(2000):  # a few dozen do, unless someone wins nearly everything
        both = strength[..., None] + strength[..., None, :]  # (..., n, n)
        strength = wins.sum(-1) / (games / both).sum(-1)
    ratings = 400 * np.log10(strength)
    return 1000 + ratings - ratings.mean(-1, keepdims=True)


# ---------------------------------------------------------------- contestants


def key(*parts):
    """24 hex digits that are equal where all parts are; what JSON does not know counts by its str()"""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]


def content(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path, data):
    """Bytes -> a file that is whole or not there, whenever a kill comes"""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def in_codec(picture):
    """PIL picture -> bytes of a file without metadata"""
    file = io.BytesIO()
    # one codec for every picture, so that none gives a side away; colour is not subsampled, which small
    # pictures show
    picture.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def load(run, name):
    """What is trained -> into the run's policy; the hash of its file"""
    policy = run.policies[name]
    trained = Path(run.cfg.out) / name
    policy.load(trained)
    return content(trained / policy.lora_file)


def rewrites(run, cfg, prompts, folder):
    """Another rewrite for each picture -> P*M texts, prompt-major

    They stay on disk: to write them again takes minutes with a real LLM, and rounding could change a word.
    """
    M = cfg.bench.images
    made_by = load(run, "refiner"), asdict(cfg.refiner), cfg.dtype, M
    path = folder / f"{key(made_by, prompts)}.json"
    if not path.exists():
        keys = [("bench rewrite", p) for p in range(len(prompts))]
        texts, _ = run.refiner.rollout(prompts, M, keys)
        write(path, json.dumps(texts).encode())
    return json.loads(path.read_text())


def fill(name, pictures, micro_batch, make):
    """make(rows) -> images (b,3,H,W) of those [Picture] that are not on disk, and <contestant>.jsonl of all

    So a killed bench goes on where it was. The list is for measures of your own, in the layout of
    bench.contestants.
    """
    todo = [i for i, picture in enumerate(pictures) if not picture.file.exists()]
    for rows in tqdm(list(batches(todo, micro_batch)), desc=name):
        for i, image in zip(rows, R.to_pil(make(rows))):
            write(pictures[i].file, in_codec(image))
    lines = []
    for picture in pictures:
        row = {"image": f"pictures/{picture.file.name}", "prompt": picture.text}
        lines.append(json.dumps(row))
    folder = pictures[0].file.parents[1]
    write(folder / f"{name}.jsonl", "\n".join(lines).encode())
    return pictures


def draw(run, cfg, name, weights, prompts, texts, folder):
    """texts P*M, prompt-major -> [Picture] of one contestant

    Picture m of prompt p starts from the same noise in every contestant, whatever the run's seed. weights:
    the LoRA's hash, "" for none.
    """
    made_by = weights, asdict(cfg.generator), cfg.dtype
    keys = []
    pictures = []
    for i, text in enumerate(texts):
        p, m = divmod(i, cfg.bench.images)
        keys.append(("bench", p, m))
        file = folder / f"{key(made_by, text, keys[i])}.jpg"
        pictures.append(Picture(p, file, prompts[p]))

    def make(rows):  # (b,3,H,W)
        images, _ = run.generator.rollout(
            [texts[i] for i in rows], [keys[i] for i in rows]
        )
        return images

    with run.generator.at_work():
        return fill(name, pictures, cfg.micro_batch, make)


def listing(name, path, prompts):
    """A folder of 00000.jpg ... by the prompt's line, or JSON lines {"image", "prompt"} -> [Picture]

    The captions of photographs may be their own; all others draw the test prompts, each of them.
    """
    path = Path(path)
    with loading(f"{path}, for {len(prompts)} test prompts,"):
        if path.is_dir():
            files = sorted(path.glob("[0-9]*"))
            rows = [(file, prompts[int(file.stem)]) for file in files]
        else:
            rows = R.read_list(path)
        if name == "photographs":
            return [Picture(i, *row) for i, row in enumerate(rows)]
        pictures = [Picture(prompts.index(text), file, text) for file, text in rows]
    found = {picture.unit for picture in pictures}
    for p, prompt in enumerate(prompts):
        if p not in found:
            raise ConfigError(
                f"{path}: no picture for prompt {p:05d}, {prompt!r}; expected one"
            )
    return pictures


def adopt(run, cfg, name, pictures, folder):
    """Pictures from elsewhere -> [Picture] in the common size and codec, resized and cropped

    With autoencode_photos photographs also pass through the generator's autoencoder, whose blur would tell.
    """
    shape = cfg.generator.height, cfg.generator.width
    encode = name == "photographs" and cfg.autoencode_photos
    made_by = shape, cfg.generator.model if encode else ""
    adopted = []
    for picture in pictures:
        file = folder / f"{key(made_by, content(picture.file), picture.text)}.jpg"
        adopted.append(picture._replace(file=file))

    def make(rows):  # (b,3,H,W)
        images = torch.stack([R.read_image(pictures[i].file, shape) for i in rows])
        return run.real(images) if encode else images

    return fill(name, adopted, cfg.micro_batch, make)


def gather(run, cfg, prompts, elsewhere, folder):
    """Every contestant, photographs last -> {name: [Picture]}

    The run's own draw with what is trained in <out>. elsewhere {name: [Picture]}: as `listing` found them.
    """
    plain = [prompt for prompt in prompts for _ in range(cfg.bench.images)]
    rewritten = rewrites(run, cfg, prompts, folder) if run.refiner else None
    weights = ""
    contestants = {}
    for name, texts in zip(OWN, [plain, rewritten, plain, rewritten]):
        if name == "generator":  # from here on with its LoRA
            weights = load(run, name)
        if texts:
            contestants[name] = draw(run, cfg, name, weights, prompts, texts, folder)
    for name, pictures in elsewhere.items():
        contestants[name] = adopt(run, cfg, name, pictures, folder)
    return contestants


# ---------------------------------------------------------------- Detector-Scoring


class Files(list):
    """[Picture]; a slice of it is images (b,3,H,W), read when they are asked for"""

    def __getitem__(self, rows):
        return torch.stack([R.read_image(x.file) for x in super().__getitem__(rows)])


def measure(run, rewards, pictures):
    """What each reward says of each picture -> {name: {metric: number}}, realism's mean among them"""
    # {metric: (n,)}
    scores = run.score(rewards, Files(pictures), [picture.text for picture in pictures])
    realism = [scores[metric] for metric in run.cfg.bench.axes.get("realism", [])]
    if realism:
        scores["heldout"] = torch.stack(realism).mean(0)
    rows = torch.stack([*scores.values()], 1).tolist()  # (n, metrics)
    return {
        picture.name: dict(zip(scores, row)) for picture, row in zip(pictures, rows)
    }


def score_draws(run, contestants, seen, categories):
    """-> {path in bench.json: draws} of scores, real, categories; seen {name: {metric: number}}

    Draws are a figure and what it is without each unit. A photograph has the category of the prompt that its
    caption is.
    """
    rewards = run.cfg.rewards.train | run.cfg.rewards.heldout
    detectors = [name for name in rewards if rewards[name].kind.startswith(P_REAL)]
    detectors.append("heldout")
    pairs = defaultdict(list)  # {path: [(unit, value)]}
    for name, pictures in contestants.items():
        for picture in pictures:
            unit = picture.unit
            for metric, value in seen[picture.name].items():
                pairs["scores", name, metric].append((unit, value))
                if metric in detectors:
                    pairs["real", name, metric].append((unit, value > 0.5))
                if picture.text in categories:
                    category = categories[picture.text]
                    pairs["categories", category, name, metric].append((unit, value))
    return {path: mean_draws(rows) for path, rows in pairs.items()}


@torch.no_grad()
def kid_scores(run, heldout, contestants):
    """-> {path in bench.json: draws} of each KID"""
    # the run has features, too: those of its KID model
    models = {"kid": run} | {f"kid_{name}": reward for name, reward in heldout.items()}
    draws = {}
    for metric, model in models.items():
        if hasattr(model, "features"):
            features = {}
            module = getattr(model, "model", None)
            # under offload it rests on the CPU
            with on_device(module, run.device) if module else nullcontext():
                for name, pictures in contestants.items():
                    chunks = batches(Files(pictures), run.cfg.micro_batch)
                    parts = [model.features(images).cpu() for images in chunks]
                    features[name] = torch.cat(parts)  # (n, D)
            photographs = features.pop("photographs")
            for name, x in features.items():
                units = torch.tensor([picture.unit for picture in contestants[name]])
                kernels = R.mean_kernels(x, photographs, units)
                draws["scores", name, metric] = kid_draws(kernels)
    return draws


def differences(draws):
    """Each contestant's scores less base's, draw by draw, so that what prompts differ by cancels"""
    result = {}
    for path, mine in draws.items():
        if path[0] == "scores" and path[1] != "photographs":
            base = draws["scores", "base", path[2]]
            result["difference", *path[1:]] = [a - b for a, b in zip(mine, base)]
    return result


def nest(draws):
    """{path: draws} -> {key: {key: ... v}}"""
    result = {}
    for path, parts in draws.items():
        node = result
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = interval(*parts)
    return result


# ---------------------------------------------------------------- the judge

# what RealBench's judges are told to look for, one question an axis; words of our own
PAIR = """You are shown two pictures. Compare them three times. realism: which one is more likely an \
unedited photograph? Look for what cameras do not do: anatomy and faces (hands, eyes, teeth, skin like \
wax), repetition (copied details, texture that repeats), lighting (shadows and reflections that \
disagree), edges (halos, outlines that melt into each other) and colour (casts, saturation no lens would \
give); beauty does not count. detail: which one has more true fine structure, such as skin, hair, leaves \
or cloth? Noise, blocks and patterns are not structure. aesthetics: which one pleases more, by light, \
colour and composition? The subject never counts. Reply with JSON only: {"realism": ..., "detail": ..., \
"aesthetics": ...}, each "first", "second" or "tie"."""
# what an answer is worth to the first picture
POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0}


def parse(reply):
    """A judge's reply -> {axis: answer}: the last one of each axis; what a model thinks aloud is left out

    Free text says nothing: "the first is not a real photograph" holds the word `first`.
    """
    text = reply.rpartition("</think>")[2].lower()
    axis = "|".join(AXES)
    answer = r"\W*(?:is\W+)?(?:the\W+)?(first|second|tie)\b"
    return dict(re.findall(rf"\b({axis}){answer}", text))


def connect(cfg, device):
    """The model that is asked. ConfigError where there is none, or no key for it."""
    judge = asdict(cfg.bench.judge)
    if judge.pop("kind") == "vlm":
        return Vlm(judge["model"], device, dtype=cfg.dtype)
    return Endpoint(**judge)


@dataclass
class Judge:
    """Says of two pictures, by name, which is better on each axis.

    answers {(name, name): {axis: answer}}. What is unparsed or failed is open: no loss for either side, and
    asked again by the next run. seen {name: scores}: all that the detector judge looks at; it is not logged.
    """

    cfg: Config
    folder: Path  # of the pictures
    seen: dict
    device: str

    def __post_init__(self):
        judge = self.cfg.bench.judge
        address = judge.base_url if judge.kind == "openai" else ""
        self.name = f"{judge.kind} {judge.model} {address}".strip()
        # another wording shares no answer with this one
        self.made_by = [self.name, key(PAIR)]
        self.model = None
        self.calls = Counter()
        self.failed_in_a_row = 0
        self.axes = AXES
        if judge.kind == "detector":
            self.axes = [
                axis for axis, metrics in self.cfg.bench.axes.items() if metrics
            ]
        self.log = self.folder.parent / "judgements.jsonl"
        self.log.touch()
        # without the half line that a kill may leave
        lines, end, _ = self.log.read_bytes().rpartition(b"\n")
        write(self.log, lines + end)
        self.answers = {}
        for row in map(json.loads, lines.splitlines()):
            if row["made_by"] == self.made_by and row["answers"]:
                self.answers[tuple(row["pictures"])] = row["answers"]

    def ask(self, pairs):
        """Puts those that have no answer yet"""
        todo = [pair for pair in dict.fromkeys(pairs) if pair not in self.answers]
        if self.cfg.bench.judge.kind == "detector":
            self.answers |= {pair: self.compare(*pair) for pair in todo}
        elif todo:
            self.model = self.model or connect(self.cfg, self.device)  # once
            # an Endpoint has a map of its own, which asks several at a time
            asked = getattr(self.model, "map", map)(self.put, tqdm(todo, desc="judge"))
            self.answers |= {
                pair: answers for pair, answers in zip(todo, asked) if answers
            }

    def compare(self, x, y):
        """The detector judge takes the mean of the measures that speak for an axis

        A tie only where two are equal, as different files hardly are.
        """
        answers = {}
        for axis in self.axes:
            metrics = self.cfg.bench.axes[axis]
            ahead = sum(
                self.seen[x][metric] - self.seen[y][metric] for metric in metrics
            )
            answers[axis] = {1: "first", 0: "tie", -1: "second"}[np.sign(ahead)]
        return answers

    def put(self, pair):
        """One question to the model -> its answers, which are also logged"""
        row = {"made_by": self.made_by, "pictures": pair, "answers": {}}
        try:
            pictures = [Image.open(self.folder / f"{name}.jpg") for name in pair]
            row["reply"] = self.model.reply(pictures, PAIR)[:1000]
            row["answers"] = parse(row["reply"])
            self.calls["answered" if row["answers"] else "unparsed"] += 1
            self.failed_in_a_row = 0
        except NoAnswer as failure:
            row["error"] = str(failure)
            self.calls["failed"] += 1
            # 400 may be about these pictures alone, unless it was never otherwise
            if "HTTP 400" not in row["error"] or not self.calls["answered"]:
                self.failed_in_a_row += 1
            if self.failed_in_a_row >= GIVE_UP:
                raise ConfigError(
                    f"bench.judge: {failure}, {GIVE_UP} times; expected answers, run again to go on"
                ) from failure
        # a line fits into one write, so those of several threads cannot mix
        with open(self.log, "a") as log:
            log.write(json.dumps(row) + "\n")
        return row["answers"]

    def points(self, axis, x, y):
        """What the answer to (x, y) is worth to x; NaN where there is none"""
        return POINTS.get(self.answers.get((x, y), {}).get(axis), np.nan)

    def summary(self, pairs):
        """How far the judge may be believed, and what it cost"""
        told = []  # each answer and that to the other order, in points of the picture shown first
        for (x, y), answers in self.answers.items():
            for axis in answers:
                told.append((self.points(axis, x, y), self.points(axis, y, x)))
        first = [here for here, _ in told if here != 0.5]
        changed = [here == there != 0.5 for here, there in told]
        return {
            "name": self.name,
            "pairs": pairs,
            "answered": len(self.answers),
            "unparsed": self.calls["unparsed"],
            "failed": self.calls["failed"],
            "calls": self.calls.total(),
            "position_bias": float(np.mean(first)) if first else None,
            "order_changed": float(np.mean(changed)) if changed else None,
        }


# ---------------------------------------------------------------- Arena-Scoring


def deal(photographs, prompts):
    """Every photograph to one prompt, evenly: to that whose words its caption shares most, while it has room

    -> per prompt its Pictures. So every photograph meets someone, and a prompt that is left out takes its
    photographs along: none counts twice.
    """

    def words(text):
        return set(re.findall(r"\w+", text.lower()))

    room = -(-len(photographs) // len(prompts))
    dealt = [[] for _ in prompts]
    for i in rng("bench deal").permutation(len(photographs)).tolist():
        mine = words(photographs[i].text)
        rank = []
        for prompt, has in zip(prompts, dealt):
            theirs = words(prompt)
            near = len(mine & theirs) / max(len(mine | theirs), 1)
            rank.append((len(has) < room, near, -len(has)))
        dealt[rank.index(max(rank))].append(photographs[i])
    return dealt


def by_prompt(contestants, prompts):
    """{contestant: [Picture]} -> {contestant: per prompt its Pictures}"""
    result = {}
    for name, pictures in contestants.items():
        units = range(len(prompts))
        result[name] = [
            [picture for picture in pictures if picture.unit == p] for p in units
        ]
    result["photographs"] = deal(contestants["photographs"], prompts)
    return result


def matches(pictures, limit):
    """{contestant: per prompt its Pictures} -> [(a, b, prompt, picture of a, picture of b)] for all pairs

    Picture m meets picture m, drawn from the same noise; where there are more photographs than pictures, each
    contestant begins with the next ones. At most `limit` a pair of contestants, and each prompt has its turn
    before any has a second one.
    """
    result = []
    for a, b in combinations(pictures, 2):
        turn = list(pictures).index(a) if b == "photographs" else 0
        rounds = defaultdict(list)
        for p in rng("bench matches").permutation(len(pictures[a])).tolist():
            mine = pictures[a][p]
            theirs = islice(cycle(pictures[b][p]), turn * len(mine), None)
            for m, (x, y) in enumerate(zip(mine, theirs)):
                rounds[m].append((a, b, p, x.name, y.name))
        result += sum(rounds.values(), [])[:limit]
    return result


def from_both_sides(rows):
    """[(a, b, prompt, won by a)] -> {(a, b): [(prompt, won by a)]}, and the same seen from b"""
    results = defaultdict(list)
    for a, b, p, won in rows:
        results[a, b].append((p, won))
        results[b, a].append((p, 1 - won))
    return results


def hold(judge, rows):
    """Ask every match in both orders -> {axis: results from both sides}

    won: 1, 1/2 or 0; NaN where one of the two answers is missing.
    """
    judge.ask([pair for *_, x, y in rows for pair in ((x, y), (y, x))])
    results = {}
    for axis in judge.axes:
        won = []
        for a, b, p, x, y in rows:
            # the median makes a tie of what is not said both times
            both = judge.points(axis, x, y), 0.5, 1 - judge.points(axis, y, x)
            won.append((a, b, p, float(np.median(both))))
        results[axis] = from_both_sides(won)
    return results


def rating(results, names):
    """Of the matches among `names` -> {contestant: v}"""
    n = len(names)
    wins = defaultdict(lambda: np.zeros((n, n)))  # of each prompt
    for (a, b), rows in results.items():
        if a in names and b in names:
            for p, won in rows:
                wins[p][names.index(a), names.index(b)] += np.nan_to_num(won)
    wins = np.array([*wins.values()])  # (units, n, n)
    whole = bradley_terry(wins.sum(0))
    left_out = bradley_terry(wins.sum(0) - wins)
    return {name: interval(whole[i], left_out[:, i]) for i, name in enumerate(names)}


def means(figures):
    """{name: v} -> [mean]"""
    return [v["mean"] for v in figures.values()]


def arena(results):
    """-> {a: {b: counts, rate and its interval}}"""
    table = defaultdict(dict)
    for (a, b), rows in results.items():
        won = Counter(v for _, v in rows)
        counts = {"win": won[1], "tie": won[0.5], "loss": won[0]}
        counts["errors"] = len(rows) - sum(counts.values())
        v = mean_interval(rows)
        if v:
            table[a][b] = counts | {"rate": v.pop("mean")} | v
    return table


# ---------------------------------------------------------------- people


def read_votes(path, names, prompts):
    """CSV (prompt, left, right, vote: left, right or tie) -> results of one axis, as `hold` has them

    What is no prompt, contestant or vote is a ConfigError that names it.
    """
    votes = []
    with loading(path), open(path, newline="") as file:
        for row in csv.DictReader(file):
            # index: a ValueError says which name is none
            left, right = (names[names.index(row[side])] for side in ("left", "right"))
            won = {"left": 1.0, "tie": 0.5, "right": 0.0}[row["vote"]]
            votes.append((left, right, prompts.index(row["prompt"]), won))
    return from_both_sides(votes)


def compare_people(votes, results):
    """Do people and the arena rank alike, do they agree on the same pair of pictures? -> human of bench.json

    tau, rho: of the ratings. Agreement: 1 the same answer, 1/2 if just one of the two is a tie, 0 opposite;
    only where there is a judgement.
    """
    names = list(dict.fromkeys(name for name, _ in votes))
    rated = rating(votes, names)
    people = means(rated)
    judges = means(rating(results, names))
    agreed = []
    for pair, rows in votes.items():
        # of each prompt the match that the page shows
        first = dict(reversed(results.get(pair, [])))
        agreed += [(p, 1 - abs(won - first.get(p, np.nan))) for p, won in rows]
    return {
        "votes": len(agreed) // 2,  # each stands there from both sides
        "compared": int(np.isfinite([v for _, v in agreed]).sum()) // 2,
        # 0 where a side has no order at all, which scipy calls NaN
        "tau": float(np.nan_to_num(stats.kendalltau(people, judges).statistic)),
        "rho": float(np.nan_to_num(stats.spearmanr(people, judges).statistic)),
        "agreement": mean_interval(agreed),
        "rating": rated,
    }


# ---------------------------------------------------------------- selftest


def as_picture(pixels):
    """Any numbers (H,W,3) -> PIL picture"""
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def add_noise(picture, std):
    pixels = np.asarray(picture)  # (H,W,3)
    # another noise for each picture: one for all may look more or less like a photograph's
    noise = rng("bench noise", int(pixels.sum())).standard_normal(pixels.shape)
    return as_picture(pixels + 255 * std * noise)


def weave(picture, strength):
    """A grid at the period of a decoder's patches, 8 pixels"""
    y, x = np.cos(np.pi * np.indices(picture.size[::-1]) / 4)  # (H,W) each
    return as_picture(np.asarray(picture) + 255 * strength * (y + x)[..., None])


def repeat(picture, share):
    """The middle of the picture, an eighth of it wide, copied over a share of it from the left"""
    edge = picture.width // 8
    y, x = np.indices(picture.size[::-1])  # (H,W) each
    pixels = np.asarray(picture)  # (H,W,3)
    tiles = pixels[3 * edge + y % edge, 3 * edge + x % edge]  # (H,W,3)
    return as_picture(np.where(x[..., None] < share * picture.width, tiles, pixels))


def cast(picture, strength):
    """Red up, blue down"""
    return as_picture(np.asarray(picture) * [1 + strength, 1, 1 - strength])


# PIL picture, strength -> PIL picture; weak, middle, strong. The median of `smooth` melts texture and leaves
# edges, as on retouched skin.
DISTORTIONS = {
    "blur": (
        lambda x, sigma: x.filter(ImageFilter.GaussianBlur(sigma)),
        (0.6, 1.0, 2.0),
    ),
    "noise": (add_noise, (0.04, 0.08, 0.16)),
    "jpeg": (
        lambda x, quality: Image.open(io.BytesIO(R.encode(x, quality))),
        (40, 20, 10),
    ),
    "smooth": (lambda x, pixels: x.filter(ImageFilter.MedianFilter(pixels)), (3, 5, 7)),
    "saturate": (
        lambda x, factor: ImageEnhance.Color(x).enhance(factor),
        (1.4, 2.0, 3.0),
    ),
    "weave": (weave, (0.02, 0.04, 0.08)),
    "repeat": (repeat, (0.25, 0.5, 1.0)),
    "cast": (cast, (0.1, 0.2, 0.4)),
}


def spoil(picture, distortion, strength):
    """-> the Picture of a spoiled file"""
    file = picture.file.with_stem(key(picture.name, distortion, strength))
    if not file.exists():
        distort, _ = DISTORTIONS[distortion]
        write(file, in_codec(distort(Image.open(picture.file), strength)))
    return picture._replace(file=file)


def ordered(levels):
    """A measure's four levels, from untouched to strong, which should fall -> a row of `selftest`"""
    return {
        "levels": levels,
        "below": max(levels[1:]) < levels[0],
        "ordered": levels == sorted(set(levels), reverse=True),
    }


def selftest(run, judge, heldout, photographs):
    """Spoiled photographs must rank below untouched ones, more spoiled below less -> selftest of bench.json

    A measure that does not see this is no measure. Of each metric the mean, of the arena the ratings of the
    four levels.
    """
    photographs = photographs[: run.cfg.bench.pairs]
    result = defaultdict(dict)
    for distortion, (_, strengths) in tqdm(DISTORTIONS.items(), desc="selftest"):
        levels = [photographs]
        for strength in strengths:
            levels.append([spoil(x, distortion, strength) for x in photographs])
        judge.seen |= measure(run, heldout, sum(levels[1:], []))
        for metric in sum(run.cfg.bench.axes.values(), []):
            scores = [
                [judge.seen[picture.name][metric] for picture in level]
                for level in levels
            ]
            result[distortion][metric] = ordered(np.mean(scores, 1).tolist())
        pictures = {
            i: [[picture] for picture in level] for i, level in enumerate(levels)
        }
        rows = matches(pictures, len(photographs))
        for axis, results in hold(judge, rows).items():
            ratings = rating(results, list(pictures))
            result[distortion][f"arena {axis}"] = ordered(means(ratings))
    return result


# ---------------------------------------------------------------- report

# the page sorts, shows and asks; the Markdown is for terminals and for pull requests


def leaves(node, path=()):
    """Nested mappings -> (path, value); a value is v, a number, a word or a list"""
    if isinstance(node, dict) and "low" not in node:
        for name in node:
            yield from leaves(node[name], (*path, name))
    else:
        yield path, node


def cell(value):
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, dict):
        text = f"{value.get('mean', value.get('rate')):.4g}"
        if value["low"] is not None:
            text += f" [{value['low']:.4g}, {value['high']:.4g}]"
        return text
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(result):
    """bench.json -> bench.md: a value's last two keys are a table's row and column, those before its title"""
    tables = defaultdict(lambda: defaultdict(dict))
    for path, value in leaves(result):
        tables[path[:-2] or path[:1]][path[-2:-1]][path[-1]] = cell(value)
    lines = []
    for title, rows in tables.items():
        columns = list(dict.fromkeys(chain(*rows.values())))
        lines += ["", f"## {', '.join(title)}", ""]
        lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            cells = [row.get(column, "") for column in columns]
            lines.append(f"| {' '.join(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gallery(cfg, pictures, prompts, seen):
    """What bench.html shows of some prompts: first pictures as data URLs, 512 pixels at most, and scores"""
    result = []
    for p, prompt in enumerate(prompts[: cfg.bench.gallery]):
        row = {}
        for name in pictures:
            for picture in pictures[name][p][:1]:
                small = Image.open(picture.file)
                small.thumbnail((512, 512))
                url = f"data:image/jpeg;base64,{base64.b64encode(in_codec(small)).decode()}"
                scores = {
                    metric: round(value, 3)
                    for metric, value in seen[picture.name].items()
                }
                row[name] = {"url": url, "scores": scores}
        result.append({"prompt": prompt, "pictures": row})
    return result


def report(cfg, result, shown):
    """bench.json, bench.md and bench.html"""
    out = Path(cfg.out)
    page = Path(__file__).with_name("bench.html").read_text()
    data = json.dumps({"result": result, "gallery": shown}, allow_nan=False)
    # <!--<script> in a prompt would swallow the page
    data = data.replace("<", r"\u003c")
    write(out / "bench.json", json.dumps(result, indent=1).encode())
    write(out / "bench.md", markdown(result).encode())
    write(out / "bench.html", page.replace("DATA", data, 1).encode())


# ---------------------------------------------------------------- main


def check(cfg, prompts):
    """What can be told before a model loads -> {name: [Picture]} from elsewhere, {prompt: category}, votes"""
    b = cfg.bench
    check_folder(f"{cfg.out}/generator", Generator.lora_file)
    if cfg.refiner:
        check_folder(f"{cfg.out}/refiner", Refiner.lora_file)
    names = [*OWN, "photographs", *b.contestants]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"bench.contestants: {few(b.contestants)}; expected other names than {few(names[:5], 5)}"
        )
    measures = sum(b.axes.values(), [])
    for metric in measures:
        if metric not in cfg.rewards.heldout:
            raise ConfigError(
                f"bench.axes: {metric}; expected rewards.heldout's: {few(cfg.rewards.heldout, 9)}"
            )
    if b.judge.kind == "detector" and not measures:
        raise ConfigError(
            "bench.judge.kind: detector, but bench.axes is empty; expected vlm or openai"
        )
    if b.judge.kind == "vlm":
        check_folder(b.judge.model, "config.json")
    if b.judge.kind == "openai":
        connect(cfg, None)
    paths = b.contestants | {"photographs": cfg.test_photos}
    elsewhere = {name: listing(name, path, prompts) for name, path in paths.items()}
    if min(len(prompts), len(elsewhere["photographs"])) < 4:
        raise ConfigError(
            f"{cfg.test_prompts}, {cfg.test_photos}: expected 4 or more prompts and photographs"
        )
    categories = {}
    if b.categories:
        with loading(f"{b.categories}, for {len(prompts)} test prompts,"):
            named = grpo.read_prompts(b.categories)
            categories = dict(zip(prompts, named, strict=True))
    return elsewhere, categories, read_votes(b.human, names, prompts) if b.human else {}


def main(cfg):
    start = time.perf_counter()
    b = cfg.bench
    prompts = grpo.read_prompts(cfg.test_prompts)
    elsewhere, categories, votes = check(cfg, prompts)
    folder = Path(cfg.out) / "bench/pictures"
    folder.mkdir(parents=True, exist_ok=True)
    run = grpo.Run(cfg, train=False)
    heldout = R.load_rewards(cfg.rewards.heldout, "cpu" if cfg.offload else run.device)
    contestants = gather(run, cfg, prompts, elsewhere, folder)
    seen = measure(run, run.rewards | heldout, sum(contestants.values(), []))
    for scores in seen.values():
        scores["reward"] = run.combine(scores)

    draws = score_draws(run, contestants, seen, categories)
    draws |= kid_scores(run, heldout, contestants)
    result = {"pictures": len(prompts) * b.images, "axes": b.axes}
    result |= nest(draws | differences(draws))

    judge = Judge(cfg, folder, seen, run.device)
    pictures = by_prompt(contestants, prompts)
    rows = matches(pictures, b.pairs)
    results = hold(judge, rows)
    result["arena"] = {axis: arena(won) for axis, won in results.items()}
    names = list(contestants)
    result["rating"] = {axis: rating(won, names) for axis, won in results.items()}
    if votes:
        result["human"] = compare_people(votes, results[judge.axes[0]])
    if b.selftest:
        result["selftest"] = selftest(run, judge, heldout, contestants["photographs"])
    result["judge"] = judge.summary(len(rows))
    report(cfg, result, gallery(cfg, pictures, prompts, seen))
    print(markdown(result))
    seconds = time.perf_counter() - start
    peak = f"Peak memory {peak_memory():.1f} GiB"
    print(f"{seconds:.0f} seconds. {peak}. Wrote {cfg.out}/bench.*")


if __name__ == "__main__":
    grpo.cli(lambda: main(grpo.load_config(sys.argv[1:], Config)))
