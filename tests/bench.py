"""What packing buys: `python tests/bench.py` (pytest does not collect it).

The same random 135M Llama (SmolLM2's shape), or --model DIR, and the same questions, in one run:
this program's packed prefix trees against the plain way, one padded row for each prompt and answer
with the logits of every token. Repetitions are interleaved; it prints medians, spreads, tokens and
peak memory.

`--memory` instead measures what a process needs in training, replicated (DDP) and sharded
(`--shard`) over two processes, beside the formula of `need`; and prints how many GPUs of 40 and
80 GB that formula asks for.

    bmlama  lengths as BMLAMA's in English and Spanish (4 to 17 tokens, answers 1 to 10); ten
            answers to judge, two to train on
    mmmlu   300-token prompts, four letters to judge and two to train on
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import dco


def questions(shape: str, stage: str, vocabulary: int) -> list[data.Tree]:
    """4 questions in 2 languages, or 4 prompts; two answers each to train on, all to judge."""
    rng = random.Random(0)
    ids = lambda lengths: [rng.randrange(vocabulary) for _ in range(rng.choice(lengths))]  # noqa: E731
    if shape == "bmlama":  # its deciles under SmolLM2's tokenizer
        number, K, prompt, answer = (
            8,
            10,
            [4, 5, 6, 7, 7, 8, 10, 11, 13, 17],
            [1, 1, 1, 1, 2, 2, 3, 4, 6, 10],
        )
    else:
        number, K, prompt, answer = 4, 4, range(250, 350), [1]
    return [
        data.Tree(ids(prompt), [ids(answer) for _ in range(2 if stage == "step" else K)])
        for _ in range(number)
    ]


def plain(model, trees: list[data.Tree]) -> torch.Tensor:
    """One padded row for each prompt and answer, all logits, as is commonly done."""
    rows = [tree.prefix + branch for tree in trees for branch in tree.branches]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(
        model.device
    )
    length = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    start = torch.tensor(
        [len(tree.prefix) for tree in trees for _ in tree.branches], device=model.device
    )[:, None]
    column = torch.arange(ids.shape[1], device=model.device)
    logits = model(input_ids=ids, attention_mask=(column < length).long(), use_cache=False).logits[
        :, :-1
    ]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    scored = (column[1:] >= start) & (column[1:] < length)
    return (logps * scored).sum(-1).view(len(trees), -1)


WAYS = {"packed": dco.completion_logps, "plain": plain}


def once(model, trees, way: str, stage: str) -> tuple[float, torch.Tensor]:
    """Seconds and scores of one forward, or of a forward and backward."""
    model.zero_grad()
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    with torch.set_grad_enabled(stage == "step"):
        scores = WAYS[way](model, trees)
        if stage == "step":
            scores.sum().backward()
    synchronize()
    return time.perf_counter() - begun, scores.detach()


def make(arguments):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )
    return model.to(arguments.device).train()


def peak(arguments, shape: str, stage: str, way: str) -> float:
    """GiB at most, of the process or on the GPU, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--model",
        arguments.model,
        "--device",
        arguments.device,
        "--peak",
        shape,
        stage,
        way,
    ]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Shape(NamedTuple):
    """What a model's memory depends on."""

    layers: int
    d: int  # width
    f: int  # feed-forward width
    kv: int  # width of keys, and of values
    V: int  # vocabulary
    tied: bool  # whether the embeddings are the head

    @property
    def layer(self) -> int:
        return 2 * self.d * (self.d + self.kv) + 3 * self.d * self.f

    @property
    def root(self) -> int:
        return self.V * self.d * (1 if self.tied else 2)


SHAPES = {
    "SmolLM2 135M": Shape(30, 576, 1536, 192, 49152, True),
    "Qwen2.5 3B": Shape(36, 2048, 11008, 256, 151936, True),
    "Qwen2.5 7B": Shape(28, 3584, 18944, 512, 152064, False),
    "Qwen2.5 14B": Shape(48, 5120, 13824, 1024, 152064, False),
}


def need(shape: Shape, processes: int, shard: bool, tokens: int, scored: int, size: int) -> int:
    """Bytes of one process, with --gradient_checkpointing; `size` bytes a weight.

    Weights, gradients and AdamW's two moments are 4 numbers a parameter. Sharded, a process holds
    1 / processes of them, and whole, weights and gradients: of the embeddings and the head, and of
    two layers, one at work and one on its way. Activations: a layer's input for each layer, one
    layer at work, and logits, their exponentials and their gradient at the scored positions.
    """
    parameters = shape.layers * shape.layer + shape.root
    states = 4 * size * parameters
    if shard and processes > 1:
        states = states // processes + 2 * size * (shape.root + 2 * shape.layer)
    working = 8 * shape.d + 4 * shape.f
    activations = 4 * tokens * (shape.layers * shape.d + working) + 12 * scored * shape.V
    return states + activations


