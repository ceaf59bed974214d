"""Speed and memory against named references, measured side by side in one run. A script, not a test: it asserts nothing.

    python tests/perf.py [cpu|cuda] [row ...]      rows: logprob, sde, generator, refiner, growth; default: all

Prints a table and writes perf.json beside this file: {"machine", "rows": [{"name", "metric", "ours", "peer", "peer_name", "ratio"}]}; metric is
`time` (seconds, median of 5 after a warm-up, ours and the peers in turn), `peak_memory` (MiB above the inputs, median of 5 runs, each in a fresh
process) or `fraction_of_peak` (ours over the rate of a plain matrix product or copy in the same run); ratio = ours / peer. Peers that are not
installed are named and left out: pip install trl liger-kernel cut-cross-entropy. A run of part of the rows keeps the other rows of the file.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import generator as G
import refiner as L

RUNS = 5
DEVICE = "cpu"


# ---------------------------------------------------------------- measuring


def clock(function):
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(functions, runs=RUNS):
    """{name: function} -> {name: median seconds}; one warm-up each, then A B C, A B C, ..."""
    seconds = {n: [] for n in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            s = clock(function)
            if run:
                seconds[name].append(s)
    return {n: statistics.median(s) for n, s in seconds.items()}


def peak_of(function):
    """MiB above what was held before"""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def fresh(*words, runs=RUNS):
    """Median of what `python tests/perf.py DEVICE --one words` prints, each run a fresh process"""
    command = [sys.executable, __file__, DEVICE, "--one", *map(str, words)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # a freed tensor goes back to the system, or no later peak would show
    run = lambda: subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return statistics.median(float(run().split()[-1]) for _ in range(runs))


ROWS = []


def row(name, metric, ours, peer, peer_name):
    ROWS.append(dict(name=name, metric=metric, ours=ours, peer=peer, peer_name=peer_name, ratio=ours / peer))
    print(f"{name:44s} {metric:16s} ours {ours:10.4g}  {peer_name:22s} {peer:10.4g}  ratio {ours / peer:.3f}", flush=True)


# ---------------------------------------------------------------- 1. log-probs

SHAPES = [(1024, 576, 49152, "float32"), (1024, 576, 49152, "bfloat16"), (512, 1024, 151936, "float32"), (512, 1024, 151936, "bfloat16")]  # fmt: skip


def logprob_functions(n, D, V, dtype, peers=True):
    """{name: function}, each a forward and a backward to hidden, and {name: reason} for peers that cannot run"""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    hidden = torch.randn(n, D, device=DEVICE).to(dtype)
    weight = (torch.randn(V, D, device=DEVICE) / D**0.5).to(dtype)
    ids = torch.randint(V, (n,), device=DEVICE)

    def run(log_probs):
        def function():
            x = hidden.clone().requires_grad_(True)
            log_probs(x).sum().backward()

        return function

    found = {"ours": run(lambda x: L.token_log_probs(x, weight, ids, 1.0)[0])}
    found["naive log_softmax"] = run(lambda x: (x @ weight.T).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0])
    missing = {}
    if not peers:
        return found, missing
    try:
        from trl.trainer.utils import selective_log_softmax

        found["TRL selective_log_softmax"] = run(lambda x: selective_log_softmax((x @ weight.T)[None], ids[None])[0])
    except Exception as error:
        missing["TRL"] = error
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, chunk_size=1, loss_type="grpo")
        ones, advantages = torch.ones(8, n // 8, device=DEVICE), torch.ones(8, device=DEVICE)
        liger = lambda x: loss(x.view(8, n // 8, D), weight, ids.view(8, -1), ones, advantages)[0]
        run(liger)()
        found["liger chunked loss"] = run(liger)
    except Exception as error:
        missing["liger-kernel"] = error
    try:
        from cut_cross_entropy import linear_cross_entropy

        cce = lambda x: -linear_cross_entropy(x, weight, ids, reduction="none", impl="cce" if DEVICE == "cuda" else "torch_compile")  # fmt: skip
        run(cce)()
        found["cut-cross-entropy"] = run(cce)
    except Exception as error:
        missing["cut-cross-entropy"] = error
    return found, missing


def logprob():
    for shape in SHAPES + ([(4096, 2560, 151936, "bfloat16")] if DEVICE == "cuda" else []):
        n, D, V, dtype = shape
        name = f"log-probs ({n}, {D}) x {V} {dtype}"
        found, missing = logprob_functions(*shape)
        for peer, error in missing.items():
            print(f"{name}: {peer} left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        seconds = in_turn(found)
        for peer in list(found)[1:]:
            row(name, "time", seconds["ours"], seconds[peer], peer)
        memory = fresh("logprob", "ours", *shape)
        row(name, "peak_memory", memory, fresh("logprob", "naive log_softmax", *shape), "naive log_softmax")
        if DEVICE == "cuda":
            a, b = (torch.randn(s, device=DEVICE, dtype=getattr(torch, dtype)) for s in ((n, D), (D, V)))
            rate = 2 * n * D * V / in_turn({"mm": lambda: a @ b})["mm"]
            row(name, "fraction_of_peak", 4 * n * D * V / seconds["ours"], rate, "matmul flop/s")


# ---------------------------------------------------------------- 2. the SDE step

FLUX_LATENTS = (21, 4096, 64)


def sde_functions():
    """Forward (drawing) and replay with backward, ours and as the chain of elementwise operations that is published with Flow-GRPO"""
    torch.manual_seed(0)
    x, v, noise, old_v, ref_v = (torch.randn(FLUX_LATENTS, device=DEVICE) for _ in range(5))
    t, s, a = 0.8, 0.76, 0.9
    c_x, c_v, std = G.sde_coefficients("flow", t, s, a, 0.99)
    x_next = c_x * x + c_v * v + std * noise
    B, h = len(x), t - s
    sigma = torch.full((B, 1, 1), t, device=DEVICE)
    dims = tuple(range(1, x.ndim))

    def chain(velocity):
        g = a * torch.sqrt(sigma / (1 - sigma))
        mean = x * (1 - g**2 * h / (2 * sigma)) - velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * h
        return mean, g * h**0.5

    def chain_log_prob(sample, mean, deviation):
        quadratic = -((sample - mean) ** 2) / (2 * deviation**2)
        return (quadratic - torch.log(deviation) - 0.5 * torch.log(2 * torch.as_tensor(torch.pi))).mean(dims)

    def chain_forward():
        mean, deviation = chain(v)
        sample = mean + deviation * noise
        return sample, chain_log_prob(sample, mean, deviation)

    def chain_replay():
        leaf = v.clone().requires_grad_(True)
        mean, deviation = chain(leaf)
        with torch.no_grad():
            old_mean, _ = chain(old_v)
            ref_mean, _ = chain(ref_v)
        log_prob = chain_log_prob(x_next, mean, deviation)
        guard = ((x_next - old_mean) / deviation * (mean - old_mean) / abs(c_v)).mean(dims)
        kl = ((mean - ref_mean) ** 2 / (2 * deviation**2)).mean(dims)
        (log_prob + guard + kl).sum().backward()
        return leaf.grad

    def replay():
        leaf = v.clone().requires_grad_(True)
        sum(value.sum() for value in G.sde_log_ratio(x, leaf, x_next, old_v, ref_v, c_x, c_v, std)).backward()
        return leaf.grad

    torch.testing.assert_close(replay(), chain_replay(), rtol=1e-3, atol=1e-7)  # the same work
    return {
        "forward": (lambda: G.sde_step(x, v, noise, c_x, c_v, std), chain_forward, 4),
        "replay and backward": (replay, chain_replay, 11),
    }, x


def sde():
    functions, x = sde_functions()
    for name, (ours, peer, passes) in functions.items():
        seconds = in_turn({"ours": ours, "peer": peer})
        title = f"SDE step {FLUX_LATENTS} float32, {name}"
        row(title, "time", seconds["ours"], seconds["peer"], "elementwise chain")
        row(title, "peak_memory", fresh("sde", name, 0), fresh("sde", name, 1), "elementwise chain")
        if DEVICE == "cuda":  # passes: tensors of this size that must be read or written
            y = torch.empty_like(x)
            rate = 2 * x.numel() * 4 / in_turn({"copy": lambda: y.copy_(x)})["copy"]
            row(title, "fraction_of_peak", passes * x.numel() * 4 / seconds["ours"], rate, "copy bytes/s")


# ---------------------------------------------------------------- 3. whole steps


def default_run(*words):
    import grpo

    for library in (grpo.diffusers, grpo.transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    os.chdir(ROOT)
    return grpo.Run(grpo.load_config(["config.yaml", f"device={DEVICE}", *words]))


def published_step(run, stage, iteration):
    """Every step but the last stochastic and trained, embeddings made for each picture, old log-probs computed again"""
    gen, P, M = run.generator, stage.prompts, stage.images
    prompts = [p for p in run.next_prompts(iteration, P) for _ in range(M)]  # (P*M)
    keys = [(0, iteration, p, m) for p in range(P) for m in range(M)]
    gen.encode(prompts)  # a row for each picture
    images, trajectory = gen.rollout(prompts, keys, range(gen.cfg.num_steps - 1))
    scores = run.combine(__import__("reward").score(run.rewards, images, prompts, run.cfg.micro_batch))
    advantage = scores.view(P, M).sub(scores.view(P, M).mean(1, keepdim=True)).flatten()  # (P*M,)
    gen.encode(prompts)
    with torch.no_grad():  # old log-probs
        for k in range(len(trajectory.index)):
            for rows in gen.chunks(len(prompts)):
                gen.replay(trajectory, k, rows)
    run.update_generator(trajectory, advantage, P, range(P))


def generator():
    import grpo

    run, stage = default_run(), grpo.StageConfig(train="generator", prompts=3, rewrites=1, images=24)
    phases = []
    ours = lambda: phases.append(run.step(stage, len(phases))["seconds"])
    seconds = in_turn({"ours": ours, "peer": lambda: published_step(run, stage, len(phases))})
    row("generator step, nano, 72 pictures", "time", seconds["ours"], seconds["peer"], "every step trained")
    print("   of it: " + shares_of(phases[1:]))


def shares_of(phases):
    total = sum(sum(p.values()) for p in phases)
    return ", ".join(f"{n} {sum(p[n] for p in phases) / total:.0%}" for n in phases[0])


def smol(folder):
    """A random model of SmolLM2-135M's shape and a tokenizer of its size, saved as a user's folder"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    V = 49152
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2", unk_token="t3")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)


