"""Laws of grpo.py: config, advantages, loss, whole steps on tiny models, and a run as its user sees it."""

import json
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from conftest import ROOT, read_log
from omegaconf import OmegaConf
from torch.testing import assert_close

import bench
import generator
import grpo
import policy
import refiner
from common import rng
from learner import UpdateConfig
from policy import on_device
from reward import RewardConfig

PATHS = [*ROOT.glob("*.py"), *ROOT.glob("rewards/*.py")]
SOURCES = {path.stem: path.read_text() for path in PATHS}
FILE = OmegaConf.to_container(OmegaConf.load(ROOT / "config.yaml"))
PROFILES = FILE.pop("profiles")
GENERATOR = "train: generator, steps: 6, prompts: 2, images: 4"
REFINER = "train: refiner, steps: 1, prompts: 2, images: 2, rewrites: 3, keep_original: no"
JOINT = "train: joint, steps: 1, prompts: 2, rewrites: 2, images: 3"


@pytest.fixture
def refused(capsys):
    """words of the command line -> the one line with which grpo.py refuses them, with exit code 2"""

    def get(*words):
        with pytest.raises(SystemExit) as end:
            grpo.cli(lambda: grpo.train(grpo.load_config(words)))
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return get


@pytest.fixture
def spy(monkeypatch):
    """owner, name -> a list of the arguments with which owner.name is called from now on"""

    def watch(owner, name):
        calls = []
        work = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, **more: calls.append(args) or work(*args, **more)
        )
        return calls

    return watch


# ---------------------------------------------------------------- config


def check_read(name):
    """Some file reads it."""
    found = [re.search(rf"\.{name}\b", text) for text in SOURCES.values()]
    assert any(found), f"{name} is never read"


def check_keys(default, value, where="config"):
    """A part of config.yaml has the fields of its dataclass, each of which is read, and their defaults."""
    if is_dataclass(default):
        assert set(value) == {f.name for f in fields(default)}, where
        for name, part in value.items():
            check_read(name)
            check_keys(getattr(default, name), part, f"{where}.{name}")
    elif isinstance(default, list):
        for one, other in zip(default, value, strict=True):
            check_keys(one, other, where)
    elif isinstance(default, dict):
        # or it would shine through the mapping that a user writes
        assert default == {}, where
    else:
        assert default == value, where


def test_config_yaml_is_the_config():
    """Its keys are the fields of the dataclasses, to the last, and its values their defaults."""
    check_keys(bench.Config(), FILE)
    learns = [f.name for f in fields(UpdateConfig)]
    assert set(PROFILES["v2"]["learners"]["semantic"]) == set(learns)
    for name in learns + [f.name for f in fields(RewardConfig)]:
        check_read(name)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_changes_something(profile):
    """Each is a valid config of a run and of its bench, and not the default one; its stages can be trained."""
    changed = grpo.load_config(["config.yaml", f"profile={profile}"], bench.Config)
    assert changed != grpo.load_config(["config.yaml"], bench.Config)
    changed.validation_prompts = "nano/validation_prompts.txt"  # of a real model they are the user's
    grpo.check_run(changed)


def test_words_win_over_the_profile_and_that_over_the_file(tmp_path):
    """In whatever order they stand. null takes a reward or the refiner away; 1e-5 is a number, 1 a float."""
    path = tmp_path / "mine.yaml"
    path.write_text("""
seed: 1
weight_decay: 1
rewards: {train: {a: {kind: clip}, b: {kind: clip}}}
profiles: {p: {seed: 2, generator: {lr: 3.0}}}
""")
    words = [
        "generator.lr=1e-5",
        "profile=p",
        "refiner=null",
        "rewards.train.a=null",
    ]
    cfg = grpo.load_config([str(path), *words])
    assert (cfg.seed, cfg.generator.lr, cfg.refiner) == (2, 1e-5, None)
    assert isinstance(cfg.weight_decay, float)
    assert list(cfg.rewards.train) == ["b"]


