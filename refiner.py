"""The language policy: a chat LLM that rewrites the user's prompt so that its picture looks like a photograph.

Rollout: P prompts x N rewrites are sampled at `temperature`; log-probs are taken at the same temperature. The answer sits in
<answer>...</answer>, after optional thinking; a rewrite without one, or with an empty one, is replaced by the user's words and marked.

Token losses. L tokens, mask m, ratio r = exp(log_prob - old_log_prob), advantage A of the whole rewrite, B rewrites:

    l_t = -min(r_t A, clip(r_t, 1 - clip_range, 1 + clip_range_high) A)
    dapo     sum m l / (tokens of the whole accumulated batch)             DAPO, arXiv 2503.14476
    grpo     1/B sum over rewrites of (sum_t m l / sum_t m)                DeepSeekMath, arXiv 2402.03300
    dr_grpo  1/B sum over rewrites of (sum_t m l / max_new_tokens)         Dr. GRPO, arXiv 2503.20783
    gspo     1/B sum over rewrites of l with r = exp(mean_t log-ratio)     GSPO, arXiv 2507.18071
"""

import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux: torch does the same work
    triton = None

SAMPLING = 10**9 + 1  # first word of the seeds of rewrites, so that no picture's noise shares them


@dataclass
class RefinerConfig:
    """See config.yaml for units and reasons."""

    model: str = "nano/refiner"
    system_prompt: str = (
        "You rewrite prompts for a text-to-image model. Keep the subject and every detail of the user's prompt, "
        "and add what makes the picture look like a real photograph. Reply with <answer>the rewritten prompt</answer>."
    )
    examples: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int = 64
    temperature: float = 1.0
    format_penalty: float = 0.5
    lora_rank: int = 16
    lora_alpha: int = 32
    lr: float = 1e-3
    loss: Literal["dapo", "grpo", "dr_grpo", "gspo"] = "dapo"
    clip_range: float = 0.2
    clip_range_high: float = 0.28
    beta: float = 0.0
    cues: list[str] = field(
        default_factory=lambda: ["raw photo", "film grain", "35mm film", "unedited", "phone", "camera", "IMG_", "DSC_"]
    )

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(
                f"refiner.temperature: {self.temperature}; expected a number above 0, because GRPO needs rewrites that differ"
            )


@dataclass
class Rewrites:
    """P*N sampled rewrites, prompt-major."""

    texts: list  # what the generator draws
    ids: torch.Tensor  # (B, K+L) left-padded prompt, then the completion
    attention: torch.Tensor  # (B, K+L) 1 where a token is
    mask: torch.Tensor  # (B, L) f32, 1 on completion tokens, the end token included
    bad_format: torch.Tensor  # (B,) f32, 1 where no answer could be read


# ---------------------------------------------------------------- pure functions


def chat(tokenizer, prompts, system_prompt, examples):
    """Prompts -> the chat texts that the LLM continues; examples {user's words: rewrite} are shown as earlier turns."""
    turn = lambda role, content: {"role": role, "content": content}
    head = [turn("system", system_prompt)]
    for words, rewrite in examples.items():
        head += [turn("user", words), turn("assistant", f"<answer>{rewrite}</answer>")]
    return [
        tokenizer.apply_chat_template(head + [turn("user", p)], tokenize=False, add_generation_prompt=True) for p in prompts
    ]


def read_answer(text):
    """The last closed <answer> after the thinking, white space folded; None if there is none or it is empty."""
    answers = re.findall(r"<answer>(.*?)</answer>", text.rpartition("</think>")[2], flags=re.DOTALL)
    return " ".join(answers[-1].split()) or None if answers else None


def cue_share(texts, cues):
    """Share of texts that hold at least one photographic cue."""
    return sum(any(c.lower() in t.lower() for c in cues) for t in texts) / max(len(texts), 1)