TOKENS = 64
TEXTS = [f"t{i} " * 24 for i in range(100, 108)]


def refiner_ours(folder, steps):
    """`steps` steps of 8 prompts x 8 rewrites x 64 tokens -> [{phase: seconds}]"""
    cfg = L.RefinerConfig(model=folder, system_prompt="", max_new_tokens=TOKENS)
    llm = L.Refiner(cfg, DEVICE)
    llm.model.generation_config.min_new_tokens = TOKENS
    llm.add_lora()
    optimizer = torch.optim.AdamW(llm.parameters(), lr=1e-5)
    phases = []
    for step in range(steps):
        drawn = []
        rollout = clock(lambda: drawn.append(llm.rollout(TEXTS, 8, step)))
        rewrites = drawn[0]
        tokens, advantage = rewrites.mask.sum().item(), torch.arange(64.0, device=DEVICE) / 64 - 0.5

        def update():
            for b in torch.arange(64).split(16):
                log_probs, _ = llm.log_probs(rewrites, b.tolist())
                L.token_loss(log_probs, log_probs.detach(), advantage[b], rewrites.mask[b], cfg, 64, tokens)[0].backward()
            torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        phases.append({"rollout": rollout, "update": clock(update)})
    return phases


def refiner_trl(folder, steps):
    """The same by TRL's GRPOTrainer -> seconds of each step"""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    stamps = []

    class Stamp(TrainerCallback):
        def on_step_begin(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            stamps[-1] = time.perf_counter() - stamps[-1]

    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=16, gradient_accumulation_steps=4, num_generations=8,
        max_completion_length=TOKENS, generation_kwargs={"min_new_tokens": TOKENS}, temperature=1.0, top_k=0, beta=0.0,
        max_steps=steps, learning_rate=1e-5, loss_type="dapo", gradient_checkpointing=False, bf16=False, report_to=[],
        use_cpu=DEVICE == "cpu", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        lambda completions, **_: [float(i % 7) for i in range(len(completions))],
        args, Dataset.from_dict({"prompt": TEXTS * steps}), processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"), callbacks=[Stamp()],
    )  # fmt: skip
    trainer.train()
    return stamps


