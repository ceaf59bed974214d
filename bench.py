"""RealBench: did pictures become more real, and how sure is that?

    python bench.py config.yaml [key=value ...]             after python grpo.py config.yaml
    python bench.py config.yaml bench.human=votes.csv       votes that the voting page of bench.html saved
    python bench.py config.yaml bench.judge.kind=openai bench.judge.model=gpt-5 bench.pairs=64

Contestants: `base`, `refiner` (rewritten prompts, base generator), `generator` (plain prompts, trained generator),
`both`, the folders of bench.contestants, and `photographs`; the same test prompts and noise for all, Euler sampling.
Every picture, a photograph too, becomes one JPEG of one size under <out>/bench/pictures, named by what made it
(weights, text, noise, steps): nothing is drawn twice, no two models share a picture, and detectors, judges and people
see the same file. Detector-Scoring asks every reward and held-out detector. Arena-Scoring asks a judge which of two
pictures is more real, in both orders: an answer that changes with the order is a tie. A model's answers stand in
<out>/bench/judgements.jsonl, and only what is open is asked.

<out>/bench.json; v = {"mean", "low", "high"}, a 95% interval; a tie is half a win:

    pictures                                per own contestant
    missing.<contestant>                    names of pictures that are not there or cannot be read
    scores.<contestant>.<metric>            v
    difference.<contestant>.<metric>        v, contestant - base, paired by prompt
    real.<contestant>.<detector|judge>      v, share judged real: P(real) > 0.5, or the judge's verdict on one picture
    categories.<category>.<contestant>.<metric>   v
    arena.<a>.<b>                           {"win", "tie", "loss", "errors", "rate", "low", "high"} of a over b
    rating.<contestant>                     v, Bradley-Terry; 400 points are odds of 10 to 1, the mean of all is 1000
    judge                                   {"name", "pairs", "answered", "unparsed", "failed", "calls", "calls_total",
                                             "position_bias", "order_changed"}
    human                                   {"votes", "compared", "tau": v, "rho": v, "agreement": v,
                                            "rating": {contestant: v}}
    selftest.<distortion>.<measure>         {"levels": [untouched, weak, middle, strong], "tau": v, "below", "ordered"}

Metrics: each training reward (`alignment` is against the user's prompt), each held-out detector, `reward` (training
rewards by weight), `heldout` (mean of the held-out detectors), `kid` (to the photographs, lower is better).
position_bias: share of answers that name the first picture, 0.5 is none. Intervals: prompts are resampled, not
pictures, because pictures of one prompt are alike; for photographs, pictures. KID is no mean, so its interval comes
from random halves: a half drawn without replacement varies around the whole as the whole varies around the truth.
"""

import base64
import csv
import hashlib
import http.client
import io
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import grpo
import reward as R

BENCH = 7919  # seed of the bench's noise: the same pictures are drawn whatever the seed of the run
OWN = ("base", "refiner", "generator", "both")
CODEC = dict(format="JPEG", quality=95, subsampling=0)  # of every picture, so that no codec gives a side away
BACKOFF = 1.0  # seconds before the first retry of a judge; doubles
MAX_TOKENS = 256  # of a local judge's reply
GIVE_UP = 10  # questions that fail in a row before the run stops


@dataclass
class Contestant:
    files: list  # per unit (a prompt; a photograph) the list of its cached pictures, empty where missing
    texts: list  # per unit the user's prompt or the caption


# ---------------------------------------------------------------- statistics


def interval(value, draws):
    """A figure and its resampled values -> {"mean", "low", "high"}: 95% percentile interval"""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"mean": float(value), "low": float(low), "high": float(high)}


def unit_means(values):
    """(units, pictures), NaN where a picture is missing -> (units,)"""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, 1) / (~np.isnan(values)).sum(1)


def bootstrap(values, resamples, rng):
    """values (units, pictures) -> percentile interval over resampled units; None if there are none"""
    units = unit_means(values)
    units = units[~np.isnan(units)]
    if not len(units):
        return None
    return interval(units.mean(), units[rng.integers(0, len(units), (resamples, len(units)))].mean(1))


