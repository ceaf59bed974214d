"""Does a published clip range mean what it meant? bf16's noise and a first update, at FLUX's latent size.

    python tests/clip.py          nano FLUX at 512 px: 16 x 128 x 128 latents; ten minutes of one core

Prints the largest log-ratio of pictures that are replayed in another micro-batch than drew them, which should be
0, and after one AdamW step on the pictures of one prompt the share of another prompt's that is outside the clip.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import grpo
from generator import Generator

# profiles.flux: what is published of it but the model, its size and the micro-batch
WORDS = [
    f"generator.{name}"
    for name in ("model=nano/flux", "height=512", "width=512", "gradient_checkpointing=false")
]
WORDS += ["generator.call={guidance_scale: 3.5, max_sequence_length: 40}"]
PROMPTS = ["a tabby cat"] * 3 + ["a cup of coffee"] * 3
KEYS = [("picture", 0, 0, p, m) for p in range(2) for m in range(3)]


def log_ratios(policy, record, rows):
    """Of each recorded step, without gradient: (steps, b)"""
    with torch.no_grad():
        return torch.stack([log_ratio[:, 0] for log_ratio, *_ in policy.terms(record, rows)])


def main():
    cfg = grpo.load_config(["config.yaml", "profile=flux", *WORDS]).generator
    policy = Generator(cfg, "cpu", torch.bfloat16, micro_batch=3)
    policy.add_lora()
    _, record = policy.rollout(PROMPTS, KEYS, range(5, 5 + cfg.window))
    noise = torch.cat([log_ratios(policy, record, [0, 1]), log_ratios(policy, record, [2])], 1)
    print(f"replayed: log-ratio at most {noise.abs().max():.1e}; the clip is {cfg.clip_range:.1e}")
    adamw = torch.optim.AdamW(policy.parameters(), lr=cfg.lr)
    advantage = torch.tensor([[1.2], [-1.2], [0.3]])
    for log_ratio, kl, scale, *_ in policy.terms(record, [0, 1, 2]):  # (b, 1), (b, 1)
        loss, _ = grpo.clipped_loss(log_ratio, scale * advantage, *policy.clip())
        (loss.mean() + cfg.beta * kl.mean()).div(cfg.window).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    adamw.step()
    moved = log_ratios(policy, record, [3, 4, 5]).abs()
    outside = (moved > cfg.clip_range).float().mean()
    print(f"after a step: mean {moved.mean():.1e}, at most {moved.max():.1e}, outside the clip {outside:.1%}")


if __name__ == "__main__":
    main()
