"""Laws of refiner.py: reading answers, rollouts, token losses, LoRA files."""

import math

import pytest
import torch

import refiner as L

def randomly(*shape):
    return torch.randn(*shape, dtype=torch.float64)


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
    """Log-probs without grad, as they are kept before an update, are those that training computes, for every token."""
    rewrites = refiner.rollout(PROMPTS, 4, seed=1)
    log_probs, entropy = refiner.log_probs(rewrites, list(range(8)))
    assert (entropy[rewrites.mask > 0] > 0).all() and not entropy.requires_grad
    with torch.no_grad():
        old_log_probs, _ = refiner.log_probs(rewrites, list(range(8)))
    assert torch.equal(log_probs.detach(), old_log_probs) and log_probs.requires_grad
    assert torch.equal((log_probs - old_log_probs).exp().detach(), torch.ones_like(rewrites.mask))


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
    got = refiner.log_probs(rewrites, [0, 1, 2, 3])[0][row][rewrites.mask[row] > 0]
    torch.testing.assert_close(got.detach().double(), want.detach(), rtol=1e-4, atol=1e-4)


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


def test_examples_are_earlier_turns(refiner):
    """An example stands between the system's words and the user's, its rewrite in <answer> tags; none is the plain template."""
    plain, = L.chat(refiner.tokenizer, ["a cat"], "Be brief.", {})
    shown, = L.chat(refiner.tokenizer, ["a cat"], "Be brief.", {"a dog": "a dog, film grain"})
    turns = ["Be brief.", "a dog", "<answer>a dog, film grain</answer>", "a cat"]
    places = [shown.index(t) for t in turns]
    assert places == sorted(places) and len(shown) > len(plain) and "dog" not in plain
    assert shown.endswith(plain[plain.index("a cat") :])


def test_sampling_knows_nothing_that_log_probs_does_not():
    """A repetition penalty in the model's own generation defaults would sample from another policy than the one that is trained."""
    r = L.Refiner(L.RefinerConfig(max_new_tokens=12))
    want = r.rollout(PROMPTS, 4, seed=3).ids
    r.model.generation_config.repetition_penalty = 5.0
    assert torch.equal(r.rollout(PROMPTS, 4, seed=3).ids, want)


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


# ---------------------------------------------------------------- the kernel


@pytest.fixture(params=["torch", "triton"])
def path(request, monkeypatch):
    """Small tiles, so that there are several; torch, then the Triton kernel in its interpreter"""
    monkeypatch.setattr(L, "TILE", {"cpu": (5, 16)})
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert L.use_triton(torch.zeros(1))
    return request.param


def exact(hidden, weight, ids, temperature):
    """The same in float64, by torch's own log_softmax"""
    hidden = hidden.detach().double().requires_grad_(True)
    log_p = (hidden @ weight.double().T / temperature).log_softmax(-1)
    log_probs = log_p.gather(-1, ids[..., None])[..., 0]
    (log_probs * torch.arange(1.0, ids.numel() + 1).view(ids.shape)).sum().backward()
    return log_probs.detach(), -(log_p.exp() * log_p).sum(-1).detach(), hidden.grad


def ours(hidden, weight, ids, temperature):
    hidden = hidden.detach().clone().requires_grad_(True)
    log_probs, entropy = L.token_log_probs(hidden, weight, ids, temperature)
    (log_probs * torch.arange(1.0, ids.numel() + 1).view(ids.shape)).sum().backward()
    return log_probs.detach(), entropy, hidden.grad


SIZES = [((7,), 12, 37), ((2, 3), 8, 16), ((1,), 5, 1), ((11,), 4, 129), ((1, 1), 3, 15)]


@pytest.mark.parametrize("shape,D,V", SIZES)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_fused_log_probs_against_float64(path, shape, D, V, temperature):
    """Log-probs, entropy and gradient in f32, sizes off every tile, one token, a vocabulary of one."""
    hidden, weight = torch.randn(*shape, D), torch.randn(V, D)
    ids = torch.randint(V, shape)
    for got, want in zip(ours(hidden, weight, ids, temperature), exact(hidden, weight, ids, temperature)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


def test_fused_log_probs_in_bf16(path):
    """Inputs in bf16: within what rounding the logits costs, and the gradient comes back in bf16."""
    hidden, weight, ids = torch.randn(9, 16).bfloat16(), torch.randn(40, 16).bfloat16(), torch.randint(40, (9,))
    got, want = ours(hidden, weight, ids, 1.0), exact(hidden, weight, ids, 1.0)
    assert got[0].dtype == torch.float32 and got[2].dtype == torch.bfloat16
    for g, w in zip(got, want):
        torch.testing.assert_close(g.double(), w, rtol=0.02, atol=0.1)
    assert (got[0].double() - want[0]).abs().mean() < 0.03


def test_fused_log_probs_with_huge_logits(path):
    """Logits of +-10,000, the largest in the first and in the last tile: finite, and those of float64."""
    hidden, weight = torch.eye(2, 4) * 100, torch.randn(50, 4)
    weight[0, 0], weight[49, 1], weight[3, 0] = 100.0, 100.0, -100.0
    ids = torch.tensor([0, 49])
    for got, want in zip(ours(hidden, weight, ids, 1.0), exact(hidden, weight, ids, 1.0)):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-3)
    lost = torch.tensor([3, 3])  # the least probable token: -20,000 nats, not -inf
    torch.testing.assert_close(
        ours(hidden, weight, lost, 1.0)[0].double(), exact(hidden, weight, lost, 1.0)[0], rtol=1e-5, atol=1e-3
    )