def token_loss(log_probs, old_log_probs, advantages, mask, cfg, rewrites, tokens):
    """The loss of a micro-batch, to be summed over the accumulated batch -> (loss, share of tokens that were clipped)

    log_probs, old_log_probs, mask (b, L); advantages (b,); rewrites, tokens: their numbers in the whole accumulated batch, so that the split
    into micro-batches changes nothing.
    """
    log_ratio = (log_probs - old_log_probs) * mask  # (b, L)
    length = mask.sum(1).clamp(min=1)  # (b,)
    if cfg.loss == "gspo":
        log_ratio = (log_ratio.sum(1) / length)[:, None].expand_as(mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range_high)
    a = advantages[:, None]
    per_token = -torch.minimum(ratio * a, clipped * a) * mask  # (b, L)
    clip_fraction = ((ratio * a > clipped * a) * mask).sum() / tokens
    if cfg.loss == "dapo":
        return per_token.sum() / tokens, clip_fraction
    divisor = cfg.max_new_tokens if cfg.loss == "dr_grpo" else length
    return (per_token.sum(1) / divisor).sum() / rewrites, clip_fraction


def k3_kl(log_probs, ref_log_probs):
    """Schulman's k3 estimate of KL(policy || reference) per token, >= 0: (b, L) -> (b, L)"""
    d = ref_log_probs - log_probs
    return d.exp() - d - 1


class SampleByRow(LogitsProcessor):
    """Exact sampling at `temperature` with random numbers of each row's own, so that a batch may be split in any way.

    A token is drawn by the inverse of the cumulative distribution, with one uniform number of the row's generator; it is
    the one finite score that is left, so that greedy search takes it. rngs: B numpy generators.
    """

    def __init__(self, rngs, temperature):
        self.rngs, self.temperature = rngs, temperature

    def __call__(self, input_ids, scores):
        cdf = (scores.double() / self.temperature).softmax(-1).cumsum(-1)  # (B, V), f64: rare tokens keep their share
        u = torch.tensor([[rng.random()] for rng in self.rngs], dtype=cdf.dtype, device=cdf.device)  # (B, 1) in [0, 1)
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)  # (B, 1), the first whose cdf exceeds u
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


# ---------------------------------------------------------------- the policy


