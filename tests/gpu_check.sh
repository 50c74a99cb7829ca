#!/usr/bin/env bash
# What one GPU of 80 GB or more can tell of this program in eight minutes, offline: in the project's
# root, `bash tests/gpu_check.sh`, with the Python of $PY, where `pip install -e '.[test]'` was done.
# A line of JSON a result, also in $OUT/gpu_check.jsonl. Each part is a process of its own under a time
# limit; one that fails says so, and the others go on.
#     PARTS="steps evaluation"   these parts alone
#     CHECK_CPU=1                on CPUs with tiny models, only to see that the script works
set -u
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
OUT=${OUT:-gpu_check} WORK=$(mktemp -d) PY=${PY:-python3} LIMIT=${LIMIT:-480}
export WORK CHECK_CPU=${CHECK_CPU:-}
PARTS=${PARTS:-attention waits packing checkpoint sharded steps tests whole memory tokens evaluation}
mkdir -p "$OUT"; : >"$OUT/gpu_check.jsonl"
trap 'rm -rf "$WORK"' EXIT
say() { printf '[%3ds] %s\n' "$SECONDS" "$*"; }

part() { # NAME SECONDS COMMAND...
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) status; shift 2
  [ "$left" -lt 15 ] && { say "SKIPPED $name: no time left"; return; }
  timeout -k 5 "$((most < left ? most : left))" "$@" >"$OUT/$name.log" 2>&1; status=$?
  grep -h '^{' "$OUT/$name.log" | tee -a "$OUT/gpu_check.jsonl"
  if [ $status -eq 0 ]; then say "ok $name"; else say "FAILED $name, status $status"; tail -6 "$OUT/$name.log"; fi
}

cat >"$WORK/check.py" <<'EOF_PY'
import gc
import json
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "tests")]
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

import bench
import data
import dco
import train as program

GPU = not os.environ["CHECK_CPU"]
DEVICE = "cuda" if GPU else "cpu"
PEAK = 989e12  # dense bfloat16 flop/s of an H100 SXM or an H200
bench.SIZES["1.5B"] = ("qwen2", 28, 12, 2, 128, 1536, 8960, 151936, True)
for layers in (4, 12):
    bench.SIZES[f"7B/{layers}"] = ("qwen2", layers, *bench.SIZES["7B"][2:])
if not GPU:
    for size in bench.SIZES:
        bench.SIZES[size] = ("qwen2", 2, 4, 2, 16, 64, 128, 500, size in ("135M", "1.5B"))


def result(**fields):
    print("\n" + json.dumps({"check": sys.argv[1], **fields}), flush=True)  # below a bar


def now():
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak():
    """GB that were allocated at most since it was last asked."""
    if not GPU:
        return 0.0
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return round(most, 1)


def settings(size, **more):
    given = {"device": DEVICE, "dtype": "bfloat16", "langs": ["en", "es"], "epochs": 50,
             "save_every": 0, "out": os.environ["WORK"], **more}
    return program.with_defaults(program.Config(model=size, **given))


def loaded(size, shape, **more):
    """A random model where a run has it, its settings, 1,280 questions and their trees."""
    config = settings(size, **more)
    if not dist.is_initialized():
        program.init_distributed(config)
    model, _, questions, trees = bench.prepare(config, shape)
    program.place(model, config)
    return model, config, questions * 20, trees * 20


def release():
    gc.collect()  # a model holds itself: its head's forward is a method of the head
    if GPU:
        torch.cuda.empty_cache()
    peak()


def utilisation(model, tokens, seconds, passes):
    """Share of the peak, by the matrices of the layers alone; a backward pass is two of forward."""
    layers = [w for name, w in model.named_parameters() if w.dim() == 2 and ".layers." in name]
    return round(2 * passes * sum(w.numel() for w in layers) * tokens / seconds / PEAK, 4)


def steps_of(model, config, questions, trees):
    K = max(question.K for question in questions)
    reference = torch.randn(len(trees), 2, K)
    return program.train(model, questions, trees, reference, program.gamma_matrix(config), config)


