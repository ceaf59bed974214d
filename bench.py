"""RealBench: did pictures become more real, and how sure is that?

    python bench.py config.yaml [key=value ...]             after python grpo.py config.yaml
    python bench.py config.yaml bench.human=votes.csv       votes that the voting page of bench.html saved
    python bench.py config.yaml bench.judge.kind=openai bench.judge.model=gpt-5 bench.pairs=64

Contestants: `base`, `refiner` (rewritten prompts, base generator), `generator` (plain prompts,
trained generator), `both`, the pictures of bench.contestants, and `photographs`; the same test
prompts and noise for all, Euler sampling. Every picture, a photograph too, becomes one JPEG of
one size under <out>/bench/pictures, named by what made it (LoRA, config, text, noise): nothing
is drawn twice, no two models share a picture, and detectors, judges and people see the same
pixels. Detector-Scoring asks every reward and held-out detector. Arena-Scoring asks a judge
which of two pictures is more real, in both orders: an answer that changes with the order is a
tie. A model's answers stand in <out>/bench/judgements.jsonl, and only what is open is asked.

<out>/bench.json; v = {"mean", "low", "high"}, a 95% interval, or null; a tie is half a win:

    pictures                                per own contestant
    missing.<contestant>                    names of pictures that are not there or cannot be read
    scores.<contestant>.<metric>            v
    difference.<contestant>.<metric>        v, contestant - base, paired by prompt
    real.<contestant>.<detector|judge>      v, share judged real: P(real) > 0.5, or the judge on one picture
    categories.<category>.<contestant>.<metric>   v
    arena.<a>.<b>                           {"win", "tie", "loss", "errors", "rate", "low", "high"}, a over b
    rating.<contestant>                     v, Bradley-Terry; 400 points are odds of 10 to 1, the mean is 1000
    judge                                   {"name", "pairs", "answered", "unparsed", "failed", "calls",
                                             "calls_total", "position_bias", "order_changed"}
    human                                   {"votes", "compared", "tau": v, "rho": v, "agreement": v,
                                             "rating": {contestant: v}}
    selftest.<distortion>.<measure>         {"levels": [untouched, weak, middle, strong], "tau": v,
                                             "below", "ordered"}

Metrics: each training reward (`alignment` is against the user's prompt), each held-out
detector, `reward` (training rewards by weight), `heldout` (mean of the held-out detectors),
`kid` (to the photographs, lower is better). calls: questions put to a model, without what its
client tries again. position_bias: share of answers that name the first picture, 0.5 is none.
Intervals: prompts are resampled, not pictures, because pictures of one prompt are alike; for
photographs, pictures. KID is no mean, so its interval comes from random halves: a half drawn
without replacement varies around the whole as the whole varies around the truth.
"""

import base64
import csv
import hashlib
import io
import json
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from scipy import stats
from tqdm import tqdm

import grpo
import reward as R
from common import ConfigError, bounded, check_folder, few, loading, rng
from folder import peak_memory
from rewards.vlm import Endpoint, NoAnswer, Vlm

# contestants of the run itself, in the order of drawing
OWN = ["base", "refiner", "generator", "both"]
# what is trained lies in <out>/ under these names, as stock diffusers and peft save it
LORA = {
    "generator": "pytorch_lora_weights.safetensors",
    "refiner": "adapter_model.safetensors",
}
# of every picture, so that no codec gives a side away; colour is not subsampled, which small pictures show
CODEC = dict(format="JPEG", quality=95, subsampling=0)
P_REAL = ("classifier", "rewards/")  # how the kinds of rewards begin that give P(real)
GIVE_UP = 10  # questions that fail in a row before a judge is given up


# ---------------------------------------------------------------- config


@dataclass
class JudgeConfig:
    """Who says which of two pictures is more real; config.yaml gives units and reasons."""

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

    images: int = bounded("positive", 8)
    resamples: int = bounded("positive", 1000)
    contestants: dict[str, str] = field(default_factory=dict)
    categories: str = ""
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

    unit: int  # what is resampled: the number of its prompt; for a photograph, its own number
    file: Path
    text: str  # the user's prompt, or the caption

    @property
    def name(self):
        return self.file.stem


# ---------------------------------------------------------------- statistics