MISTAKES = {
    "seed": "'seed': expected key=value",
    "profile=no": "profile=no",
    "sed=1": "'sed'.*Did you mean: 'seed'",
    "generator.num_step=4": "Did you mean: 'num_steps'.*generator.num_step",
    "learners={semantic: {treshold: 1}}": "Did you mean: 'threshold'",
    "seed=true": "'True'.* seed",
    "seed=1.5": "'1.5'.* seed",
    "generator.lr=fast": "'fast'.* generator.lr",
    "generator.sde=ode": "'ode'.*'cps'.* generator.sde",
    "generator.lr=.inf": "generator.lr: inf",
    "generator.times=11": "generator.times: 11; expected at most num_steps",
    "stages=[{images: 0}]": "stages.0.images: 0; expected",
    "stages=[{images: 1}]": "stages.0.*group of one",
    "stages=[{train: refiner, rewrites: 1, keep_original: no}]": "group of one",
    "stages=[{keep_original: false}]": "no text to draw",
    "updates=2": "prompts: 9; expected a multiple of 2",
    "refiner=null": "refiner is null",
    "learners={smooth: {}}": "learners.smooth",
    "rewards.train.semantic.kind=clasifier": "semantic.*'clasifier'",
    "rewards.train.semantic.model=nano/semantik": "nano/semantik is no folder",
    "prompts=no.txt": "no.txt",
    "generator.model=tests": "tests has no model_index.json",
    "generator.model=nano/flx": "nano/flx is no folder",
    "generator.model=nobody/nothing": "nobody/nothing cannot be loaded",
    "refiner.model=text_encoder": "text_encoder is a CLIPTextModel",
    "refiner.quantize=int8": "pip install",
    "out=tests": "out: tests is in use; choose another",
}