def refiner():
    title = "refiner step, 135 M, 8 x 8 x 64 tokens"
    with tempfile.TemporaryDirectory() as folder:
        smol(folder)
        phases = refiner_ours(folder, RUNS + 1)[1:]
        ours = statistics.median(sum(p.values()) for p in phases)
        print(f"{title}: ours {ours:.1f} s; of it: " + shares_of(phases))
        try:
            theirs = statistics.median(refiner_trl(folder, RUNS + 1)[1:])
        except ImportError as error:
            print(f"{title}: TRL left out: {error}")
            return
        row(title, "time", ours, theirs, "TRL GRPOTrainer")
        memory = [fresh("refiner", which, folder, runs=1) for which in ("ours", "trl")]
        row(title + " (one run)", "peak_memory", *memory, "TRL GRPOTrainer")


# ---------------------------------------------------------------- 4. cost as work grows


def growth():
    """Seconds per unit of work at 1, 2 and 4 times the work; ratio: per unit against the smallest"""
    run = default_run()
    gen = run.generator
    draw = lambda n: gen.sample(["a tabby cat"] * n, [(0, 0, 0, i) for i in range(n)])
    per_unit("drawing, 36 pictures x", {k: (lambda k=k: draw(36 * k)) for k in (1, 2, 4)})

    def with_steps(k):
        gen.cfg.num_steps = 5 * k
        draw(36)
        gen.cfg.num_steps = 10

    per_unit("drawing, 5 steps x", {k: (lambda k=k: with_steps(k)) for k in (1, 2, 4)})
    llm = run.refiner
    llm.model.generation_config.min_new_tokens = 1

    def with_tokens(k):
        llm.cfg.max_new_tokens = llm.model.generation_config.min_new_tokens = 32 * k
        llm.rollout(["a tabby cat"] * 8, 8, 0)

    per_unit("rewriting, 32 tokens x", {k: (lambda k=k: with_tokens(k)) for k in (1, 2, 4)})
    for k in (2, 4):
        row(f"generator step, {k} micro-batches", "peak_memory", fresh("growth", k), fresh("growth", 1), "1 micro-batch")


