"""The two Triton kernels, each under its plain-torch reference, which is what trains on a CPU.

    sde_log_ratio     a recorded step of the diffusion policy under a new velocity: log-prob, log-ratio, KL
    token_log_probs   log-probs and entropies of an LLM's tokens, without its logits

Each public function picks its path by one `if`: the formula, or on a GPU the kernel; a test holds the two
equal. TRITON_INTERPRET=1, set before this file is imported, runs the kernels on a CPU, which checks what they
compute, not how fast. Sums are in f32 and in a fixed order, so that a run repeats bit for bit.
"""

import math
import os

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux: torch does the same work
    triton = None


def use_triton(x):
    """Whether the kernels do the work for a tensor like x: on a GPU, or in Triton's interpreter"""
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


# ---------------------------------------------------------------- 1. a step of the diffusion policy
#
# A recorded step is x_next = mean + std noise, with mean = c_x x + c_v v. Latents are (B, ...), B samples of
# any shape. All that is computed is a *mean* over a sample's latent dimensions (nats per dimension), never a
# sum, so that clip range and beta do not depend on the size of the picture.


def per_sample_mean(x):
    return x.flatten(1).mean(1)  # (B, ...) -> (B,)


def gaussian_log_prob(square, std):
    """log N(x_next; mean, std^2), a mean over latent dimensions; square is mean((x_next - mean)^2): (B,)"""
    return -square / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


def guard_log_ratio(x_next, mean, old_mean, std):
    """GRPO-Guard, arXiv 2510.22319: mean(eps_old (mean - old_mean)) -> (B,)

    eps_old = (x_next - old_mean) / std. The plain log-ratio has the bias -mean((mean - old_mean)^2) / 2 std^2
    and a scale 1 / std that differs from step to step. This one has neither: one clip range fits every step.
    """
    eps_old = (x_next - old_mean) / std  # (B, ...), the noise that drew x_next
    return per_sample_mean(eps_old * (mean - old_mean))


def velocity_kl(v, ref_v):
    """mean((v - ref_v)^2): (B, ...) -> (B,)

    The KL of a step is c_v^2 / 2 std^2 times this. Without the factor all steps weigh alike, as published.
    """
    return per_sample_mean((v.float() - ref_v.float()) ** 2)


def sde_log_ratio_ref(x, v, x_next, old_v, ref_v, c_x, c_v, std):
    """`sde_log_ratio` by its formulas"""
    x_next = x_next.float()
    v = v.float()
    drift = c_x * x.float()  # (B, ...)
    mean = drift + c_v * v
    old_mean = drift + c_v * old_v.float()
    square = per_sample_mean((x_next - mean) ** 2)  # (B,)
    log_prob = gaussian_log_prob(square, std)
    guard = guard_log_ratio(x_next, mean, old_mean, std)
    return log_prob, guard, velocity_kl(v, ref_v)


# The chain above makes a dozen tensors as large as the latents. But all that it returns is in three means,
#
#     d d,  e w,  r r    of    d = x_next - mean,  e = x_next - old_mean,  w = v - old_v,  r = v - ref_v,
#
# so one pass over the latents is enough. The derivatives by v are -2 c_v d, e and 2 r, so backward is one
# more pass, which makes d, e and r again instead of keeping them.

BLOCK = 2048  # latent dimensions of one program
# A thread reads 8 numbers of each tensor, 16 bytes of bf16. With 16 numbers of f32 it took 70 registers on
# sm_100, which left room for 44% of the threads.
THREADS = 256
WARPS = THREADS // (64 if torch.version.hip else 32)

if triton:

    @triton.jit
    def _load(tensor, at, inside):
        return tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)

    @triton.jit
    def _step_kernel(
        x,  # (B, n), and so are the next four
        v,
        x_next,
        old_v,
        ref_v,
        n,
        c_x,
        c_v,
        sums,  # (B, blocks, 3), written in forward; None in backward
        grad_means,  # (B, 3), read in backward
        grad_v,  # (B, n), written in backward
        BLOCK: tl.constexpr,
    ):
        """One program a block of one sample; forward and backward are the same pass with different ends"""
        b = tl.program_id(0).to(tl.int64)  # int64, because a batch may hold more than 2^31 numbers
        block = tl.program_id(1)
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        at = b * n + i
        v_new = _load(v, at, inside)
        v_old = _load(old_v, at, inside)
        rest = _load(x_next, at, inside) - c_x * _load(x, at, inside)
        d = rest - c_v * v_new  # this and the next three are 0 past the sample's end
        e = rest - c_v * v_old
        w = v_new - v_old
        r = v_new - _load(ref_v, at, inside)
        if sums is not None:
            out = sums + 3 * (b * tl.num_programs(1) + block)
            tl.store(out, tl.sum(d * d))
            tl.store(out + 1, tl.sum(e * w))
            tl.store(out + 2, tl.sum(r * r))
        else:
            factor = grad_means + 3 * b
            grad = tl.load(factor) * -2 * c_v * d
            grad += tl.load(factor + 1) * e
            grad += tl.load(factor + 2) * 2 * r
            tl.store(grad_v + at, grad / n, mask=inside)


