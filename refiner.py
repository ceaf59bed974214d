"""The language policy: a chat LLM that rewrites a prompt so that its picture looks like a photograph.

Rollout: N rewrites of each of P prompts are sampled, those that train at `temperature`, at which log-probs
are taken too, those that are used at `use_temperature`. The answer sits in <answer>...</answer>, after
optional thinking; a rewrite without one, or with an empty one, is replaced by the user's words and marked.

Token losses. Each token of a rewrite has GRPO's clipped loss l_t of its ratio r_t = exp(log_prob -
old_log_prob) and of its rewrite's advantage. They differ in how tokens are weighed; m is the mask of L
completion tokens, B rewrites:

    dapo     sum m l / (tokens of the whole batch)              DAPO, arXiv 2503.14476
    grpo     1/B sum over rewrites of (sum m l / sum m)         DeepSeekMath, arXiv 2402.03300
    dr_grpo  1/B sum over rewrites of (sum m l / max_new_tokens)    Dr. GRPO, arXiv 2503.20783
    gspo     as grpo, with r = exp(mean over tokens of the log-ratio)   GSPO, arXiv 2507.18071
"""

import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import (
    ConfigError,
    batches,
    bounded,
    check_folder,
    check_tokenizer,
    load_model,
    loading,
    quantized,
    rng,
)
from kernels import token_log_probs
from policy import Policy, old_log_probs

CUES = ["raw photo", "film grain", "35mm film", "unedited", "phone", "camera", "IMG_", "DSC_"]
SYSTEM_PROMPT = (
    "You rewrite prompts for a text-to-image model. Keep the subject and every detail of the user's prompt, "
    "and add what makes the picture look like a real photograph. "
    "Reply with <answer>the rewritten prompt</answer>."
)


@dataclass
class RefinerConfig:
    """See config.yaml for units and reasons."""

    model: str = "nano/refiner"
    quantize: Literal["nf4", "int8"] | None = None
    system_prompt: str = SYSTEM_PROMPT
    examples: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int = bounded("positive", 64)
    temperature: float = bounded("positive", 1.0)
    use_temperature: float = bounded("positive", 0.6)
    format_penalty: float = bounded("natural", 0.5)
    lora_rank: int = bounded("positive", 16)
    lora_alpha: int = bounded("positive", 32)
    lr: float = bounded("positive", 3e-3)
    loss: Literal["dapo", "grpo", "dr_grpo", "gspo"] = "dapo"
    clip_range: float = bounded("positive", 0.2)
    clip_range_high: float = bounded("positive", 0.28)
    beta: float = bounded("natural", 0.04)
    cues: list[str] = field(default_factory=CUES.copy)


@dataclass
class Rewrites:
    """B = P*N sampled rewrites, prompt-major: what a rollout leaves to learn from"""

    texts: list  # (B,) the answers, or the user's words
    ids: torch.Tensor  # (B, K+L) left-padded chat of K tokens, then the completion of L
    attention: torch.Tensor  # (B, K+L) 1 where a token is
    mask: torch.Tensor  # (B, K+L) f32, 1 on the tokens that were sampled, the end token included
    bad_format: torch.Tensor  # (B,) f32, 1 where no answer could be read
    kept: dict = field(default_factory=dict)  # row -> (K+L,), where `remember` kept it


# ---------------------------------------------------------------- pure functions


def chat(tokenizer, prompts, system_prompt, examples):
    """Prompts -> the chats that the LLM continues; examples {user's words: rewrite} are earlier turns."""
    head = [{"role": "system", "content": system_prompt}]
    for words, rewrite in examples.items():
        head += [
            {"role": "user", "content": words},
            {"role": "assistant", "content": f"<answer>{rewrite}</answer>"},
        ]
    chats = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)


def read_answer(text):
    """The last closed <answer> after the thinking, white space folded; "" without one"""
    answers = re.findall(r"<answer>(.*?)</answer>", text.rpartition("</think>")[2], flags=re.DOTALL)
    return " ".join(answers[-1].split()) if answers else ""


def cue_share(texts, cues):
    """Share of texts that hold at least one photographic cue; for people, no reward"""
    return sum(any(cue.lower() in text.lower() for cue in cues) for text in texts) / len(texts)


