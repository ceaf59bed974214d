"""Many processes do what one does: gloo on the CPU, by torchrun. Run by torchrun, this file is a rank."""

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
    "refiner": (  # on common noise the tiny model's pictures hardly differ: a small weight for what is rounding in part
        dict(train="refiner", prompts=3, rewrites=4, images=1, keep_original=False),
        {
            "refiner": {"beta": 0.1, "max_new_tokens": 20},
            "rewards": {"train": {"side": {"weight": 0.01}, "half": {"weight": 0.01}}},
        },
    ),
    "generator": (dict(train="generator", prompts=2, rewrites=2, images=3, keep_original=True), {}),
    "joint": (dict(train="joint", prompts=4, rewrites=3, images=2, keep_original=True), {"updates": 2}),
    "dead": (  # nothing differs in a group: no rank has a gradient
        dict(train="refiner", prompts=2, rewrites=2, images=1, keep_original=False),
        {"refiner": {"max_new_tokens": 2}, "weight_decay": 0.1},
    ),
    "learning": (  # one of the rewards is a detector that learns after each step
        dict(train="generator", prompts=3, rewrites=1, images=4, keep_original=True),
        {"rewards": {"train": {"d": {"update": dict(threshold=0, accuracy=1, max_steps=3, batch_size=6, replay=8, lr=1e-3)}}}},
    ),
}


def rank_main(folder, cases, *words):
    """Two steps and a look of each case; every rank leaves its weights, pictures and rows"""
    rank, size = grpo.world()
    grpo.join("cpu")
    assert torch.distributed.is_initialized() == (size > 1)
    for case in cases.split(","):
        cfg = grpo.load_config([f"{folder}/{case}.yaml", *words])
        run = grpo.Run(cfg)
        rows = [run.step(cfg.stages[0], i) for i in range(2)]
        look, images = run.evaluate(cfg.stages[0])
        tensors = {f"refiner.{n}": p.detach() for n, p in run.refiner.model.named_parameters() if p.requires_grad}
        tensors |= {n: p.detach() for n, p in run.generator.lora.items()} | {"images": images}
        tensors |= {f"ema.{n}": p for n, p in run.generator.ema.items()}
        for learner in run.learners.values():
            tensors |= {f"detector.{n}": t for n, t in learner.state().items()}
        blocks = [p for n, p in run.generator.transformer.named_parameters() if "blocks" in n and "lora_" not in n]
        held = sum(getattr(p, "_local_tensor", p).numel() for p in blocks)
        name = f"{folder}/{case}_{'fsdp_' * cfg.fsdp}{size}_{rank}"
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, f"{name}.safetensors")
        Path(f"{name}.json").write_text(json.dumps([*rows, look, {"held": held}]))


def torchrun(size, *words):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)