def memory_of(arguments, way: str) -> None:
    """Measure one process of two: GiB at most after its model is there; printed by the first."""
    import torch.distributed as dist

    import rankc
    import train

    device, rank, world = rankc.start(arguments.device)
    model = make(arguments)
    if way == "shard":
        train.shard(model, device)
    policy = train.replicate(model, [], True) if way == "replicate" and world > 1 else model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    trees = questions("bmlama", "step", model.config.vocab_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        begun = resident("VmRSS") - 4 * sum(
            getattr(w, "to_local", lambda w=w: w)().numel() for w in model.parameters()
        )
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    for _ in range(2):  # the first makes the moments
        dco.completion_logps(policy, trees).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    used = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - begun
    tokens = sum(tree.tokens() for tree in trees)
    if rank == 0:
        print(json.dumps([used / 2**30, tokens, sum(len(b) for t in trees for b in t.branches)]))
    dist.barrier()
    dist.destroy_process_group()


def resident(name: str) -> int:
    """Bytes that this process has in memory, or has had at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def share_out(arguments) -> None:
    """Two processes measured; then GPUs by formula."""
    shape = SHAPES["SmolLM2 135M"]
    for processes, way in ((1, "replicate"), (2, "replicate"), (2, "shard")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), __file__, "--device", arguments.device]
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }  # what is freed is given back
        done = subprocess.run(
            [*command, "--memory-of", way], capture_output=True, text=True, env=environment
        )
        used, tokens, scored = json.loads(done.stdout.splitlines()[-1])
        formula = need(shape, processes, way == "shard", tokens, scored, 4) / 2**30
        print(
            f"135M, {tokens} tokens a step, {way} over {processes}: {used:.2f} GiB a process at "
            f"most, by formula {formula:.2f}",
            flush=True,
        )
    print("\nGPUs by formula, --shard --gradient_checkpointing, 2048 tokens at once, all scored")
    for name, shape in SHAPES.items():
        counts = []
        for size in (4, 2):
            for room in (40, 80):
                fits = [
                    n for n in range(1, 65) if need(shape, n, True, 2048, 2048, size) < 0.9e9 * room
                ]
                counts.append(f"{'float32' if size == 4 else 'bfloat16'} {room} GB: {fits[0]}")
        print(f"  {name:14} {'   '.join(counts)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder of a causal language model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="memory of a process in training")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        return memory_of(arguments, arguments.memory_of)
    if arguments.memory:
        return share_out(arguments)
    model = make(arguments)
    if arguments.peak:
        shape, stage, way = arguments.peak
        once(model, questions(shape, stage, model.config.vocab_size), way, stage)
        if arguments.device == "cuda":
            used = torch.cuda.max_memory_allocated() / 2**30
        else:  # not ru_maxrss, which a child inherits
            status = Path("/proc/self/status").read_text()
            used = int(status.split("VmHWM:")[1].split()[0]) / 2**20
        return print(json.dumps(used))
    fed = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(
        f"{size:.0f}M parameters, float32, {arguments.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; medians of {arguments.repeat} (min - max)"
    )
    for shape in ("bmlama", "mmmlu"):
        for stage in ("forward", "step"):
            trees = questions(shape, stage, model.config.vocab_size)
            seconds, tokens, scores = {way: [] for way in WAYS}, {}, {}
            for _ in range(arguments.repeat + 1):  # the first is a warm-up
                for way in WAYS:
                    fed.clear()
                    spent, scores[way] = once(model, trees, way, stage)
                    seconds[way].append(spent)
                    tokens[way] = sum(fed)
            memory = {way: peak(arguments, shape, stage, way) for way in WAYS}
            fewest = sum(tree.tokens() for tree in trees)
            middle = {way: statistics.median(times[1:]) for way, times in seconds.items()}
            apart = (scores["packed"] - scores["plain"]).abs().max()
            answers = scores["plain"].numel()
            name = "forward + backward" if stage == "step" else "forward"
            print(f"\n{shape}, {name}: {answers} answers, scores within {apart:.0e} nats")
            for way in WAYS:
                print(
                    f"  {way:7} {tokens[way]:6} tokens  {middle[way]:7.3f} s "
                    f"({min(seconds[way][1:]):.3f} - {max(seconds[way][1:]):.3f})  "
                    f"{answers / middle[way]:6.1f} answers/s  {memory[way]:.2f} GiB",
                    flush=True,
                )
            print(
                f"  ratio   {tokens['packed'] / fewest - 1:+.1%} of the fewest {fewest}; "
                f"{middle['plain'] / middle['packed']:.2f}x faster, "
                f"{memory['packed'] / memory['plain']:.2f} of the memory",
                flush=True,
            )


if __name__ == "__main__":
    main()