def sample_by_row(rngs, temperature):
    """Exact sampling at `temperature`, with random numbers of each row's own: a logits processor.

    A trick: one uniform number of the row's generator picks the token by the inverse of the cumulative
    distribution, and that token is left as the only finite score, so that greedy search takes it. rngs: B
    numpy generators.
    """

    def sample(ids, scores):  # (B, L), (B, V)
        # (B, V), f64: rare tokens keep their share
        cdf = (scores.double() / temperature).softmax(-1).cumsum(-1)
        if not cdf.isfinite().all():
            raise ConfigError(
                "refiner: its logits are not finite: it has diverged; a lower refiner.lr may help"
            )
        # (B, 1) in [0, 1)
        u = cdf.new_tensor([[r.random()] for r in rngs])
        # (B, 1), the first whose cdf exceeds u
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    return sample


# ---------------------------------------------------------------- the policy


class Refiner(Policy):
    """A chat LLM with a LoRA: `rollout` samples rewrites, `terms` scores their tokens with gradients."""

    name = "refiner"
    lora_file = "adapter_model.safetensors"
    prefix = "base_model.model"
    lora_options = dict(target_modules="all-linear", task_type="CAUSAL_LM")  # all but the head

    def __init__(
        self, cfg, device="cpu", dtype=torch.float32, micro_batch=64, offload=False, generator=None
    ):
        """offload: it waits on the CPU outside `at_work`. generator: whose text encoder it may be."""
        self.cfg = cfg
        self.device = device
        self.micro_batch = micro_batch
        if cfg.model == "text_encoder":  # one set of weights, with the LoRA where it writes
            self.model = generator.text_encoder
            self.tokenizer = generator.pipe.tokenizer
            generator.without_lora = self.reference
        else:
            check_folder(cfg.model, "config.json")
            with loading(cfg.model):
                self.tokenizer = AutoTokenizer.from_pretrained(cfg.model)
            check_tokenizer(cfg.model, self.tokenizer)
            self.model = load_model(
                AutoModelForCausalLM,
                cfg.model,
                dtype=dtype,
                **quantized(cfg.quantize, AutoModelForCausalLM, dtype),
            )
            self.model.requires_grad_(False).to("cpu" if offload else device)
        with self.at_work():
            self.check_head()
        # one that is not instruction-tuned has no template
        with loading(f"refiner: chat template of {cfg.model}"):
            chat(self.tokenizer, ["a photo"], cfg.system_prompt, cfg.examples)
        # Llama's has none; the mask hides whatever stands there
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.no_grad()
    def check_head(self):
        """token_log_probs knows heads that are one matrix: no bias, soft cap or scale. Two tokens tell."""
        ids = torch.arange(2, device=self.device)[None]  # (1, 2)
        head = self.model.get_output_embeddings()
        if head is None or not torch.allclose(
            self.model(input_ids=ids).logits,
            self.hidden(ids, torch.ones_like(ids)) @ head.weight.T,
            rtol=0.02,
            atol=0.02,
        ):
            raise ConfigError(
                f"refiner.model: {self.cfg.model} is a {type(self.model).__name__}, with no head or one that "
                "is more than one matrix (a bias, a scale or a soft cap); expected a model such as Qwen3, "
                "Llama or SmolLM"
            )

    def read(self, folder):
        self.model.load_adapter(folder)

    def save(self, folder):
        """As `PeftModel.from_pretrained(model, folder)` reads it"""
        self.model.save_pretrained(str(folder))

    def update_ema(self):
        """It has none: rewrites are sampled with the weights that learn."""

    # ------------------------------------------------ sampling

    @torch.no_grad()
    def rollout(self, prompts, num_rewrites, keys, temperature=None):
        """N rewrites of each of P prompts -> P*N texts, prompt-major, and Rewrites

        keys: P tuples for `rng`, to which the rewrite's number is added; sampling depends on nothing
        else, so that a prompt keeps its rewrites in whatever batch it comes. temperature: None for
        use_temperature; what trains is sampled at `temperature`.
        """
        words = [prompt for prompt in prompts for _ in range(num_rewrites)]  # B
        rngs = [rng(*key, n) for key in keys for n in range(num_rewrites)]
        chats = self.tokenizer(
            chat(self.tokenizer, words, self.cfg.system_prompt, self.cfg.examples),
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.device)
        ids = chats.input_ids  # (B, K)
        attention = chats.attention_mask  # (B, K)
        temperature = temperature or self.cfg.use_temperature
        with self.at_work():
            whole = self.generate(ids, attention, rngs, temperature)  # (B, K+L)
        completion = whole[:, ids.shape[1] :]  # (B, L)
        eos = completion.new_tensor(self.model.generation_config.eos_token_id)  # one, or several
        is_end = torch.isin(completion, eos).long()
        mask = is_end.cumsum(1) - is_end == 0  # (B, L), the first end token counts
        # behind the first end token stands padding, which is special too
        written = self.tokenizer.batch_decode(completion, skip_special_tokens=True)
        answers = [read_answer(text) for text in written]
        record = Rewrites(
            texts=[answer or prompt for answer, prompt in zip(answers, words)],
            ids=whole,
            attention=torch.cat([attention, mask], 1),
            mask=torch.cat([torch.zeros_like(ids), mask], 1).float(),
            bad_format=torch.tensor([float(not answer) for answer in answers]),
        )
        return record.texts, record

    def generate(self, ids, attention, rngs, temperature):
        """Chats (B, K) -> the same with completions (B, K+L), padded behind their end tokens

        One micro-batch at a time.
        """
        parts = []
        for rows in batches(range(len(ids)), self.micro_batch):
            parts += self.model.generate(
                input_ids=ids[rows],
                attention_mask=attention[rows],
                do_sample=False,  # sample_by_row has drawn
                logits_processor=[sample_by_row([rngs[row] for row in rows], temperature)],
                repetition_penalty=1.0,  # some models bring another, which log_probs would not know
                max_new_tokens=self.cfg.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # b of (K+l,)
        return pad_sequence(parts, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    # ------------------------------------------------ log-probs

    def log_probs(self, record, rows):
        """Log-probs, with grad, and entropies of some rows' tokens: (b, K+L) nats, zero outside the mask

        Taken at the sampling temperature. Columns that no row uses are not computed, nor the head where
        nothing follows.
        """
        ids = record.ids[rows]  # (b, K+L), and so are the next three
        attention = record.attention[rows]
        mask = record.mask[rows]
        sampled = mask > 0  # n tokens, none of them in the first column
        used = attention.any(0)  # (K+L,) columns with a token in any row, k of them
        hidden = self.hidden(ids[:, used], attention[:, used])  # (b, k, D)
        # what is read before each token
        hidden = hidden[sampled[:, used].roll(-1, 1)]  # (n, D)
        weight = self.model.get_output_embeddings().weight  # (V, D)
        # (n,), (n,)
        values = token_log_probs(hidden, weight, ids[sampled], self.cfg.temperature)
        zeros = torch.zeros_like(mask)
        return [zeros.masked_scatter(sampled, value) for value in values]

    def hidden(self, ids, attention):
        """ids, attention (b, K) -> what the head reads (b, K, D)"""
        states = self.model.base_model(
            input_ids=ids,
            attention_mask=attention,
            # left padding must not shift them
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
        return states.last_hidden_state

    # ------------------------------------------------ what GRPO asks of a policy

    def clip(self):
        """The ratio is clipped to [1 - low, 1 + high]"""
        return self.cfg.clip_range, self.cfg.clip_range_high

    def count(self, record, rows):
        """What the loss of these rows is divided by: their tokens, or their number"""
        return record.mask[rows].sum().item() if self.cfg.loss == "dapo" else len(rows)

    @torch.no_grad()
    def remember(self, record, rows):
        """Old log-probs of rows that are trained after an earlier update"""
        record.kept |= dict(zip(rows, self.log_probs(record, rows)[0]))

    def terms(self, record, rows):
        """-> log_ratio with grad, kl, scale, weight, {"entropy"}: (b, K+L) each, but for the scale

        weight is zero outside the mask. gspo has one log_ratio a rewrite, (b, 1).
        """
        log_probs, entropy = self.log_probs(record, rows)  # (b, K+L)
        mask = record.mask[rows]  # (b, K+L)
        length = mask.sum(1, keepdim=True)  # (b, 1)
        log_ratio = log_probs - old_log_probs(record.kept, rows, log_probs)
        if self.cfg.loss == "gspo":
            log_ratio = log_ratio.sum(1, keepdim=True) / length  # (b, 1)
        kl = torch.zeros_like(mask)
        if self.cfg.beta:
            with torch.no_grad(), self.reference():
                ref_log_probs = self.log_probs(record, rows)[0]  # (b, K+L)
            # Schulman's k3 estimate of KL(policy || reference) per token, >= 0
            d = ref_log_probs - log_probs
            kl = d.exp() - d - 1
        divisors = {"dapo": 1, "grpo": length, "dr_grpo": self.cfg.max_new_tokens, "gspo": length}
        yield log_ratio, kl, 1.0, mask / divisors[self.cfg.loss], {"entropy": entropy}