def per_unit(name, functions):
    seconds = in_turn(functions)
    for k in (2, 4):
        row(f"{name} {k}, per unit", "time", seconds[k] / k, seconds[1], "x 1")


# ---------------------------------------------------------------- main


def one(what, *words):
    """A fresh process: print the peak memory of one run"""
    if what == "logprob":
        name, n, D, V, dtype = words
        found, _ = logprob_functions(int(n), int(D), int(V), dtype, peers=False)
        return peak_of(found[name])
    if what == "sde":
        return peak_of(sde_functions()[0][words[0]][int(words[1])])
    if what == "refiner":
        return peak_of(lambda: (refiner_ours if words[0] == "ours" else refiner_trl)(words[1], 1))
    import grpo

    run = default_run("micro_batch=12")
    stage = grpo.StageConfig(train="generator", prompts=int(words[0]), rewrites=1, images=12)
    return peak_of(lambda: run.step(stage, 0))


def main(words):
    global DEVICE
    DEVICE = words.pop(0) if words and words[0] in ("cpu", "cuda") else "cpu"
    if words[:1] == ["--one"]:
        return print(one(*words[1:]))
    kinds = {f.__name__: f for f in (logprob, sde, generator, refiner, growth)}
    path, kept = Path(__file__).parent / "perf.json", []
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} of {os.cpu_count()} cores, {cpu_name()}"
    machine += f"; torch {torch.__version__}, python {platform.python_version()}"
    if path.exists() and (old := json.loads(path.read_text()))["machine"] == machine:
        kept = [r for r in old["rows"] if r["kind"] not in (words or kinds)]
    for kind in words or kinds:
        first = len(ROWS)
        kinds[kind]()
        for r in ROWS[first:]:
            r["kind"] = kind
        path.write_text(json.dumps({"machine": machine, "rows": kept + ROWS}, indent=1) + "\n")
    print(f"{machine}; wrote {path}")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main(sys.argv[1:])