class Refiner:
    """A chat LLM with a LoRA. `rollout` samples rewrites, `log_probs` scores them with grad, `reference()` turns the LoRA off."""

    def __init__(self, cfg, device="cpu", dtype=torch.float32, micro_batch=64):
        self.cfg, self.device, self.micro_batch = cfg, torch.device(device), micro_batch
        if Path(cfg.model).exists() and not (Path(cfg.model) / "config.json").is_file():
            raise ValueError(
                f"refiner.model: {cfg.model} has no config.json; expected a causal language model saved with save_pretrained"
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(cfg.model)
            self.model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=dtype).to(device).eval()
        except (OSError, SafetensorError) as error:  # the latter: a download that was cut off
            raise ValueError(
                f"refiner.model: {cfg.model} cannot be loaded ({str(error).splitlines()[0]}); give a folder or a repository of the Hub"
            ) from error
        if not self.tokenizer.chat_template:
            raise ValueError(f"refiner.model: {cfg.model} has no chat template; expected an instruction-tuned model")
        self.model.requires_grad_(False)
        self._check_head()

    @torch.no_grad()
    def _check_head(self):
        """token_log_probs knows heads that are one matrix: no bias, no soft cap, no scale. Two tokens tell."""
        ids = torch.arange(2, device=self.device)[None]
        states, weight = self.hidden(ids, torch.ones_like(ids))
        if not torch.allclose(self.model(input_ids=ids).logits, states @ weight.T, rtol=0.02, atol=0.02):
            raise ValueError(
                f"refiner.model: {self.cfg.model} does more than one matrix product in its head (a bias, a scale or a soft cap); "
                "expected a model such as Qwen3, Llama or SmolLM"
            )

    def add_lora(self, seed=0):
        """A new LoRA on every linear layer but the head, f32; its up matrices are zero, so that nothing changes yet."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(
                self.model,
                LoraConfig(
                    r=self.cfg.lora_rank,
                    lora_alpha=self.cfg.lora_alpha,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )

    def load_lora(self, folder):
        """The adapter that `save_lora` wrote; ValueError for one that is cut off."""
        try:
            self.model = PeftModel.from_pretrained(self.model, str(folder), is_trainable=True)
        except SafetensorError as error:
            raise ValueError(f"{folder} cannot be read ({error}); expected an adapter that save_lora wrote") from error

    def save_lora(self, folder):
        """As `PeftModel.from_pretrained(model, folder)` reads it."""
        self.model.save_pretrained(str(folder))

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def reference(self):
        """Inside, the LoRA is off."""
        with self.model.disable_adapter():
            yield

    @torch.no_grad()
    def rollout(self, prompts, num_rewrites, seed):
        """P prompts x N rewrites, prompt-major -> Rewrites. `seed` alone decides the sampling; the global generator is left as it was.

        seed: an integer, or P tuples of integers, which a prompt keeps in whatever batch it comes.
        """
        cfg, tokenizer = self.cfg, self.tokenizer
        texts = chat(tokenizer, prompts, cfg.system_prompt, cfg.examples)
        heads = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt").to(
            self.device
        )
        heads = {n: heads[n].repeat_interleave(num_rewrites, 0) for n in ("input_ids", "attention_mask")}  # (P*N, K)
        seeds = [(seed, p) for p in range(len(prompts))] if isinstance(seed, int) else seed
        rngs = [np.random.default_rng((SAMPLING, *s, n)) for s in seeds for n in range(num_rewrites)]
        ids = self.model.generate(
            **heads,
            do_sample=False,  # SampleByRow has drawn
            logits_processor=LogitsProcessorList([SampleByRow(rngs, cfg.temperature)]),
            repetition_penalty=1.0,  # of the model's own defaults: log_probs knows none
            max_new_tokens=cfg.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # (P*N, K+L)
        width = heads["input_ids"].shape[1]
        completion = ids[:, width:]  # (P*N, L)
        eos = self.model.generation_config.eos_token_id
        is_end = torch.isin(completion, torch.tensor(eos, device=ids.device).flatten())
        ended = is_end.cumsum(1)
        mask = (ended - is_end.long() == 0).float()  # (P*N, L), the first end token counts
        answers = [
            read_answer(tokenizer.decode(row[m > 0], skip_special_tokens=True)) for row, m in zip(completion, mask)
        ]
        own = [p for p in prompts for _ in range(num_rewrites)]
        return Rewrites(
            texts=[a or p for a, p in zip(answers, own)],
            ids=ids,
            attention=torch.cat([heads["attention_mask"], mask.long()], 1),
            mask=mask,
            bad_format=torch.tensor([float(a is None) for a in answers]),
        )

    def log_probs(self, rewrites, rows):
        """Token log-probs, with grad, and entropies of some rows: (b, L) nats each, at the sampling temperature; zero where the mask is.

        Padding is not computed: columns that no row uses are cut off, and the head sees completion tokens alone.
        """
        mask = rewrites.mask[rows] > 0  # (b, L)
        length = mask.shape[1]
        attention = rewrites.attention[rows]
        used = attention.any(0).nonzero()  # columns that are padding in every row are not computed
        ids, attention = rewrites.ids[rows][:, used[0] : used[-1] + 1], attention[:, used[0] : used[-1] + 1]
        mask = mask[:, : int(used[-1]) + 1 - (rewrites.ids.shape[1] - length)]  # (b, l)
        hidden, weight = self.hidden(ids, attention)
        hidden = hidden[:, -mask.shape[1] - 1 : -1][mask]  # (n, D), the positions that predict a completion token
        values = token_log_probs(hidden, weight, ids[:, -mask.shape[1] :][mask], self.cfg.temperature)  # (n,), (n,)
        return tuple(torch.zeros(len(ids), length, device=ids.device).masked_scatter(
            torch.nn.functional.pad(mask, (0, length - mask.shape[1])), v) for v in values)

    def hidden(self, ids, attention):
        """ids, attention (b, K) -> what the head reads (b, K, D), and the head's weight (V, D)"""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        positions = (attention.cumsum(1) - 1).clamp(min=0)  # left padding must not shift positions
        states = model.base_model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
        return states.last_hidden_state, model.get_output_embeddings().weight


# ---------------------------------------------------------------- main