def interval(draws):
    """(1 + R,), a figure and what it is in each of R resamples -> v, the 95% percentile
    interval of the R

    NaN is a resample in which the figure does not exist.
    """
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return {"mean": float(draws[0]), "low": float(low), "high": float(high)}


@cache
def resample(units, resamples):
    """How often each resample draws each unit, (1 + R, units); row 0 is the data itself

    Counted noise: all contestants and metrics get the same resamples, so that their differences
    are paired.
    """
    drawn = rng("bench resample", units).multinomial(
        units, np.full(units, 1 / units), resamples
    )
    return np.concatenate([np.ones((1, units)), drawn])


def unit_means(pairs):
    """[(unit, value)] -> {unit: mean}; NaN is a missing value"""
    groups = defaultdict(list)
    for unit, value in pairs:
        if np.isfinite(value):
            groups[unit].append(value)
    return {unit: float(np.mean(values)) for unit, values in groups.items()}


def bootstrap(pairs, resamples):
    """[(unit, value)] -> v of the mean over units, each of which counts once; None if there
    are none
    """
    means = list(unit_means(pairs).values())
    if not means:
        return None
    return interval(resample(len(means), resamples) @ means / len(means))


def kid_interval(mine, base, photos, features, resamples):
    """KID to the photographs, and its difference to base's -> two v

    mine, base, photos: [Picture]. features {name: (D,)}, what KID compares. Prompts and
    photographs are halved.
    """

    def pick(pictures, units):
        rows = [features[picture.name] for picture in pictures if picture.unit in units]
        return torch.stack(rows)  # (n, D)

    def kids(prompts, numbers):
        real = pick(photos, numbers)
        one = R.kid(pick(mine, prompts), real)
        return one, one - R.kid(pick(base, prompts), real)

    # the prompts that mine has pictures of; base's of the others do not count here
    sides = [
        sorted({picture.unit for picture in pictures}) for pictures in (mine, photos)
    ]
    draws = [kids(*sides)]
    noise = rng("bench halves")
    for _ in range(min(resamples, 200)):
        halves = [set(noise.permutation(units)[: len(units) // 2]) for units in sides]
        draws.append(kids(*halves))
    draws = np.array(draws)  # (1 + R, 2)
    draws[1:] += draws[0] - draws[1:].mean(0)  # the spread of halves, around the whole
    return [interval(column) for column in draws.T]


def bradley_terry(wins):
    """wins (..., n, n), how often i beat j, ties as half -> ratings (..., n), 400 log10 of the
    odds; mean 1000

    Hunter's MM iteration (2004). One tie is added to each pair: who won or lost everything
    stays finite.
    """
    wins = wins + 0.5 * (1 - np.eye(wins.shape[-1]))
    games = wins + wins.swapaxes(-1, -2)
    strength = np.ones(wins.shape[:-1])  # (..., n)
    for _ in range(2000):  # a few dozen do, unless someone wins nearly everything
        both = strength[..., :, None] + strength[..., None, :]  # (..., n, n)
        strength = wins.sum(-1) / (games / both).sum(-1)
    ratings = 400 * np.log10(strength)
    return 1000 + ratings - ratings.mean(-1, keepdims=True)


def rank_correlation(statistic, one, two):
    """stats.kendalltau (tau-b) or spearmanr, row by row of two (1 + R, n) -> v

    0 where a side has no order at all: all ratings equal, which scipy calls NaN.
    """
    return interval(
        np.nan_to_num([statistic(x, y).statistic for x, y in zip(one, two)])
    )


# ---------------------------------------------------------------- contestants


def key(*parts):
    """24 hex digits that are equal where all parts are. What JSON does not know counts by
    its str().
    """
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
    picture.save(file, **CODEC)
    return file.getvalue()


def rewrites(run, cfg, prompts, folder):
    """Another rewrite for each picture -> P*M texts, prompt-major

    They stay on disk: to write them again takes minutes with a real LLM, and rounding could
    change a word.
    """
    adapter = Path(cfg.out) / "refiner"
    run.refiner.load(adapter)
    M = cfg.bench.images
    made_by = content(adapter / LORA["refiner"]), asdict(cfg.refiner), cfg.dtype, M
    path = folder / f"{key(made_by, prompts)}.json"
    if not path.exists():
        keys = [("bench rewrite", p) for p in range(len(prompts))]
        texts, _ = run.refiner.rollout(prompts, M, keys)
        write(path, json.dumps(texts).encode())
    return json.loads(path.read_text())


def draw(run, cfg, weights, prompts, texts, folder):
    """texts P*M, prompt-major -> [Picture] of one contestant

    Picture m of prompt p starts from the same noise in every contestant, whatever the run's
    seed. Only what is not on disk is drawn, so a killed bench goes on where it was. weights:
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
    todo = [i for i, picture in enumerate(pictures) if not picture.file.exists()]
    for start in tqdm(range(0, len(todo), cfg.micro_batch), desc="draw"):
        rows = todo[start : start + cfg.micro_batch]
        # images (b,3,H,W)
        images, _ = run.generator.rollout(
            [texts[i] for i in rows], [keys[i] for i in rows]
        )
        for i, drawn in zip(rows, R.to_pil(images)):
            write(pictures[i].file, in_codec(drawn))
    return pictures


def listing(name, path, prompts):
    """A folder of 00000.jpg ... by the prompt's line, or JSON lines {"image", "prompt"} ->
    [Picture]

    A contestant draws the test prompts, all of them; the captions of photographs may be their
    own. A file that is not there is listed too, by the number of its prompt: `adopt` will name
    it.
    """
    path = Path(path)
    with loading(f"{path}, for {len(prompts)} test prompts,"):
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.stem.isdigit()]
            rows = [(file, prompts[int(file.stem)]) for file in files]
        else:
            rows = R.read_list(path)
        if path.is_dir() or name != "photographs":
            there = {text for _, text in rows}
            gaps = [p for p, text in enumerate(prompts) if text not in there]
            rows += [(path / f"{p:05d}.jpg", prompts[p]) for p in gaps]
        if name == "photographs":
            return [Picture(i, *row) for i, row in enumerate(rows)]
        return [Picture(prompts.index(text), file, text) for file, text in rows]


def adopt(run, cfg, name, pictures, folder):
    """Pictures from elsewhere -> [Picture] in the common size and codec, names of the missing

    They are resized and cropped. With autoencode_photos photographs also pass through the
    generator's autoencoder, whose blur would tell them apart.
    """
    shape = cfg.generator.height, cfg.generator.width
    through = (
        cfg.generator.model if name == "photographs" and cfg.autoencode_photos else ""
    )
    adopted = []
    missing = []
    for picture in tqdm(pictures, desc=f"read {name}"):
        try:
            image = R.read_image(picture.file, shape)[None]  # (1,3,H,W)
        except ConfigError:
            missing.append(picture.file.name)
            continue
        file = (
            folder / f"{key(content(picture.file), picture.text, shape, through)}.jpg"
        )
        if not file.exists():
            write(file, in_codec(R.to_pil(run.real(image) if through else image)[0]))
        adopted.append(picture._replace(file=file))
    units = {picture.unit for picture in adopted}
    if len(units) < 4:
        raise ConfigError(
            f"{name}: pictures of {len(units)} prompts can be read; expected 4 or more"
        )
    return adopted, missing


def gather(run, cfg, prompts, elsewhere, folder):
    """Every contestant, photographs last -> {name: [Picture]}, {name: names of missing
    pictures}

    The run's own draw with what is trained in <out>. elsewhere {name: [Picture]}: as `listing`
    found them.
    """
    plain = [prompt for prompt in prompts for _ in range(cfg.bench.images)]
    rewritten = rewrites(run, cfg, prompts, folder) if run.refiner else None
    weights = ""
    contestants = {}
    for name, texts in zip(OWN, [plain, rewritten, plain, rewritten]):
        if name == "generator":  # from here on with its LoRA
            run.generator.load(Path(cfg.out) / name)
            weights = content(Path(cfg.out) / name / LORA[name])
        if texts:
            contestants[name] = draw(run, cfg, weights, prompts, texts, folder)
    missing = {}
    for name, pictures in elsewhere.items():
        contestants[name], gone = adopt(run, cfg, name, pictures, folder)
        if gone:
            missing[name] = gone
    return contestants, missing


# ---------------------------------------------------------------- Detector-Scoring


def over(run, cfg, pictures, function):
    """function(images (b,3,H,W), texts) -> b rows, over all [Picture], a micro-batch at a
    time -> {name: row}
    """
    rows = {}
    for start in range(0, len(pictures), cfg.micro_batch):
        chunk = pictures[start : start + cfg.micro_batch]
        images = torch.stack([R.read_image(picture.file) for picture in chunk]).to(
            run.device
        )
        texts = [picture.text for picture in chunk]
        rows |= zip([picture.name for picture in chunk], function(images, texts))
    return rows


def measure(run, cfg, rewards, pictures):
    """What each reward says of each picture, and `heldout` -> {name: {metric: number}}

    With `offload` a reward visits the GPU once, not once a micro-batch.
    """
    seen = {picture.name: {} for picture in pictures}
    for metric, reward in rewards.items():

        def rows(images, texts):
            return R.score({metric: reward}, images, texts, cfg.micro_batch)[metric].tolist()  # b

        with R.visiting(reward, run.device if cfg.offload else None):
            for name, value in over(run, cfg, pictures, rows).items():
                seen[name][metric] = value
    for scores in seen.values():
        if cfg.rewards.heldout:
            scores["heldout"] = float(np.mean([scores[name] for name in cfg.rewards.heldout]))
    return seen


def figures_of(cfg, contestants, seen, categories):
    """-> {path in bench.json: [(unit, value)]} of scores, difference, real, categories; seen
    {name: scores}

    A photograph has the category of the prompt that its caption is.
    """
    rewards = cfg.rewards.train | cfg.rewards.heldout
    detectors = [name for name in rewards if rewards[name].kind.startswith(P_REAL)] + [
        "heldout"
    ]
    figures = defaultdict(list)
    for name, pictures in contestants.items():
        for picture in pictures:
            for metric, value in seen[picture.name].items():
                figures["scores", name, metric].append((picture.unit, value))
                if metric in detectors:
                    figures["real", name, metric].append((picture.unit, value > 0.5))
                if picture.text in categories:
                    path = "categories", categories[picture.text], name, metric
                    figures[path].append((picture.unit, value))
    for kind, name, metric, *_ in list(figures):
        if kind != "scores" or name == "photographs":
            continue
        # a picture less base's mean for its prompt, so that what prompts differ by cancels
        base = unit_means(figures["scores", "base", metric])
        change = [
            (unit, value - base[unit])
            for unit, value in figures["scores", name, metric]
        ]
        figures["difference", name, metric] = change
    return figures


def nest(figures, resamples):
    """{path: [(unit, value)]} -> {key: {key: ... v}}"""
    result = {}
    for path, pairs in figures.items():
        node = result
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = bootstrap(pairs, resamples)
    return result


def add_kid(result, contestants, features, resamples):
    """`kid` of scores and difference; features {name: (D,)}"""
    for name, change in result["difference"].items():
        sides = contestants[name], contestants["base"], contestants["photographs"]
        result["scores"][name]["kid"], change["kid"] = kid_interval(
            *sides, features, resamples
        )


# ---------------------------------------------------------------- the judge

# the five things that RealBench's judges are told to look for; words of our own
TASK = """You are shown {what}. Look for what cameras do not do: anatomy and faces (hands, eyes, \
teeth, skin like wax), repetition (copied details, texture that repeats), lighting (shadows and \
reflections that disagree), edges (halos, outlines that melt into each other) and colour \
consistency (casts, saturation no lens would give). Beauty, subject and size do not count. \
{question} Reply with JSON only: {json}"""
PAIR = TASK.format(
    what="two pictures",
    question="Which one is more likely to be an unedited photograph?",
    json='{"anatomy": ..., "repetition": ..., "lighting": ..., "edges": ..., "colour": ..., "answer": ...}, '
    'each "first", "second" or "tie".',
)
SINGLE = TASK.format(
    what="a picture",
    question="Is it an unedited photograph (real) or made by a computer (fake)?",
    json='{"answer": "real" or "fake"}.',
)
# the question, and what may be answered; another wording shares no answer with this one
QUESTIONS = {"pair": (PAIR, "first|second|tie"), "single": (SINGLE, "real|fake")}
# what an answer is worth to the first picture
POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0, "real": 1.0, "fake": 0.0}


def parse(reply, words):
    """A judge's reply -> one of `words`, or None: the last "answer" of the JSON, or hardly more
    than the word

    Free text says nothing: "not a real photograph" holds the word `real`. What a model thinks
    aloud is left out.
    """
    text = reply.rpartition("</think>")[2].lower()
    found = re.findall(rf"\banswer\W*(?:is\W+)?(?:the\W+)?({words})\b", text)
    found = found or re.findall(
        rf"^\W*(?:the\W+)?({words})(?:\W+(?:picture|image|one))?\W*$", text
    )
    return found[-1] if found else None


def connect(cfg, device):
    """The model that is asked. ConfigError where there is none, or no key for it."""
    judge = cfg.bench.judge
    if judge.kind == "vlm":
        return Vlm(judge.model, device, dtype=cfg.dtype)
    return Endpoint(
        judge.model,
        device,
        base_url=judge.base_url,
        key=judge.key,
        timeout=judge.timeout,
        retries=judge.retries,
        concurrency=judge.concurrency,
    )


class Judge:
    """Answers ("pair", name, name) and ("single", name) of pictures.

    answers {question: answer}. What is unparsed or failed is open: no loss for either side, and
    asked again by the next run. seen {name: scores}: its `heldout` is all that the detector
    judge looks at, and is not logged.
    """

    def __init__(self, cfg, folder, seen, device):
        self.cfg = cfg
        self.folder = folder
        self.seen = seen
        self.device = device
        judge = cfg.bench.judge
        self.name = f"{judge.kind} {judge.model} {judge.base_url if judge.kind == 'openai' else ''}".strip()
        self.model = None
        self.failed_in_a_row = 0
        self.log = folder.parent / "judgements.jsonl"
        data = self.log.read_bytes() if self.log.exists() else b""
        # without the half line that a kill may leave
        write(self.log, data[: data.rfind(b"\n") + 1])
        rows = map(json.loads, self.log.read_text().splitlines())
        self.rows = [
            row
            for row in rows
            if (row["judge"], row["wording"]) == (self.name, key(QUESTIONS))
        ]
        self.answers = {
            tuple(row["pictures"]): row["answer"] for row in self.rows if row["answer"]
        }
        self.earlier = len(self.rows)

    def ask(self, questions):
        """Puts those that have no answer yet"""
        todo = [
            question
            for question in dict.fromkeys(questions)
            if question not in self.answers
        ]
        if self.cfg.bench.judge.kind == "detector":
            self.answers |= {question: self.compare(*question[1:]) for question in todo}
        elif todo:
            self.model = self.model or connect(self.cfg, self.device)
            with tqdm(total=len(todo), desc="judge") as self.bar:
                # an Endpoint has a map of its own, which asks several at a time
                list(getattr(self.model, "map", map)(self.put, todo))

    def compare(self, x, y):
        """The detector judge; a tie only where two are equal, as different files hardly are"""
        ahead = np.sign(self.seen[x]["heldout"] - self.seen[y]["heldout"])
        return {1: "first", 0: "tie", -1: "second"}[ahead]

    def put(self, question):
        """One question to the model, and its answer into the log"""
        text, words = QUESTIONS[question[0]]
        row = {
            "judge": self.name,
            "wording": key(QUESTIONS),
            "pictures": question,
            "answer": None,
        }
        try:
            pictures = [
                Image.open(self.folder / f"{name}.jpg") for name in question[1:]
            ]
            reply = self.model.reply(pictures, text)
            row |= {"answer": parse(reply, words), "reply": reply[:1000]}
            self.failed_in_a_row = 0
        except NoAnswer as failure:
            row["error"] = str(failure)
            # 400 may be about these pictures alone, unless it was never otherwise
            if "HTTP 400" not in row["error"] or not self.answers:
                self.failed_in_a_row += 1
        # a line fits into one write, so those of several threads cannot mix
        with open(self.log, "a") as log:
            log.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self.bar.update()
        if row["answer"]:
            self.answers[question] = row["answer"]
        if self.failed_in_a_row >= GIVE_UP:
            raise ConfigError(
                f"bench.judge: {row['error']}, {GIVE_UP} times; expected answers, run again to go on"
            )

    def points(self, *question):
        """What the answer is worth to the first picture, NaN without one"""
        return POINTS.get(self.answers.get(question), np.nan)

    def summary(self, pairs):
        """How far the judge may be believed, and what it cost"""
        told = {q[1:]: answer for q, answer in self.answers.items() if q[0] == "pair"}
        first = [answer == "first" for answer in told.values() if answer != "tie"]
        changed = [
            answer == told[y, x] != "tie"
            for (x, y), answer in told.items()
            if (y, x) in told
        ]
        calls = self.rows[self.earlier :]
        failed = sum("error" in row for row in calls)
        return {
            "name": self.name,
            "pairs": pairs,
            "answered": len(self.answers),
            "unparsed": sum(not row["answer"] for row in calls) - failed,
            "failed": failed,
            "calls": len(calls),
            "calls_total": len(self.rows),
            "position_bias": float(np.mean(first)) if first else None,
            "order_changed": float(np.mean(changed)) if changed else None,
        }


# ---------------------------------------------------------------- Arena-Scoring


@cache
def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


def same_subject(prompt, photographs):
    """The photographs whose captions share most of a prompt's words (Jaccard): its own, if
    that is there
    """
    words = words_of(prompt)
    near = []
    for photograph in photographs:
        other = words_of(photograph.text)
        near.append(len(words & other) / max(len(words | other), 1))
    return [photograph for photograph, v in zip(photographs, near) if v == max(near)]


def by_prompt(contestants, prompts):
    """{contestant: per prompt its Pictures}; a photograph meets the prompts whose subject it
    shows
    """
    result = {}
    for name, pictures in contestants.items():
        result[name] = [
            [picture for picture in pictures if picture.unit == p]
            for p in range(len(prompts))
        ]
    result["photographs"] = [
        same_subject(prompt, contestants["photographs"]) for prompt in prompts
    ]
    return result


def matches(pictures, limit):
    """{contestant: per prompt its Pictures} -> [(a, b, prompt, picture of a, picture of b)] for
    all pairs

    Picture m meets picture m, drawn from the same noise; at most `limit` a pair of contestants.
    Each prompt has its turn before any has a second one.
    """
    result = []
    for a, b in combinations(pictures, 2):
        rows = []
        for p in rng("bench matches").permutation(len(pictures[a])).tolist():
            there = pictures[b][p]
            for m, x in enumerate(pictures[a][p] if there else []):
                rows.append((m, a, b, p, x.name, there[m % len(there)].name))
        rows.sort(key=lambda row: row[0])
        result += [row[1:] for row in rows[:limit]]
    return result


def hold(judge, rows):
    """Ask every match in both orders -> {(a, b): [(prompt, won by a)]}, and the same seen from
    b

    won: 1, 1/2 or 0; NaN where one of the two answers is missing.
    """
    judge.ask([("pair", *pair) for *_, x, y in rows for pair in ((x, y), (y, x))])
    results = defaultdict(list)
    for a, b, p, x, y in rows:
        there = judge.points("pair", x, y)
        back = 1 - judge.points("pair", y, x)
        # the median makes a tie of what is not said both times
        won = float(np.median([there, 0.5, back]))
        results[a, b].append((p, won))
        results[b, a].append((p, 1 - won))
    return results


def rate(results, names, units, resamples):
    """Ratings of `names` in each resample of the prompts, (1 + R, n)"""
    wins = np.zeros((units, len(names), len(names)))
    for (a, b), rows in results.items():
        for p, won in rows:
            wins[p, names.index(a), names.index(b)] += np.nan_to_num(won)
    return bradley_terry(np.einsum("ru,uij->rij", resample(units, resamples), wins))


def arena_scoring(results, names, units, resamples):
    """-> arena and rating of bench.json"""
    arena = defaultdict(dict)
    for (a, b), rows in results.items():
        won = [v for _, v in rows]
        counts = {"win": won.count(1), "tie": won.count(0.5), "loss": won.count(0)}
        counts["errors"] = len(won) - sum(counts.values())
        v = bootstrap(rows, resamples)
        if v:
            arena[a][b] = counts | {"rate": v.pop("mean")} | v
    ratings = rate(results, names, units, resamples)
    return {
        "arena": arena,
        "rating": {name: interval(draws) for name, draws in zip(names, ratings.T)},
    }


def verdicts(judge, rows):
    """The pictures that the matches show, one at a time -> {path in bench.json: [(prompt,
    judged real)]}
    """
    shown = dict.fromkeys(
        one for a, b, p, x, y in rows for one in ((a, p, x), (b, p, y))
    )
    judge.ask([("single", x) for *_, x in shown])
    figures = defaultdict(list)
    for name, p, x in shown:
        figures["real", name, "judge"].append((p, judge.points("single", x)))
    return figures


# ---------------------------------------------------------------- people


def read_votes(path, names, prompts):
    """CSV (prompt, left, right, vote: left, right or tie) -> results as `hold` has them

    What is no prompt, contestant or vote is a ConfigError that names it.
    """
    results = defaultdict(list)
    with loading(path), open(path, newline="") as file:
        for row in csv.DictReader(file):
            left, right = (names[names.index(row[side])] for side in ("left", "right"))
            p = prompts.index(row["prompt"])
            won = {"left": 1.0, "tie": 0.5, "right": 0.0}[row["vote"]]
            results[left, right].append((p, won))
            results[right, left].append((p, 1 - won))
    return results


def compare_people(votes, results, units, resamples):
    """Do people and the arena rank alike, do they agree on the same pair of pictures? -> human
    of bench.json

    tau, rho: of the ratings. Agreement: 1 the same answer, 1/2 if just one of the two is a tie,
    0 opposite; only where there is a judgement.
    """
    names = list(dict.fromkeys(name for name, _ in votes))
    judged = {pair: rows for pair, rows in results.items() if set(pair) <= set(names)}
    people, arena = (rate(side, names, units, resamples) for side in (votes, judged))
    agreed = []
    for pair, rows in votes.items():
        # of each prompt the first match, which is the one that the page shows
        first = dict(reversed(judged.get(pair, [])))
        agreed += [(p, 1 - abs(won - first.get(p, np.nan))) for p, won in rows]
    return {
        "votes": len(agreed) // 2,  # each stands there from both sides
        "compared": int(np.isfinite([v for _, v in agreed]).sum()) // 2,
        "tau": rank_correlation(stats.kendalltau, people, arena),
        "rho": rank_correlation(stats.spearmanr, people, arena),
        "agreement": bootstrap(agreed, resamples),
        "rating": {name: interval(draws) for name, draws in zip(names, people.T)},
    }


# ---------------------------------------------------------------- selftest


def add_noise(picture, std):
    pixels = np.asarray(picture)  # (H,W,3)
    # another noise for each picture: one for all may look more or less like a photograph's
    noise = rng("bench noise", int(pixels.sum())).standard_normal(pixels.shape)
    return Image.fromarray(
        (pixels + 255 * std * noise).round().clip(0, 255).astype(np.uint8)
    )


# PIL picture, strength -> PIL picture; weak, middle, strong. The median of `smooth` melts
# texture and leaves edges, as on retouched skin.
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
}


def spoil(picture, distortion, strength):
    """-> the Picture of a spoiled file"""
    file = picture.file.with_stem(key(picture.name, distortion, strength))
    if not file.exists():
        write(
            file,
            in_codec(DISTORTIONS[distortion][0](Image.open(picture.file), strength)),
        )
    return picture._replace(file=file)


def ordered(draws):
    """A measure's (1 + R, 4), from untouched to strong, which should fall each time -> a row
    of `selftest`
    """
    return {
        "levels": draws[0].tolist(),
        "tau": rank_correlation(stats.kendalltau, draws, [[3, 2, 1, 0]] * len(draws)),
        "below": bool((draws[0, 1:] < draws[0, 0]).all()),
        "ordered": bool((np.diff(draws[0]) < 0).all()),
    }


def selftest(cfg, judge, photographs, look):
    """Spoiled photographs must rank below untouched ones, more spoiled below less -> selftest
    of bench.json

    A measure that does not see this is no measure. Of each held-out detector the mean P(real),
    of the arena the ratings of the four levels. look([Picture]) -> {name: {metric: number}}
    """
    photographs = photographs[: cfg.bench.pairs]
    units = len(photographs)
    counts = resample(units, cfg.bench.resamples)  # (1 + R, units)
    result = defaultdict(dict)
    for distortion, (_, strengths) in tqdm(DISTORTIONS.items(), desc="selftest"):
        levels = [photographs]
        for strength in strengths:
            levels.append(
                [spoil(picture, distortion, strength) for picture in photographs]
            )
        judge.seen |= look(sum(levels[1:], []))
        for metric in cfg.rewards.heldout:
            values = [[judge.seen[x.name][metric] for x in level] for level in levels]
            draws = counts @ np.transpose(values) / units  # (1 + R, 4)
            result[distortion][metric] = ordered(draws)
        pictures = {
            i: [[picture] for picture in level] for i, level in enumerate(levels)
        }
        results = hold(judge, matches(pictures, units))
        result[distortion]["arena"] = ordered(
            rate(results, list(pictures), units, cfg.bench.resamples)
        )
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
    if isinstance(value, dict):
        return f"{value.get('mean', value.get('rate')):.4g} [{value['low']:.4g}, {value['high']:.4g}]"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(result):
    """bench.json -> bench.md: a value's last two keys are row and column of a table, those
    before them its title
    """
    tables = defaultdict(lambda: defaultdict(dict))
    for path, value in leaves(result):
        tables[path[:-2] or path[:1]][path[-2:-1]][path[-1]] = cell(value)
    lines = []
    for title, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += ["", f"## {', '.join(title)}", ""]
        lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            cells = [row.get(column, "") for column in columns]
            lines.append(f"| {' '.join(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gallery(cfg, pictures, prompts, seen):
    """What bench.html shows of some prompts: first pictures as data URLs, 512 pixels at
    most, and scores
    """
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
    # a prompt that holds <!--<script> would swallow the page
    data = data.replace("<", r"\u003c")
    write(out / "bench.json", json.dumps(result, indent=1, allow_nan=False).encode())
    write(out / "bench.md", markdown(result).encode())
    write(out / "bench.html", page.replace("DATA", data, 1).encode())


# ---------------------------------------------------------------- main


def check(cfg, prompts):
    """What can be told before a model loads -> {name: [Picture]} from elsewhere, {prompt:
    category}, votes
    """
    b = cfg.bench
    if len(prompts) < 4:
        raise ConfigError(
            f"{cfg.test_prompts}: {len(prompts)} prompts; expected 4 or more"
        )
    for name, file in LORA.items():
        if name == "generator" or cfg.refiner:
            check_folder(Path(cfg.out) / name, file)
    names = [*OWN, "photographs", *b.contestants]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"bench.contestants: {few(b.contestants)}; expected other names than {few(names[:5], 5)}"
        )
    if b.judge.kind == "detector" and not cfg.rewards.heldout:
        raise ConfigError(
            "bench.judge.kind: detector, but rewards.heldout is empty; expected vlm or openai"
        )
    if b.judge.kind == "vlm":
        check_folder(b.judge.model, "config.json")
    if b.judge.kind == "openai":
        connect(cfg, None)
    paths = b.contestants | {"photographs": cfg.test_photos}
    elsewhere = {name: listing(name, path, prompts) for name, path in paths.items()}
    categories = {}
    if b.categories:
        with loading(f"{b.categories}, for {len(prompts)} test prompts,"):
            categories = dict(
                zip(prompts, grpo.read_prompts(b.categories), strict=True)
            )
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
    contestants, missing = gather(run, cfg, prompts, elsewhere, folder)
    everything = sum(contestants.values(), [])
    seen = measure(run, cfg, run.rewards | heldout, everything)
    for scores in seen.values():
        scores["reward"] = run.combine(scores)
    figures = figures_of(cfg, contestants, seen, categories)

    judge = Judge(cfg, folder, seen, run.device)
    pictures = by_prompt(contestants, prompts)
    rows = matches(pictures, b.pairs)
    results = hold(judge, rows)
    if b.judge.kind != "detector":  # whose verdict is `heldout`
        figures |= verdicts(judge, rows)

    result = {"pictures": len(prompts) * b.images, "missing": missing}
    result |= nest(figures, b.resamples)
    features = over(run, cfg, everything, lambda images, texts: run.features(images))
    add_kid(result, contestants, features, b.resamples)
    result |= arena_scoring(results, list(contestants), len(prompts), b.resamples)
    if votes:
        result["human"] = compare_people(votes, results, len(prompts), b.resamples)
    if b.selftest:
        look = partial(measure, run, cfg, heldout)
        result["selftest"] = selftest(cfg, judge, contestants["photographs"], look)
    result["judge"] = judge.summary(len(rows))
    report(cfg, result, gallery(cfg, pictures, prompts, seen))
    print(markdown(result))
    seconds = time.perf_counter() - start
    print(
        f"{seconds:.0f} seconds. Peak memory {peak_memory():.1f} GiB. Wrote {cfg.out}/bench.*"
    )


if __name__ == "__main__":
    grpo.cli(lambda: main(grpo.load_config(sys.argv[1:], Config)))
