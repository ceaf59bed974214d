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

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class RefinerConfig:
    """See config.yaml for units and reasons."""

    model: str = "nano/refiner"
    system_prompt: str = (
        "You rewrite prompts for a text-to-image model. Keep the subject and every detail of the user's prompt, "
        "and add what makes the picture look like a real photograph. Reply with <answer>the rewritten prompt</answer>."
    )
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
    old_log_probs: torch.Tensor  # (B, L) nats, at the sampling temperature


# ---------------------------------------------------------------- pure functions


def chat(tokenizer, prompts, system_prompt):
    """Prompts -> the chat texts that the LLM continues."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": system_prompt}, {"role": "user", "content": p}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for p in prompts
    ]


def read_answer(text):
    """The last closed <answer> after the thinking, white space folded; None if there is none or it is empty."""
    answers = re.findall(r"<answer>(.*?)</answer>", text.rpartition("</think>")[2], flags=re.DOTALL)
    return " ".join(answers[-1].split()) or None if answers else None


def cue_share(texts, cues):
    """Share of texts that hold at least one photographic cue."""
    return sum(any(c.lower() in t.lower() for c in cues) for t in texts) / max(len(texts), 1)


def token_log_probs(logits, ids, temperature):
    """log softmax(logits / temperature) at ids: (B, L, V), (B, L) -> (B, L) f32 nats"""
    logits = logits.float() / temperature
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


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
        except OSError as error:
            raise ValueError(
                f"refiner.model: {cfg.model} cannot be loaded ({str(error).splitlines()[0]}); give a folder or a repository of the Hub"
            ) from error
        if not self.tokenizer.chat_template:
            raise ValueError(f"refiner.model: {cfg.model} has no chat template; expected an instruction-tuned model")
        self.model.requires_grad_(False)

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
        """The adapter that `save_lora` wrote."""
        self.model = PeftModel.from_pretrained(self.model, str(folder), is_trainable=True)

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
        """P prompts x N rewrites, prompt-major -> Rewrites. `seed` alone decides the sampling; the global generator is left as it was."""
        cfg, tokenizer = self.cfg, self.tokenizer
        texts = chat(tokenizer, prompts, cfg.system_prompt)
        heads = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt").to(
            self.device
        )
        heads = {n: heads[n].repeat_interleave(num_rewrites, 0) for n in ("input_ids", "attention_mask")}  # (P*N, K)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids = self.model.generate(
                **heads,
                do_sample=True,
                temperature=cfg.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=cfg.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )  # (P*N, K+L)
        width = heads["input_ids"].shape[1]
        completion = ids[:, width:]  # (P*N, L)
        eos = self.model.generation_config.eos_token_id
        ended = torch.isin(completion, torch.tensor(eos, device=ids.device).flatten()).cumsum(1)
        mask = (
            ended - torch.isin(completion, torch.tensor(eos, device=ids.device).flatten()).long() == 0
        ).float()  # the first end token counts
        answers = [
            read_answer(tokenizer.decode(row[m > 0], skip_special_tokens=True)) for row, m in zip(completion, mask)
        ]
        own = [p for p in prompts for _ in range(num_rewrites)]
        rewrites = Rewrites(
            texts=[a or p for a, p in zip(answers, own)],
            ids=ids,
            attention=torch.cat([heads["attention_mask"], mask.long()], 1),
            mask=mask,
            bad_format=torch.tensor([float(a is None) for a in answers]),
            old_log_probs=torch.zeros_like(mask),
        )
        for rows in self.chunks(len(ids)):
            rewrites.old_log_probs[rows] = self.log_probs(rewrites, rows)
        return rewrites

    def chunks(self, n):
        return [list(range(i, min(i + self.micro_batch, n))) for i in range(0, n, self.micro_batch)]

    def log_probs(self, rewrites, rows):
        """Token log-probs of some rows, with grad: (b, L) nats, at the sampling temperature; zero where the mask is zero"""
        ids, mask = rewrites.ids[rows], rewrites.mask[rows]
        length = mask.shape[1]
        attention = rewrites.attention[rows]
        positions = (attention.cumsum(1) - 1).clamp(min=0)  # left padding must not shift positions
        logits = self.model(
            input_ids=ids, attention_mask=attention, position_ids=positions, logits_to_keep=length + 1
        ).logits[:, :-1]  # (b, L, V)
        return token_log_probs(logits, ids[:, -length:], self.cfg.temperature) * mask