def trained(cfg, device, dtype):
    """The refiner of a whole config, with the LoRA of <out> where there is one"""
    refiner = Refiner(cfg.refiner, device, dtype, cfg.micro_batch)
    if (Path(cfg.out) / "refiner").is_dir():
        refiner.load_lora(Path(cfg.out) / "refiner")
    return refiner


def main(words):
    """[config.yaml, prompts and key=value in any order]: print four rewrites of each prompt, and mark those with no answer"""
    import grpo

    prompts = [w for w in words[1:] if not re.match(r"[\w.]+=", w)]
    cfg = grpo.load_config([w for w in words if w not in prompts])
    if not prompts:
        raise ValueError('no prompt; expected python refiner.py config.yaml "a prompt" ... [key=value ...]')
    if not cfg.refiner:
        raise ValueError("refiner: null; expected a config with a refiner")
    rewrites = trained(cfg, grpo.pick_device(cfg.device), getattr(torch, cfg.dtype)).rollout(prompts, 4, cfg.seed)
    for i, (text, bad) in enumerate(zip(rewrites.texts, rewrites.bad_format.tolist())):
        print((f"{prompts[i // 4]}\n" if i % 4 == 0 else "") + f"  {text}" + ("  (no answer: the prompt itself)" if bad else ""))


# ---------------------------------------------------------------- the kernel: log-probs without logits


def token_log_probs_ref(hidden, weight, ids, temperature):
    """What `token_log_probs` computes, with the logits (..., V) that it does without."""
    log_p = (hidden.float() @ weight.float().T / temperature).log_softmax(-1)  # (..., V)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1).detach()


def token_log_probs(hidden, weight, ids, temperature=1.0):
    """log p(ids) and entropy of softmax(hidden weight^T / temperature), without ever holding n x V numbers.

    hidden (..., D), weight (V, D) of the frozen head, both f32, bf16 or f16; ids (...) -> log_probs (...), entropy (...), f32 nats, for any
    leading shape. The gradient goes to hidden alone, and the entropy has none. ValueError if the head is trainable.

    One sweep over the vocabulary in tiles, the online softmax of FlashAttention (arXiv 2205.14135). As the head is frozen, a token's gradient is one
    vector, u = (weight[id] - softmax weight) / temperature, which the same sweep sums up; backward only multiplies. So two matrix products, where
    recomputing the logits in backward takes three; without grad one.
    """
    if weight.requires_grad:
        raise ValueError("refiner: the head (lm_head) is trainable; token_log_probs has no gradient for it: freeze it, or train with LoRA")
    with_grad = hidden.requires_grad and torch.is_grad_enabled()
    values = _TokenLogProbs.apply(hidden.flatten(0, -2), weight, ids.flatten(), temperature, with_grad)  # (n,), (n,)
    return tuple(v.view(ids.shape) for v in values)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, with_grad):
        log_probs, entropy, u = _sweep(hidden, weight, ids, temperature, with_grad)
        ctx.save_for_backward(u)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (u,) = ctx.saved_tensors
        return (grad[:, None] * u).to(u.dtype), None, None, None, None


TILE = {"cpu": (512, 1024), "cuda": (1024, 16384)}  # tokens x vocabulary: large enough for the matrix products, small enough for cache and memory


def _sweep(hidden, weight, ids, temperature, with_grad):
    """-> log_probs (n,), entropy (n,), u (n, D) or None"""
    (n, D), V, wide = hidden.shape, len(weight), torch.promote_types(hidden.dtype, torch.float32)
    log_probs, entropy = (torch.empty(n, dtype=wide, device=hidden.device) for _ in range(2))
    u = torch.empty_like(hidden, memory_format=torch.contiguous_format) if with_grad else None
    tokens, vocab = TILE[hidden.device.type]
    for start in range(0, n, tokens):
        rows = slice(start, start + tokens)
        h, target = hidden[rows], ids[rows]
        state = torch.zeros(4, len(h), dtype=wide, device=h.device)  # per token: maximum, sum of e, sum of e l, l at the id
        state[0] = -1e30
        total = torch.zeros(len(h), D, dtype=wide, device=h.device) if with_grad else None  # sum of e weight
        for first in range(0, V, vocab):
            w = weight[first : first + vocab]  # (v, D)
            logits = _product(h, w.T, wide)  # (n, v)
            e, shrink = softmax_tile(logits, target - first, state, temperature, w.dtype)
            if with_grad:
                total.mul_(shrink[:, None]).add_(_product(e, w, wide))
        top, sums, weighted, chosen = state
        log_probs[rows] = chosen - top - sums.log()
        entropy[rows] = sums.log() - weighted / sums
        if with_grad:
            u[rows] = (weight[target] - total / sums[:, None]) / temperature
    return log_probs, entropy, u


