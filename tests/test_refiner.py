"""Laws of refiner.py: reading answers, rollouts, token losses, LoRA files."""

import math

import pytest
import torch

import refiner as L

PROMPTS = ["a tabby cat", "a chinese temple, wide view, in soft light"]


@pytest.fixture(scope="module")
def refiner():
    r = L.Refiner(L.RefinerConfig(max_new_tokens=24), micro_batch=8)
    r.add_lora()
    return r


@pytest.mark.parametrize(
    "text,answer",
    [
        ("<answer>a cat,\n raw  photo</answer>", "a cat, raw photo"),
        ("<think>maybe <answer>no</answer></think>\n<answer>yes</answer>", "yes"),
        ("<answer>one</answer> or <answer>two</answer>", "two"),
        ("no tags at all", None),
        ("<answer></answer>", None),
        ("<answer>  \n</answer>", None),
        ("<answer>cut off", None),
        ("", None),
    ],
)
def test_read_answer(text, answer):
    """The last closed answer after the thinking; None where there is nothing to draw."""
    assert L.read_answer(text) == answer


def test_cue_share():
    """Counted per text, without regard to case."""
    assert (
        L.cue_share(
            ["a cat, Raw Photo", "a dog, film grain, raw photo", "a cow", "img_1.cr2"],
            ["raw photo", "film grain", "IMG_"],
        )
        == 0.75
    )


# ---------------------------------------------------------------- rollout


def test_ratio_is_one_on_the_first_pass(refiner):
    """Log-probs of the rollout are those that training computes, for every token."""
    rewrites = refiner.rollout(PROMPTS, 4, seed=1)
    log_probs = refiner.log_probs(rewrites, list(range(8)))
    assert torch.equal(log_probs.detach(), rewrites.old_log_probs) and log_probs.requires_grad
    assert torch.equal((log_probs - rewrites.old_log_probs).exp().detach(), torch.ones_like(rewrites.mask))


def test_log_probs_are_those_of_the_sampled_tokens_without_padding(refiner):
    """One row alone, unpadded, through the bare model: log_softmax at the temperature, token by token."""
    rewrites = refiner.rollout(PROMPTS, 2, seed=2)
    row = 0  # the shorter prompt, padded on the left
    ids, keep = rewrites.ids[row], rewrites.attention[row].bool()
    assert not keep[0]
    alone = ids[keep][None]
    logits = refiner.model(input_ids=alone).logits[0].double() / refiner.cfg.temperature
    length = int(rewrites.mask[row].sum())
    want = logits.log_softmax(-1)[-length - 1 : -1].gather(1, alone[0, -length:, None])[:, 0]
    got = rewrites.old_log_probs[row][rewrites.mask[row] > 0]
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-4, atol=1e-4)


def test_rollout_depends_on_its_seed_alone(refiner):
    """The same seed repeats, another differs, rewrites of a prompt differ, and the global generator is left as it was."""
    state = torch.get_rng_state()
    one, two, other = (refiner.rollout(PROMPTS, 4, seed=s) for s in (5, 5, 6))
    assert torch.equal(state, torch.get_rng_state())
    assert one.texts == two.texts and one.texts != other.texts and len(set(one.texts)) > 4


def test_mask_ends_with_the_first_end_token(refiner):
    """Nothing after the end token counts, the end token itself does."""
    rewrites = refiner.rollout(PROMPTS, 4, seed=3)
    eos = refiner.tokenizer.eos_token_id
    completion = rewrites.ids[:, -rewrites.mask.shape[1] :]
    for tokens, mask in zip(completion.tolist(), rewrites.mask.tolist()):
        length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert mask == [1.0] * length + [0.0] * (len(tokens) - length)


def test_an_answer_that_is_cut_off_falls_back_to_the_users_words():
    """Two new tokens cannot hold an answer: the text is the prompt, and the row is marked."""
    r = L.Refiner(L.RefinerConfig(max_new_tokens=2))
    rewrites = r.rollout(PROMPTS, 2, seed=0)
    assert rewrites.texts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 and rewrites.bad_format.tolist() == [1.0] * 4


# ---------------------------------------------------------------- losses

