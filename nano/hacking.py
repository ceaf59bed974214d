"""Why detectors should learn: the same training against frozen and against learning ones, judged by others.

    python nano/hacking.py                                            3 seeds, 48 steps, frozen and learning
    python nano/hacking.py --steps 2 --seeds 1 --figure out/h.png     does it run?
    python nano/hacking.py generator.beta=0.08 --out out/kl           any key of config.yaml, for both

Both start from the same weights and draw the same noise; `profiles.v2` of config.yaml is all they differ by.
Alignment pays nothing and the KL is weak, so that a frozen detector is gamed. grpo.train loads no held-out
detector: each look at the validation prompts leaves its LoRA in <out>/<run>/looks/, and afterwards test
prompts are drawn with it, the same noise for all, and judged: by the held-out detectors as they are, by the
same once they have learnt such pictures (`taught`), by naturalness, which knows no fakes, and by KID. Each run
is a process of its own, as many at a time as there are cores; what it prints stands in <out>/<run>.log. A
finished run is not run again. Writes <out>/<run>/looks.json and the figure, prints a table.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import bench
import grpo
import reward as R
from common import ConfigError, rng
from learner import Learner, Photographs, UpdateConfig
from plots import save_grid

KINDS = ("frozen", "learning")
LESSON = UpdateConfig(lr=3e-4, batch_size=16, replay=0, ema=0.9)
# alignment is scored and shown, but pays nothing; the KL is weak: the detectors alone hold the policy back
WORDS = [
    "stages=[{{train: generator, steps: {}, prompts: 6, rewrites: 0, images: 12, keep_original: true}}]",
    "refiner=null", "rewards.train.alignment.weight=0", "keep_within.alignment=9",
    "generator.beta=0.01", "generator.ema=0.9", "eval_every=8", "bench.images=4",
]  # fmt: skip


class Watched(grpo.Run):
    """A run that leaves the LoRA of each look behind, the EMA that drew it"""

    def evaluate(self, stage):
        folder = Path(self.cfg.out) / "looks"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.generator.ema, folder / f"{len(list(folder.iterdir())):05d}.safetensors")
        return super().evaluate(stage)


def config(args, kind, seed):
    profile = ["profile=v2"] if kind == "learning" else []
    ours = [f"out={args.out}/{kind}{seed}", f"seed={seed}", WORDS[0].format(args.steps), *WORDS[1:]]
    return grpo.load_config(["config.yaml", *profile, *ours, *args.words], bench.Config)


def rows_of(cfg):
    return [json.loads(line) for line in (Path(cfg.out) / "metrics.jsonl").read_text().splitlines()]


def finished(cfg):
    """True for a run that is complete; ConfigError for what an interrupted or another one left"""
    out = Path(cfg.out)
    if not out.exists():
        return False
    if not (out / "generator").is_dir() or grpo.load_config([str(out / "config.yaml")], bench.Config) != cfg:
        raise ConfigError(
            f"{out} holds an unfinished run or one of another config; remove it, or choose another --out"
        )
    return True


def taught(cfg, images, prompts, photos, lessons):
    """Pictures (P*M,3,H,W) of P prompts -> (P, M), the held-out detectors' mean of wins against photographs

    Each detector first takes `lessons` steps of the update that profiles.v2 is made of, against the pictures
    of the other half of the prompts. A win: it puts the picture above a photograph that it has not learnt from.
    0.5: it cannot tell them apart.
    """
    held_out = {name: cfg.rewards.heldout[name] for name in cfg.bench.axes["realism"]}
    wins = torch.zeros(len(held_out), len(prompts), len(images) // len(prompts))
    pictures = list(zip(R.as_bytes(images), [p for p in prompts for _ in range(wins.shape[2])]))
    numbers = torch.arange(len(pictures)).view(wins.shape[1:])  # (P, M)
    for d, (name, config) in enumerate(held_out.items()):
        for half in range(2):
            noise = rng("lesson", half)
            reward = R.load_rewards({name: config})
            learner = Learner(name, reward[name], LESSON, photos)
            fresh, held = ([pictures[i] for i in numbers[n::2].flatten()] for n in (half, 1 - half))
            for _ in range(lessons):
                learner.train_step(fresh, noise)
            both, texts, _ = photos.beside(held, noise, held_back=True)  # as many photographs as pictures
            of_pictures, of_photos = R.score(reward, both, texts, cfg.micro_batch)[name].chunk(
                2
            )  # (P/2*M,) each
            wins[d, 1 - half :: 2] = (
                (of_pictures[:, None] > of_photos).float().mean(1).view(-1, wins.shape[2])
            )
    return wins.mean(0)


def measure(cfg, lessons):
    """Each look of a run on the test prompts -> files in its folder

    looks.json: `steps`, `scores` {metric: (looks, prompts, images)}, `taught` at every second look and
    NaN at the others, `photographs` {metric: mean}. looks.safetensors: features for the KID, `pictures` (looks, prompts,
    images, D) and `photographs` (n, D). start.png, end.png: a picture of each prompt.
    """
    run, out = grpo.Run(cfg, train=False), Path(cfg.out)
    run.generator.add_lora(cfg.seed)
    rewards = run.rewards | run.validation | R.load_rewards(cfg.rewards.heldout, run.device)
    size = cfg.generator.height, cfg.generator.width
    photos, texts = R.read_photos(cfg.test_photos, size)
    photos, learn_from = run.real(photos), Photographs(cfg.photos, size, run.real)
    prompts, M = grpo.read_prompts(cfg.test_prompts), cfg.bench.images
    owners = [p for p in prompts for _ in range(M)]
    # the noise of bench.py's pictures
    keys = [("bench", p, m) for p in range(len(prompts)) for m in range(M)]
    result = {"steps": [r["step"] for r in rows_of(cfg) if "validation" in r], "scores": {}, "features": []}
    result["photographs"] = {n: v.mean().item() for n, v in run.score(rewards, photos, texts).items()}
    looks = sorted((out / "looks").iterdir())
    for number, look in enumerate(tqdm(looks, desc="looks")):
        for name, tensor in load_file(look).items():
            run.generator.lora[name].data.copy_(tensor)
        images, _ = run.generator.rollout(owners, keys)  # (P*M, 3, H, W)
        scores = {n: v.view(-1, M) for n, v in run.score(rewards, images, owners).items()}
        slow = number % 2 == 0 or look == looks[-1]  # lessons take most of the time
        scores["taught"] = (
            taught(cfg, images, prompts, learn_from, lessons)
            if slow
            else torch.full((len(prompts), M), torch.nan)
        )
        for name, values in scores.items():
            result["scores"].setdefault(name, []).append(values.tolist())
        result["features"].append(run.features(images).unflatten(0, (-1, M)))
        if look in (looks[0], looks[-1]):
            save_grid(R.as_bytes(images[::M]), out / ("start.png" if look == looks[0] else "end.png"), 8)
    save_file(
        {"pictures": torch.stack(result.pop("features")), "photographs": run.features(photos)},
        out / "looks.safetensors",
    )
    (out / "looks.json").write_text(json.dumps(result))


def train_and_measure(cfg, lessons):
    """What one process does"""
    grpo.Run = Watched  # what grpo.train makes
    if not finished(cfg):
        grpo.train(cfg)
    if not (Path(cfg.out) / "looks.json").exists():
        measure(cfg, lessons)


def launch(cfg, one, threads):
    """train_and_measure in a process of its own, which prints to <run>.log beside its folder"""
    log = Path(f"{cfg.out}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--one", *map(str, one)]
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        last = (log.read_text().strip() or "it printed nothing").splitlines()[-1]
        raise ConfigError(f"{cfg.out}: its process ended with {code}: {last}")


def collect(cfgs):
    """-> {kind: figures}

    metric: (seeds, looks, prompts, images), `heldout` the mean of those. `kid`, and `validation kid` as
    training looked: (seeds, looks). `trained` (seeds, trained steps): mean of the detectors that learn in one of
    the two, as training scored its own pictures. `features`: as `measure` writes them, (seeds, looks, prompts,
    images, D).
    `photographs`: {metric: mean}, and their features.
    """
    learn = list(cfgs["learning", 0].learners)
    held = cfgs["frozen", 0].bench.axes["realism"]
    found = {}
    for kind in KINDS:
        of_kind = [c for (k, _), c in cfgs.items() if k == kind]
        looks = [json.loads((Path(c.out) / "looks.json").read_text()) for c in of_kind]
        files = [load_file(Path(c.out) / "looks.safetensors") for c in of_kind]
        validation = [[r["validation"]["kid"] for r in rows_of(c) if "validation" in r] for c in of_kind]
        rows = [[r for r in rows_of(c) if "reward" in r] for c in of_kind]
        one = {n: np.array([look["scores"][n] for look in looks]) for n in looks[0]["scores"]}
        one["heldout"] = np.mean([one[n] for n in held], 0)
        one["features"], real = torch.stack([f["pictures"] for f in files]), files[0]["photographs"]
        prompts, images = one["features"].shape[2:4]
        units = torch.arange(prompts).repeat_interleave(images)
        one["kid"] = np.array([[R.kid(x.flatten(0, 1), real, units) for x in run] for run in one["features"]])
        one["validation kid"] = np.array(validation)  # on validation prompts, to validation photographs
        one["trained"] = np.array([[np.mean([r["rewards"][n] for n in learn]) for r in run] for run in rows])
        one["steps"], one["trained steps"] = looks[0]["steps"], [r["step"] for r in rows[0]]
        one["photographs"] = looks[0]["photographs"] | {"taught": 0.5, "kid": 0.0, "features": real}
        one["photographs"]["heldout"] = np.mean([one["photographs"][n] for n in held])
        found[kind] = one
    return found


def difference(found, name, one, other):
    """Means over seeds of two (kind, look), their difference, its interval, which leaves out test prompts"""
    a, b = (found[kind]["features" if name == "kid" else name][:, look] for kind, look in (one, other))
    if name == "kid":
        real = found["frozen"]["photographs"]["features"]  # (n, D)
        units = torch.arange(a.shape[1]).repeat_interleave(a.shape[2]).repeat(a.shape[0])
        draws = [bench.kid_draws(R.mean_kernels(side.flatten(0, 2), real, units)) for side in (a, b)]
        v = bench.interval(*[x - y for x, y in zip(*draws)])
        seeds = found[one[0]]["kid"][:, one[1]] - found[other[0]]["kid"][:, other[1]]
    else:
        v, seeds = (
            bench.mean_interval([(p, d) for (_, p, _), d in np.ndenumerate(a - b)]),
            (a - b).mean((1, 2)),
        )
    each = ", ".join(f"{x:+.3f}" for x in seeds)
    return f"{v['mean']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}] (seeds {each})"


def table(found):
    """Lines of Markdown: means over seeds, differences with 95% intervals"""
    frozen, learning, real = found["frozen"], found["learning"], found["frozen"]["photographs"]
    lines = [
        "| | start | frozen, end | learning, end | photographs | learning: end - start | end: learning - frozen |",
        "|---" * 7 + "|",
    ]
    for name in [n for n in frozen if n in real and n != "features"]:
        cells = [f"{v.mean():.3f}" for v in (frozen[name][:, 0], frozen[name][:, -1], learning[name][:, -1])]
        cells += [f"{real[name]:.3f}", difference(found, name, ("learning", -1), ("learning", 0))]
        cells += [difference(found, name, ("learning", -1), ("frozen", -1))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    start, end, ours = (
        found[kind]["validation kid"][:, look]
        for kind, look in (("frozen", 0), ("frozen", -1), ("learning", -1))
    )
    seeds = [
        f"{d.mean():+.3f} (seeds {', '.join(f'{x:+.3f}' for x in d)})" for d in (ours - start, ours - end)
    ]
    cells = [*(f"{v.mean():.3f}" for v in (start, end, ours)), "", *seeds]
    return [*lines, "| validation kid | " + " | ".join(cells) + " |"]


def figure(found, cfgs, path):
    """Above, five panels over steps, thin lines are seeds, thick ones means; below, pictures of the first seed"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "trained": "trained detectors, P(real), each step's pictures",
        "heldout": "held-out detectors, P(real)",
        "naturalness": "naturalness",
        "taught": "held-out detectors once taught: wins",
        "kid": "KID, lower is better",
    }
    shape = plt.figure(figsize=(18, 7.4))
    above = shape.add_gridspec(1, 5, left=0.03, right=0.99, top=0.95, bottom=0.52, wspace=0.15).subplots()
    below = shape.add_gridspec(1, 3, left=0.01, right=0.99, top=0.42, bottom=0.01, wspace=0.02).subplots()
    for axis, (name, title) in zip(above, panels.items()):
        for kind, colour in zip(KINDS, ("tab:red", "tab:blue")):
            one = found[kind]
            values = one[name].reshape(*one[name].shape[:2], -1).mean(2)  # (seeds, steps or looks)
            there = ~np.isnan(values[0])
            steps = np.array(one["trained steps" if name == "trained" else "steps"])[there]
            axis.plot(steps, values.T[there], color=colour, lw=0.6, alpha=0.5)
            axis.plot(steps, values.mean(0)[there], "o-", color=colour, ms=3, label=f"{kind} detectors")
        if name in one["photographs"]:
            axis.axhline(one["photographs"][name], color="gray", ls=":", label="photographs")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.2)
    above[1].legend(frameon=False)
    ends = {
        "start": ("frozen", "start"),
        "end, frozen detectors": ("frozen", "end"),
        "end, learning detectors": ("learning", "end"),
    }
    for axis, (title, (kind, file)) in zip(below, ends.items()):
        axis.imshow(plt.imread(Path(cfgs[kind, 0].out) / f"{file}.png"))
        axis.set(title=title, xticks=[], yticks=[])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    shape.savefig(path, dpi=70)
    plt.close(shape)


def main(args):
    cfgs = {(kind, seed): config(args, kind, seed) for seed in range(args.seeds) for kind in KINDS}
    if args.one:
        return train_and_measure(cfgs[args.one[0], int(args.one[1])], args.lessons)
    todo = {
        one: cfg
        for one, cfg in cfgs.items()
        if not finished(cfg) or not (Path(cfg.out) / "looks.json").exists()
    }
    jobs = min(os.cpu_count(), len(todo)) or 1
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), desc="runs", disable=not todo) as bar:
        runs = [pool.submit(launch, cfg, one, os.cpu_count() // jobs) for one, cfg in todo.items()]
        try:
            for run in as_completed(runs):
                bar.update()
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error no other run begins
    found = collect(cfgs)
    figure(found, cfgs, args.figure)
    print("\n".join(table(found)))
    print(f"wrote {args.figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="key=value of config.yaml, for both kinds")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--lessons", type=int, default=20, help="optimizer steps that held-out detectors are taught with"
    )
    parser.add_argument("--out", default="out/hacking")
    parser.add_argument("--figure", default="assets/hacking.png")
    # kind and seed: the processes that this one starts
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    grpo.cli(lambda: main(parser.parse_args()))
