"""The folder of a run, <out>/: its lock, its log, and the checkpoints that it goes on from.

    metrics.jsonl, config.yaml, curves.png, samples/    for people
    generator/, refiner/                                LoRAs of the best look, for stock diffusers and peft
    checkpoint/<turn>.pt                                for resume=true, to the same result to the bit

A checkpoint holds no random generator: all that a step draws follows from (seed, iteration), see
common.rng.
"""

import importlib
import json
import os
import resource
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import diffusers
import filelock
import torch
import transformers
from omegaconf import OmegaConf
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import ranks
from common import ConfigError, check_finite, loading

# What the line of a step shows: figures whose names begin so. The others, loss and clip fraction among them,
# say little at a glance and stand in metrics.jsonl.
SHOWN = (
    "rewards/",
    "generator/kl",
    "generator/grad_norm",
    "refiner/kl",
    "refiner/grad_norm",
    "refiner/cue_share",
    "detectors/",
    "validation/",
)
# What a resumed run may change: where it runs, what it shows, and what only the bench reads. Everything else
# decides the result, and a mixture of two configs would be a result that nobody can repeat.
FREE = {
    "out",
    "resume",
    "device",
    "save_every",
    "micro_batch",
    "log",
    "bench",
    "test_prompts",
    "test_photos",
}


@contextmanager
def lock(cfg):
    """Inside, the folder is ours. One that is in use is never overwritten.

    The lock is the system's, and a process that was killed has let go of it, so nobody has to delete a file
    after a crash.
    """
    out = Path(cfg.out)
    if ranks.RANK:  # rank 0 writes and prints
        sys.stdout = open(os.devnull, "w")
        yield
        return
    if not cfg.resume and any(path.name != "run.lock" for path in out.glob("*")):
        raise ConfigError(
            f"out: {out} is in use; choose another with out=NAME, or go on with resume=true"
        )
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / "run.lock", blocking=False):
            yield
    except filelock.Timeout:
        raise ConfigError(
            f"out: another run is at work in {out}; choose another with out=NAME"
        ) from None


# ---------------------------------------------------------------- the log


def flat(row, prefix=""):
    """{"rewards": {"semantic": r}} -> {"rewards/semantic": r}, as trackers name what belongs together"""
    result = {}
    for key, value in row.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        else:
            result[prefix + key] = value
    return result


class Log:
    """metrics.jsonl, a line a step for people, the progress bar and, where `log` names one, a tracker.

    Every rank has one and calls it alike; that of rank 0 writes.
    """

    def __init__(self, run, rows):
        """rows: those of a resumed run, which are written again"""
        cfg = run.cfg
        self.rows = rows
        self.out = cfg.out
        self.tracker = None
        steps = sum(stage.steps for stage in cfg.stages)
        done = sum("reward" in row for row in rows)  # the others only looked
        self.bar = tqdm(total=steps, initial=done, desc="train", disable=ranks.RANK > 0)
        self.say = self.bar.write  # a line above the bar
        if ranks.RANK:
            self.file = open(os.devnull, "w")
            return
        for folder in ("samples", "checkpoint"):  # now: a start that failed has left nothing
            Path(cfg.out, folder).mkdir(exist_ok=True)
        # resolved: with profile and words in it, so that it alone says what ran
        OmegaConf.save(OmegaConf.create(asdict(cfg)), f"{cfg.out}/config.yaml")
        self.file = open(f"{cfg.out}/metrics.jsonl", "w")
        # rows after the checkpoint are forgotten: their steps are taken again
        self.file.writelines(json.dumps(row) + "\n" for row in rows)
        if cfg.log:  # wandb and trackio speak the same three calls
            with loading(f"log: {cfg.log}"):
                self.tracker = importlib.import_module(cfg.log)
                self.tracker.init(project="nanoRealGen", name=cfg.out, config=asdict(cfg))
        self.say(
            f"torch {torch.__version__}, diffusers {diffusers.__version__}, "
            f"transformers {transformers.__version__}; {run.device} x {ranks.WORLD}, {cfg.dtype}"
        )

    def seconds(self):
        """Since this process began to train; the bar has counted them"""
        return round(self.bar.format_dict["elapsed"], 3)

    def record(self, row):
        """A row of metrics, at its step; ConfigError where a policy has diverged"""
        row["seconds"] = self.seconds()
        row = json.loads(json.dumps(row), parse_constant=lambda _: None)  # JSON knows no NaN
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()  # a row is there for `tail -f`, and after a kill
        figures = flat(row)
        if self.tracker:
            self.tracker.log(figures, step=row["step"])
        parts = [
            f"{name} {value:.3g}"
            for name, value in figures.items()
            if name.startswith(SHOWN) and value is not None
        ]
        self.say(f"step {row['step']:4d} {row['stage']}: " + ", ".join(parts))
        self.bar.update("reward" in row)  # not by the row of a stage's end, which only looks
        for name in ("generator", "refiner"):
            # None is a NaN or infinity, and its update was left out; once may be chance
            norms = [row[name]["grad_norm"] for row in self.rows if name in row][-3:]
            if norms == [None] * 3:
                raise ConfigError(
                    f"{name}: three gradients in a row are not finite: it has diverged; lower its lr"
                )

    def close(self):
        """After an error too, so that a tracker does not show a dead run as one at work"""
        self.say(
            f"{self.seconds():.0f} seconds. Peak memory {peak_memory():.1f} GiB. Wrote {self.out}/"
        )
        self.bar.close()
        self.file.close()
        if self.tracker:
            self.tracker.finish()