def kid_interval(features, base, photos, resamples, rng):
    """KID of features (units, pictures, D) to photos (m, D), and its difference to base's -> two intervals"""

    def whole(x, rows, reals):
        x = x[rows].flatten(0, 1)
        return R.kid(x[~x.isnan().any(1)], photos[reals])  # NaN: a missing picture

    everything = whole(features, slice(None), slice(None)), whole(base, slice(None), slice(None))
    draws = []
    for _ in range(min(resamples, 200)):
        rows = torch.from_numpy(rng.permutation(len(features))[: len(features) // 2])
        reals = torch.from_numpy(rng.permutation(len(photos))[: len(photos) // 2])
        draws.append((whole(features, rows, reals), whole(base, rows, reals)))
    draws = np.array(draws)  # (draws, 2)
    results = []
    for center, values in ((everything[0], draws[:, 0]), (everything[0] - everything[1], draws[:, 0] - draws[:, 1])):
        results.append(interval(center, values - np.nanmean(values) + center))
    return results


def bradley_terry(wins):
    """wins (..., n, n): how often i beat j, ties as half -> ratings (..., n), 400 log10 of the odds, mean 1000

    Hunter's MM iteration (2004). One tie is added to each pair: who won or lost everything stays finite.
    """
    wins = wins + 0.5 * (1 - np.eye(wins.shape[-1]))
    games, strength = wins + wins.swapaxes(-1, -2), np.ones(wins.shape[:-1])
    for _ in range(2000):
        expected = (games / (strength[..., :, None] + strength[..., None, :])).sum(-1)
        new = wins.sum(-1) / expected  # (..., n)
        new /= np.exp(np.log(new).mean(-1, keepdims=True))
        moved, strength = np.abs(np.log(new / strength)).max(), new
        if moved < 1e-7:
            break
    return 1000 + 400 * np.log10(strength)


def order(x):
    """(..., n) -> (..., n, n): sign of x_i - x_j"""
    return np.sign(np.asarray(x)[..., :, None] - np.asarray(x)[..., None, :])


def correlation(a, b, axes):
    """sum ab / sqrt(sum a^2 sum b^2); 0 where one side has no order at all"""
    norm = np.sqrt((a**2).sum(axes) * (b**2).sum(axes))
    return np.where(norm > 0, (a * b).sum(axes) / np.where(norm > 0, norm, 1), 0.0)


def kendall(x, y):
    """Kendall's tau-b of (..., n) and (..., n) -> (...)"""
    return correlation(order(x), order(y), (-2, -1))


def spearman(x, y):
    """Spearman's rho: Pearson of average ranks, which are, up to a shift, half the row sums of `order`"""
    return correlation(order(x).sum(-1), order(y).sum(-1), -1)


def resample(units, resamples, rng):
    """How often each unit is drawn: (1 + resamples, units); row 0 is the data itself"""
    return np.concatenate([np.ones((1, units)), rng.multinomial(units, np.full(units, 1 / units), resamples)])


# ---------------------------------------------------------------- contestants


def key(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def fingerprint(modules):
    """Up to 64 values of every tensor, LoRA included: weights are known by what they are, not by a folder's name"""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            flat = value.detach().flatten()
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_picture(image, path):
    """(3,H,W) in [0,1] -> the common codec, without metadata; a kill leaves no half picture"""
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    picture.save(path.with_suffix(".part"), **CODEC)
    path.with_suffix(".part").replace(path)


def rewrites(run, cfg, prompts, folder):
    """Another rewrite for each picture -> P*M texts; kept on disk, 32 prompts at a time"""
    texts, M = [], cfg.bench.images
    weights = fingerprint([run.refiner.model])
    for first in range(0, len(prompts), 32):
        chunk, seed, r = prompts[first : first + 32], BENCH + first, cfg.refiner
        name = key(weights, chunk, M, seed, r.system_prompt, r.max_new_tokens, r.temperature, cfg.dtype)
        path = folder / f"rewrites_{name}.json"
        if not path.exists():
            path.write_text(json.dumps(run.refiner.rollout(chunk, M, seed).texts))
        texts += json.loads(path.read_text())
    return texts


def draw_contestant(run, cfg, prompts, rewritten, folder, bar):
    """-> Contestant, prompt by prompt; only pictures that are not on disk are drawn"""
    g, M = cfg.generator, cfg.bench.images
    texts = rewrites(run, cfg, prompts, folder) if rewritten else [p for p in prompts for _ in range(M)]
    noise = [(BENCH, grpo.EVALUATION, p, m) for p in range(len(prompts)) for m in range(M)]  # the same for all
    weights = fingerprint(part for part in run.generator.pipe.components.values() if isinstance(part, torch.nn.Module))
    made_by = (weights, g.height, g.width, g.num_steps, g.call, cfg.dtype)
    files = [folder / "pictures" / f"{key(made_by, text, n)}.jpg" for text, n in zip(texts, noise)]
    todo = [i for i, file in enumerate(files) if not file.exists()]
    bar.update(len(files) - len(todo))
    for start in range(0, len(todo), cfg.micro_batch):
        rows = todo[start : start + cfg.micro_batch]
        images = run.generator.sample([texts[i] for i in rows], [noise[i] for i in rows])  # (b, 3, H, W)
        for i, image in zip(rows, images):
            write_picture(image, files[i])
        bar.update(len(rows))
    return Contestant([files[p * M : (p + 1) * M] for p in range(len(prompts))], prompts)


def draw(run, cfg, prompts, folder):
    """{name: Contestant} of the run itself; trained weights come from <out>"""
    out, own, todo = Path(cfg.out), {}, [n for n in OWN if run.refiner or n in ("base", "generator")]
    with tqdm(total=len(todo) * len(prompts) * cfg.bench.images, desc="draw") as bar:
        for name in todo:
            if name == "refiner":
                run.refiner.load_lora(out / "refiner")
            if name == "generator":
                run.generator.load_lora(out / "generator")
            own[name] = draw_contestant(run, cfg, prompts, name in ("refiner", "both"), folder, bar)
    return own


def listing(where, path, prompts, photographs=False):
    """A folder of 00000.jpg ... by the prompt's line, or JSON lines {"image", "prompt"} -> [(prompt, file, text)]

    The captions of photographs may be their own; a contestant draws the test prompts, all of them.
    """
    path = Path(path)
    if path.is_file():
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            rows = [(path.parent / row["image"], row["prompt"]) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{where}: {path}: {error!r}; expected JSON lines {{"image", "prompt"}}') from error
        if photographs:
            return [(i, *row) for i, row in enumerate(rows)]
        for _, text in rows:
            if text not in prompts:
                raise ValueError(f"{where}: {path} holds {text!r}, which is no line of test_prompts; expected those")
        found = [[f for f, text in rows if text == p] or [path.parent / f"no picture of {p}"] for p in prompts]
        return [(i, f, prompts[i]) for i, files in enumerate(found) for f in files]
    if not path.is_dir():
        raise ValueError(
            f'{where}: {path} does not exist; expected a folder of 00000.jpg ... or JSON lines {{"image", "prompt"}}'
        )
    found = {int(f.stem): f for f in sorted(path.iterdir()) if f.stem.isdigit()}
    if not found or max(found) >= len(prompts):
        what = f"picture {found[max(found)].name}" if found else "no picture named by a number"
        raise ValueError(
            f"{where}: {path} has {what}, but there are {len(prompts)} prompts; "
            f"expected 00000.jpg to {len(prompts) - 1:05d}.jpg, one a prompt"
        )
    return [(i, found.get(i, path / f"{i:05d}.jpg"), prompt) for i, prompt in enumerate(prompts)]


def adopt(run, cfg, where, rows, folder, photographs=False):
    """Pictures from elsewhere into the common size and codec: rows of `listing` -> those that can be read, the others

    Photographs are cropped to the generator's size and, with autoencode_photos, pass through its autoencoder; a
    contestant of another size is refused.
    """
    size, adopted, missing = (cfg.generator.height, cfg.generator.width), [], []
    through = fingerprint([run.generator.pipe.vae]) if photographs and cfg.autoencode_photos else None
    for i, file, text in tqdm(rows, desc=f"read {where}", leave=False):
        try:
            target = folder / "pictures" / f"{key(hashlib.sha256(file.read_bytes()).hexdigest(), size, through)}.jpg"
            image = None if target.exists() else R.read_image(file, size if photographs else None)
        except (OSError, ValueError):
            missing.append(file.name)
            continue
        if image is not None and image.shape[1:] != size:
            raise ValueError(
                f"{where}: {file} is {image.shape[2]} x {image.shape[1]} pixels; expected {size[1]} x {size[0]} "
                "(generator.width x height) like every other contestant: draw or resize it to that"
            )
        if image is not None:
            write_picture(run.real(image[None])[0] if through else image, target)
        adopted.append((i, target, text))
    if len(adopted) < 4:
        raise ValueError(f"{where}: {len(adopted)} pictures can be read; expected at least 4")
    if missing:
        print(f"{where}: {len(missing)} of {len(rows)} pictures are missing or unreadable: {', '.join(missing)}")
    return adopted, missing


def gather(run, cfg, prompts, folder):
    """Every contestant, photographs last -> {name: Contestant}, {name: names of missing pictures}"""
    contestants, missing = draw(run, cfg, prompts, folder), {}
    for name, path in cfg.bench.contestants.items():
        where = f"bench.contestants.{name}"
        rows, missing[name] = adopt(run, cfg, where, listing(where, path, prompts), folder)
        contestants[name] = Contestant([[f for i, f, _ in rows if i == p] for p in range(len(prompts))], prompts)
    photos = listing("test_photos", cfg.test_photos, prompts, photographs=True)
    rows, missing["photographs"] = adopt(run, cfg, "test_photos", photos, folder, photographs=True)
    contestants["photographs"] = Contestant([[f] for _, f, _ in rows], [text for *_, text in rows])
    return contestants, {name: names for name, names in missing.items() if names}


# ---------------------------------------------------------------- Detector-Scoring


@torch.no_grad()
def over(contestant, cfg, device, function):
    """function(images (b,3,H,W), texts) -> {name: (b, ...)}; in all {name: (units, pictures, ...)}, NaN where none"""
    rows = [(u, k, f) for u, files in enumerate(contestant.files) for k, f in enumerate(files)]
    parts = []
    for i in range(0, len(rows), cfg.micro_batch):
        chunk = rows[i : i + cfg.micro_batch]
        images = torch.stack([R.read_image(f) for _, _, f in chunk]).to(device)
        parts.append(function(images, [contestant.texts[u] for u, _, _ in chunk]))
    u, k, _ = zip(*rows)
    result = {}
    for name in parts[0]:
        flat = torch.cat([p[name] for p in parts])  # (pictures, ...)
        result[name] = torch.full((len(contestant.files), max(k) + 1, *flat.shape[1:]), torch.nan)
        result[name][list(u), list(k)] = flat
    return result


def detect(run, cfg, contestants, heldout):
    """{contestant: {metric: (units, pictures)}}, {contestant: features (units, pictures, D)}"""

    def measure(images, texts):
        raw = run.score(run.rewards | heldout, images, texts)
        raw["reward"] = run.combine(raw)
        if heldout:
            raw["heldout"] = torch.stack([raw[h] for h in heldout]).mean(0)
        return raw | {"features": run.features(images)}

    values = {name: over(c, cfg, run.device, measure) for name, c in tqdm(contestants.items(), desc="score")}
    features = {name: v.pop("features") for name, v in values.items()}
    return {name: {m: x.numpy() for m, x in v.items()} for name, v in values.items()}, features


def detector_scoring(cfg, values, features):
    """-> scores, difference, real: see the module's docstring"""
    rewards, n = cfg.rewards.train | cfg.rewards.heldout, cfg.bench.resamples
    detectors = [m for m, r in rewards.items() if r.kind != "clip" and ":" not in r.kind]  # these return P(real)
    detectors += ["heldout"] if cfg.rewards.heldout and set(cfg.rewards.heldout) <= set(detectors) else []
    photos = features["photographs"].flatten(0, 1)
    scores, difference, real = {}, {}, {}
    for name, metrics in values.items():
        rng = np.random.default_rng(BENCH)  # the same resamples for all contestants: differences are paired
        scores[name] = {m: bootstrap(v, n, rng) for m, v in metrics.items()}
        share = {m: np.where(np.isnan(metrics[m]), np.nan, metrics[m] > 0.5) for m in detectors}
        if name != "photographs":
            paired = {m: (unit_means(v) - unit_means(values["base"][m]))[:, None] for m, v in metrics.items()}
            difference[name] = {m: bootstrap(v, n, rng) for m, v in paired.items()}
            scores[name]["kid"], difference[name]["kid"] = kid_interval(
                features[name], features["base"], photos, n, rng
            )
        real[name] = {m: bootstrap(v, n, rng) for m, v in share.items()}
    return scores, difference, real


def by_category(cfg, values, contestants, prompts, categories):
    """{category: {contestant: {metric: v}}}; a photograph has the category of the prompt that its caption is"""
    known, result = dict(zip(prompts, categories)), {}
    for category in dict.fromkeys(categories):
        for name, metrics in values.items():
            units = categories if name != "photographs" else [known.get(t) for t in contestants[name].texts]
            rows = [i for i, c in enumerate(units) if c == category]
            rng = np.random.default_rng(BENCH)
            row = {m: bootstrap(v[rows], cfg.bench.resamples, rng) for m, v in metrics.items()}
            if any(row.values()):
                result.setdefault(category, {})[name] = row
    return result


# ---------------------------------------------------------------- the judge

TASK = """You are shown {what}. Look for what cameras do not do: anatomy and faces (hands, eyes, teeth, skin like wax),\
 repetition (copied details, texture that repeats), lighting (shadows and reflections that disagree), edges (halos, \
outlines that melt into each other) and colour consistency (casts, saturation no lens would give). Beauty, subject and \
size do not count. {question} Reply with JSON only: {json}"""
QUESTIONS = {  # kind: (the question, what may be answered)
    "pair": (
        TASK.format(
            what="two pictures",
            question="Which one is more likely to be an unedited photograph?",
            json='{"anatomy": ..., "repetition": ..., "lighting": ..., "edges": ..., "colour": ..., "answer": ...}, '
            'each "first", "second" or "tie".',
        ),
        ("first", "second", "tie"),
    ),
    "single": (
        TASK.format(
            what="a picture",
            question="Is it an unedited photograph (real) or made by a computer (fake)?",
            json='{"answer": "real" or "fake"}.',
        ),
        ("real", "fake"),
    ),
}


def parse(text, allowed):
    """A judge's reply -> one of `allowed`, or None: the last "answer" of the JSON, or hardly more than the word"""
    text, words = text.rpartition("</think>")[2].lower(), "|".join(allowed)
    found = re.findall(rf"\banswer\W*(?:is\W+)?(?:the\W+)?({words})\b", text)
    found = found or re.findall(rf"^\W*(?:the\W+)?({words})(?:\W+(?:picture|image|one))?\W*$", text)
    return found[-1] if found else None


def realness(values, contestants):
    """{picture: mean of the held-out detectors}, which is all that the detector judge looks at"""
    result = {}
    for name, metrics in values.items():
        for files, row in zip(contestants[name].files, metrics.get("heldout", ())):
            result |= {f.stem: float(v) for f, v in zip(files, row)}
    return result


class Judge:
    """Answers ("pair", picture, picture) and ("single", picture); pictures by their key, as the log names them."""

    def __init__(self, cfg, folder, realness, device):
        self.cfg, self.folder, self.realness, self.device = cfg, folder, realness, device
        self.name = " ".join(w for w in (cfg.kind, cfg.model, cfg.base_url if cfg.kind == "openai" else "") if w)
        self.log, self.lock, self.model = folder / "judgements.jsonl", threading.Lock(), None
        self.answers, self.errors, self.calls, self.calls_total = {}, {}, 0, 0
        text = self.log.read_text() if self.log.exists() else ""
        if text and not text.endswith("\n"):  # killed while it wrote
            self.log.write_text(text := text[: text.rfind("\n") + 1])
        for row in map(json.loads, text.splitlines()):
            if row["judge"] == self.name and row["wording"] == key(QUESTIONS[row["pictures"][0]]):
                self.calls_total += row["calls"]
                if row["answer"]:
                    self.answers[tuple(row["pictures"])] = row["answer"]

    def ask(self, questions):
        """Afterwards self.answers holds what could be answered, self.errors the rest by reason"""
        questions = [q for q in dict.fromkeys(questions) if q not in self.answers]
        if self.cfg.kind == "detector":
            self.answers |= {q: self.compare(q) for q in questions}
        elif questions:
            self.ask_model(questions)

    def compare(self, question):
        values = [self.realness[picture] for picture in question[1:]]
        if question[0] == "single":
            return "real" if values[0] > 0.5 else "fake"
        return "tie" if values[0] == values[1] else "first" if values[0] > values[1] else "second"

    def ask_model(self, questions):
        if self.cfg.kind == "vlm":
            self.load_vlm()
        in_a_row = 0
        with (
            ThreadPoolExecutor(self.cfg.concurrency if self.cfg.kind == "openai" else 1) as pool,
            tqdm(total=len(questions), desc="judge") as bar,
        ):
            futures = [pool.submit(self.ask_one, q) for q in questions]
            try:
                for future in as_completed(futures):
                    error = future.result()
                    bar.update()
                    if error is None or error == "unparsed":
                        in_a_row = 0
                    elif not (self.answers and error.startswith("refused")):  # one picture may offend, not all
                        in_a_row += 1
                    if in_a_row == (GIVE_UP if self.answers else min(GIVE_UP, len(questions))):
                        raise ValueError(
                            f"bench.judge: {self.name}: {in_a_row} questions in a row failed, the last: {error}"
                        )
            except BaseException as stop:
                pool.shutdown(cancel_futures=True)  # waits for what is under way, which is kept
                if isinstance(stop, ValueError):
                    raise ValueError(
                        f"{stop}; the {len(self.answers)} judgements so far are kept in {self.log}, run again to go on"
                    ) from stop
                raise

    def ask_one(self, question):
        """Ask, parse, log -> None or the reason why there is no answer"""
        text, allowed = QUESTIONS[question[0]]
        files = [self.folder / "pictures" / f"{picture}.jpg" for picture in question[1:]]
        reply, error, calls = (self.reply_vlm if self.cfg.kind == "vlm" else self.reply_openai)(files, text)
        answer = parse(reply, allowed) if error is None else None
        error = error or (None if answer else "unparsed")
        row = {"judge": self.name, "wording": key(QUESTIONS[question[0]]), "pictures": question, "answer": answer}
        with self.lock:
            with open(self.log, "a") as file:
                file.write(json.dumps(row | {"error": error, "calls": calls, "reply": reply}) + "\n")
            self.calls, self.calls_total = self.calls + calls, self.calls_total + calls
            if answer:
                self.answers[question] = answer
            else:
                self.errors[question] = error
        return error

    def reply_openai(self, files, text):
        """POST <base_url>/chat/completions, with retries -> reply, error, calls made"""
        data = [f"data:image/jpeg;base64,{base64.b64encode(f.read_bytes()).decode()}" for f in files]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in data] + [{"type": "text", "text": text}]
        body = json.dumps({"model": self.cfg.model, "messages": [{"role": "user", "content": content}]}).encode()
        headers = {"Content-Type": "application/json"}
        if self.cfg.key:
            headers["Authorization"] = f"Bearer {os.environ[self.cfg.key]}"
        request = urllib.request.Request(f"{self.cfg.base_url.rstrip('/')}/chat/completions", body, headers)
        for attempt in range(self.cfg.retries + 1):
            wait = BACKOFF * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=self.cfg.timeout) as response:
                    return json.loads(response.read())["choices"][0]["message"]["content"] or "", None, attempt + 1
            except urllib.error.HTTPError as problem:
                error = f"HTTP {problem.code}"
                if problem.code in (401, 403, 404):
                    remedy = (
                        f"the key in {self.cfg.key or 'bench.judge.key'}, bench.judge.model and bench.judge.base_url"
                    )
                    raise ValueError(f"bench.judge: {self.name} answers {error}; check {remedy}") from problem
                if problem.code < 500 and problem.code not in (408, 409, 429):
                    return "", f"refused with {error}", attempt + 1  # asking again changes nothing
                after = problem.headers.get("Retry-After", "")
                wait = min(float(after), 60.0) if after.isdigit() else wait
            except (OSError, http.client.HTTPException) as problem:  # no connection, reset, time-out
                error = str(getattr(problem, "reason", problem)) or type(problem).__name__
            except (ValueError, KeyError, IndexError, TypeError):
                error = "a reply that is no chat completion"
            if attempt < self.cfg.retries:
                time.sleep(wait)
        return "", error, self.cfg.retries + 1

    def load_vlm(self):
        from transformers import AutoModelForImageTextToText

        try:
            self.processor = R.picture_processor(self.cfg.model)
            model = R.from_pretrained(AutoModelForImageTextToText, self.cfg.model, dtype="auto")
            self.model = model.to(self.device).eval()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"bench.judge.model: {self.cfg.model} cannot be loaded ({str(error).splitlines()[0]}); "
                "expected a folder or repository of an image-text-to-text model"
            ) from error

    @torch.no_grad()
    def reply_vlm(self, files, text):
        """Both pictures in one message of the model's own chat template; greedy -> reply, error, calls made"""
        content = [{"type": "image", "image": Image.open(f).convert("RGB")} for f in files]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ).to(self.device, self.model.dtype)  # fmt: skip
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)[
            0, inputs["input_ids"].shape[1] :
        ]
        return self.processor.decode(ids, skip_special_tokens=True), None, 1


# ---------------------------------------------------------------- Arena-Scoring


def same_subject(prompts, captions):
    """For each prompt the indices of the captions that share most of its words (Jaccard), its own if there"""
    words = [set(re.findall(r"\w+", c.lower())) for c in captions]
    result = []
    for prompt in prompts:
        own = set(re.findall(r"\w+", prompt.lower()))
        near = [len(own & w) / max(len(own | w), 1) for w in words]
        result.append([i for i, v in enumerate(near) if v == max(near)])
    return result


def opponents(contestants, prompts):
    """{contestant: per prompt its pictures' keys}; a photograph meets the prompts whose subject it shows"""
    result = {n: [[f.stem for f in files] for files in c.files] for n, c in contestants.items()}
    photos = result["photographs"]
    near = same_subject(prompts, contestants["photographs"].texts)
    return result | {"photographs": [[photos[i][0] for i in rows] for rows in near]}


def matches(pictures, limit):
    """{contestant: per prompt its pictures} -> [(a, b, prompt, picture of a, picture of b)] for all pairs

    Picture m meets picture m, drawn from the same noise; at most `limit` a pair of contestants, over all prompts.
    """
    names, result = list(pictures), []
    shuffled = np.random.default_rng(BENCH).permutation(len(pictures[names[0]])).tolist()
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = [(p, pictures[a][p], pictures[b][p]) for p in shuffled if pictures[a][p] and pictures[b][p]]
            rounds = range(max((len(x) for _, x, _ in both), default=0))
            rows = [(a, b, p, x[m], y[m % len(y)]) for m in rounds for p, x, y in both if m < len(x)]
            result += rows[:limit]
    return result


def outcome(judge, x, y):
    """1 if x wins in both orders, -1 if y does, 0 if the answers differ or are ties, None if one is missing"""
    there, back = judge.answers.get(("pair", x, y)), judge.answers.get(("pair", y, x))
    if not (there and back):
        return None
    return {("first", "second"): 1, ("second", "first"): -1}.get((there, back), 0)


def hold(judge, rows):
    """Ask every match in both orders -> [(a, b, prompt, outcome)]"""
    judge.ask([("pair", *pair) for _, _, _, x, y in rows for pair in ((x, y), (y, x))])
    return [(a, b, p, outcome(judge, x, y)) for a, b, p, x, y in rows]


def tally(results, names, units):
    """[(a, b, prompt, outcome)] -> wins (units, n, n): i over j, a tie is half"""
    wins, place = np.zeros((units, len(names), len(names))), {n: i for i, n in enumerate(names)}
    for a, b, p, o in results:
        if o is not None:
            wins[p, place[a], place[b]] += (1 + o) / 2
            wins[p, place[b], place[a]] += (1 - o) / 2
    return wins


def rate(results, names, units, resamples):
    """-> arena, rating of the docstring, and the ratings of every resample of the prompts (1 + resamples, n)"""
    wins, counts = tally(results, names, units), resample(units, resamples, np.random.default_rng(BENCH))
    won = np.einsum("ru,uij->rij", counts, wins)  # (1 + resamples, n, n)
    with np.errstate(invalid="ignore"):
        rates = won / (won + won.swapaxes(1, 2))
    arena = {}
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            mine = [o if x == a else -o if o else o for x, y, _, o in results if {x, y} == {a, b}] if i != j else []
            if any(o is not None for o in mine):
                v = interval(rates[0, i, j], rates[1:, i, j])
                row = {n: mine.count(o) for n, o in (("win", 1), ("tie", 0), ("loss", -1), ("errors", None))}
                arena.setdefault(a, {})[b] = row | {"rate": v["mean"], "low": v["low"], "high": v["high"]}
    ratings = bradley_terry(won)  # (1 + resamples, n)
    return arena, {n: interval(ratings[0, i], ratings[1:, i]) for i, n in enumerate(names)}, ratings


def verdicts(judge, rows, names, units, resamples):
    """{contestant: share judged real, one picture at a time}, of the pictures that the matches show"""
    shown = {n: [set() for _ in range(units)] for n in names}
    for a, b, p, x, y in rows:
        shown[a][p].add(x)
        shown[b][p].add(y)
    judge.ask([("single", x) for sets in shown.values() for pictures in sets for x in sorted(pictures)])
    value, result = {"real": 1.0, "fake": 0.0, None: np.nan}, {}
    for name, sets in shown.items():
        table = np.full((units, max(map(len, sets))), np.nan)
        for p, pictures in enumerate(sets):
            table[p, : len(pictures)] = [value[judge.answers.get(("single", x))] for x in pictures]
        result[name] = bootstrap(table, resamples, np.random.default_rng(BENCH))
    return result


def summary(judge, results):
    """How far the judge may be believed, and what it cost"""
    pairs = {q: a for q, a in judge.answers.items() if q[0] == "pair"}
    named = [a for a in pairs.values() if a != "tie"]
    both = [(a, pairs[k, y, x]) for (k, x, y), a in pairs.items() if x < y and (k, y, x) in pairs]
    unparsed = list(judge.errors.values()).count("unparsed")
    return {
        "name": judge.name,
        "pairs": len(results),
        "answered": len(judge.answers),
        "unparsed": unparsed,
        "failed": len(judge.errors) - unparsed,
        "calls": judge.calls,
        "calls_total": judge.calls_total,
        "position_bias": named.count("first") / len(named) if named else None,
        "order_changed": sum(a == b != "tie" for a, b in both) / len(both) if both else None,
    }


# ---------------------------------------------------------------- people


def read_votes(path, names, prompts):
    """CSV (prompt, left, right, vote) -> [(left, right, prompt's index, 1 left, 0 tie, -1 right)]"""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"bench.human: {path} is not a file; expected the CSV that bench.html saves")
    reader = csv.DictReader(io.StringIO(path.read_text()))
    if reader.fieldnames is None or set(reader.fieldnames) != {"prompt", "left", "right", "vote"}:
        raise ValueError(f"bench.human: {path} has the columns {reader.fieldnames}; expected prompt, left, right, vote")
    votes, values = [], {"left": 1, "tie": 0, "right": -1}
    for line, row in enumerate(reader, 2):
        for column, known in (("prompt", prompts), ("left", names), ("right", names), ("vote", values)):
            if row[column] not in known:
                expected = "a line of test_prompts" if column == "prompt" else f"one of {', '.join(known)}"
                raise ValueError(f"bench.human: {path}: line {line}: {column} is {row[column]!r}; expected {expected}")
        votes.append((row["left"], row["right"], prompts.index(row["prompt"]), values[row["vote"]]))
    if not votes:
        raise ValueError(f"bench.human: {path} holds no vote; expected a row a vote")
    return votes


