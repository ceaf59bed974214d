"""kernels.py: the references are the definitions, and every fast path equals its reference."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import kernels as K

STEP = {"c_x": 0.9, "c_v": -0.8, "std": 0.6}
ROUNDING = {  # relative, and absolute for numbers around 1
    torch.float32: 1e-4,
    torch.bfloat16: 0.05,
    torch.float16: 0.01,
}


@pytest.fixture
def interpreter(monkeypatch):
    """The Triton kernels, on a CPU"""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def assert_all_close(got, want, dtype):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


# ---------------------------------------------------------------- a step of the diffusion policy


def step_inputs(shape):
    """x, v, x_next, old_v, ref_v, strided, and as different as can be, so that no term is too small to see"""
    return torch.randn(*shape, 5).unbind(-1)


def step_results(function, x, v, *rest):
    """log_prob, guard, kl, and the gradient to v of a mix of them, times the number of latent dimensions"""
    v = v.detach().requires_grad_(True)
    log_prob, guard, kl = function(x, v, *rest, **STEP)
    mix = log_prob - 2 * guard + 3 * kl  # (B,)
    per_sample = torch.arange(1.0, len(x) + 1)
    (grad,) = torch.autograd.grad(mix @ per_sample, v)
    return log_prob.detach(), guard.detach(), kl.detach(), grad * x[0].numel()


def test_the_reference_is_the_definition():
    """In float64: torch.distributions' log_prob, mean(eps_old (mean - old_mean)), and the KL without its factor"""
    tensors = step_inputs((3, 4, 5, 7))
    x, v, x_next, old_v, ref_v = [t.double() for t in tensors]
    new, old, ref = [Normal(0.9 * x - 0.8 * u, 0.6) for u in (v, old_v, ref_v)]
    eps_old = (x_next - old.mean) / 0.6
    want = (
        new.log_prob(x_next),
        eps_old * (new.mean - old.mean),
        kl_divergence(new, ref) * 2 * 0.6**2 / 0.8**2,
    )
    got = K.sde_log_ratio(*tensors, **STEP)
    assert_all_close(got, [t.mean((1, 2, 3)).float() for t in want], torch.float32)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(5, 123, 123), (2, 3, 2, 5, 7), (1, 1)])