def peak_memory():
    """GiB of this process; ru_maxrss is in bytes on macOS and in KiB elsewhere"""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---------------------------------------------------------------- checkpoints


def checkpoints(out):
    """The checkpoints of a run, newest first: their names are turns, with zeros in front"""
    return sorted((Path(out) / "checkpoint").glob("*.pt"), reverse=True)


def identity(cfg):
    """What a resumed run shares with its checkpoint: the config but FREE, and the words of its prompts"""
    values = {key: value for key, value in asdict(cfg).items() if key not in FREE}
    for key in ("prompts", "validation_prompts"):  # the words decide, wherever they lie
        values[key] = Path(values[key]).read_text()
    return values


def save_checkpoint(cfg, state, progress):
    """One file, written beside and renamed, so that each *.pt is whole; the last two stay.

    All ranks hold the same bits of what trains, so that rank 0's file is the checkpoint of all.
    """
    if ranks.RANK == 0:
        folder = Path(cfg.out) / "checkpoint"
        # A kill leaves the old ones, or the new one too: rename is atomic, and fsync puts the bytes
        # on the disk before the name.
        with open(folder / "writing", "wb") as file:
            torch.save({"identity": identity(cfg), "state": state, "progress": progress}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "writing", folder / f"{progress['turn']:06d}.pt")
        for old in checkpoints(cfg.out)[2:]:
            old.unlink()


def load_checkpoint(cfg, restore):
    """restore(state) of the newest checkpoint that can be read -> its progress

    A disk that was full or a machine that lost power may have damaged the newest: the one before costs some
    steps, a training on garbage costs the run.
    """
    for path in checkpoints(cfg.out):
        try:
            with loading(path):
                # torch writes a zip file with checksums and does not look at them when it reads
                if zipfile.ZipFile(path).testzip():
                    raise ConfigError(f"{path}: its checksums do not match")
                saved = torch.load(path, map_location="cpu", weights_only=True)  # tensors, no code
                check_finite(path, dict(enumerate(tree_leaves(saved))))
                theirs = saved["identity"]
                changed = [key for key, ours in identity(cfg).items() if theirs.get(key) != ours]
                if not changed:
                    restore(saved["state"])
        except ConfigError as error:
            print(f"resume: {error}; falls back to the one before")
            continue
        if changed:  # no damage, and the one before would say the same
            raise ConfigError(
                f"resume: {changed[0]} is not what {path} was written with; set it back, or train anew with "
                "out=NAME"
            )
        print(f"resume: goes on from {path}")
        return saved["progress"]
    raise ConfigError(f"resume: no checkpoint of {cfg.out} can be read; train anew with out=NAME")