LOG_RATIO = torch.tensor([[0.1, -0.5, 0.0], [0.4, 0.2, 9.9]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
A = torch.tensor([1.0, -2.0])


def by_hand(kind):
    clip = lambda r, a: -min(r * a, min(max(r, 0.8), 1.28) * a)
    e = math.exp
    rows = [[clip(e(0.1), 1), clip(e(-0.5), 1), clip(1.0, 1)], [clip(e(0.4), -2), clip(e(0.2), -2)]]
    if kind == "dapo":
        return sum(map(sum, rows)) / 5
    if kind == "grpo":
        return (sum(rows[0]) / 3 + sum(rows[1]) / 2) / 2
    if kind == "dr_grpo":
        return (sum(rows[0]) + sum(rows[1])) / 10 / 2
    return (clip(e((0.1 - 0.5) / 3), 1) + clip(e(0.3), -2)) / 2


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "gspo"])
def test_token_losses_against_hand_computed_values(kind):
    """Two rewrites of three and two tokens; the masked token, with its absurd ratio, does not count."""
    cfg = L.RefinerConfig(loss=kind, max_new_tokens=10)
    loss, _ = L.token_loss(LOG_RATIO, torch.zeros_like(LOG_RATIO), A, MASK, cfg, 2, 5.0)
    assert loss.item() == pytest.approx(by_hand(kind), rel=1e-5)


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "gspo"])
def test_token_losses_do_not_depend_on_the_micro_batch(kind):
    """The normalisers are those of the accumulated batch: any split sums to the same loss and gradient."""
    g = torch.Generator().manual_seed(0)
    new = (torch.randn(6, 5, generator=g) * 0.3).requires_grad_(True)
    mask = (torch.rand(6, 5, generator=g) < 0.7).float()
    mask[:, 0] = 1
    advantage, cfg = torch.randn(6, generator=g), L.RefinerConfig(loss=kind)

    def run(splits):
        new.grad = None
        total = 0.0
        for rows in splits:
            loss, _ = L.token_loss(
                new[rows], torch.zeros(len(rows), 5), advantage[rows], mask[rows], cfg, 6, mask.sum().item()
            )
            loss.backward()
            total += loss.item()
        return total, new.grad.clone()

    whole, gradient = run([list(range(6))])
    for splits in ([[0, 1, 2, 3], [4, 5]], [[i] for i in range(6)]):
        part, other = run(splits)
        assert part == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(other, gradient)


def test_k3_is_zero_at_the_reference_and_its_mean_is_the_kl():
    """Nonnegative everywhere; over samples of the policy its mean is KL(policy || reference)."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(8, generator=g).log_softmax(0), torch.randn(8, generator=g).log_softmax(0)
    k3 = L.k3_kl(p, q)
    assert (k3 >= 0).all() and L.k3_kl(p, p).abs().max() == 0
    assert (p.exp() * k3).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-6)


def test_temperature_divides_logits():
    """token_log_probs is log_softmax(logits / T) at the ids, huge logits included."""
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 100
    ids = torch.tensor([[0, 6, 3], [1, 1, 2]])
    want = (logits.double() / 0.7).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(L.token_log_probs(logits, ids, 0.7).double(), want, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- LoRA and bad input


def test_adapter_file_reproduces_the_logits_in_a_fresh_model(tmp_path):
    """AutoModelForCausalLM + PeftModel, nothing of ours, gives the trained logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    r = L.Refiner(L.RefinerConfig())
    r.add_lora()
    g = torch.Generator().manual_seed(1)
    for n, p in r.model.named_parameters():
        if "lora_B" in n:
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    ids = torch.arange(20)[None]
    want = r.model(input_ids=ids).logits
    r.save_lora(tmp_path)
    base = AutoModelForCausalLM.from_pretrained("nano/refiner", dtype=torch.float32)
    assert (base(input_ids=ids).logits - want).abs().max() > 1e-2
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(input_ids=ids).logits, want)
    with r.reference():
        assert (r.model(input_ids=ids).logits - want).abs().max() > 1e-2


def test_lora_leaves_the_head_alone(refiner):
    """The head and the embeddings are frozen: only attention and MLP layers carry LoRA."""
    names = [n for n, p in refiner.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n and "lm_head" not in n and "embed" not in n for n in names)


def test_a_folder_that_is_no_model(tmp_path):
    """One line that names the folder and what was expected."""
    with pytest.raises(ValueError, match="no config.json; expected a causal language model"):
        L.Refiner(L.RefinerConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match="temperature"):
        L.RefinerConfig(temperature=0.0)