def test_the_step_kernel_equals_the_reference(interpreter, shape, dtype):
    """Forward and gradient, in any dtype, at sizes off every block; twice the same bits"""
    tensors = [t.to(dtype) for t in step_inputs(shape)]
    got = step_results(K.sde_log_ratio, *tensors)
    want = step_results(K.sde_log_ratio_ref, *tensors)
    assert_all_close(got, want, dtype)
    again = step_results(K.sde_log_ratio, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


# ---------------------------------------------------------------- log-probs of tokens


@pytest.fixture(params=["torch", "triton"])
def sweep(request, monkeypatch):
    """The sweep in tiles of 4 tokens x 16 words, in torch and by the kernel"""
    monkeypatch.setattr(K, "SMALL", 0)
    monkeypatch.setattr(K, "TILE", {"cpu": (4, 16)})
    if request.param == "triton":
        request.getfixturevalue("interpreter")


def token_inputs(shape, D, V):
    """hidden (*shape, D) and weight (V, D), strided; ids from the first word to the last, one in each tile"""
    hidden = torch.randn(*shape, 2 * D)[..., ::2]
    weight = torch.randn(V, 2 * D)[:, ::2]
    ids = torch.linspace(0, V - 1, math.prod(shape)).long()
    return hidden, weight, ids.view(shape)


def assert_sweep_is_formula(hidden, weight, ids, temperature):
    """Log-probs, entropy, and the gradient to hidden, which for the formula is autograd's"""
    results = []
    for function in (K.token_log_probs, K.token_log_probs_ref):
        leaf = hidden.detach().requires_grad_(True)
        log_probs, entropy = function(leaf, weight, ids, temperature)
        assert not entropy.requires_grad
        mix = log_probs.flatten() @ torch.linspace(-1, 2, ids.numel())
        (grad,) = torch.autograd.grad(mix, leaf)
        results.append((log_probs.detach(), entropy, grad))
    assert_all_close(*results, hidden.dtype)


SIZES = [
    ((2, 3), 12, 37),
    ((11,), 4, 129),
    ((1,), 5, 1),  # a vocabulary of one
    ((), 3, 15),
    ((0,), 3, 15),  # no token
]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape,D,V", SIZES)
def test_the_sweep_equals_the_formula(sweep, shape, D, V, dtype):
    """At sizes off every tile, with a target in each tile and a temperature that is not 1"""
    hidden, weight, ids = token_inputs(shape, D, V)
    assert_sweep_is_formula(hidden.to(dtype), weight.to(dtype), ids, 0.7)


def test_the_sweep_survives_huge_logits(sweep):
    """Logits of +-10,000, the largest in the first or in the last tile, and targets of -20,000 nats"""
    hidden = 100 * torch.eye(3, 4)
    weight = torch.randn(50, 4)
    weight[[0, 49, 3], [0, 1, 2]] = torch.tensor([100.0, 100.0, -100.0])
    for target in (0, 3, 49):
        assert_sweep_is_formula(hidden, weight, torch.full((3,), target), 1.0)


def test_the_sweep_never_holds_all_logits(sweep):
    """No tensor of forward and backward has even a tenth of n x V numbers."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and not out._is_view():
                sizes.append(out.numel())
            return out

    hidden, weight, ids = token_inputs((16,), 8, 200)
    hidden.requires_grad_(True)
    with Watch():
        log_probs, _ = K.token_log_probs(hidden, weight, ids)
        log_probs.sum().backward()
    assert max(sizes) < 16 * 200 / 10


def test_a_trainable_head_is_refused():
    """Its gradient would be missing in silence."""
    hidden, weight, ids = token_inputs((2,), 3, 5)
    with pytest.raises(ValueError, match="head is trainable"):
        K.token_log_probs(hidden, weight.requires_grad_(True), ids)


# ---------------------------------------------------------------- GPUs, without one

# Each kernel as it is launched for real models: tensors of torch start at multiples of 16 bytes, and the numbers of a
# latent and of a vocabulary's tile (Qwen3: nine of 16,384 and one of 4,480) are multiples of 16. Triton reads as much
# from the arguments of a launch.
COMPILE = """
import json
import kernels as K
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

step = ["x", "v", "x_next", "old_v", "ref_v"]
tile = {"logits": "*fp32", "e": "*bf16", "shrink": "*fp32", "state": "*fp32"}
tile |= {"n": "i32", "v": "i32", "temperature": "fp32"}
for target in (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)):
    cases = []
    for dtype in ("*bf16", "*fp32"):
        given = dict.fromkeys(step, dtype) | {"n": "i32", "c_x": "fp32", "c_v": "fp32"}
        shape = (K.BLOCK, K.THREADS // target[2])
        cases.append((K._step_kernel, given | {"sums": "*fp32"}, *shape, 0))
        cases.append((K._step_kernel, given | {"grad_means": "*fp32", "grad_v": dtype}, *shape, 3))
    for v in (16384, 151936 % 16384):
        cases.append((K._softmax_tile_kernel, tile, *K.tile_shape(v), 3))
    for kernel, given, block, warps, scalars in cases:
        names = kernel.arg_names
        signature = {n: given.get(n, "constexpr") for n in names}
        constants = {n: None for n in names if n not in given} | {"BLOCK": block}
        sixteen = "v" if kernel is K._softmax_tile_kernel else "n"
        aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or n == sixteen]
        hints = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(kernel, signature, constants, hints)
        binary = triton.compile(source, target=GPUTarget(*target), options={"num_warps": warps})
        text = binary.asm["ptx" if target[0] == "cuda" else "amdgcn"]
        row = dict(name=f"{kernel.fn.__name__} {given}", arch=target[1], threads=warps * target[2], scalars=scalars, asm=text)
        row["cubin"] = list(binary.asm["cubin"]) if target[0] == "cuda" else None
        print(json.dumps(row))
"""


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    """Every kernel for sm_80, sm_90, sm_100 and gfx942, in a process of its own: here they are the interpreter's."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def nvidia_registers(cubin, folder):
    """What ptxas gave -> registers of a thread, bytes of its stack and local memory, where it would spill"""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(bytes(cubin))
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = [
        int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")
    ]
    return registers, stack + local


def test_the_kernels_fit_their_gpus(binaries, tmp_path):
    """No spills, and registers that leave a multiprocessor at least half of its threads

    NVIDIA: 65,536 registers and 2,048 threads, given out by whole blocks; a warp takes registers by 8 a thread. gfx942:
    the compiler itself says how many of 8 waves a SIMD holds. Shared memory is 1 KiB at most, no bound. Speed cannot be
    read here: neither the bandwidth that is reached nor what the driver does with the binary.
    """
    assert len(binaries) == 4 * 6
    for row in binaries:
        where = (row["name"], row["arch"])
        if row["cubin"]:
            registers, spilled = nvidia_registers(row["cubin"], tmp_path)
            blocks = 65536 // (math.ceil(registers / 8) * 8 * row["threads"])
            occupancy = blocks * row["threads"] / 2048
            assert ".local" not in row["asm"], where
        else:
            number = lambda key: int(re.search(rf"{key}:\s+(\d+)", row["asm"])[1])
            spilled = (
                number("ScratchSize") + number(".vgpr_spill_count") + number(".sgpr_spill_count")
            )
            occupancy = number("; Occupancy") / 8
        assert spilled == 0, where
        assert occupancy >= 0.5, where


def test_the_kernels_load_16_bytes_at_a_time(binaries):
    """Every tensor is read by the widest loads there are; narrow ones are those of a row's few numbers."""
    for row in binaries:
        where = (row["name"], row["arch"])
        loads = re.findall(r"ld\.global\S*|global_load_\S+|buffer_load_\S+", row["asm"])
        wide = [load for load in loads if "v4.b32" in load or "dwordx4" in load]
        assert wide, where
        # gfx942 reads those by s_load, which is none of these
        assert len(loads) - len(wide) <= row["scalars"], where
