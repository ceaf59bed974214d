"""refiner.py: reading answers, sampling, log-probs, the token losses, the adapter's file, what is refused."""

import json
import math
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, damage, nudge, refuses
from torch.testing import assert_close
from transformers import PhiConfig, PhiForCausalLM

from grpo import clipped_loss
from refiner import (
    Refiner,
    RefinerConfig,
    chat,
    cue_share,
    read_answer,
)

MODEL = ROOT / "nano/refiner"
PROMPTS = ["a tabby cat", "a chinese temple, wide view, in soft light"]
KEYS = [("test", 0), ("test", 1)]
ROWS = [4, 5, 6, 7]


def make(model=MODEL, micro_batch=8, max_new_tokens=24, **changes):
    cfg = RefinerConfig(
        model=str(model), max_new_tokens=max_new_tokens, **changes
    )
    llm = Refiner(cfg, micro_batch=micro_batch)
    llm.add_lora()
    return llm


@pytest.fixture(scope="module")
def refiner():
    return make()


@pytest.fixture(scope="module")
def record(refiner):
    """Four rewrites of each prompt"""
    return refiner.rollout(PROMPTS, 4, KEYS)[1]


@pytest.fixture
def folder(tmp_path):
    """A copy of the model, to be damaged"""
    return shutil.copytree(MODEL, tmp_path / "llm")


# ---------------------------------------------------------------- text

ANSWERS = {
    "<answer>a cat,\n raw  photo</answer>": "a cat, raw photo",
    "<think>maybe <answer>no</answer></think>\n<answer>yes</answer>": "yes",
    "<answer>one</answer> or <answer>two</answer>": "two",
    "<think><answer>no</answer></think> yes": "",
    "<answer>  \n</answer>": "",
    "<answer>cut off": "",
    "": "",
}


@pytest.mark.parametrize("text,answer", ANSWERS.items())
def test_an_answer_is_the_last_closed_one_after_the_thinking(text, answer):
    """White space folded; empty where there is nothing to draw."""
    assert read_answer(text) == answer


def test_cue_share_counts_texts():
    """A text counts once, in any case."""
    texts = [
        "a cat, Raw Photo",
        "film grain, raw photo",
        "a cow",
        "img_1.cr2",
    ]
    assert cue_share(texts, ["raw photo", "film grain", "IMG_"]) == 0.75


def test_examples_are_earlier_turns(refiner):
    """Between the system's words and the user's, which end the chat as they do without."""
    plain, shown = (
        chat(refiner.tokenizer, ["a cat"], "Be brief.", examples)[0]
        for examples in ({}, {"a dog": "grain"})
    )
    turns = ["Be brief.", "a dog", "<answer>grain</answer>", "a cat"]
    assert sorted(turns, key=shown.index) == turns
    assert shown.endswith(plain[plain.index("a cat") :])


# ---------------------------------------------------------------- sampling


def test_a_rewrite_depends_on_its_key_alone(refiner, record, monkeypatch):
    """Not on its neighbours, nor on the micro-batch, which bounds `generate`; torch's generator stays."""
    spy = Mock(wraps=refiner.model.generate)
    monkeypatch.setattr(refiner.model, "generate", spy)
    monkeypatch.setattr(refiner, "micro_batch", 3)
    state = torch.get_rng_state()
    texts, _ = refiner.rollout(PROMPTS[::-1], 4, KEYS[::-1])
    assert torch.equal(state, torch.get_rng_state())
    assert texts == record.texts[4:] + record.texts[:4]
    batches = [call.kwargs["input_ids"] for call in spy.call_args_list]
    assert [len(ids) for ids in batches] == [3, 3, 2]
    other, _ = refiner.rollout(PROMPTS, 4, [("test", 2), ("test", 3)])
    assert len(set(texts + other)) > 8


def test_what_is_used_is_sampled_at_its_own_temperature(record):
    """Near 0 all rewrites are the likeliest; what trains asks for the temperature of its log-probs."""
    llm = make(use_temperature=1e-3)
    texts, _ = llm.rollout(PROMPTS, 4, KEYS)
    assert len(set(texts[:4])) == len(set(texts[4:])) == 1
    assert llm.rollout(PROMPTS, 4, KEYS, 0.6)[0] == record.texts


def test_the_models_own_repetition_penalty_is_not_applied(
    refiner, record, monkeypatch
):
    """It would sample from another policy than log_probs knows."""
    monkeypatch.setattr(
        refiner.model.generation_config, "repetition_penalty", 5.0
    )
    assert refiner.rollout(PROMPTS, 4, KEYS)[0] == record.texts


def test_the_mask_is_the_rewrite_up_to_its_first_end_token(refiner, record):
    """It begins behind the longest chat, and holds the end token."""
    chats = chat(refiner.tokenizer, PROMPTS, refiner.cfg.system_prompt, {})
    K = max(map(len, refiner.tokenizer(chats).input_ids))
    eos = refiner.tokenizer.eos_token_id
    for ids, mask in zip(record.ids.tolist(), record.mask.tolist()):
        end = [*ids, eos].index(eos, K)
        assert mask == [float(K <= i <= end) for i in range(len(mask))]
    assert len(record.mask.sum(1).unique()) > 1


def test_an_answer_that_is_cut_off_falls_back_to_the_users_words():
    """Two tokens hold no answer: the text is the prompt, and the rewrite is marked."""
    texts, record = make(max_new_tokens=2).rollout(PROMPTS, 1, KEYS)
    assert texts == PROMPTS and record.bad_format.tolist() == [1, 1]


# ---------------------------------------------------------------- log-probs