def speed(model, config, questions, trees, number=20, **more):
    """Some steps: milliseconds, tokens, utilisation, and GB at most."""
    steps = steps_of(model, config, questions, trees)
    for _ in range(5 if GPU else 1):
        next(steps)
    peak()
    began = now()
    lines = [next(steps) for _ in range(number if GPU else 2)]
    seconds = (now() - began) / len(lines)
    steps.close()
    tokens = sum(line["tokens"] for line in lines) / len(lines)
    result(ms=round(1e3 * seconds, 1), tokens=round(tokens), peak_GB=peak(),
           utilisation=utilisation(model, tokens, seconds, 3), **more)


def attention():
    """Which kernel takes a mask, and what a length costs that was not seen before."""
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        first, again = [], []
        for N in (241, 344, 453, 562, 671):
            q, k, v = (torch.randn(1, 28, N, 128, device=DEVICE, dtype=torch.bfloat16,
                                   requires_grad=True) for _ in range(3))
            mask = torch.zeros(1, 1, N, N, device=DEVICE, dtype=torch.bfloat16)
            kernel = torch._fused_sdp_choice(q, k, v, attn_mask=mask)
            for times in (first, again):
                began = now()
                torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).sum().backward()
                times.append(1e3 * (now() - began))
        result(cudnn_allowed=cudnn, kernel=SDPBackend(kernel).name, new_length_ms=round(sorted(first)[2], 2),
               seen_length_ms=round(sorted(again)[2], 2))


def waits():
    """The places where the CPU waits for the GPU in a step; there should be one, in train.py.

    Copies are not seen so: beside it, how long the CPU takes to pack and queue 4,096 tokens while
    the GPU is asleep for a second.
    """
    for size in ("135M", "1B"):  # tied without and with a token that pads
        model, config, questions, trees = loaded(size, "bmlama", candidates=0, max_tokens=256)
        steps = steps_of(model, config, questions, trees)
        next(steps), next(steps)
        if GPU:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(steps)
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
        found = [w for w in caught if "synchroniz" in str(w.message)]
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)
        row = [tree for pair in trees[:80] for tree in pair]
        with torch.no_grad(), program.autocast(config):
            dco.completion_logps(model, row)
            now()
            if GPU:
                torch.cuda._sleep(2_000_000_000)  # cycles, about a second
            began = time.perf_counter()
            dco.completion_logps(model, row)
            queued = time.perf_counter() - began
        result(size=size, places=places, tokens=sum(tree.tokens() for tree in row),
               seconds_to_queue=round(queued, 3))
        steps.close()
        del model
        release()
    if GPU:
        result(allocator=torch.cuda.memory._snapshot()["allocator_settings"])


def packing():
    """Whether the program's own check passes, in float32, with TF32, and in bfloat16."""
    model, config, _, trees = loaded("1.5B", "mmmlu")
    for dtype, precision in (("float32", "highest"), ("float32", "high"), ("bfloat16", "high")):
        torch.set_float32_matmul_precision(precision)
        try:
            program.check_model(model, trees[:4], replace(config, dtype=dtype))
            refused = ""
        except data.InputError as error:
            refused = str(error)
        result(dtype=dtype, precision=precision, refused=refused)


def memory():
    """GB at most in a micro-batch of 2,000 tokens, beside those that the trace says."""
    trees = [data.Tree(list(range(57)), [[0, 1, 2], [0, 1, 2, 3]])] * 32
    for size, recompute in (("1.5B", False), ("1.5B", True), ("7B/4", False), ("7B/4", True)):
        config = settings(size, gradient_checkpointing=recompute)
        _, *traced = bench.trace(1, replace(config, device="cpu"), trees)
        program.init_distributed(config)
        model = bench.random_model(size, DEVICE)
        program.place(model, config)
        model.get_input_embeddings().sparse = False  # as the trace has it
        moments = [torch.zeros_like(w) for w in model.parameters() for _ in range(2)]
        peak()
        with program.autocast(config):
            logps = dco.completion_logps(model, trees)
        forward = peak()
        logps.sum().backward()
        result(size=size, checkpointed=recompute, forward_GB=forward, backward_GB=peak(),
               traced_GB=[round(x / 1e9, 1) for x in traced])
        del model, moments, logps
        dist.destroy_process_group()
        release()