def write_config(path, checkpoints, stage, **values):
    """A run on the tiny FLUX and the nano refiner; the rewards spread around 0, so that rounding stays small"""
    from conftest import CALLS, TARGETS

    (path.parent / "mine.py").write_text(
        "import os\n\ncalls = []\n\n"
        "def side(images, prompts):\n    return (images[..., :8] - images[..., 8:]).mean((1, 2, 3))\n\n"
        "def half(images, prompts):\n    return (images[..., :8, :] - images[..., 8:, :]).mean((1, 2, 3))\n\n"
        "def dies(images, prompts):\n    calls.append(1)\n    if os.environ['RANK'] == '1' and len(calls) == 5:\n"
        "        os._exit(9)\n    return side(images, prompts)\n"
    )
    prompts = ["a cat", "a dog", "a red cup", "a tree", "a boat", "a house"][: stage["prompts"] + 2]
    path.with_suffix(".txt").write_text("\n".join(prompts))
    mine = {n: {"kind": f"{path.parent}/mine.py:{n}"} for n in ("side", "half")}
    config = dict(
        out=str(path.parent / "out"),
        stages=[dict(steps=2, **stage)],
        micro_batch=5,  # divides no group
        eval_every=1,
        eval_images=2,
        validation_prompts=str(path.with_suffix(".txt")),
        generator=dict(model=checkpoints("flux"), height=16, width=16, num_steps=3, window=1, call=CALLS["flux"]),
        refiner=dict(max_new_tokens=16, lora_rank=4, lr=5e-5),  # Adam turns the rounding of tiny gradients into steps
        rewards=dict(train=mine, validation=dict(mine)),
    )
    config["generator"] |= dict(lora_rank=4, lora_targets=TARGETS)
    path.write_text(yaml.safe_dump(grpo.merge(config, values)))
    return path


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory):
    """(case, ranks, rank) -> its tensors and rows, after 1, 2 and 3 ranks have run every case"""
    from conftest import small_detector  # not above: it sets the number of threads, and a rank has one

    folder = tmp_path_factory.mktemp("ddp")
    for case, (stage, values) in CASES.items():
        if case == "learning":
            values["rewards"]["train"]["d"]["model"] = small_detector(folder / "detector")
        write_config(folder / f"{case}.yaml", checkpoints, stage, **values)
    for size in (1, 2, 3):
        done = torchrun(size, "tests/test_ddp.py", folder, ",".join(CASES))
        assert done.returncode == 0, done.stderr[-3000:]
    done = torchrun(2, "tests/test_ddp.py", folder, "generator", "fsdp=true")
    assert done.returncode == 0, done.stderr[-3000:]

    def get(case, size, rank=0):  # size: 1, 2, 3 or fsdp_2
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
@pytest.mark.parametrize("case", ["refiner", "generator", "joint"])
def test_the_update_does_not_depend_on_the_number_of_ranks(results, case, size):
    """After two steps: weights, EMA and pictures to 1e-6, every metric too, and the ranks hold bit-equal weights."""
    one, rows = results(case, 1)
    for rank in range(size):
        many, rows_of_many = results(case, size, rank)
        assert set(many) == set(one)
        worst = max(((one[n] - many[n]).abs().max().item(), n) for n in one)
        assert worst[0] < 1e-6, worst
        assert all(torch.equal(t, results(case, size, 0)[0][n]) for n, t in many.items())
        for policy in {"refiner", "generator"} & set(rows[0]):
            start = {"refiner": "refiner.", "generator": "transformer_blocks."}[policy]
            names = [n for n in one if n.startswith(start) and "lora_B" in n]  # began at 0
            a, b = (torch.cat([x[n].flatten() for n in names]) for x in (one, many))
            assert a.norm() > 0 and (a - b).norm() < 1e-3 * a.norm()
            assert all(row[policy]["grad_norm"] > 0 for row in rows[:2])
        for a, b in zip(rows[:3], rows_of_many[:3], strict=True):
            assert numbers(a) == pytest.approx(numbers(b), rel=1e-4, abs=1e-6) and len(numbers(a)) >= 3


def test_without_any_gradient_no_rank_moves(results):
    """Groups of equal rewards: weights stay as they began, weight decay included, on 1, 2 and 3 ranks."""
    one, rows = results("dead", 1)
    assert rows[0]["refiner"]["bad_format"] == rows[0]["zero_std"] == 1 and rows[1]["refiner"]["grad_norm"] == 0
    began = results("generator", 1)[0]  # that case never trains its refiner
    for size in (1, 2, 3):
        many = results("dead", size, size - 1)[0]
        assert all(torch.equal(many[n], began[n]) for n in one if n.startswith("refiner."))


def test_every_rank_holds_the_same_detector(results):
    """After two updates on 1, 2 and 3 ranks: EMA, live weights, AdamW, replay; bit-equal on the ranks of a run.

    The ranks of a run agree with one process up to the rounding of pictures, which the 8 bits of the replay bound.
    """
    one, rows = results("learning", 1)
    states = {n for n in one if n.startswith("detector.")}
    assert {n.split(".")[1] for n in states} == {"ema", "live", "adam", "replay", "prompts", "seen", "steps", "bad_photos"}
    assert one["detector.steps"] == 6 and one["detector.replay"].shape == (8, 3, 16, 16)
    for size in (2, 3):
        first, its_rows = results("learning", size)
        for rank in range(1, size):
            other = results("learning", size, rank)[0]
            assert set(other) == set(one) and all(torch.equal(first[n], other[n]) for n in states)
        assert (first["detector.replay"].int() - one["detector.replay"].int()).abs().max() <= 1
        assert torch.equal(first["detector.prompts"], one["detector.prompts"])
        for a, b in zip(rows[:2], its_rows[:2], strict=True):
            assert numbers(a["detectors"]["d"]) == pytest.approx(numbers(b["detectors"]["d"]), abs=1e-3)


def test_sharded_weights_give_the_same_losses(results):
    """fsdp: each of two ranks holds half of the blocks' frozen weights, all of the LoRA, and trains as one does."""
    one, rows = results("generator", 1)
    for rank in range(2):
        many, rows_of_many = results("generator", "fsdp_2", rank)
        for a, b in zip(rows[:3], rows_of_many[:3], strict=True):
            assert numbers(a) == pytest.approx(numbers(b), rel=1e-4, abs=1e-6)
        assert max((one[n] - many[n]).abs().max().item() for n in one) < 1e-6
        assert 0 < rows_of_many[3]["held"] < 0.55 * rows[3]["held"]


