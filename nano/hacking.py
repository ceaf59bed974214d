"""Why detectors should learn: the same training against frozen and against learning detectors, told apart by detectors that neither saw.

    python nano/hacking.py                                            3 seeds, 60 steps, frozen and learning
    python nano/hacking.py --steps 2 --seeds 1 --figure out/h.png     does it run?
    python nano/hacking.py generator.beta=0.1 --out out/kl            any key of config.yaml, for both

Both start from the same weights and draw the same noise; `profiles.v2` of config.yaml is all they differ by. The stage is longer than
the default one, with the KL off, so that a frozen detector is gamed. grpo.train loads no held-out detector: each look at the validation
prompts leaves its LoRA in <out>/<run>/looks/, and afterwards this script draws test prompts with it, the same noise for all.
A finished run is not run again. Writes <out>/<run>/looks.json and the figure, prints a table.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file, save_file

import bench
import grpo
import reward as R

KINDS = ("frozen", "learning")
STAGE = "stages=[{{train: generator, steps: {}, prompts: 9, rewrites: 1, images: 12, keep_original: true}}]"


class Watched(grpo.Run):
    """A run that leaves the LoRA of each look behind, the EMA that drew it"""

    def evaluate(self, stage):
        folder = Path(self.cfg.out) / "looks"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.generator.ema, folder / f"{len(list(folder.iterdir())):05d}.safetensors")
        return super().evaluate(stage)


def config(args, kind, seed):
    profile = ["profile=v2"] if kind == "learning" else []
    ours = [f"out={args.out}/{kind}{seed}", f"seed={seed}", STAGE.format(args.steps), "refiner=null", "generator.beta=0", "eval_every=6"]
    return grpo.load_config(["config.yaml", *profile, *ours, *args.words])


def rows_of(cfg):
    return [json.loads(line) for line in (Path(cfg.out) / "metrics.jsonl").read_text().splitlines()]


def finished(cfg):
    """True for a run that is complete; ValueError for what an interrupted or another one left"""
    out = Path(cfg.out)
    if not out.exists():
        return False
    if not (out / "generator").is_dir() or grpo.load_config([str(out / "config.yaml")]) != cfg:
        raise ValueError(f"{out} holds an unfinished run or one of another config; remove it, or choose another --out")
    return True


def measure(args, cfgs):
    """Each look of each run on the test prompts -> writes <run>/looks.json: steps, {metric: (looks, prompts, images)}, kid (looks)"""
    todo = [cfg for cfg in cfgs.values() if not (Path(cfg.out) / "looks.json").exists()]
    if not todo:
        return
    cfg = cfgs["frozen", 0]
    run = grpo.Run(cfg, train=False)
    run.generator.add_lora(cfg.seed)
    rewards = run.rewards | run.validation | R.load_rewards(cfg.rewards.heldout, run.device)
    photos, _ = R.read_photos(cfg.test_photos, (cfg.generator.height, cfg.generator.width))
    real = run.features(run.real(photos))  # (n, D)
    prompts, M = grpo.read_prompts(cfg.test_prompts), cfg.bench.images
    owners = [p for p in prompts for _ in range(M)]
    for one in todo:
        result = {"steps": [r["step"] for r in rows_of(one) if "validation" in r], "scores": {}, "kid": []}
        for look in sorted((Path(one.out) / "looks").iterdir()):
            for name, tensor in load_file(look).items():
                run.generator.ema[name].copy_(tensor)
            images, _ = run.draw(prompts, M, bench.BENCH, False)  # (P*M, 3, H, W)
            for name, values in R.score(rewards, images, owners, cfg.micro_batch).items():
                result["scores"].setdefault(name, []).append(values.view(-1, M).tolist())
            result["kid"].append(R.kid(run.features(images), real))
        file = Path(one.out) / "looks.json"
        file.write_text(json.dumps(result))
        print(f"wrote {file}", flush=True)


def collect(cfgs):
    """-> {kind: {"steps", "trained steps", "trained" (seeds, steps), metric: (seeds, looks, prompts, images), "kid": (seeds, looks)}}

    `trained`: mean of the detectors that learn in one of the two, as training scored its own pictures. `heldout`: mean of those.
    """
    learn = [n for n, r in cfgs["learning", 0].rewards.train.items() if r.update]
    held = list(cfgs["frozen", 0].rewards.heldout)
    found = {}
    for kind in KINDS:
        of_kind = [c for (k, _), c in cfgs.items() if k == kind]
        looks = [json.loads((Path(c.out) / "looks.json").read_text()) for c in of_kind]
        rows = [[r for r in rows_of(c) if "reward" in r] for c in of_kind]
        found[kind] = {n: np.array([look["scores"][n] for look in looks]) for n in looks[0]["scores"]}
        found[kind]["heldout"] = np.mean([found[kind][n] for n in held], 0)
        found[kind]["kid"] = np.array([look["kid"] for look in looks])
        found[kind]["trained"] = np.array([[np.mean([r["rewards"][n] for n in learn]) for r in run] for run in rows])
        found[kind]["steps"], found[kind]["trained steps"] = looks[0]["steps"], [r["step"] for r in rows[0]]
    return found


def table(found):
    """Lines of Markdown. Intervals resample test prompts, pictures of all seeds pooled; the brackets' last part is each seed's mean."""
    frozen, learning = found["frozen"], found["learning"]
    lines = ["| | start | frozen, end | learning, end | learning: end - start | end: learning - frozen |", "|---" * 6 + "|"]
    for name in frozen:
        if name in ("steps", "trained steps", "trained", "kid"):
            continue
        start, end, ours = frozen[name][:, 0], frozen[name][:, -1], learning[name][:, -1]  # (seeds, prompts, images)
        cells = [f"{v.mean():.3f}" for v in (start, end, ours)]
        for change in (ours - learning[name][:, 0], ours - end):
            pooled = change.transpose(1, 0, 2).reshape(change.shape[1], -1)  # (prompts, seeds*images)
            v = bench.bootstrap(pooled, 1000, np.random.default_rng(bench.BENCH))
            seeds = ", ".join(f"{x:+.3f}" for x in change.mean((1, 2)))
            cells.append(f"{v['mean']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}] (seeds {seeds})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in ("trained", "kid"):
        start, end, ours = frozen[name][:, 0], frozen[name][:, -1], learning[name][:, -1]  # (seeds,)
        cells = [f"{v.mean():.3f}" for v in (start, end, ours)]
        cells += [f"{v.mean():+.3f} (seeds {', '.join(f'{x:+.3f}' for x in v)})"
                  for v in (ours - learning[name][:, 0], ours - end)]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def figure(found, path, validation):
    """Four panels over steps; thin lines are seeds, thick ones their mean"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"trained": "trained detectors, as training scored its own pictures", "validation": "validation detectors, test prompts",
              "heldout": "held-out detectors, test prompts", "kid": "KID to test photographs"}  # fmt: skip
    shape, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.2))
    for axis, (name, title) in zip(axes, panels.items()):
        for kind, colour in zip(KINDS, ("tab:red", "tab:blue")):
            one = found[kind]
            values = np.mean([one[n] for n in validation], 0) if name == "validation" else one[name]
            values = values.reshape(*values.shape[:2], -1).mean(2)  # (seeds, steps or looks)
            steps = one["trained steps" if name == "trained" else "steps"]
            axis.plot(steps, values.T, color=colour, lw=0.6, alpha=0.5)
            axis.plot(steps, values.mean(0), "o-", color=colour, ms=3, label=f"{kind} detectors")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False)
    shape.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    shape.savefig(path, dpi=80)
    plt.close(shape)


def main(args):
    cfgs = {(kind, seed): config(args, kind, seed) for seed in range(args.seeds) for kind in KINDS}
    todo = [cfg for cfg in cfgs.values() if not finished(cfg)]
    grpo.Run = Watched  # what grpo.train makes
    for cfg in todo:
        print(f"== {cfg.out}", flush=True)
        grpo.train(cfg)
    measure(args, cfgs)
    found = collect(cfgs)
    figure(found, args.figure, list(cfgs["frozen", 0].rewards.validation))
    print("\n".join(table(found)))
    print(f"wrote {args.figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="key=value of config.yaml, for both kinds")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="out/hacking")
    parser.add_argument("--figure", default="assets/hacking.png")
    grpo.cli(lambda: main(parser.parse_args()))