class _StepMeans(torch.autograd.Function):
    """c_x, c_v, (x, v, x_next, old_v, ref_v) -> (B, 3), the means of d d, e w and r r"""

    @staticmethod
    def forward(ctx, c_x, c_v, *latents):
        latents = [t.contiguous() for t in latents]  # (B, ...) each
        n = math.prod(latents[0].shape[1:])
        ctx.save_for_backward(*latents)
        ctx.scalars = (n, c_x, c_v)
        ctx.grid = (len(latents[0]), triton.cdiv(n, BLOCK))
        sums = torch.empty(*ctx.grid, 3, device=latents[0].device)
        _step_kernel[ctx.grid](*latents, *ctx.scalars, sums, None, None, BLOCK, num_warps=WARPS)
        return sums.sum(1) / n  # the second stage of the sums; atomics would add in any order

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_means):
        latents = ctx.saved_tensors
        grad_means = grad_means.contiguous()
        grad_v = torch.empty_like(latents[1])
        _step_kernel[ctx.grid](*latents, *ctx.scalars, None, grad_means, grad_v, BLOCK, num_warps=WARPS)
        return None, None, None, grad_v, None, None, None


def sde_log_ratio(x, v, x_next, old_v, ref_v, c_x, c_v, std):
    """A recorded step under the velocity v -> log_prob, GRPO-Guard's log-ratio to old_v, KL to ref_v

    x, x_next (B, ...): latents before and after the step. v, old_v, ref_v (B, ...): velocities, new, recorded
    and of the reference. All f32, bf16 or f16. c_x, c_v, std: floats. Returns three (B,)
    f32, means over latent dimensions. Only v gets a gradient.
    """
    if not use_triton(x):
        return sde_log_ratio_ref(x, v, x_next, old_v, ref_v, c_x, c_v, std)
    means = _StepMeans.apply(c_x, c_v, x, v, x_next, old_v, ref_v)
    square, guard, distance = means.unbind(1)  # (B,) each
    return gaussian_log_prob(square, std), guard * c_v / std, distance


# ---------------------------------------------------------------- 2. log-probs of tokens, without logits


def token_log_probs_ref(hidden, weight, ids, temperature):
    """`token_log_probs` by its formula, with all logits"""
    logits = (hidden @ weight.T).float()  # (..., V), rounded to the model's dtype first, as its own head does
    log_p = (logits / temperature).log_softmax(-1)
    log_probs = log_p.gather(-1, ids[..., None])[..., 0]  # (...)
    log_p = log_p.detach()
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_probs, entropy


# A vocabulary is large: 4,096 tokens of Qwen3 make 2.5 GB of logits, and autograd keeps them more than once.
# So the fast path sweeps over it in tiles, with the online softmax of FlashAttention, arXiv 2205.14135.
#
# The trick: the head is frozen, so that a token's gradient is one vector,
#
#     u = d log p(id) / d hidden = (weight[id] - sum_j p_j weight_j) / temperature,
#
# and the same sweep sums it up; backward only multiplies by it. That takes two products with the head, and
# one where no gradient is wanted. A backward that makes the logits again takes three.

# n x V floats, 16 MiB. On a CPU all logits at once are as fast as the sweep up to 4 MiB, lose hundredths of a
# second here, and take about twice its time at 64 MiB. Up to here the formula does the work.
SMALL = 2**22
TILE = {  # tokens x vocabulary
    "cpu": (512, 1024),  # 2 MiB, which stay in the cache
    "cuda": (1024, 16384),  # 64 MiB, enough to keep the matrix product busy
}


def softmax_tile_ref(logits, state, temperature, dtype):
    """One tile of the online softmax -> e (n, v) in `dtype`, shrink (n,)

    logits (n, v) f32 are used up. state (3, n) f32, updated in place, holds for each token, with
    l = logits / temperature: top, the largest l so far; the sum of e = exp(l - top); the sum of e (l - top).
    As top grows, what was summed up before must shrink by the factor `shrink`.
    """
    top, sums, weighted = state
    l = logits.div_(temperature)
    new_top = torch.maximum(top, l.amax(1))  # (n,)
    rise = new_top - top
    shrink = (-rise).exp()
    top.copy_(new_top)  # not top += rise: the first rise is 1e30, which leaves no digits for l
    l -= top[:, None]
    e = l.exp()  # (n, v)
    weighted -= sums * rise  # relative to top, so that no large numbers cancel
    weighted.mul_(shrink).add_(torch.linalg.vecdot(e, l))
    sums.mul_(shrink).add_(e.sum(1))
    return e.to(dtype), shrink


