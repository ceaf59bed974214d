"""Many processes do what one does: gloo on the CPU, started by torchrun as a user would. Run by torchrun, this file is a rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import grpo

# case -> stage, other keys. On 3 ranks `generator` leaves one without a prompt, and `joint` two without any in a share
CASES = {
    "refiner": (dict(train="refiner", prompts=3, rewrites=4, images=1, keep_original=False), {"refiner": {"beta": 0.1}}),
    "generator": (dict(train="generator", prompts=2, rewrites=2, images=3, keep_original=True), {}),
    "joint": (dict(train="joint", prompts=4, rewrites=3, images=2, keep_original=True), {"updates": 2}),
}


def rank_main(folder):
    """Two steps and a look of every case; each rank leaves its weights, pictures and rows"""
    rank, size = grpo.world()
    grpo.join("cpu")
    assert torch.distributed.is_initialized() == (size > 1)
    for case in CASES:
        cfg = grpo.load_config([f"{folder}/{case}.yaml"])
        run = grpo.Run(cfg)
        rows = [run.step(cfg.stages[0], i) for i in range(2)]
        look, images = run.evaluate(cfg.stages[0])
        tensors = {f"refiner.{i}": p.detach() for i, p in enumerate(run.refiner.parameters())}
        tensors |= {n: p.detach() for n, p in run.generator.lora.items()} | {"images": images}
        tensors |= {f"ema.{n}": p for n, p in run.generator.ema.items()}
        save_file({n: t.contiguous() for n, t in tensors.items()}, f"{folder}/{case}_{size}_{rank}.safetensors")
        Path(f"{folder}/{case}_{size}_{rank}.json").write_text(json.dumps([*rows, look]))


def torchrun(size, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)


def write_config(path, checkpoints, stage, **values):
    """A run on the tiny FLUX and the nano refiner; the rewards spread around 0, so that rounding stays small"""
    from conftest import CALLS, TARGETS

    (path.parent / "mine.py").write_text(
        "import os\n"
        "def side(images, prompts):\n    return (images[..., :8] - images[..., 8:]).mean((1, 2, 3))\n\n"
        "def half(images, prompts):\n    return (images[..., :8, :] - images[..., 8:, :]).mean((1, 2, 3))\n\n"
        "def dies(images, prompts):\n    os.environ['RANK'] == '1' and os._exit(9)\n    return side(images, prompts)\n"
    )
    (path.parent / "prompts.txt").write_text("a cat\na dog\na red cup\na tree\na boat\n")
    mine = {n: {"kind": f"{path.parent}/mine.py:{n}"} for n in ("side", "half")}
    config = dict(
        out=str(path.parent / "out"),
        stages=[dict(steps=2, **stage)],
        micro_batch=4,
        eval_every=1,
        eval_images=2,
        validation_prompts=str(path.parent / "prompts.txt"),
        generator=dict(model=checkpoints("flux"), height=16, width=16, num_steps=3, window=1, call=CALLS["flux"]),
        refiner=dict(max_new_tokens=16, lora_rank=4),
        rewards=dict(train=mine, validation=dict(mine)),
    )
    config["generator"] |= dict(lora_rank=4, lora_targets=TARGETS)
    path.write_text(yaml.safe_dump(grpo.merge(config, values)))
    return path


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory):
    """(case, ranks, rank) -> its tensors and rows, after 1, 2 and 3 ranks have run every case"""
    folder = tmp_path_factory.mktemp("ddp")
    for case, (stage, values) in CASES.items():
        write_config(folder / f"{case}.yaml", checkpoints, stage, **values)
    for size in (1, 2, 3):
        done = torchrun(size, "tests/test_ddp.py", folder)
        assert done.returncode == 0, done.stderr[-3000:]

    def get(case, size, rank=0):
        name = f"{folder}/{case}_{size}_{rank}"
        return load_file(f"{name}.safetensors"), json.loads(Path(f"{name}.json").read_text())

    return get


def numbers(row, path=""):
    """{dotted name: number} of a row of metrics, seconds left out"""
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict) and name != "seconds":
            flat |= numbers(value, f"{path}{name}.")
        elif isinstance(value, (int, float)):
            flat[path + name] = value
    return flat


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_update_does_not_depend_on_the_number_of_ranks(results, case, size):
    """After two steps: weights, EMA and pictures to 1e-6, every metric too, and the ranks hold bit-equal weights."""
    one, rows = results(case, 1)
    for rank in range(size):
        many, rows_of_many = results(case, size, rank)
        assert set(many) == set(one)
        worst = {n: (one[n] - many[n]).abs().max().item() for n in one}
        print(case, size, rank, "largest difference", max(worst.items(), key=lambda x: x[1]))
        assert max(worst.values()) < 1e-6, max(worst.items(), key=lambda x: x[1])
        assert all(torch.equal(t, results(case, size, 0)[0][n]) for n, t in many.items())
        for a, b in zip(rows, rows_of_many, strict=True):
            assert numbers(a) == pytest.approx(numbers(b), rel=1e-4, abs=1e-6) and len(numbers(a)) >= 3
    moved = [n for n in one if "lora_B" in n and one[n].abs().max() > 1e-5] + [n for n in one if n.startswith("refiner")]
    assert moved and all(row[m]["grad_norm"] > 0 for row in rows[:2] for m in {"refiner", "generator"} & set(row))


if __name__ == "__main__":
    rank_main(sys.argv[1])
