"""RealBench, its Detector-Scoring part: did pictures become more real, and how sure is that?

    python bench.py config.yaml [key=value ...]        after python grpo.py config.yaml

The same test prompts and noise are drawn by four contestants, `base`, `refiner` (rewritten prompts, base generator), `generator` (plain
prompts, trained generator) and `both`, with Euler sampling; held-out `photographs` are scored beside them. Writes <out>/bench.json:

    scores.<contestant>.<metric>      {"mean", "low", "high"}    95% interval
    difference.<contestant>.<metric>  {"mean", "low", "high"}    contestant - base, paired by prompt

Metrics: each training reward (`alignment` is against the user's prompt), each held-out detector, `reward` (training rewards by weight),
`heldout` (mean of the held-out detectors), `kid` (to the photographs, lower is better). Intervals: prompts are resampled, not pictures, because pictures of one prompt are alike; for photographs,
pictures. KID is no mean, so its interval comes from random halves: a half drawn without replacement varies around the whole
as the whole varies around the truth.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import grpo
import reward as R

BENCH = 7919  # seed of the bench's noise: the same pictures are drawn whatever the seed of the run


def bootstrap(values, resamples, rng):
    """values (units, pictures) -> {"mean", "low", "high"}: percentile interval over resampled units"""
    units = np.asarray(values, dtype=np.float64).mean(1)  # (units,)
    means = units[rng.integers(0, len(units), (resamples, len(units)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(units.mean()), "low": float(low), "high": float(high)}


def kid_interval(features, base, photos, resamples, rng):
    """KID of features (units, pictures, D) to photos (m, D), and its difference to base's -> two {"mean", "low", "high"}"""

    def whole(x, rows, reals):
        return R.kid(x[rows].flatten(0, 1), photos[reals])

    everything = whole(features, slice(None), slice(None)), whole(base, slice(None), slice(None))
    draws = []
    for _ in range(min(resamples, 200)):
        rows = torch.from_numpy(rng.permutation(len(features))[: len(features) // 2])
        reals = torch.from_numpy(rng.permutation(len(photos))[: len(photos) // 2])
        draws.append((whole(features, rows, reals), whole(base, rows, reals)))
    draws = np.array(draws)  # (draws, 2)
    results = []
    for center, values in ((everything[0], draws[:, 0]), (everything[0] - everything[1], draws[:, 0] - draws[:, 1])):
        low, high = np.percentile(values - values.mean(), [2.5, 97.5]) + center
        results.append({"mean": float(center), "low": float(low), "high": float(high)})
    return results


def draw(run, cfg, prompts):
    """{contestant: pictures (P*M, 3, H, W)}, prompt-major, the same noise for all; trained weights come from <out>"""
    out, M = Path(cfg.out), cfg.bench.images
    contestants = {"base": run.draw(prompts, M, BENCH, False)[0]}
    if run.refiner:
        run.refiner.load_lora(out / "refiner")
        contestants["refiner"] = run.draw(prompts, M, BENCH, True)[0]
    run.generator.load_lora(out / "generator")
    contestants["generator"] = run.draw(prompts, M, BENCH, False)[0]
    if run.refiner:
        contestants["both"] = run.draw(prompts, M, BENCH, True)[0]
    return contestants


def score(run, cfg, contestants, photos, captions, prompts):
    """-> (scores, difference), see the module's docstring"""
    rewards = run.rewards | R.load_rewards(cfg.rewards.heldout, run.device)
    held, M = list(cfg.rewards.heldout), cfg.bench.images
    owners = [p for p in prompts for _ in range(M)]
    values, features = {}, {}
    for name, images in (contestants | {"photographs": photos}).items():
        texts = captions if name == "photographs" else owners
        raw = R.score(rewards, images, texts, cfg.micro_batch)
        raw["reward"] = run.combine(raw)
        if held:
            raw["heldout"] = torch.stack([raw[h] for h in held]).mean(0)
        values[name] = {m: v.view(-1, 1 if name == "photographs" else M).numpy() for m, v in raw.items()}
        features[name] = run.features(images)
    real = features.pop("photographs")
    scores, difference = {}, {}
    for name, metrics in values.items():
        rng = np.random.default_rng(BENCH)  # the same resamples for all contestants: differences are paired
        scores[name] = {m: bootstrap(v, cfg.bench.resamples, rng) for m, v in metrics.items()}
        if name == "photographs":
            continue
        difference[name] = {m: bootstrap(v - values["base"][m], cfg.bench.resamples, rng) for m, v in metrics.items()}
        shaped, base = (features[n].view(-1, M, real.shape[1]) for n in (name, "base"))
        scores[name]["kid"], difference[name]["kid"] = kid_interval(shaped, base, real, cfg.bench.resamples, rng)
    return scores, difference


def table(scores, difference):
    """Lines of a Markdown table: mean [low, high], then the paired difference to base"""
    metrics = list(next(iter(scores.values())))
    lines = ["| contestant | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]

    def cell(v, sign=""):
        return f"{v['mean']:{sign}.3f} [{v['low']:{sign}.3f}, {v['high']:{sign}.3f}]" if v else ""

    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(m)) for m in metrics) + " |")
    for name, row in difference.items():
        if name != "base":
            lines.append(f"| {name} - base | " + " | ".join(cell(row.get(m), "+") for m in metrics) + " |")
    return lines


def main(cfg):
    out, start, seconds = Path(cfg.out), time.perf_counter(), {}
    if not (out / "generator").is_dir():
        raise ValueError(
            f"out: {cfg.out} holds no trained generator; expected the folder of a finished run, python grpo.py config.yaml out={cfg.out}"
        )
    prompts = grpo.read_prompts(cfg.test_prompts)
    photos, captions = R.read_photos(cfg.test_photos, (cfg.generator.height, cfg.generator.width))

    def lap(name):
        seconds[name] = time.perf_counter() - start - sum(seconds.values())

    run = grpo.Run(cfg, train=False)
    photos = run.real(photos)
    lap("load")
    contestants = draw(run, cfg, prompts)
    lap("draw")
    scores, difference = score(run, cfg, contestants, photos, captions, prompts)
    lap("score")
    (out / "bench.json").write_text(
        json.dumps({"scores": scores, "difference": difference, "pictures": len(prompts) * cfg.bench.images}, indent=1)
    )
    rows = min(12, len(prompts))
    first = [images[:: cfg.bench.images][:rows] for images in contestants.values()] + [photos[:rows]]
    grpo.save_grid(torch.cat(first), out / "bench.png", rows)
    print("\n".join(table(scores, difference)))
    print(
        f"{len(prompts) * cfg.bench.images} pictures per contestant, {len(photos)} photographs; 95% intervals. seconds: "
        + ", ".join(f"{n} {s:.0f}" for n, s in seconds.items())
        + f"; in all {sum(seconds.values()):.0f}. Peak memory {grpo.peak_memory():.1f} GiB."
    )
    print(f"wrote {out}/bench.json and {out}/bench.png (rows: {', '.join(contestants)}, photographs)")


if __name__ == "__main__":
    grpo.cli(lambda: main(grpo.load_config(sys.argv[1:])))