@pytest.mark.parametrize("word, message", MISTAKES.items())
def test_a_mistake_is_one_line_and_exit_code_2(refused, tmp_path, monkeypatch, word, message):
    """It names key and value; and nothing is left that would stand in the way of the next try."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # as if it were not installed
    for _ in range(2):
        assert re.search(
            message, refused("config.yaml", f"out={tmp_path}/out", word)
        )


def test_no_config_file_is_one_line(refused):
    """None, and a missing one"""
    assert "python grpo.py config.yaml" in refused()
    assert "no.yaml" in refused("no.yaml")


def test_a_bug_keeps_its_traceback(config, monkeypatch):
    """What is no ConfigError passes through `cli` as it was raised, or nobody could mend it."""
    monkeypatch.setattr(grpo.Run, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.cli(lambda: grpo.train(config()))


# ---------------------------------------------------------------- the house

STOREYS = [
    "common",
    "kernels ranks pipeline policy",
    "generator refiner reward folder plots",
    "learner vlm omniaid naturalness",
    "grpo",
    "bench sample probe",
]


def test_arrows_go_one_way():
    """A file imports only what stands on a lower storey, so that there is no circle to understand at once."""
    storey = {name: i for i, names in enumerate(STOREYS) for name in names.split()}
    for name, text in SOURCES.items():
        found = re.findall(
            r"^ *(?:from|import) (?:rewards\.)?(\w+)", text, re.MULTILINE
        )
        assert max([storey.get(other, -1) for other in found]) < storey[name], name


@pytest.mark.parametrize("log_prob", ["path", "elbo"])
def test_two_uses_never_draw_the_same_noise(config, spy, log_prob):
    """numpy pads a seed with zeros: numbers alone would not keep a window from a look's first picture.

    Only elbo's noise is drawn more than once: for all pictures of a prompt.
    """
    cfg = config(f"generator.log_prob={log_prob}", stage=JOINT)
    run = grpo.Run(cfg)
    calls = [spy(module, "rng") for module in (grpo, generator, refiner)]
    run.step(cfg.stages[0], 0)
    run.evaluate(cfg.stages[0])
    keys = sum(calls, [])
    shared = len(keys) - len({*keys})
    # 9 pictures of each of 2 prompts, at 2 times
    assert shared == (2 * 8 * 2 if log_prob == "elbo" else 0)
    assert len({rng(*key).random() for key in keys}) == len({*keys}) > 30


# ---------------------------------------------------------------- advantages and loss


def test_advantages_are_the_weighted_mean_of_standardised_rewards():
    """In each group; 1e-4 keeps rounding from being an advantage. Of 100, one outlier would stand at 9.9."""
    a, b = torch.randn(2, 3, 4)
    scores = {"a": a.flatten(), "b": b.flatten()}
    want = torch.zeros(3, 4)
    for weight, r in ((1.0, a), (0.5, b)):
        std = r.std(1, keepdim=True, correction=0)
        want += weight * (r - r.mean(1, keepdim=True)) / (std + 1e-4)
    assert_close(grpo.advantages(scores, {"a": 1.0, "b": 0.5}, 3), want / 1.5)
    outlier = torch.eye(100)[3]
    assert grpo.advantages({"a": outlier}, {"a": 1.0}, 1).max() == 5.0


def test_extremes_are_the_worst_and_best_of_each_group():
    """As many of each group, whatever it holds; 0, or more than there are, trains all."""
    advantage = torch.tensor([[0.1, -3.0, 2.0, 0.2, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    first, second = grpo.extremes(advantage, 1)
    assert first.tolist() == [False, True, True, False, False]
    assert second.sum() == 2
    assert grpo.extremes(advantage, 0).all() and grpo.extremes(advantage, 3).all()


# ratio, advantage, slope of the loss in the log-ratio
SLOPES = [(1, 2, -2), (2, 2, 0), (0.5, 2, -1), (0.5, -2, 0), (2, -2, 4)]


@pytest.mark.parametrize("ratio, advantage, slope", SLOPES)
def test_clipped_loss_is_the_pessimistic_bound(ratio, advantage, slope):
    """At ratio 1 its slope is -A, beyond the clip range on the side of A it is 0, on the other -ratio A."""
    log_ratio = torch.tensor([[float(ratio)]]).log().requires_grad_()
    loss, clipped = grpo.clipped_loss(
        log_ratio, torch.tensor([[advantage]]), 0.2, 0.28
    )
    loss.sum().backward()
    bound = min(max(ratio, 0.8), 1.28)
    assert loss.item() == pytest.approx(-min(ratio * advantage, bound * advantage))
    assert log_ratio.grad.item() == pytest.approx(slope)
    assert clipped.item() == (slope == 0)


def test_in_a_joint_stage_either_policy_has_its_own_groups(config, spy, monkeypatch):
    """A picture is compared with those of its text, a rewrite with the texts of its prompt."""
    cfg = config("refiner.format_penalty=0", stage=JOINT)
    run = grpo.Run(cfg)
    run.prompts = ["a cat"] * 2  # a group is a place in the batch, not a text
    scores = {"bright": torch.randn(18), "smooth": torch.zeros(18)}  # P*N*M
    monkeypatch.setattr(run, "score", lambda *_: scores)
    updates = spy(run, "update")
    run.step(cfg.stages[0], 0)
    pictures, texts = [advantage for _, _, advantage, *_ in updates]
    assert_close(pictures.view(6, 3).sum(1), torch.zeros(6))  # (P*N, M)
    want = grpo.standardise(scores["bright"].view(2, 3, 3).mean(2))  # (P, N)
    assert_close(texts, want[:, 1:] / 2)  # nobody chose the user's words


# ---------------------------------------------------------------- whole steps


@pytest.mark.parametrize("stage", [REFINER, GENERATOR, JOINT])
def test_a_step_moves_only_the_lora_of_what_the_stage_trains(config, stage):
    """Base weights never move, nor does the LoRA of a frozen policy."""
    cfg = config(stage=stage)
    run = grpo.Run(cfg)
    models = {"refiner": run.refiner.model, "generator": run.generator.model}
    models = torch.nn.ModuleDict(models)
    before = {name: p.clone() for name, p in models.named_parameters()}
    rows = [run.step(cfg.stages[0], iteration) for iteration in range(2)]
    moved = [n for n, p in models.named_parameters() if not torch.equal(p, before[n])]
    trained = {name.partition(".")[0] for name in moved}
    assert trained == ({"refiner", "generator"} if stage == JOINT else {cfg.stages[0].train})
    assert all("lora_" in name for name in moved)
    assert all(row[name]["grad_norm"] > 0 for row in rows for name in trained)


@pytest.mark.parametrize("stage", [REFINER, GENERATOR, JOINT])
def test_batches_are_prompt_major(config, spy, stage):
    """Rewards see what the user typed, the generator the texts; with rewrites: 0 those are the user's words.

    In a refiner stage the texts of a prompt are drawn on the same noise, elsewhere each picture has its own.
    """
    cfg = config(stage=stage)
    run = grpo.Run(cfg)
    stage = cfg.stages[0]
    drawn = spy(run.generator, "rollout")
    written = spy(run.refiner, "rollout")
    scored = spy(run, "score")
    run.step(stage, 0)
    # at the temperature of their log-probs
    assert [call[3] for call in written] == [1.0] * (stage.rewrites > 0)
    texts, keys = drawn[0]
    words = scored[0][2]
    N, M = stage.texts, stage.images
    assert words == [prompt for prompt in run.next_prompts(0, 2) for _ in range(N * M)]
    assert texts == [text for text in texts[::M] for _ in range(M)]
    assert (texts == words) == (stage.rewrites == 0)
    assert not stage.keep_original or texts[:M] == words[:M]
    if stage.train == "refiner":
        assert keys == keys[:M] * N + keys[-M:] * N
    else:
        assert len({*keys}) == 2 * N * M


@pytest.mark.parametrize("log_prob", ["path", "elbo"])
def test_gradients_do_not_depend_on_the_micro_batch(config, monkeypatch, log_prob):
    """All pictures and rewrites at once, or in fives with activations computed again: one gradient."""
    words = [f"generator.log_prob={log_prob}", "generator.extremes=3"]
    kept = []

    def keep(run, name):
        grads = [p.grad.flatten() for p in run.policies[name].parameters()]
        kept.append(torch.cat(grads))
        return 0.0

    monkeypatch.setattr(grpo.Run, "optimize", keep)
    for micro_batch, again in ((18, False), (5, True)):
        words += [f"micro_batch={micro_batch}", f"generator.gradient_checkpointing={again}"]
        cfg = config(*words, stage=JOINT)
        run = grpo.Run(cfg)
        assert run.generator.model.is_gradient_checkpointing == again
        run.step(cfg.stages[0], 0)
    for whole, split in zip(kept[:2], kept[2:]):
        assert whole.norm() > 0
        assert (whole - split).norm() < 1e-3 * whole.norm()


@pytest.mark.parametrize("log_prob", ["path", "elbo"])
def test_the_second_update_compares_with_the_rollout(config, spy, log_prob):
    """The ratio is 1 in the first, and no longer in the second, whose weights are not those that drew.

    Figures are means over the updates.
    """
    words = ["updates=2", "micro_batch=9", "generator.beta=0", f"generator.log_prob={log_prob}"]
    cfg = config(*words, stage=JOINT)
    losses = spy(grpo, "clipped_loss")
    run = grpo.Run(cfg)
    row = run.step(cfg.stages[0], 0)
    change = [log_ratio.abs().max().item() for log_ratio, *_ in losses]
    pictures = change[:4]  # of 2 updates, each on the 2 steps of the window, or 2 times
    rewrites = change[4:]
    assert max(*pictures[:2], rewrites[0]) < 1e-6
    assert min(pictures[2:]) > 2e-6 and rewrites[1] > 1e-5
    values = [grpo.clipped_loss(*arguments)[0] for arguments in losses[:4]]
    assert row["generator"]["loss"] == pytest.approx(torch.cat(values).mean().item(), rel=0.01)


def test_a_policy_is_on_the_device_while_it_works_and_at_no_other_time(config, monkeypatch):
    """A whole step, a look and a restore under offload; the other policy waits."""
    here = []

    @contextmanager
    def at_work(model, device):
        assert not here  # one at a time
        here.append(model)
        yield
        here.pop()

    def needs(kind, name):
        stock = getattr(kind, name)

        def method(self, *args, **kwargs):
            assert here == [self.model]
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, method)

    cfg = config("offload=true", "updates=2", stage=JOINT)
    run = grpo.Run(cfg)
    monkeypatch.setattr(policy, "on_device", at_work)
    for name in ("remember", "terms", "update_ema"):
        needs(generator.Generator, name)
        needs(refiner.Refiner, name)
    needs(generator.Generator, "draw")
    needs(refiner.Refiner, "generate")
    run.step(cfg.stages[0], 0)
    run.evaluate(cfg.stages[0])
    run.restore(run.state())
    assert not here


def test_a_model_visits_a_device():
    """And goes back, after an exception too."""
    model = Mock()
    model.parameters.side_effect = lambda: iter([torch.zeros(1)])
    with pytest.raises(KeyError), on_device(model, "cuda"):
        raise KeyError
    assert model.to.mock_calls == [call("cuda"), call(torch.device("cpu"))]


def test_every_prompt_is_drawn_once_before_any_is_drawn_twice():
    """Across the border of two epochs too, each of which has an order of its own."""
    run = SimpleNamespace(prompts=[*"abcde"], cfg=grpo.Config())
    drawn = sum(
        (grpo.Run.next_prompts(run, iteration, 2) for iteration in range(5)), []
    )
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == run.prompts
    assert drawn[:5] != drawn[5:]


# ---------------------------------------------------------------- what is kept

# score, reward and alignment of four looks; at the third the alignment has fallen too far
LOOKS = [(0.1, 0.3, 0.5), (0.3, 0.2, 0.5), (0.9, 0.9, 0.4), (0.2, 0.25, 0.49)]


@pytest.mark.parametrize("keep, step", [("score", 1), ("reward", 0), ("last", 3)])
def test_keep_says_which_look_is_kept(tmp_path, keep, step):
    """Of those at which no reward of keep_within fell too far; a reward that is absent forbids nothing.

    The stage ends with the weights of that look.
    """
    (tmp_path / "samples").mkdir()
    cfg = grpo.Config(out=str(tmp_path), stages=[grpo.StageConfig()], keep=keep, eval_images=1)
    cfg.keep_within = {"alignment": 0.02, "absent": 0.1}
    lora = torch.zeros(1)
    kept = []
    run = SimpleNamespace(cfg=cfg, weights={"alignment": 1.0}, policies={}, set_tensors=kept.append)
    run.tensors = lambda: {"lora": lora}
    looks = {}
    for iteration, values in enumerate(LOOKS):
        figures = dict(zip(("score", "reward", "train_alignment"), values))
        run.evaluate = lambda stage: (figures, torch.zeros(2, 3, 8, 8))
        grpo.look(run, cfg.stages[0], iteration, looks)
        lora += 1
    rows = [{"step": 0, "stage": "0 generator", "validation": {"score": 0.1}}]
    progress = {"looks": looks, "rows": rows}
    grpo.finish_stage(run, 0, progress, SimpleNamespace(say=print))
    assert not looks  # the next stage has its own
    assert kept == [{"lora": step}]


FORK = [
    "rewards.train.smooth=null",
    "rewards.validation.bright=null",
    "keep=reward",
    "keep_within={alignment: 0.02}",
    "eval_images=4",
    "eval_every=4",
    "micro_batch=32",
    "generator.lr=5e-2",
    "generator.beta=0",
    "generator.ema=0.5",
    "generator.clip_range=0.1",
]


WAYS = ["ratio=guard", "ratio=ppo", "log_prob=elbo"]


@pytest.mark.parametrize("way", WAYS)
def test_a_reward_of_ones_own_rises_and_its_weights_are_kept(config, way):
    """Brightness, with no judge beside it: it rises on prompts and noise that never trained."""
    stage = "train: generator, steps: 8, prompts: 4, images: 16"
    cfg = config(*FORK, f"generator.{way}", stage=stage)
    grpo.train(cfg)
    rows = read_log(cfg.out)
    looks = [row["validation"]["reward"] for row in rows if "validation" in row]
    assert min(looks[1:]) - looks[0] > 0.05 * rows[0]["reward_std"]
    run = grpo.Run(cfg, train=False)
    run.generator.load(f"{cfg.out}/generator")
    assert all(
        p.any() for name, p in run.generator.lora.items() if "lora_B" in name
    )


def test_a_toy_reward_rises_for_the_refiner(config, spy, monkeypatch):
    """A reward on a rewrite's words: the share of rewrites that hold them grows."""
    stage = "train: refiner, steps: 8, prompts: 4, images: 1, rewrites: 8, keep_original: no"
    cfg = config("refiner.lr=3e-3", "refiner.max_new_tokens=20", "micro_batch=32", stage=stage)
    run = grpo.Run(cfg)
    drawn = spy(run.generator, "rollout")
    monkeypatch.setattr(run, "score", lambda *_: {"bright": photo(), "smooth": torch.zeros(32)})

    def photo():
        return torch.tensor([float("photo" in text) for text in drawn[-1][0]])

    share = [run.step(cfg.stages[0], i)["rewards"]["bright"] for i in range(8)]
    assert sum(share[-3:]) / 3 > sum(share[:2]) / 2 + 0.2