def compare_people(votes, results, names, units, resamples):
    """Do people and the arena rank alike (tau-b, rho of the ratings), and do they agree on the same pair of pictures?

    Agreement: 1 the same answer, 1/2 if just one of the two is a tie, 0 opposite; only where there is a judgement.
    """
    names = [n for n in names if any(n in v[:2] for v in votes)]
    counts = resample(units, resamples, np.random.default_rng(BENCH))  # the same prompts for both sides
    mine = [r for r in results if r[0] in names and r[1] in names]
    people, arena = (bradley_terry(np.einsum("ru,uij->rij", counts, tally(v, names, units))) for v in (votes, mine))
    first = {}
    for a, b, p, o in results:  # the first match of a prompt is the one that the voting page shows
        if o is not None:
            first.setdefault((a, b, p), o)
            first.setdefault((b, a, p), -o)
    compared = [(p, 1 - abs(o - first[a, b, p]) / 2) for a, b, p, o in votes if (a, b, p) in first]
    result = {"votes": len(votes), "compared": len(compared)}
    for name, function in (("tau", kendall), ("rho", spearman)):
        values = function(people, arena)  # (1 + resamples,)
        result[name] = interval(values[0], values[1:])
    if compared:
        agree, asked = (np.bincount([p for p, _ in compared], w, units) for w in ([v for _, v in compared], None))
        with np.errstate(invalid="ignore"):
            values = counts @ agree / (counts @ asked)
        result["agreement"] = interval(values[0], values[1:])
    return result | {"rating": {n: interval(people[0, i], people[1:, i]) for i, n in enumerate(names)}}