def _product(a, b, dtype):
    """a @ b in `dtype`. A GPU accumulates half precision in f32 and keeps that; on a CPU the result is rounded first, as the plain product is."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda and a.dtype != dtype else (a @ b).to(dtype)


def softmax_tile_ref(logits, target, state, temperature, dtype):
    """One tile of the online softmax. logits (n, v), target (n,) place of the id, maybe outside the tile, state (4, n), updated in place.

    l = logits / temperature; -> e = exp(l - maximum so far) (n, v) in `dtype`, and the factor (n,) that earlier sums shrink by.
    """
    top, sums, weighted, chosen = state
    l = logits if temperature == 1 else logits.div_(temperature)  # (n, v)
    inside = (target >= 0) & (target < l.shape[1])
    chosen += torch.where(inside, l.gather(1, target.clamp(0, l.shape[1] - 1)[:, None])[:, 0], 0)
    new = torch.maximum(top, l.amax(1))
    shrink = (top - new).exp()
    weighted.add_(sums * (top - new)).mul_(shrink)  # sum of e (l - maximum): no large numbers cancel
    l -= new[:, None]
    e = l.exp()
    weighted += torch.linalg.vecdot(e, l)
    sums.mul_(shrink).add_(e.sum(1))
    top.copy_(new)
    return e.to(dtype), shrink


def softmax_tile(logits, target, state, temperature, dtype):
    """`softmax_tile_ref` in one pass by Triton, on a GPU or where TRITON_INTERPRET=1, else in torch."""
    if not use_triton(logits):
        return softmax_tile_ref(logits, target, state, temperature, dtype)
    n, v = logits.shape
    e, shrink = torch.empty(n, v, dtype=dtype, device=logits.device), torch.empty(n, device=logits.device)
    block = triton.next_power_of_2(v)
    _softmax_tile_kernel[(n,)](logits, e, target, state, shrink, n, v, 1 / temperature, BLOCK=block, num_warps=16 if block > 4096 else 4)
    return e, shrink


def use_triton(x):
    """On a GPU; TRITON_INTERPRET=1 runs the kernels on a CPU, to check what they compute, not how fast."""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


if triton:

    @triton.jit
    def _softmax_tile_kernel(logits, e, target, state, shrink, n, v, inv_temperature, BLOCK: tl.constexpr):
        """One program a token: its row of the tile is read once, e written once. state is (4, n)."""
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        l = tl.load(logits + row * v + cols, mask=cols < v, other=float("-inf")) * inv_temperature  # (BLOCK,)
        top, sums, weighted, chosen = state + row, state + n + row, state + 2 * n + row, state + 3 * n + row
        old = tl.load(top)
        tl.store(chosen, tl.load(chosen) + tl.sum(tl.where(cols == tl.load(target + row), l, 0.0)))
        new = tl.maximum(old, tl.max(l))
        factor = tl.exp(old - new)
        d = tl.where(cols < v, l - new, 0.0)
        p = tl.where(cols < v, tl.exp(d), 0.0)
        before = tl.load(sums)
        tl.store(weighted, factor * (tl.load(weighted) + before * (old - new)) + tl.sum(p * d))
        tl.store(sums, factor * before + tl.sum(p))
        tl.store(top, new)
        tl.store(shrink + row, factor)
        tl.store(e + row * v + cols, p, mask=cols < v)


if __name__ == "__main__":
    from grpo import cli

    cli(lambda: main(sys.argv[1:]))