if triton:

    @triton.jit
    def _softmax_tile_kernel(
        logits,  # (n, v)
        e,  # (n, v), written
        shrink,  # (n,), written
        state,  # (3, n), updated
        n,
        v,
        temperature,
        BLOCK: tl.constexpr,
    ):
        """One program a token: its row of the tile is read once, and e is written once"""
        token = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)
        inside = i < v
        at = token * v + i
        l = tl.load(logits + at, mask=inside, other=float("-inf")) / temperature  # (BLOCK,)
        top = state + token
        sums = top + n
        weighted = sums + n
        old_top = tl.load(top)
        new_top = tl.maximum(old_top, tl.max(l))
        rise = new_top - old_top
        factor = tl.exp(-rise)
        p = tl.exp(l - new_top)  # 0 past the end
        l = tl.where(inside, l - new_top, 0.0)
        old_sum = tl.load(sums)
        old_weighted = tl.load(weighted) - old_sum * rise
        tl.store(weighted, factor * old_weighted + tl.sum(p * l))
        tl.store(sums, factor * old_sum + tl.sum(p))
        tl.store(top, new_top)
        tl.store(shrink + token, factor)
        tl.store(e + at, p, mask=inside)


def tile_shape(v):
    """Numbers and warps of the program that reads a row of v numbers"""
    block = triton.next_power_of_2(v)
    return block, 16 if block > 4096 else 4


def softmax_tile(logits, state, temperature, dtype):
    """`softmax_tile_ref`, or the same in one pass by the kernel"""
    if not use_triton(logits):
        return softmax_tile_ref(logits, state, temperature, dtype)
    n, v = logits.shape
    e = torch.empty_like(logits, dtype=dtype)
    shrink = torch.empty_like(state[0])
    block, warps = tile_shape(v)
    _softmax_tile_kernel[(n,)](logits, e, shrink, state, n, v, temperature, block, num_warps=warps)
    return e, shrink


def product(a, b):
    """a @ b in f32. A GPU sums halves in f32 and keeps that; a CPU rounds the result, as the head does."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class _TokenLogProbs(torch.autograd.Function):
    """The sweep: hidden (n, D), weight (V, D), ids (n,) -> log_probs (n,), entropy (n,)"""

    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, width):
        state = torch.zeros(3, len(hidden), device=hidden.device)
        state[0] = -1e30  # nothing seen yet; -inf would make 0 * inf
        total = torch.zeros_like(hidden, dtype=torch.float32)  # (n, D), the sum of e weight
        for w in weight.split(width):  # (v, D)
            logits = product(hidden, w.T)  # (n, v)
            e, shrink = softmax_tile(logits, state, temperature, w.dtype)
            if ctx.needs_input_grad[0]:
                total = total * shrink[:, None] + product(e, w)
        top, sums, weighted = state
        target = weight[ids].float()  # (n, D)
        chosen = torch.linalg.vecdot(hidden.float(), target) / temperature  # (n,), the id's own l
        log_probs = chosen - top - sums.log()
        entropy = sums.log() - weighted / sums
        u = (target - total / sums[:, None]) / temperature  # (n, D), unused where total was not summed
        ctx.save_for_backward(u.to(hidden.dtype))
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (u,) = ctx.saved_tensors
        grad_hidden = grad[:, None] * u  # (n, D)
        return grad_hidden.to(u.dtype), None, None, None, None


def token_log_probs(hidden, weight, ids, temperature=1.0):
    """log p(ids) and entropy of softmax(hidden weight^T / temperature): (...), (...), f32 nats

    hidden (..., D) and the head's weight (V, D): f32, bf16 or f16. ids (...). Only hidden gets a gradient,
    from the log-probs alone. Raises ValueError if the head is trainable.
    """
    if weight.requires_grad:
        raise ValueError("the head is trainable, and token_log_probs has no gradient for it; freeze it")
    if not hidden.is_cuda and ids.numel() * len(weight) <= SMALL:
        return token_log_probs_ref(hidden, weight, ids, temperature)
    tokens, width = TILE["cuda" if hidden.is_cuda else "cpu"]
    states = hidden.reshape(-1, hidden.shape[-1])  # (n, D)
    targets = ids.flatten()  # (n,)
    parts = [
        _TokenLogProbs.apply(h, weight, i, temperature, width)
        for h, i in zip(states.split(tokens), targets.split(tokens))
    ]
    log_probs, entropy = map(torch.cat, zip(*parts))  # (n,) each
    return log_probs.view(ids.shape), entropy.view(ids.shape)