def test_fused_log_probs_of_strided_and_empty_input(path):
    """A transposed hidden gives the same numbers as its copy; no token gives empty results and an empty gradient."""
    hidden, weight, ids = torch.randn(12, 7).T, torch.randn(21, 24)[:, ::2], torch.randint(21, (7,))
    for a, b in zip(ours(hidden, weight, ids, 1.0), ours(hidden.contiguous(), weight.contiguous(), ids, 1.0)):
        torch.testing.assert_close(a, b)
    log_probs, entropy, grad = ours(hidden[:0], weight, ids[:0], 1.0)
    assert log_probs.shape == entropy.shape == (0,) and grad.shape == (0, 12)


def test_every_output_element_is_written(path, monkeypatch):
    """torch.empty filled with NaN beforehand: none is left in log-probs, entropy or gradient."""
    poisoned = lambda make: lambda *a, **k: make(*a, **k).fill_(float("nan"))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    hidden, weight, ids = torch.randn(13, 6), torch.randn(35, 6), torch.randint(35, (13,))
    assert all(torch.isfinite(x).all() for x in ours(hidden, weight, ids, 1.0))


def test_the_two_paths_agree_and_so_does_the_reference(monkeypatch):
    """Kernel, tiles of torch and the plain reference: one number."""
    monkeypatch.setattr(L, "TILE", {"cpu": (1024, 16)})
    hidden, weight, ids = torch.randn(6, 8), torch.randn(50, 8), torch.randint(50, (6,))
    tiles = L.token_log_probs(hidden, weight, ids, 0.9)
    for a, b in zip(tiles, L.token_log_probs_ref(hidden, weight, ids, 0.9)):
        torch.testing.assert_close(a, b)
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for a, b in zip(tiles, L.token_log_probs(hidden, weight, ids, 0.9)):
        torch.testing.assert_close(a, b)


def test_gradcheck_of_the_tiled_path(monkeypatch):
    """Numerical derivatives in float64, over several tiles."""
    monkeypatch.setattr(L, "TILE", {"cpu": (3, 4)})
    hidden, weight, ids = randomly(5, 3).requires_grad_(True), randomly(11, 3), torch.randint(11, (5,))
    assert torch.autograd.gradcheck(lambda h: L.token_log_probs(h, weight, ids, 0.8)[0], hidden)


def test_no_logits_are_ever_held(monkeypatch):
    """The largest tensor that token_log_probs makes is a tile, not n x V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(L, "TILE", {"cpu": (1024, 64)})
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(t):
                    largest[0] = max(largest[0], t.numel())
            return out

    hidden, weight, ids = torch.randn(32, 8).requires_grad_(True), torch.randn(1000, 8), torch.randint(1000, (32,))
    with Watch():
        L.token_log_probs(hidden, weight, ids, 1.0)[0].sum().backward()
    assert 32 * 64 <= largest[0] < 32 * 1000


def test_without_grad_there_is_one_product_and_no_u(monkeypatch):
    """Tiles x products: two with grad, one without."""
    calls, product = [], L._product
    monkeypatch.setattr(L, "_product", lambda *a: calls.append(1) or product(*a))
    monkeypatch.setattr(L, "TILE", {"cpu": (1024, 10)})
    hidden, weight, ids = torch.randn(4, 6), torch.randn(30, 6), torch.randint(30, (4,))
    L.token_log_probs(hidden, weight, ids, 1.0)
    assert len(calls) == 3
    L.token_log_probs(hidden.requires_grad_(True), weight, ids, 1.0)
    assert len(calls) == 3 + 6


def test_a_trainable_head_is_refused():
    """Its gradient would be missing in silence."""
    with pytest.raises(ValueError, match="lm_head"):
        L.token_log_probs(torch.randn(2, 3), torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1]), 1.0)


def test_a_head_with_a_soft_cap_is_refused(tmp_path):
    """Gemma 2 caps its logits: its log-probs would be wrong in silence."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained("nano/refiner")
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="more than one matrix product in its head"):
        L.Refiner(L.RefinerConfig(model=str(tmp_path)))


def test_padding_costs_nothing(refiner, monkeypatch):
    """The head sees completion tokens alone, and columns that are padding in all rows are cut off before the model."""
    rewrites = refiner.rollout(PROMPTS, 2, seed=2)
    rows = [0, 1]  # the shorter prompt alone
    seen = {}
    token_log_probs, hidden = L.token_log_probs, refiner.hidden
    monkeypatch.setattr(L, "token_log_probs", lambda h, *a: seen.update(head=len(h)) or token_log_probs(h, *a))
    monkeypatch.setattr(refiner, "hidden", lambda ids, a: seen.update(columns=ids.shape[1]) or hidden(ids, a))
    log_probs, _ = refiner.log_probs(rewrites, rows)
    assert seen["head"] == rewrites.mask[rows].sum() and seen["columns"] == rewrites.attention[rows].any(0).sum()
    assert seen["columns"] < rewrites.ids.shape[1] and log_probs.shape == rewrites.mask[rows].shape
    whole, _ = refiner.log_probs(rewrites, [0, 1, 2, 3])
    torch.testing.assert_close(log_probs.detach(), whole[rows].detach(), rtol=1e-4, atol=1e-4)


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
