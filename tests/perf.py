"""Speed and memory of kernels.py beside the plain formulas, and a whole step. A script, not a test.

    python tests/perf.py [cuda]

Prints a Markdown table and writes perf.json beside this file: {"machine", "rows": [{"what", "unit", "ours",
"formula"}]}. Seconds are medians of 5 runs after a warm-up, forward and backward, ours and formula in turn.
MiB are the peak above the inputs, each in a fresh process. On a CPU the SDE step and the log-probs of a small
vocabulary *are* the formula, so that their two numbers differ by noise alone.
"""

import json
import os
import platform
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors go back at once, or no later peak would show

import torch

import kernels

DEVICE = "cuda" if "cuda" in sys.argv else "cpu"
RUNS = 5
FLUX_LATENTS = (21, 4096, 64)  # 21 pictures of 1024 x 1024 pixels
TOKENS = {  # n tokens, D, V, dtype
    "log-probs, small vocabulary": (1024, 128, 578, "float32"),  # nano/refiner
    "log-probs, large vocabulary": (1024, 576, 49152, "float32"),  # SmolLM2-135M
}
if DEVICE == "cuda":
    TOKENS["log-probs, Qwen3-4B"] = (4096, 2560, 151936, "bfloat16")


# ---------------------------------------------------------------- what is measured


def log_probs(name, n, D, V, dtype):
    """A function that runs kernels.<name> forward and backward"""
    torch.manual_seed(0)
    place = {"device": DEVICE, "dtype": getattr(torch, dtype)}
    hidden = torch.randn(n, D, **place, requires_grad=True)
    weight = torch.randn(V, D, **place) / D**0.5
    ids = torch.randint(V, (n,), device=DEVICE)

    def run():
        hidden.grad = None
        values, _ = getattr(kernels, name)(hidden, weight, ids, 1.0)  # (n,)
        values.sum().backward()

    return run


def sde(name):
    """The same for a step of the diffusion policy"""
    torch.manual_seed(0)
    x, v, x_next, old_v, ref_v = torch.randn(5, *FLUX_LATENTS, device=DEVICE)
    v.requires_grad_(True)

    def run():
        v.grad = None
        values = getattr(kernels, name)(x, v, x_next, old_v, ref_v, 0.97, -0.08, 0.6)  # (B,) each
        sum(values).sum().backward()

    return run


def step_seconds():
    """{part: median seconds} of generator steps of the default config: 3 prompts x 24 pictures"""
    import grpo  # not at the top, because the processes that measure memory import this file too

    os.chdir(ROOT)
    run = grpo.Run(grpo.load_config(["config.yaml", "refiner=null", f"device={DEVICE}"]))
    spent = {"draw": [], "reward": [], "update": []}

    def watch(part, name):
        """run.<name> is timed from now on"""
        work = getattr(run, name)

        def timed(*args):
            results = []
            spent[part].append(clock(lambda: results.append(work(*args))))
            return results[0]

        setattr(run, name, timed)

    watch("draw", "rollout")
    watch("reward", "score")
    watch("update", "update")
    stage = grpo.StageConfig("generator", prompts=3, images=24)
    for iteration in range(RUNS + 1):
        run.step(stage, iteration)
    return {part: statistics.median(times[1:]) for part, times in spent.items()}


# ---------------------------------------------------------------- measuring


def clock(function):
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds(ours, formula):
    """Median seconds of either. They take turns, so that what else the machine does meets both."""
    runs = [(clock(ours), clock(formula)) for _ in range(RUNS + 1)][1:]
    return {
        "ours": statistics.median(run[0] for run in runs),
        "formula": statistics.median(run[1] for run in runs),
    }


def process_memory(key):
    """MiB of /proc/self/status: VmRSS is what is held now, VmHWM the most that was"""
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak(name, *shape):
    """MiB of log_probs(name, *shape) above what was held before. It runs once beforehand, for what stays."""
    run = log_probs(name, *shape)
    run()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - before


def fresh_peak(name, *shape):
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (name, *shape))


def measure():
    """One row after another"""
    for what, shape in TOKENS.items():
        times = seconds(log_probs("token_log_probs", *shape), log_probs("token_log_probs_ref", *shape))
        yield {"what": what, "unit": "s", **times}
        ours = fresh_peak("token_log_probs", *shape)
        formula = fresh_peak("token_log_probs_ref", *shape)
        yield {"what": what, "unit": "MiB", "ours": ours, "formula": formula}
    times = seconds(sde("sde_log_ratio"), sde("sde_log_ratio_ref"))
    yield {"what": f"SDE log-ratio, {FLUX_LATENTS}", "unit": "s", **times}
    for part, median in step_seconds().items():
        yield {"what": f"generator step, 72 pictures: {part}", "unit": "s", "ours": median, "formula": None}


if __name__ == "__main__":
    machine = f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    if DEVICE == "cuda":
        machine = torch.cuda.get_device_name()
    machine += f", torch {torch.__version__}"
    print(f"{machine}\n\n| what | unit | ours | formula |\n|---|---|---|---|")
    rows = []
    for row in measure():
        rows.append(row)
        formula = "" if row["formula"] is None else f"{row['formula']:.4g}"
        print(f"| {row['what']} | {row['unit']} | {row['ours']:.4g} | {formula} |", flush=True)
    file = Path(__file__).parent / "perf.json"
    file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