def test_log_probs_are_those_of_the_bare_model_without_padding(record):
    """Each row alone: log_softmax of the logits at the sampling temperature, and 0 outside the mask."""
    llm = make(temperature=0.7)
    nudge(llm)
    log_probs, _ = llm.log_probs(record, ROWS + [0])
    for got, row in zip(log_probs, ROWS + [0]):
        ids = record.ids[row][record.attention[row] > 0]
        logits = llm.model(ids[None]).logits[0, :-1]  # (k-1, V)
        want = (logits / 0.7).log_softmax(-1).gather(1, ids[1:, None])
        mask = record.mask[row] > 0
        assert_close(got[mask], want[-mask.sum() :, 0], rtol=1e-4, atol=1e-4)
        assert not got[~mask].any()


def test_ratio_and_kl_follow_from_the_old_policy(record):
    """Exactly 1 and 0 at first; later, remembered rows know the policy that drew them, here the reference."""
    llm = make(beta=0.1, micro_batch=3)
    llm.remember(record, ROWS)
    ((log_ratio, kl, *_),) = llm.terms(record, ROWS)
    assert not log_ratio.any() and not kl.any()
    old, _ = llm.log_probs(record, ROWS)
    nudge(llm)
    new, _ = llm.log_probs(record, ROWS)
    ((log_ratio, kl, *_),) = llm.terms(record, ROWS)
    assert_close(log_ratio, new - old, rtol=1e-4, atol=1e-4)
    d = old - new  # Schulman's k3, whose mean over tokens of the policy is the KL
    assert_close(kl, d.exp() - d - 1, rtol=1e-4, atol=1e-6)
    assert kl.sum() > 0
    ((log_ratio, *_),) = llm.terms(record, [0, 1])  # not remembered
    assert not log_ratio.any()
    log_ratio.sum().backward()
    assert all(p.grad.any() for p in llm.parameters())


# ---------------------------------------------------------------- losses


def by_hand(log_ratio, advantage):
    """PPO's loss of one token, clipped to [0.8, 1.28]"""
    ratio = math.exp(log_ratio)
    return -min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)


FIRST = [by_hand(0.1, 1), by_hand(-0.5, 1), by_hand(0, 1)]
SECOND = [by_hand(0.4, -2), by_hand(0.2, -2)]
BY_HAND = {
    "dapo": sum(FIRST + SECOND) / 5,
    "grpo": (sum(FIRST) / 3 + sum(SECOND) / 2) / 2,
    "dr_grpo": sum(FIRST + SECOND) / 10 / 2,
    "gspo": (by_hand(-0.4 / 3, 1) + by_hand(0.3, -2)) / 2,
}


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("split", [[[0, 1]], [[1], [0]]])
def test_the_token_losses_are_those_of_their_papers(kind, split):
    """Rewrites of three and two tokens, in one micro-batch or two; old log-probs are 0."""
    log_probs = torch.tensor([[0, 0.1, -0.5, 0], [0, 0.4, 0.2, 0]])
    mask = torch.tensor([[0.0, 1, 1, 1], [0, 1, 1, 0]])
    advantage = torch.tensor([[1.0], [-2]])
    old = torch.zeros(4)
    record = SimpleNamespace(mask=mask, kept={0: old, 1: old})
    llm = object.__new__(Refiner)
    llm.cfg = RefinerConfig(loss=kind, max_new_tokens=10, beta=0)
    llm.log_probs = lambda _, rows: (log_probs[rows], None)
    total = 0
    for rows in split:
        ((log_ratio, _, _, weight, _),) = llm.terms(record, rows)
        loss, _ = clipped_loss(log_ratio, advantage[rows], *llm.clip())
        total += (loss * weight).sum() / llm.count(record, [0, 1])
    assert total.item() == pytest.approx(BY_HAND[kind])


# ---------------------------------------------------------------- the adapter's file


def test_a_saved_adapter_is_the_policy_again_and_a_damaged_one_is_refused(tmp_path):
    """Loaded into a fresh model it gives the same logits and can be trained."""
    llm = make()
    ids = torch.arange(20)[None]
    nudge(llm)
    trained = llm.model(ids).logits
    llm.save(tmp_path)
    again = Refiner(llm.cfg)
    again.load(tmp_path)
    assert_close(again.model(ids).logits, trained)
    assert len(again.parameters()) == len(llm.parameters())
    damage(tmp_path / "adapter_model.safetensors", "reshaped")
    with refuses(str(tmp_path)):
        Refiner(llm.cfg).load(tmp_path)


# ---------------------------------------------------------------- models


def test_a_tokenizer_without_a_pad_token_rewrites_as_with_one(folder, record):
    """Llama's has none."""
    file = folder / "tokenizer_config.json"
    options = json.loads(file.read_text()) | {"pad_token": None}
    file.write_text(json.dumps(options))
    llm = make(folder)
    assert llm.tokenizer.pad_token == llm.tokenizer.eos_token
    _, other = llm.rollout(PROMPTS, 4, KEYS)
    assert other.texts == record.texts
    assert torch.equal(other.mask, record.mask)


def test_a_head_with_a_bias_is_refused(folder):
    """Its log-probs would be wrong in silence."""
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = PhiForCausalLM(PhiConfig(vocab_size=578, **small))
    model.lm_head.bias.data += 0.5
    model.save_pretrained(folder)
    with refuses("more than one matrix"):
        make(folder)


def test_a_policy_that_has_diverged_is_named():
    """Logits of NaN are a ConfigError, before a token is drawn from them."""
    llm = make()
    llm.parameters()[0].data += math.nan
    with refuses("diverged"):
        llm.rollout(PROMPTS, 1, KEYS)