# ---------------------------------------------------------------- a run


def test_a_run_that_diverges_says_so(config, refused, tmp_path):
    """It names the rate to lower, and no resume, which would diverge again."""
    config(stage=GENERATOR)
    line = refused(
        str(tmp_path / "config.yaml"), "generator.lr=1e30", "eval_every=9"
    )
    assert "diverged" in line
    assert "generator.lr" in line
    assert "resume" not in line


def test_a_run_writes_what_it_says(config, refused, tmp_path, monkeypatch):
    """Rows, which a tracker gets too, a config that loads to the same, pictures.

    A second run on the same folder is refused, and nothing in it changes.
    """
    sent = []

    def log(row, step):
        sent.append((step, row["validation/kid"]))

    tracker = SimpleNamespace(init=lambda **_: None, log=log, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    stages = f"stages=[{{{REFINER}}}, {{{JOINT}}}]"
    cfg = config(stages, "log=trackio")
    grpo.train(cfg)
    out = tmp_path / "out"
    rows = read_log(out)
    assert [row["step"] for row in rows if "reward" in row] == [0, 1]
    assert [(row["step"], row["validation"]["kid"]) for row in rows] == sent
    assert grpo.load_config([str(out / "config.yaml")]) == cfg
    names = {path.name for path in out.rglob("*.png")}
    assert names >= {"curves.png", "00000_refiner.png", "before_after_1_joint.png"}
    assert "is in use" in refused(str(tmp_path / "config.yaml"), stages)
    assert len(read_log(out)) == len(rows)


# ---------------------------------------------------------------- one LLM for two


def test_a_text_encoder_that_writes_is_the_refiner(config, tmp_path):
    """FLUX.2-klein encodes prompts with a Qwen3: its LoRA trains as the refiner and is off where prompts are encoded."""
    import pipelines

    torch.manual_seed(0)
    pipe, call = pipelines.klein(is_distilled=True)
    pipe.save_pretrained(tmp_path / "klein")
    cfg = config(
        f"generator.model={tmp_path}/klein",
        f"generator.call={json.dumps(call)}",
        "generator.log_prob=elbo",
        "refiner.model=text_encoder",
        "refiner.max_new_tokens=4",
        "refiner.lr=0.1",
        "offload=true",
        stage="train: joint, steps: 1, prompts: 2, images: 2, rewrites: 2",
    )
    run = grpo.Run(cfg)
    assert run.refiner.model is run.generator.text_encoder
    keys = [("test", 0), ("test", 1)]
    words = ["a cat", "a dog"]

    def drawn():
        with run.generator.at_work():
            return run.generator.rollout(words, keys)[0]

    before = drawn()
    _, rewrites = run.refiner.rollout(words, 2, keys)
    run.update("refiner", rewrites, torch.tensor([[1.0, -1.0]] * 2))
    assert torch.equal(drawn(), before)
    # with the LoRA on, pictures would be others; a new LoRA, which adds nothing, would not change them
    run.generator.without_lora = nullcontext
    assert not torch.equal(drawn(), before)


@pytest.mark.parametrize("schedule, shares", [("linear", [1, 0.5]), ("constant", [1, 1])])
def test_learning_rates_follow_the_schedule_of_a_stage(config, monkeypatch, schedule, shares):
    lrs = []

    def optimize(run, name):
        lrs.append(run.optimizers[name].param_groups[0]["lr"])
        return 0.0

    monkeypatch.setattr(grpo.Run, "optimize", optimize)
    grpo.train(config(f"lr_schedule={schedule}", "generator.lr=0.01", "eval_every=9"))
    assert lrs == [0.01 * share for share in shares]