# ---------------------------------------------------------------- selftest


def blur(x, sigma):
    """Gaussian, sigma in pixels"""
    r = max(1, round(3 * sigma))
    kernel = torch.exp(-(torch.arange(-r, r + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)  # (3, 1, 2r+1)
    x = F.conv2d(F.pad(x[None], (r, r, r, r), mode="reflect"), kernel[:, :, None], groups=3)
    return F.conv2d(x, kernel[..., None], groups=3)[0]


def noise(x, std):
    return x + std * torch.from_numpy(np.random.default_rng(BENCH).standard_normal(x.shape, dtype=np.float32))


def jpeg(x, quality):
    buffer = io.BytesIO()
    Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return R.read_image(buffer)


def smooth(x, contrast):
    """Bilateral filter, twice: texture below `contrast` melts as on retouched skin, edges stay"""
    near = torch.exp(-(torch.arange(-3, 4)[:, None] ** 2 + torch.arange(-3, 4) ** 2) / 8).flatten()  # (49,)
    for _ in range(2):
        around = F.unfold(F.pad(x[None], (3, 3, 3, 3), mode="reflect"), 7).view(3, 49, *x.shape[1:])
        alike = torch.exp(-((around - x[:, None]) ** 2).sum(0) / (2 * contrast**2)) * near[:, None, None]  # (49, H, W)
        x = (around * alike).sum(1) / alike.sum(0)
    return x


def saturate(x, factor):
    grey = x.mean(0, keepdim=True)
    return grey + factor * (x - grey)


DISTORTIONS = {  # weak, middle, strong
    "blur": (blur, (0.6, 1.0, 2.0)),
    "noise": (noise, (0.04, 0.08, 0.16)),
    "jpeg": (jpeg, (40, 20, 10)),
    "smooth": (smooth, (0.05, 0.1, 0.2)),
    "saturate": (saturate, (1.4, 2.0, 3.0)),
}


def selftest(run, cfg, judge, photographs, heldout, folder):
    """Spoiled photographs must rank below untouched ones, more spoiled below less: {distortion: {measure: ...}}

    tau: Kendall's tau-b of minus the strength (0 to 3) and the four levels of the measure (mean P(real); in the arena
    the rating of the four). below: every strength is under the untouched. ordered: and each under the one before.
    """
    files, result = [f[0] for f in photographs.files[: cfg.bench.pairs]], {}
    texts, units = photographs.texts[: len(files)], len(files)
    counts = resample(units, cfg.bench.resamples, np.random.default_rng(BENCH))
    for name, (function, strengths) in tqdm(DISTORTIONS.items(), desc="selftest"):
        levels = [Contestant([[f] for f in files], texts)]
        for strength in strengths:
            made = [folder / "pictures" / f"{key(f.stem, name, strength)}.jpg" for f in files]
            for f, target in zip(files, made):
                if not target.exists():
                    write_picture(function(R.read_image(f), strength).clamp(0, 1), target)
            levels.append(Contestant([[f] for f in made], texts))
        measured = [over(c, cfg, run.device, lambda x, t: run.score(heldout, x, t)) for c in levels]
        if cfg.bench.judge.kind == "detector":
            for c, values in zip(levels, measured):
                mean = torch.stack(list(values.values())).mean(0)[:, 0].tolist()  # (units,)
                judge.realness |= {f[0].stem: v for f, v in zip(c.files, mean)}
        draws = {m: counts @ np.stack([v[m][:, 0].numpy() for v in measured], 1) / units for m in heldout}
        results = hold(judge, matches({str(i): [[f[0].stem] for f in c.files] for i, c in enumerate(levels)}, units))
        draws["arena"] = rate(results, ["0", "1", "2", "3"], units, cfg.bench.resamples)[2]
        result[name] = {}
        for measure, v in draws.items():  # (1 + resamples, 4)
            tau = kendall(v, np.broadcast_to([3.0, 2.0, 1.0, 0.0], v.shape))
            result[name][measure] = {
                "levels": v[0].tolist(),
                "tau": interval(tau[0], tau[1:]),
                "below": bool((v[0, 1:] < v[0, 0]).all()),
                "ordered": bool((np.diff(v[0]) < 0).all()),
            }
    return result


# ---------------------------------------------------------------- report


def cell(v, sign="", digits=3):
    return f"{v['mean']:{sign}.{digits}f} [{v['low']:{sign}.{digits}f}, {v['high']:{sign}.{digits}f}]" if v else ""


def table(scores, difference):
    """Lines of a Markdown table: mean [low, high], then the paired difference to base"""
    metrics = list(next(iter(scores.values())))
    lines = ["| contestant | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(m)) for m in metrics) + " |")
    for name, row in difference.items():
        if name != "base":
            lines.append(f"| {name} - base | " + " | ".join(cell(row.get(m), "+") for m in metrics) + " |")
    return lines


def arena_table(arena, rating):
    """Rating, then the win rate of the row over the column"""
    names = list(rating)
    lines = [
        "| contestant | rating | " + " | ".join(f"over {n}" for n in names) + " |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for a in names:
        row = {b: v | {"mean": v["rate"]} for b, v in arena.get(a, {}).items()}
        lines.append(f"| {a} | {cell(rating[a], digits=0)} | " + " | ".join(cell(row.get(b)) for b in names) + " |")
    return lines


def markdown(result):
    """bench.json -> bench.md"""
    judge = result["judge"]
    lines = ["# RealBench", "", f"{result['pictures']} pictures per own contestant. Mean and 95% interval.", ""]
    lines += ["## Detector-Scoring", "", *table(result["scores"], result["difference"]), ""]
    lines += ["## Share judged real", "", *table(result["real"], {}), ""] if any(result["real"].values()) else []
    for category, scores in result.get("categories", {}).items():
        lines += [f"## Category {category}", "", *table(scores, {}), ""]
    lines += ["## Arena-Scoring", "", *arena_table(result["arena"], result["rating"]), ""]
    bias, changed = (f"{judge[n]:.1%}" if judge[n] is not None else "-" for n in ("position_bias", "order_changed"))
    lines += [
        f"Judge: {judge['name']}; {judge['pairs']} pairs of pictures, each in both orders; {judge['unparsed']} replies "
        f"unparsed, {judge['failed']} failed; {judge['calls']} calls in this run, {judge['calls_total']} in all. It "
        f"names the first picture in {bias} of its answers (50% is no bias) and changes its answer with the order in "
        f"{changed} of the pairs.",
        "",
    ]
    if "human" in result:
        human = result["human"]
        lines += ["## People", "", "| votes | compared | tau-b | rho | agreement |", "|---|---|---|---|---|"]
        figures = " | ".join(cell(human.get(n)) for n in ("tau", "rho", "agreement"))
        lines += [f"| {human['votes']} | {human['compared']} | {figures} |", ""]
    if "selftest" in result:
        lines += ["## Selftest: spoiled photographs must rank below untouched ones", ""]
        lines += ["| distortion | measure | untouched | weak | middle | strong | tau-b | verdict |", "|" + "---|" * 8]
        for name, measures in result["selftest"].items():
            for m, v in measures.items():
                levels = " | ".join(f"{x:.0f}" if m == "arena" else f"{x:.3f}" for x in v["levels"])
                verdict = "ordered" if v["ordered"] else "below, not ordered" if v["below"] else "**fails**"
                lines.append(f"| {name} | {m} | {levels} | {cell(v['tau'], digits=2)} | {verdict} |")
        lines.append("")
    if result["missing"]:
        lines += ["## Missing pictures", ""]
        lines += [f"- {n}: {len(names)}: {', '.join(names)}" for n, names in result["missing"].items()]
    return lines


def gallery(cfg, pictures, prompts, values, contestants, folder):
    """What bench.html shows: the first pictures of some prompts as data URLs, 512 pixels at most, and scores"""
    shown, result = {}, []
    for name, metrics in values.items():
        for u, files in enumerate(contestants[name].files):
            for k, f in enumerate(files[:1] if name != "photographs" else files):
                shown[name, f.stem] = {m: round(float(v[u, k]), 3) for m, v in metrics.items()}
    for p in range(min(cfg.bench.gallery, len(prompts))):
        row = {}
        for name in pictures:
            for stem in pictures[name][p][:1]:
                picture, buffer = Image.open(folder / "pictures" / f"{stem}.jpg"), io.BytesIO()
                picture.thumbnail((512, 512))
                picture.save(buffer, **CODEC)
                url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
                row[name] = {"url": url, "scores": shown[name, stem]}
        result.append({"prompt": prompts[p], "pictures": row})
    return result


def report(cfg, result, shown):
    """bench.json, bench.md and bench.html"""
    out = Path(cfg.out)
    (out / "bench.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    (out / "bench.md").write_text("\n".join(markdown(result)) + "\n")
    data = json.dumps({"result": result, "gallery": shown}, allow_nan=False).replace("</", "<\\/")
    (out / "bench.html").write_text(TEMPLATE.replace("DATA", data, 1))


# ---------------------------------------------------------------- main


def check(cfg, prompts):
    """What can be told before a model loads -> categories, votes"""
    out, b, judge = Path(cfg.out), cfg.bench, cfg.bench.judge
    names = [*OWN, *b.contestants, "photographs"]
    if not (out / "generator").is_dir():
        raise ValueError(
            f"out: {cfg.out} holds no trained generator; expected the folder of a finished run, "
            f"python grpo.py config.yaml out={cfg.out}"
        )
    if len(prompts) < 4:
        raise ValueError(f"test_prompts: {len(prompts)} prompts; expected at least 4, or there is no interval")
    for name, path in b.contestants.items():
        if name in (*OWN, "photographs"):
            raise ValueError(
                f"bench.contestants.{name}: the name is taken; expected none of {', '.join(OWN)}, photographs"
            )
        listing(f"bench.contestants.{name}", path, prompts)
    listing("test_photos", cfg.test_photos, prompts, photographs=True)
    if judge.kind == "detector" and not cfg.rewards.heldout:
        raise ValueError(
            "bench.judge.kind: detector needs rewards.heldout, which is empty; name one, or choose vlm or openai"
        )
    if judge.kind != "detector" and not judge.model:
        raise ValueError(f"bench.judge.model: empty; expected the model that bench.judge.kind={judge.kind} asks")
    if judge.kind == "openai" and judge.key and not os.environ.get(judge.key):
        raise ValueError(
            f"bench.judge.key: the environment has no {judge.key}; expected the key of {judge.base_url} in it "
            """('bench.judge.key=""' for a server that needs none)"""
        )
    categories = grpo.read_prompts(b.categories) if b.categories else []
    if b.categories and len(categories) != len(prompts):
        raise ValueError(f"bench.categories: {len(categories)} lines for {len(prompts)} prompts; expected one a prompt")
    return categories, read_votes(b.human, names, prompts) if b.human else []


def arena_scoring(cfg, judge, pictures, prompts, votes):
    """-> the keys arena, rating, human of the result, verdicts on single pictures, results of the matches"""
    rows, names, size = matches(pictures, cfg.bench.pairs), list(pictures), (len(prompts), cfg.bench.resamples)
    results = hold(judge, rows)
    arena, rating, _ = rate(results, names, *size)
    found = {"arena": arena, "rating": rating}
    if votes:
        found["human"] = compare_people(votes, results, names, *size)
    # the detector judge's verdict is `heldout` of Detector-Scoring
    return found, {} if cfg.bench.judge.kind == "detector" else verdicts(judge, rows, names, *size), results


def main(cfg):
    start, seconds, folder = time.perf_counter(), {}, Path(cfg.out) / "bench"
    prompts = grpo.read_prompts(cfg.test_prompts)
    categories, votes = check(cfg, prompts)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)

    def lap(name):
        seconds[name] = time.perf_counter() - start - sum(seconds.values())

    run = grpo.Run(cfg, train=False)
    heldout = R.load_rewards(cfg.rewards.heldout, "cpu" if cfg.offload else run.device)
    lap("load")
    contestants, missing = gather(run, cfg, prompts, folder)
    lap("draw")
    values, features = detect(run, cfg, contestants, heldout)
    scores, difference, real = detector_scoring(cfg, values, features)
    result = {
        "pictures": len(prompts) * cfg.bench.images,
        "missing": missing,
        "scores": scores,
        "difference": difference,
    }
    if categories:
        result["categories"] = by_category(cfg, values, contestants, prompts, categories)
    lap("score")
    judge, pictures = (
        Judge(cfg.bench.judge, folder, realness(values, contestants), run.device),
        opponents(contestants, prompts),
    )
    found, share, results = arena_scoring(cfg, judge, pictures, prompts, votes)
    for name, v in share.items():
        real[name]["judge"] = v
    result |= {"real": real} | found
    lap("judge")
    if cfg.bench.selftest:
        result["selftest"] = selftest(run, cfg, judge, contestants["photographs"], heldout, folder)
        lap("selftest")
    result["judge"] = summary(judge, results)
    report(cfg, result, gallery(cfg, pictures, prompts, values, contestants, folder))
    print("\n".join(markdown(result)))
    print(
        f"{result['pictures']} pictures per contestant, {len(features['photographs'])} photographs; 95% intervals. "
        + f"seconds: {', '.join(f'{n} {s:.0f}' for n, s in seconds.items())}; in all {sum(seconds.values()):.0f}. "
        + f"Peak memory {grpo.peak_memory():.1f} GiB."
    )
    print(f"wrote {cfg.out}/bench.json, {cfg.out}/bench.md and {cfg.out}/bench.html, which is also the voting page")


# ---------------------------------------------------------------- bench.html

TEMPLATE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>RealBench</title>
<style>
:root { color-scheme: light dark; --bg: #fbfaf8; --card: #fff; --ink: #1d1d1f; --soft: #6b6b70; --line: #e2e0db; --mark: #2f6f4f; --warm: #b4552d; }
@media (prefers-color-scheme: dark) { :root { --bg: #141416; --card: #1d1d20; --ink: #ececee; --soft: #9a9aa2; --line: #34343a; --mark: #6fc79a; --warm: #e58a5f; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem; margin: .5rem 0 0 } h2 { font-size: 1.1rem; margin: 0 0 .6rem }
p { margin: .3rem 0 } .soft { color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: .5rem 0; position: sticky; top: 0; background: var(--bg); z-index: 3 }
a { color: var(--mark) }
section, #tables { scroll-margin-top: 3rem } section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: 1rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { text-align: right; padding: .3rem .45rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card) }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid var(--mark) }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
td small { display: block; color: var(--soft); font-size: .78em; line-height: 1.1 }
svg text { fill: var(--ink); font-size: 13px } svg .soft { fill: var(--soft); font-size: 11px }
.pictures td, .pictures th { text-align: center; padding: .2rem; border: 0 }
.pictures td:first-child, .pictures th:first-child { text-align: left; white-space: normal; min-width: 6.5rem; max-width: 12rem; font-size: .85rem }
.pictures img { width: clamp(60px, 13vw, 150px); border-radius: 4px; display: block; margin: auto; cursor: pointer }
img { image-rendering: auto } img.small { image-rendering: pixelated }
#tip { position: fixed; z-index: 9; pointer-events: none; background: var(--ink); color: var(--bg); border-radius: 6px; padding: .4rem .6rem; font-size: .8rem; display: none; font-variant-numeric: tabular-nums }
#tip div { display: flex; justify-content: space-between; gap: 1rem }
.controls { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin-bottom: .6rem }
select, .button { font: inherit; color: inherit; background: var(--bg); border: 1px solid var(--line); border-radius: 6px; padding: .3rem .7rem; max-width: 100% }
.button { cursor: pointer } .button:hover { border-color: var(--mark) }
#stack { position: relative; width: min(100%, 420px); aspect-ratio: 1; overflow: hidden; border-radius: 8px; touch-action: pan-y }
#stack img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain }
#after { clip-path: inset(0 0 0 var(--cut, 50%)) }
#stack i { position: absolute; top: 0; bottom: 0; left: var(--cut, 50%); width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 4px #000 }
#cut { width: min(100%, 420px); display: block; accent-color: var(--mark) }
#ballot { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; max-width: 820px; margin: auto }
#ballot button { all: unset; cursor: pointer; border: 3px solid transparent; border-radius: 10px; overflow: hidden }
#ballot button:hover, #ballot button:focus-visible { border-color: var(--mark) } #ballot img { width: 100%; display: block }
body.voting main > :not(#vote) { display: none } body:not(.voting) #booth { display: none } body.voting #open { display: none }
progress { width: 100%; accent-color: var(--mark) }
</style>
<main>
<header><h1>RealBench</h1><p class="soft" id="about"></p></header>
<nav><a href="#rating">Rating</a><a href="#tables">Tables</a><a href="#pictures">Pictures</a><a href="#slider">Before/after</a><a href="#vote">Vote</a></nav>
<section id="rating"><h2>Arena rating</h2><div class="wide" id="plot"></div><p class="soft" id="judge"></p></section>
<div id="tables"></div>
<section id="pictures"><h2>The same prompt, by contestant</h2><p class="soft">Hover or tap a picture for its scores.</p><div class="wide" id="grid"></div></section>
<section id="slider"><h2>Before/after</h2>
<div class="controls"><select id="left" aria-label="left picture"></select><select id="right" aria-label="right picture"></select><select id="which" aria-label="prompt"></select></div>
<div id="stack"><img id="before" alt="left"><img id="after" alt="right"><i></i></div><input id="cut" type="range" min="0" max="100" value="50" aria-label="divider"></section>
<section id="vote"><h2>Vote: which one looks more like an unedited photograph?</h2>
<div id="open"><p>Pairs come blind, in random order and on random sides. The saved file goes into <code>bench.human</code>.</p><p><button class="button" id="start">Start voting</button></p></div>
<div id="booth"><p id="prompt"></p><div id="ballot"><button id="voteleft" aria-label="left"><img alt="left picture"></button><button id="voteright" aria-label="right"><img alt="right picture"></button></div>
<div class="controls" style="margin-top:.6rem"><button class="button" id="tie">Cannot tell (↓)</button><button class="button" id="undo">Back (Backspace)</button><button class="button" id="save">Save votes.csv</button><button class="button" id="stop">Results</button></div>
<progress id="done" value="0"></progress><p class="soft" id="count"></p></div></section>
</main>
<div id="tip"></div>
<script type="application/json" id="data">DATA</script>
<script>
"use strict"
const { result, gallery } = JSON.parse(document.getElementById("data").textContent)
const $ = id => document.getElementById(id)
const make = (tag, parent, text, attributes = {}) => {
  const node = document.createElement(tag)
  if (text !== undefined) node.textContent = text
  Object.entries(attributes).forEach(([k, v]) => node.setAttribute(k, v))
  parent?.append(node)
  return node
}
const names = Object.keys(result.rating), fixed = (x, d) => x.toFixed(d).replace("-", "\u2212")
$("about").textContent = `${result.pictures} pictures per own contestant; mean and 95% interval` +
  Object.entries(result.missing).map(([n, m]) => `; ${n}: ${m.length} pictures missing`).join("")

// ---- rating plot
{
  const rows = names.map(n => [n, result.rating[n]]).sort((a, b) => b[1].mean - a[1].mean)
  const spread = Math.max(...rows.map(r => r[1].high)) - Math.min(...rows.map(r => r[1].low)), step = [20, 50, 100, 200, 500].find(s => spread / s < 5) ?? 1000
  const low = Math.floor(Math.min(...rows.map(r => r[1].low)) / step) * step, high = Math.ceil(Math.max(...rows.map(r => r[1].high)) / step) * step
  const x = v => 120 + 290 * (v - low) / (high - low || 1), height = rows.length * 30 + 30
  const ticks = [...Array((high - low) / step + 1)].map((_, i) => low + i * step)
  $("plot").innerHTML = `<svg viewBox="0 0 460 ${height}" style="width:100%;max-width:600px" role="img" aria-label="ratings with intervals">` +
    ticks.map(t => `<line x1="${x(t)}" x2="${x(t)}" y1="0" y2="${height - 24}" stroke="var(--line)"/><text class="soft" x="${x(t)}" y="${height - 6}" text-anchor="middle">${fixed(t, 0)}</text>`).join("") +
    rows.map(([n, v], i) => `<g transform="translate(0 ${i * 30 + 16})"><text class="name" y="5"></text><line x1="${x(v.low)}" x2="${x(v.high)}" stroke="var(--mark)" stroke-width="3" stroke-linecap="round"/><circle cx="${x(v.mean)}" r="5" fill="var(--mark)"/><text x="${x(v.high) + 8}" y="5">${fixed(v.mean, 0)}</text></g>`).join("") + "</svg>"
  $("plot").querySelectorAll(".name").forEach((node, i) => node.textContent = rows[i][0])
  const j = result.judge, percent = v => v === null ? "no answer" : `${fixed(100 * v, 1)}%`
  $("judge").textContent = `Judge ${j.name}: ${j.pairs} pairs in both orders, ${j.unparsed} replies unparsed, ${j.failed} failed. ` +
    `It names the first picture in ${percent(j.position_bias)} of its answers (50% is no bias) and changes its answer with the order in ${percent(j.order_changed)} of the pairs.`
}

// ---- tables: cells are {mean, low, high}, numbers or words; a click on a head sorts
function table(title, heads, rows, digits = 3, sign = false, note) {
  const section = make("section", $("tables")), wrap = (make("h2", section, title), make("div", section, undefined, { class: "wide" }))
  const node = make("table", wrap), head = make("tr", make("thead", node)), body = make("tbody", node)
  const plus = (v, d = digits) => (sign && v > 0 ? "+" : "") + fixed(v, d)
  rows.forEach(row => {
    const line = make("tr", body)
    row.forEach(v => {
      const cell = make("td", line, v == null ? "" : v.mean !== undefined ? plus(v.mean) : typeof v === "number" ? plus(v) : v)
      if (v?.low != null) make("small", cell, `${plus(v.low)} to ${plus(v.high)}`)
      cell.value = v?.mean ?? v ?? null
    })
  })
  heads.forEach((h, column) => {
    const th = make("th", head)
    make("button", th, h).onclick = () => {
      const down = th.getAttribute("aria-sort") !== "descending"
      head.querySelectorAll("th").forEach(t => t.removeAttribute("aria-sort"))
      th.setAttribute("aria-sort", down ? "descending" : "ascending")
      const value = line => line.children[column].value
      const compare = (a, b) => value(a) === null ? 1 : value(b) === null ? -1 : (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0) * (down ? -1 : 1)
      body.append(...[...body.children].sort(compare))
    }
  })
  if (note) make("p", section, note, { class: "soft" })
}
const grid = (title, data, ...rest) => {
  const heads = [...new Set(Object.values(data).flatMap(Object.keys))]
  if (heads.length) table(title, ["contestant", ...heads], Object.entries(data).map(([n, row]) => [n, ...heads.map(h => row[h])]), ...rest)
}
grid("Detector-Scoring", result.scores, 3, false, "Detectors give P(real), alignment a cosine; kid is the distance to the photographs, lower is better.")
grid("Difference to base, paired by prompt", Object.fromEntries(Object.entries(result.difference).filter(([n]) => n !== "base")), 3, true)
grid("Share judged real", result.real)
Object.entries(result.categories ?? {}).forEach(([c, data]) => grid(`Category ${c}`, data))
table("Arena: how often the row beats the column", ["contestant", ...names], names.map(a => [a, ...names.map(b => {
  const v = result.arena[a]?.[b]
  return v && { mean: v.rate, low: v.low, high: v.high }
})]), 2, false, "A tie is half a win. Against photographs, 0.50 means that the judge cannot tell them apart.")
if (result.human) {
  const h = result.human
  table("People and the arena", ["votes", "compared", "tau-b", "rho", "agreement"], [[String(h.votes), String(h.compared), h.tau, h.rho, h.agreement]], 2)
  table("Rating by people", ["contestant", "rating"], Object.entries(h.rating), 0)
}
if (result.selftest) table("Selftest: spoiled photographs must rank below untouched ones", ["distortion", "measure", "untouched", "weak", "middle", "strong", "tau-b", "verdict"],
  Object.entries(result.selftest).flatMap(([d, m]) => Object.entries(m).map(([n, v]) => [d, n, ...v.levels.map(x => n === "arena" ? Math.round(x) + "" : x), v.tau, v.ordered ? "ordered" : v.below ? "below" : "fails"])))

// ---- gallery
const sized = image => image.onload = () => image.classList.toggle("small", image.naturalWidth < 200)
{
  const node = make("table", $("grid"), undefined, { class: "pictures" }), head = make("tr", make("thead", node)), body = make("tbody", node), tip = $("tip")
  make("th", head, "prompt")
  names.forEach(n => make("th", head, n))
  gallery.forEach(row => {
    const line = make("tr", body)
    make("td", line, row.prompt)
    names.forEach(n => {
      const cell = make("td", line), p = row.pictures[n]
      if (!p) return make("span", cell, "missing", { class: "soft" })
      const image = make("img", cell, undefined, { alt: `${n}: ${row.prompt}`, tabindex: 0 })
      sized(image)
      image.src = p.url
      const show = event => {
        tip.replaceChildren(make("b", null, n))
        Object.entries(p.scores).forEach(([k, v]) => { const d = make("div", tip); make("span", d, k); make("span", d, fixed(v, 3)) })
        tip.style.display = "block"
        const box = image.getBoundingClientRect(), w = tip.offsetWidth, h = tip.offsetHeight
        tip.style.left = Math.max(4, Math.min(innerWidth - w - 4, box.left + box.width / 2 - w / 2)) + "px"
        tip.style.top = (box.top > h + 8 ? box.top - h - 6 : Math.min(box.bottom + 6, innerHeight - h - 4)) + "px"
        event.stopPropagation()
      }
      for (const kind of ["pointerenter", "click", "focus"]) image.addEventListener(kind, show)
      for (const kind of ["pointerleave", "blur"]) image.addEventListener(kind, e => { if (e.pointerType !== "touch") tip.style.display = "none" })
    })
  })
  for (const kind of ["click", "scroll"]) addEventListener(kind, () => tip.style.display = "none", true)
}

// ---- before/after slider
{
  const pick = ["left", "right"].map(id => (names.forEach(n => make("option", $(id), n)), $(id)))
  gallery.forEach((row, i) => make("option", $("which"), `${i + 1}. ${row.prompt}`, { value: i }))
  pick[0].value = "base"
  pick[1].value = names.includes("both") ? "both" : "generator"
  sized($("before")); sized($("after"))
  const show = () => ["before", "after"].forEach((id, i) => { $(id).src = gallery[$("which").value].pictures[pick[i].value]?.url ?? "data:," })
  const cut = percent => { $("stack").style.setProperty("--cut", percent + "%"); $("cut").value = percent }
  $("cut").oninput = () => cut($("cut").value)
  $("stack").onpointermove = e => {
    const box = $("stack").getBoundingClientRect()
    if (e.pointerType === "mouse" || e.buttons) cut(Math.max(0, Math.min(100, 100 * (e.clientX - box.left) / box.width)))
  }
  for (const node of [...pick, $("which")]) node.onchange = show
  if (gallery.length) show()
}

// ---- voting
{
  const pairs = gallery.flatMap(row => names.flatMap((a, i) => names.slice(i + 1).filter(b => row.pictures[a] && row.pictures[b]).map(b => [row, ...(Math.random() < .5 ? [a, b] : [b, a])])))
  for (let i = pairs.length - 1; i > 0; i--) { const j = Math.floor(Math.random() * (i + 1)); [pairs[i], pairs[j]] = [pairs[j], pairs[i]] }
  const [one, two] = ["voteleft", "voteright"].map(id => $(id).firstChild), votes = []
  sized(one); sized(two)
  let saved = true
  const show = () => {
    const pair = pairs[votes.length]
    $("done").max = pairs.length
    $("done").value = votes.length
    $("count").textContent = `${votes.length} of ${pairs.length} pairs. Keys: ← left, → right, ↓ cannot tell, Backspace one back. You may stop at any time; save before you leave.`
    $("ballot").style.visibility = pair ? "visible" : "hidden"
    $("prompt").textContent = pair ? pair[0].prompt : "That was the last pair. Save the file."
    if (pair) { one.src = pair[0].pictures[pair[1]].url; two.src = pair[0].pictures[pair[2]].url }
  }
  const vote = answer => { if (votes.length < pairs.length) { votes.push(answer); saved = false; show() } }
  const back = () => { votes.pop(); show() }
  const quote = text => `"${text.replaceAll('"', '""')}"`
  const save = () => {
    const lines = votes.map((v, i) => [quote(pairs[i][0].prompt), quote(pairs[i][1]), quote(pairs[i][2]), v].join(","))
    make("a", null, undefined, { download: "votes.csv", href: URL.createObjectURL(new Blob([["prompt,left,right,vote", ...lines, ""].join("\n")], { type: "text/csv" })) }).click()
    saved = true
  }
  const mode = on => { document.body.classList.toggle("voting", on); if (on) { show(); scrollTo(0, 0) } }
  $("start").onclick = () => mode(true)
  $("stop").onclick = () => mode(false)
  $("voteleft").onclick = () => vote("left")
  $("voteright").onclick = () => vote("right")
  $("tie").onclick = () => vote("tie")
  $("undo").onclick = back
  $("save").onclick = save
  const keys = { ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowDown: () => vote("tie"), Backspace: back }
  addEventListener("keydown", e => { if (document.body.classList.contains("voting") && keys[e.key] && !e.repeat) { e.preventDefault(); keys[e.key]() } })
  addEventListener("beforeunload", e => { if (!saved) e.preventDefault() })
}
</script>
</html>
"""

if __name__ == "__main__":
    grpo.cli(lambda: main(grpo.load_config(sys.argv[1:])))
