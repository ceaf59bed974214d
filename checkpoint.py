"""Checkpoints, from which an interrupted run goes on to the same result, bit for bit; the lock on its folder; its end.

    <out>/checkpoint/<training steps done>/
        tensors.safetensors    {name: tensor}: `Run.state`, and the best look's weights and pictures
        state.json             the config, how many rows metrics.jsonl has, and the rest

A checkpoint is written to a hidden folder, fsynced and renamed, so that a folder with a number for a name is whole; the
last two stay. Random generators have no state in it: all that a step draws follows from (seed, iteration), and for
rewards that draw from the global generators `seed_globals` sees to that.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

FORMAT = "nanoRealGen checkpoint 1"
KEEP = 2
LOCK = "run.lock"
# what a resumed run may change: where it runs, how often it saves, and what only the bench reads
FREE = ("out", "resume", "device", "save_every", "micro_batch")
FREE += ("bench", "test_prompts", "test_photos", "rewards.heldout")


def seed_globals(seed, iteration):
    """Seed the global generators of torch, numpy and Python from (seed, iteration), for rewards that draw from them."""
    value = int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0])
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


# ---------------------------------------------------------------- files


class Unreadable(ValueError):
    """A checkpoint that is cut short, not ours, or without its rows of metrics.jsonl"""


@contextmanager
def naming(path):
    """What cannot be written, on a full disk say, is a ValueError naming `path`, or an OSError with its own name."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None):
            raise
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def fsync(path):
    """File or folder: what was written to it is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(out):
    """The checkpoints of a run, newest first"""
    found = [p for p in Path(out, "checkpoint").glob("*") if p.name.isdigit()]
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def write(out, step, tensors, state):
    """{name: tensor} and a JSON-able dict -> <out>/checkpoint/<step>. On ValueError and OSError older ones stay."""
    folder = Path(out, "checkpoint")
    final, temporary = folder / f"{step:06d}", folder / ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    with naming(final):
        try:
            temporary.mkdir(parents=True)
            tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_file(tensors, temporary / "tensors.safetensors")
            (temporary / "state.json").write_text(json.dumps({"format": FORMAT} | state, default=str))
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            if final.exists():  # of the same step, so of the same content
                shutil.rmtree(final)
            temporary.rename(final)
            fsync(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for path in complete(out)[KEEP:]:
            shutil.rmtree(path)


def read(path):
    """-> tensors, state. Unreadable for a checkpoint that is cut short or not ours."""
    try:
        state = json.loads((path / "state.json").read_text())
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"state.json does not say {FORMAT!r}")
        return load((path / "tensors.safetensors").read_bytes()), state  # not mapped: the file may go
    except (OSError, ValueError, SafetensorError) as error:
        raise Unreadable(f"{path} cannot be read ({' '.join(str(error).split())[:200]})") from error


def read_rows(path, count):
    """The first `count` rows of metrics.jsonl, after which the file is cut off. Unreadable where there are fewer."""
    rows = []
    with open(path, "a+b") as file:  # a run that was killed early has none yet
        file.seek(0)
        for text in file:
            if len(rows) == count or not text.endswith(b"\n"):
                break
            rows.append(text)
        if len(rows) < count:
            raise Unreadable(f"{path} has {len(rows)} rows where the checkpoint counts {count}")
        if os.environ.get("RANK", "0") == "0":
            file.truncate(sum(map(len, rows)))
    return [json.loads(row) for row in rows]


def changed(old, new, where=""):
    """Two configs as nested dicts -> [(dotted key, old, new)] where they differ"""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {key: f"{where}.{key}" if where else key for key in old | new}
        return [c for key, path in keys.items() for c in changed(old.get(key), new.get(key), path)]
    return [] if old == new else [(where, old, new)]


def check_config(path, old, new):
    """ValueError for the first key, other than FREE, in which the config (a dict) is not the checkpoint's."""
    for key, was, now in changed(old, json.loads(json.dumps(new, default=str))):
        if not any(key == free or key.startswith(free + ".") for free in FREE):
            raise ValueError(
                f"resume: {key} is {now!r}, but {path} was written with {was!r}; "
                f"set it back, or train anew with out=NAME. "
                f"Only {', '.join(FREE)} may change"
            )


def kept(out):
    """What to tell after a fault"""
    found = complete(out)
    if not found:
        return "no checkpoint was written"
    return f"the last good checkpoint is {found[0]}; resume=true goes on from there"


# ---------------------------------------------------------------- one run in a folder, and its end


@contextmanager
def locked(out):
    """Inside, <out>/run.lock is ours. The kernel frees it with the process: what a killed run leaves is taken over."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK
    with open(path, "a+") as file:
        file.seek(0)
        owner = file.read()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: {out} is in use by {owner or 'another run'}; choose another with out=NAME, or end that run"
            ) from None
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise ValueError(f"out: {out} was in use by a run that has just ended; start again")
        if owner:
            print(f"{path}: {owner} is gone without removing it; taken over")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # a run that failed before it wrote anything leaves nothing
                out.rmdir()


class Stop:
    """SIGINT and SIGTERM inside are noted, so that the step can be finished and saved; a second one acts at once."""

    number = None

    def __enter__(self):
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.number = number
        signal.signal(number, self.before[number])
        print(f"\n{signal.Signals(number).name}: ends after this step; again to end at once", file=sys.stderr)

    def agree(self, count):
        """Where another rank was told to stop, stop too"""
        if count and not self.number:
            self.number = signal.SIGTERM

    def now(self, out):
        """Exit, 0 for SIGINT and 143 for SIGTERM, if there was a signal."""
        if self.number:
            print(f"stopped; {kept(out)}")
            sys.exit(0 if self.number == signal.SIGINT else 128 + self.number)