def test_rank_0_writes_and_prints_and_a_rank_that_dies_ends_the_run(checkpoints, tmp_path):
    """`torchrun grpo.py fsdp=true`: one log, one set of files. Rank 1 gone in step 1: non-zero, all files whole."""
    stage = dict(train="generator", prompts=2, rewrites=1, images=6, keep_original=True)
    path = write_config(tmp_path / "c.yaml", checkpoints, stage)
    done = torchrun(2, "grpo.py", path, "fsdp=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("keeps the weights of step") == done.stdout.count("Peak memory") == 1
    lines = lambda out: (tmp_path / out / "metrics.jsonl").read_text().splitlines()
    read = lambda out: [json.loads(line)["step"] for line in lines(out)]
    assert read("out") == [0, 1, 2]
    assert load_file(tmp_path / "out/generator/pytorch_lora_weights.safetensors")
    assert len(list((tmp_path / "out/samples").glob("*.png"))) == 4
    dies = f"rewards.train.dies={{kind: '{tmp_path}/mine.py:dies'}}"
    done = torchrun(2, "grpo.py", path, dies, f"out={tmp_path / 'died'}")
    assert done.returncode != 0 and "exitcode  : 9" in done.stderr
    assert read("died") == [0] and yaml.safe_load((tmp_path / "died/config.yaml").read_text())["stages"]


# ---------------------------------------------------------------- parts


def as_rank(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


@pytest.mark.parametrize("count,size", [(8, 2), (5, 3), (2, 3), (1, 1)])
def test_each_prompt_has_one_rank(monkeypatch, count, size):
    """Contiguous, in order, near-equal; ranks beyond the prompts have none."""
    parts = []
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        parts.append(grpo.share_of(count))
    assert sum(parts, []) == list(range(count)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_sharded_weights_need_equal_work(monkeypatch):
    """fsdp with prompts that do not divide, or with several updates, would hang: refused, with the remedy."""
    cfg = grpo.load_config(["config.yaml", "fsdp=true"])  # 8 and 9 prompts
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(ValueError, match=r"fsdp: stages\[1\].prompts: 9 on 2 ranks; expected a multiple"):
        grpo.check_equal_work(cfg, 32)
    cfg.stages, cfg.updates = cfg.stages[:1], 2
    with pytest.raises(ValueError, match="fsdp: updates: 2; expected 1"):
        grpo.check_equal_work(cfg, 32)
    with pytest.raises(ValueError, match="fsdp: validation_prompts: 31 on 2 ranks"):
        grpo.check_equal_work(cfg, 31)


class Grid:
    """A generator of one number, to put in place of a random one"""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_by_row_is_exact(temperature):
    """Uniform numbers on a grid hit each token as often as its probability says, and never one without any."""
    logits = torch.tensor([-torch.inf, 1.0, -2.0, 0.5, -torch.inf, 3.0, -9.0, -torch.inf])
    n = 10_000
    sampler = grpo.L.SampleByRow([Grid((i + 0.5) / n) for i in range(n)], temperature)
    scores = sampler(None, logits.expand(n, -1))  # (n, V)
    assert (scores.isfinite().sum(1) == 1).all()
    share = torch.bincount(scores.argmax(1), minlength=len(logits)) / n
    assert (share - (logits / temperature).softmax(0)).abs().max() < 1.01 / n
    for edge in (0.0, np.nextafter(1.0, 0.0)):  # the ends of [0, 1)
        token = grpo.L.SampleByRow([Grid(edge)], temperature)(None, logits[None]).argmax().item()
        assert token == (1 if edge == 0 else 6)


def test_a_rewrite_does_not_depend_on_its_batch():
    """Two prompts at once or each alone, padded differently: the same rewrites; another seed, others."""
    prompts = ["a cat", "a chinese temple by the lake, wide view"]
    refiner = grpo.L.Refiner(grpo.L.RefinerConfig())
    seeds = [(0, 5, 0), (0, 5, 1)]
    whole = refiner.rollout(prompts, 4, seeds)
    alone = [refiner.rollout([p], 4, [s]) for p, s in zip(prompts, seeds)]
    assert whole.texts == alone[0].texts + alone[1].texts and len(set(whole.texts)) > 4
    assert whole.mask.sum(1).tolist() == torch.cat([a.mask.sum(1) for a in alone]).tolist()
    assert whole.texts != refiner.rollout(prompts, 4, [(0, 6, 0), (0, 6, 1)]).texts


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