def steps():
    """The paper's batch with a 1.5B, and for how much of a step the GPU is at work."""
    for shape in ("bmlama", "mmmlu"):
        model, *rest = loaded("1.5B", shape)
        speed(model, *rest, size="1.5B", shape=shape)
        if GPU:
            run = steps_of(model, *rest)
            next(run), next(run)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                began = now()
                for _ in range(8):
                    next(run)
                seconds = now() - began
            kernels = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
            busy = sum(e.self_device_time_total for e in kernels) / 1e6
            top = {e.key[:50]: round(e.self_device_time_total / 8e3, 2) for e in kernels[:6]}
            result(shape=shape, gpu_busy=round(busy / seconds, 3), top_ms=top)
            run.close()
        del model
        release()


def whole():
    """The paper's batch with a 7B; of 12 layers where all do not fit."""
    room = torch.cuda.get_device_properties(0).total_memory if GPU else 0
    size = "7B" if room > 135e9 or not GPU else "7B/12"
    for shape in ("bmlama", "mmmlu"):
        model, *rest = loaded(size, shape, gradient_checkpointing=True)
        speed(model, *rest, size=size, shape=shape)
        del model, rest
        release()


def sharded():
    """--shard in one process. With checkpointing it crashed on torch 2.9 to 2.12 (pytorch#159359)."""
    for recompute in (False, True):
        model, *rest = loaded("7B/4", "bmlama", shard=True, gradient_checkpointing=recompute)
        speed(model, *rest, size="7B/4", checkpointed=recompute)
        del model, rest
        release()


def tokens():
    """Ever more questions in a step, up to some 16,000 tokens, and rows of other lengths."""
    model, config, *rest = loaded("1.5B", "bmlama", candidates=0)
    for questions in (4, 32, 270):
        for row in (1024, 2048, 4096, 8192):
            if questions == 270 or row == 4096:
                config = replace(config, batch_questions=questions, max_tokens=row)
                speed(model, config, *rest, number=8, batch_questions=questions, max_tokens=row)


def evaluation():
    """Scoring, by the length of a row; and the share of the time that the CPU spends on packing."""
    for shape in ("bmlama", "mmmlu"):
        model, config, questions, trees = loaded("1.5B", shape)
        questions, trees = (questions, trees) if GPU else (questions[:8], trees[:8])
        flat = [tree for row in trees for tree in row]
        fed = sum(tree.tokens() for tree in flat)
        program.score(model, questions[:40], trees[:40], config)
        for row in (1024, 2048, 4096, 8192, 16384):
            config = replace(config, max_tokens=row)
            began = now()
            program.score(model, questions, trees, config)
            seconds = now() - began
            began = time.perf_counter()
            for group in program.deal({n: t.tokens() for n, t in enumerate(flat)}, row):
                dco.pack([flat[n] for n, _ in group])
            host = time.perf_counter() - began
            result(shape=shape, max_tokens=row, tokens_a_second=round(fed / seconds),
                   utilisation=utilisation(model, fed, seconds, 1), peak_GB=peak(),
                   packing=round(host / seconds, 3))
        del model
        release()


def checkpoint():
    """How fast one is written, by DCP's path for a GPU, and that a run goes on from it."""
    for shard in (False, True):
        model, config, *rest = loaded("135M", "bmlama", shard=shard, save_every=2)
        config = replace(config, out=f"{config.out}/{shard}")
        steps = steps_of(model, config, *rest)
        next(steps), next(steps)
        began = now()
        next(steps)  # writes that of step 2 first
        seconds = now() - began
        (folder,) = program.checkpoints(config).values()
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
        line = next(steps_of(model, config, *rest))
        result(sharded=shard, GB=round(size, 2), seconds=round(seconds, 1), next_step=line["step"])
        release()


globals()[sys.argv[1]]()
if dist.is_initialized():
    dist.destroy_process_group()
EOF_PY

say "$($PY -c 'import os, torch, transformers
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print("torch", torch.__version__, "transformers", transformers.__version__, name, os.cpu_count(), "CPUs")')"
for name in $PARTS; do
  case $name in
    tests) part tests 200 $PY -m pytest -m cuda tests/test_cuda.py -p no:cacheprovider
           say "$(tail -1 "$OUT/tests.log")" ;;
    *) part "$name" 60 $PY "$WORK/check.py" "$name" ;;
  esac
done
