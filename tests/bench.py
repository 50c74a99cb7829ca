"""How fast, how frugal, how near the floor: `python tests/bench.py` (pytest does not collect it).

A random 135M Llama (SmolLM2's shape), or --size, or --model DIR, and the same tokens, in one run:
this program against the plain way, which pads a row for each prompt and answer, 16 at a time (8 of
mmmlu's), computes the logits of every token, and keeps the reference model in the step; --only
leaves it out. Each way runs in a process of its own, in turn with the other; medians (min - max).
On CPUs this program has glibc keep freed memory (train.reuse_memory); --reuse: the plain way, too.
Questions have the lengths of --shapes, or are real ones: --data, as train.py takes it. Stages:

    reference   log-probs of two answers to each question, as a peer needs them before it trains
    step        an optimizer step of 4 questions, 2 languages and 2 answers, by train.train
    evaluation  log-probs of all answers, by train.score; train.py's own reference pass is this one

Tokens are counted against the fewest: each prompt once a language, each answer less its last token.
Utilisation: the time of the matrix products alone, of a model's layers and head for as many tokens,
each the best of five, by that of forward (and backward). Instead of that:

    --processes step with 2 processes of one thread against one process of one thread
    --scale     the measures for 17 languages and 100,000 questions; a million questions to load
    --memory    what a step takes on GPUs, traced on fake tensors; the trace beside the real thing
    --precision what bfloat16 costs and gives, in a --model's scores of --data
    --largest   the most tokens at once that fit a GPU
"""

import argparse
import copy
import dataclasses
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
import weakref
from collections import Counter, namedtuple
from contextlib import redirect_stdout
from dataclasses import fields
from itertools import islice, pairwise, repeat
from pathlib import Path
from statistics import mean, median

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import dco
import rankc
import train
from theory.rankc_chance import consist

SHAPES = {  # tokens of a prompt and of an answer, each one of a list, and the number of answers
    "bmlama": ([4, 5, 6, 7, 7, 8, 10, 11, 13, 17], [1, 1, 1, 1, 2, 2, 3, 4, 6, 10], 10),  # deciles
    "mmmlu": (range(250, 350), [1], 4),
    "xcsqa": (range(50, 80), [1], 5),
}
SIZES = {  # layers, heads, heads of keys, width, feed-forward width, vocabulary, tied embeddings
    "135M": ("llama", 30, 9, 3, 576, 1536, 49152, True),  # SmolLM2
    "1.5B": ("qwen2", 28, 12, 2, 1536, 8960, 151936, True),  # this and the others: Qwen2.5
    "3B": ("qwen2", 36, 16, 2, 2048, 11008, 151936, True),
    "7B": ("qwen2", 28, 28, 4, 3584, 18944, 152064, False),
    "14B": ("qwen2", 48, 40, 8, 5120, 13824, 152064, False),
    "8B": ("llama", 32, 32, 8, 4096, 14336, 128256, False),  # Llama 3.1
    "4B": ("gemma3", 34, 8, 4, 2560, 10240, 262208, True),  # these two: Gemma 3 with its tower
    "12B": ("gemma3", 48, 16, 8, 3840, 15360, 262208, True),
}
TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
TOWER |= {"num_attention_heads": 16, "image_size": 896, "patch_size": 14}
Shape = namedtuple("Shape", "layers d f V products layer root")  # products: widths in and out


def shape_of(model) -> Shape:
    """What a model's cost depends on: layers, widths, a layer's matrices, and weights."""
    config = model.config.get_text_config()
    d, f, V = config.hidden_size, config.intermediate_size, config.vocab_size
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    kv = head * config.num_key_value_heads
    products = (d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)
    layer, root = sum(a * b for a, b in products), V * d * (1 if config.tie_word_embeddings else 2)
    return Shape(config.num_hidden_layers, d, f, V, products, layer, root)


def random_model(size: str, device: str):
    from transformers import AutoConfig, AutoModelForCausalLM  # slow to import

    names = "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"
    names += "intermediate_size", "vocab_size", "tie_word_embeddings"
    kind, *numbers = SIZES[size]
    settings = dict(zip(names, numbers, strict=True))
    if kind == "gemma3":
        settings = {"text_config": {**settings, "head_dim": 256}, "vision_config": TOWER}
    config = AutoConfig.for_model(kind, **settings)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def prepare(arguments, shape: str):
    """A model, trees [question][language], the items of each step, without end, and settings."""
    torch.manual_seed(0)
    names = {field.name for field in fields(train.Config)} & set(vars(arguments))
    given = {name: getattr(arguments, name) for name in names}
    config = train.Config(**{"epochs": 10**6, **given, "model": given["model"] or arguments.size})
    number = max(16, config.batch_questions * (arguments.repeat + 1))
    if arguments.model:
        model, tokenizer = train.load_model(config)
        model.to(config.device)
    else:
        model = random_model(arguments.size, config.device)
    if arguments.data:
        questions = data.split(data.load(config.data, config.langs), number, 0, 0)[0]
        trees = data.encode(tokenizer, questions, config.langs)
    else:
        rng, V, (prompt, answer, K) = random.Random(0), shape_of(model).V, SHAPES[shape]
        ids = lambda lengths: [rng.randrange(V) for _ in range(rng.choice(lengths))]  # noqa: E731
        prompts = ([ids(prompt) for _ in config.langs] for _ in range(number))
        trees = [[data.Tree(p, [ids(answer) for _ in range(K)]) for p in row] for row in prompts]
        questions = [data.Question(str(n), "", 0, {}, {"": ("",) * K}) for n in range(number)]
    ref = torch.randn(len(trees), len(config.langs), max(question.K for question in questions))
    items = train.make_batches(questions, trees, ref, train.gamma_matrix(config), config)
    return model, trees, items, config


def begin(work, *given, world: int = 1):
    """Run work(pipe, *given) in so many new processes; the other end of the pipe.

    One that fails says why on stderr; then recv() raises EOFError at this end.
    """
    spawn = multiprocessing.get_context("spawn")  # they share nothing of this process's memory
    ours, theirs = spawn.Pipe()
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ.update(TQDM_DISABLE="1", PYTHONWARNINGS="ignore")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=str(world))
    for rank in map(str, range(world)):  # as torchrun tells it to train.init_distributed
        os.environ.update(RANK=rank, LOCAL_RANK=rank)
        spawn.Process(target=quietly, args=(work, theirs, *given), daemon=True).start()
    theirs.close()
    return ours


def quietly(work, *given) -> None:
    with open(os.devnull, "w") as null, redirect_stdout(null):  # lines that tell of progress
        work(*given)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def now() -> float:
    """Seconds, once a GPU has done what it was asked to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work) -> float:
    begun, _ = now(), work()
    return now() - begun


def clocked(work, turn: Counter, part: str):
    """`work`, adding its seconds to a part of the turn."""

    def wrapped(*args, **kwargs):
        begun, made = now(), work(*args, **kwargs)
        turn[part] += now() - begun
        return made

    return wrapped


def spread(times: list[float]) -> str:
    return f"{median(times):7.3f} s ({min(times):.3f} - {max(times):.3f})"


def room(name: str = "VmHWM") -> int:
    """Bytes this process has had at most, on a GPU if it uses one, or has in memory (VmRSS)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def plain(model, trees: list[data.Tree], rows: int, config: train.Config) -> torch.Tensor:
    """A padded row for each prompt and answer, all logits, as is commonly done: (answers,)."""
    texts, scores = [(tree, tree.prefix + branch) for tree in trees for branch in tree.branches], []
    for first in range(0, len(texts), rows):
        columns = []  # of each row: its tokens, ones, and ones where it is the answer
        for tree, text in texts[first : first + rows]:
            answer = torch.arange(len(text)) >= len(tree.prefix) + tree.prompt_len
            columns.append(torch.stack([torch.tensor(text), torch.ones_like(answer), answer], -1))
        ids, mask, answer = pad_sequence(columns, batch_first=True).to(model.device).unbind(-1)
        with train.autocast(config, model.device):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scores.append((logps * answer[:, 1:]).sum(-1))
    return torch.cat(scores)


def plain_steps(model, steps, rows: int, config: train.Config) -> None:
    """What train.train does, with the reference model in the step."""
    reference, gamma = copy.deepcopy(model).requires_grad_(False), train.gamma_matrix(config)
    weights, table = list(model.parameters()), (-1, len(config.langs), 2)  # (B, L, K)
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0, fused=True)
    some = max(1, rows // 2 // len(config.langs))  # questions at once
    for items in steps:
        for first in range(0, len(items), some):
            trees = [tree for item in items[first : first + some] for tree in item.trees]
            with torch.no_grad():
                ref = plain(reference, trees, rows, config).view(table)
            logps = plain(model, trees, rows, config).view(table)
            losses = dco.dco_loss(logps, ref, dco.align_reward(ref, gamma), config.beta)
            (losses.sum() / len(items)).backward()
        torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def turns(pipe, turn: Counter, work):
    """For each message a step's items, or rows of trees; when that is done, what the turn took."""
    for _ in iter(pipe.recv, None):
        turn.clear()
        begun, rows = now(), next(work)
        yield rows
        turn["seconds"] = now() - begun
        turn["trees"] = [tree for row in rows for tree in getattr(row, "trees", row)]
        turn["peak"] = room()
        pipe.send(turn)


def one_way(pipe, arguments, shape: str, stage: str, way: str) -> None:
    """A process of `compare`: one way through one stage, in turns."""
    if way == "plain" and not arguments.reuse:
        train.reuse_memory = lambda: None
    train.init_distributed(train.Config(model="m", device=arguments.device))
    model, trees, items, config = prepare(arguments, shape)
    packed = dco.packs_exactly(model, [row[0] for row in trees[:2]])
    pipe.send(shape_of(model))
    rows, judged, turn = *((8, 4) if shape == "mmmlu" else (16, 16)), Counter()
    note = lambda _, __, given: turn.update(fed=given["input_ids"].numel())  # noqa: E731
    model.register_forward_pre_hook(note, with_kwargs=True)  # of its copy, the reference, too
    if stage != "step":
        K = 2 if stage == "reference" else None
        pruned = [[t._replace(branches=t.branches[:K]) for t in row] for row in trees[:judged]]
        model.eval()
        for trees in turns(pipe, turn, repeat(pruned)):
            if way == "packed":
                scores = train.score(model, trees, config, packed)
                turn["scores"] = scores[scores.isfinite()]
            else:
                with torch.no_grad():
                    turn["scores"] = plain(model, sum(trees, []), rows, config).cpu()
    elif way == "plain":
        plain_steps(model, turns(pipe, turn, items), rows, config)
    else:
        for owner, name, part in (
            (dco, "completion_logps", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "optimizer"),
            (torch.optim.AdamW, "step", "optimizer"),
        ):
            setattr(owner, name, clocked(getattr(owner, name), turn, part))
        train.train(model, turns(pipe, turn, items), 10**6, config, packed, lambda line: None)


def compare(arguments, shape: str) -> None:
    """Every stage of one shape: both ways in turn, and how far this program is from the floor."""
    for stage in arguments.stages:
        ways = ["packed"] if arguments.only else ["packed", "plain"]
        pipes = {way: begin(one_way, arguments, shape, stage, way) for way in ways}
        size, *_ = [pipe.recv() for pipe in pipes.values()]
        found = {way: [] for way in ways}
        for _ in range(arguments.repeat + 1):
            for way, pipe in pipes.items():
                pipe.send("your turn")
                found[way].append(pipe.recv())
        for way, pipe in pipes.items():
            pipe.send(None)
            del found[way][0]  # which warms up
        for process in multiprocessing.active_children():
            process.join()  # what follows is timed, too
        show(arguments, f"{shape}, {stage}", size, found)


def positions(tree: data.Tree) -> int:
    """How many tokens of it predict something."""
    return 1 + sum(len(branch) - 1 for branch in tree.branches)


def flops(shape: Shape, trees: list[data.Tree]) -> float:
    """Of one forward pass: 2 a weight and token, 4 d for each token that a token attends to."""
    total = 0
    for tree in trees:
        n, own = len(tree.prefix), [len(branch) - 1 for branch in tree.branches]
        seen = n * (n + 1) / 2 + sum(m * n + m * (m + 1) / 2 for m in own)
        total += 2 * shape.layers * (tree.tokens() * shape.layer + 2 * shape.d * seen)
        total += 2 * shape.V * shape.d * positions(tree)
    return total


def bare(shape: Shape, trees: list[data.Tree], device: str, dtype, backward: bool) -> float:
    """Seconds of a model's matrix products for these trees at once, the best of five each."""
    total, tokens = 0.0, sum(tree.tokens() for tree in trees)
    sizes = Counter((a, b, tokens) for a, b in shape.products * shape.layers)
    for (a, b, T), times in [*sizes.items(), ((shape.d, shape.V, sum(map(positions, trees))), 1)]:
        x, w, g = (torch.randn(n, device=device, dtype=dtype) for n in ((T, a), (b, a), (T, b)))
        for product in [lambda: x @ w.T, *([lambda: g @ w, lambda: g.T @ x] * backward)]:
            product()
            total += times * min(seconds(product) for _ in range(5))
    return total


def show(arguments, title: str, size: Shape, found: dict[str, list[Counter]]) -> None:
    """Print what the turns of each way took."""
    mine, theirs = found["packed"], found.get("plain")
    parts = ["forward", "backward", "optimizer"]  # 0 where nothing is trained
    whole, *spent = (median(turn[part] for turn in mine) for part in ["seconds", *parts])
    computing = spent[0] + spent[1] or whole
    print(f"\n{title}: {sum(len(tree.branches) for tree in mine[0]['trees'])} answers")
    for way, turns in found.items():
        times, fed = [turn["seconds"] for turn in turns], mean(turn["fed"] for turn in turns)
        print(f"  {way:8} {spread(times)}  {fed:6.0f} tokens  {turns[-1]['peak'] / 2**30:5.2f} GiB")
    fewest = sum(tree.tokens() for turn in mine for tree in turn["trees"])
    ratio = f"{sum(turn['fed'] for turn in mine) / fewest - 1:+.1%} tokens over the fewest"
    if theirs:
        faster = median(turn["seconds"] for turn in theirs) / whole
        memory = mine[-1]["peak"] / theirs[-1]["peak"]
        ratio = f"{faster:.2f}x faster, {ratio}, {memory:.2f} of the memory"
        if not spent[1]:
            apart = (mine[0]["scores"] - theirs[0]["scores"]).abs().max()
            ratio += f", scores within {apart:.0e} nats"
    print(f"  ratio    {ratio}")
    if trained := spent[1] > 0:
        shares = zip([*parts, "everything else"], [*spent, whole - sum(spent)], strict=True)
        print("  parts   ", ", ".join(f"{part} {x:.3f} s ({x / whole:.1%})" for part, x in shares))
    dtype = getattr(torch, arguments.dtype)
    floors, trees = [], [turn["trees"] for turn in mine]
    for some in trees if trained else trees[:1]:  # what is judged is the same in every turn
        groups = [[some[i] for i in group] for group in data.batches(some, arguments.max_tokens)]
        floors.append(sum(bare(size, g, arguments.device, dtype, trained) for g in groups))
    floor, passes = mean(floors), 3 if trained else 1  # a backward pass is two forward ones
    work = passes * mean(flops(size, some) for some in trees) / 1e9
    print(
        f"  flops    {work:.1f} G at {work / computing:.0f} GFLOP/s; products alone {floor:.3f} of "
        f"{computing:.3f} s: utilisation {floor / computing:.0%}"
    )


def training(pipe, arguments, shape: str) -> None:
    """What steps by train.train take: times, bytes, the largest micro-batch; None: no room.

    Times of steps and, with --processes, of steps without the exchange, and of the exchange alone.
    """
    if arguments.memory:
        train.reuse_memory = lambda: None  # what is freed is to be seen as such
    device = train.init_distributed(train.Config(model="m", device=arguments.device))
    rank, world = dist.get_rank(), dist.get_world_size()
    model, _, items, config = prepare(arguments, shape)
    parameters, before, fed = sum(w.numel() for w in model.parameters()), 0, []
    train.distribute(model, config, device)
    if device.type == "cpu":  # what there is beside the weights; then VmHWM begins anew
        before = room("VmRSS") - 4 * parameters // (world if config.shard else 1)
        Path("/proc/self/clear_refs").write_text("5")
    pack = dco.pack
    dco.pack = lambda *given: fed.append(pack(*given)) or fed[-1]
    try:
        times = [step_times(model, items, arguments.repeat, config)]
    except torch.OutOfMemoryError:
        return pipe.send(None)
    used = room() - before
    largest = max(fed, key=lambda batch: batch.token.numel())
    if arguments.processes:
        train.sum_gradients = lambda *_: None  # each process for itself
        times.append(step_times(model, items, arguments.repeat, config))
        gradients = torch.zeros(parameters, device=device)
        times.append([seconds(lambda: dist.all_reduce(gradients)) for _ in range(4)][1:])
    if rank == 0:
        pipe.send((times, used, largest))


def step_times(model, items, number: int, config: train.Config) -> list[float]:
    """Seconds of so many steps after a first, from one line of the log to the next."""
    ends = []
    log = lambda line: ends.append(now())  # noqa: E731
    train.train(model, islice(items, number + 1), number + 1, config, True, log)
    return [end - begun for begun, end in pairwise(ends)]


def processes(arguments, shape: str) -> None:
    """Rounds of one process and of two, in turn."""
    names = "one process, one thread", "two, one thread each", "two, gradients not exchanged"
    times = {name: [] for name in (*names, "the exchange alone")}
    for _ in range(3):
        one, two = (begin(training, arguments, shape, world=n).recv()[0] for n in (1, 2))
        for found, some in zip(times.values(), (one[0], *two), strict=True):
            found += some
    for name, found in times.items():
        print(f"{shape}: {name:28} {spread(found)}")
    one, two, apart, exchange = map(median, times.values())
    print(
        f"{shape}: efficiency {one / 2 / two:.0%}, without the exchange {one / 2 / apart:.0%}; the "
        f"exchange costs {two - apart:.3f} s of the {exchange:.3f} s that it takes alone"
    )


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive under it: now, and at most."""

    def __init__(self):
        super().__init__()
        self.storages, self.operations, self.most = weakref.WeakKeyDictionary(), 0, 0
        self.elsewhere = lambda: ()  # tensors that do not count

    def now(self) -> int:
        apart = {tensor.untyped_storage() for tensor in self.elsewhere()}
        return sum(each.nbytes() for each in list(self.storages) if each not in apart)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, FakeTensor):
                self.storages[each.untyped_storage()] = None
        self.operations += 1
        if self.operations % 4 == 0:
            self.most = max(self.most, self.now())
        return out


def trace(size: str, world: int, config: train.Config, batch: dco.Pack) -> tuple[int, int, int]:
    """Bytes of one of so many processes: weights and moments; with them the peak of a micro-batch's
    forward pass, and of its backward pass and the update.

    The real model, sharding, compute precision and checkpointing, on tensors without contents.
    Under --offload what lies in the machine's memory does not count.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh, init, device = train.init_device_mesh("cpu", (world,)), train.init_device_mesh, "cpu"
    train.init_device_mesh = lambda *_: mesh
    local = lambda x: getattr(x, "_local_tensor", x)  # noqa: E731
    with FakeTensorMode(allow_non_fake_inputs=True):
        with no_init_weights():
            model = random_model(size, device).train()
        model.requires_grad_(False)
        for part in (model.get_decoder(), model.get_output_embeddings()):
            part.requires_grad_(True)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train.distribute(model, config, torch.device(device))
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0)
        with (live := Live()):
            for weight in model.parameters():
                live.storages[local(weight).untyped_storage()] = None
            for weight in weights:
                moments = {name: torch.zeros_like(weight) for name in train.MOMENTS}
                optimizer.state[weight] = {"step": torch.zeros(()), **moments}
                live.storages |= {local(x).untyped_storage(): None for x in moments.values()}
            if config.offload:
                fixed = [local(x) for x in model.parameters()]
                fixed += [local(optimizer.state[w][x]) for w in weights for x in train.MOMENTS]
                live.elsewhere = lambda: (
                    fixed + [local(w.grad) for w in weights if w.grad is not None]
                )
            live.most = 0
            peaks = [live.now()]
            with train.autocast(config, torch.device(device)):
                logps = dco.completion_logps(model, batch, packed=True)
            peaks.append(live.most)
            live.most = 0
            # not Eq. 11, which looks at its rows; a loss of so few numbers takes no room
            dco.dpo_loss(logps, torch.zeros_like(logps), config.beta).sum().backward()
            live.most = max(live.most, live.now())
            peaks.append(live.most)
    train.init_device_mesh = init
    dist.destroy_process_group()
    return tuple(peaks)


def memory(arguments, shape: str) -> None:
    """One process and two, traced and measured; then the paper's models on GPUs, traced."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back
    arguments.gradient_checkpointing, arguments.batch_questions, arguments.repeat = True, 12, 1
    for world, way in ((1, "replicate"), (2, "replicate"), (2, "shard")):
        arguments.shard = way == "shard"
        _, used, batch = begin(training, arguments, shape, world=world).recv()
        config = train.Config(model="m", device="cpu", shard=arguments.shard,
                              gradient_checkpointing=True)  # fmt: skip
        *_, traced = trace(arguments.size, world, config, batch)
        print(
            f"{arguments.size}, {shape}, {way} over {world}, {batch.token.numel()} tokens at once: "
            f"{used / 2**30:.2f} GiB a process, traced {traced / 2**30:.2f}, {traced / used:.2f}"
        )
    some = [data.Tree(list(range(1, 58)), [[5, 6, 7], [8, 9, 10, 11]]) for _ in range(32)]
    print("\nGB of each GPU, --gradient_checkpointing, bfloat16 compute, 2,048 tokens at once:")
    print("states, and with them the peak of forward, of backward; fits, with a tenth left free")
    print(
        "\n| | GPUs | states | forward | backward | fits |\n| --- | --- | --- | --- | --- | --- |"
    )
    names = {"3B": "Qwen2.5 3B", "4B": "Gemma 3 4B", "7B": "Qwen2.5 7B", "8B": "Llama 3.1 8B",
             "12B": "Gemma 3 12B", "14B": "Qwen2.5 14B"}  # fmt: skip
    for size, name in names.items():
        width = random_model(size, "meta").config.get_text_config().hidden_size
        batch = dco.pack(some, width)
        for world, flag in [
            (1, "--offload"),
            (1, ""),
            (2, "--shard"),
            (4, "--shard"),
            (8, "--shard"),
        ]:
            settings = {"shard": flag == "--shard", "offload": flag == "--offload"}
            config = train.Config(model="m", device="cpu", dtype="bfloat16", **settings,
                                  gradient_checkpointing=True)  # fmt: skip
            sizes = trace(size, world, config, batch)
            fits = [f"{GB} GB" for GB in (24, 40, 80) if max(sizes) < 0.9e9 * GB]
            told = " | ".join(f"{x / 1e9:.1f}" for x in sizes)
            print(f"| {name} | {world} {flag} | {told} | {fits[0] if fits else 'none'} |")


def precision(arguments) -> None:
    """Seconds, errors, ties and measures of a model's scores, by what it computes them in."""
    os.environ.update(TQDM_DISABLE="1")
    config = train.Config(model=arguments.model, data=arguments.data, langs=arguments.langs)
    train.init_distributed(config)
    model, tokenizer = train.load_model(config)
    questions = data.split(data.load(config.data, config.langs), 0, arguments.batch_questions, 0)[1]
    trees, exact = data.encode(tokenizer, questions, config.langs), None
    gold = torch.tensor([question.gold for question in questions])
    ways = {"float32": ("float32", dco.float32_logits)}
    ways |= {"bfloat16, logits in float32": ("bfloat16", dco.float32_logits)}
    ways |= {"bfloat16, logits, too": ("bfloat16", torch.nn.Linear.forward)}
    print(f"{len(questions)} questions in {' '.join(config.langs)}")
    for name, (dtype, dco.float32_logits) in ways.items():
        settings, times = dataclasses.replace(config, dtype=dtype), []
        for _ in range(arguments.repeat):
            begun, scores = now(), train.score(model, trees, settings, True)
            times.append(now() - begun)
        exact = scores if exact is None else exact
        there = exact.isfinite()
        apart = (scores - exact)[there].abs()
        unlike = [row[row.isfinite()] for row in scores.flatten(0, 1)]
        ties = sum(len(row.unique()) < len(row) for row in unlike)
        tops = (scores.argmax(-1) != exact.argmax(-1)).double().mean()
        clc = 100 * rankc.clc(scores)[0, 1:].mean()
        right = ", ".join(f"{100 * x:.1f}" for x in rankc.accuracy(scores, gold))
        print(
            f"{name:28} {spread(times)}; off by {apart.max():.2f} nats at most, {apart.mean():.3f} "
            f"in the mean; {tops:.1%} of the top answers differ; {ties} of {len(unlike)} tie; "
            f"CLC {clc:.1f}, accuracy {right}"
        )


def largest(arguments, shape: str) -> None:
    """Twice the tokens at once, in a new process each time, until a step does not fit."""
    fits, shortest = True, min(SHAPES[shape][0])
    while fits:
        tokens = arguments.max_tokens
        arguments.batch_questions = 1 + 2 * tokens // shortest // len(arguments.langs)  # to spare
        fits = begin(training, arguments, shape).recv()
        told = f"fit in {fits[1] / 2**30:.1f} GiB" if fits else "do not fit"
        print(f"{shape}: {tokens} tokens at once {told}")
        arguments.max_tokens *= 2
        for process in multiprocessing.active_children():
            process.join()  # with it goes its memory


def scale_measures() -> None:
    """Seconds and memory of every measure, on one thread."""
    torch.set_num_threads(1)
    print("every measure of rankc.measure, 10 candidates, one thread")
    empty = room("VmRSS")
    for L, Q in ((4, 100_000), (8, 100_000), (17, 25_000), (17, 50_000), (17, 100_000)):
        scores, langs = torch.randn(Q, L, 10), [str(n) for n in range(L)]
        spent = seconds(lambda: rankc.measure(scores, scores, [0] * Q, langs))
        some = random.Random(0).sample(range(Q), 40)
        a, b = scores[some][:, [0, -1]].unbind(1)  # (40, K) each
        by_sets = map(consist, *(x.argsort(descending=True).tolist() for x in (a, b)))
        wrong = (rankc.rankc(a, b) - torch.tensor([*by_sets], dtype=torch.double)).abs().max()
        print(
            f"  {L:2} languages, {Q:6} questions: {spent:5.2f} s, {(room() - empty) / 2**30:.2f} "
            f"GiB at most so far; brute force on 40 questions of a pair within {wrong:.0e}"
        )


def load_split_sample(pipe, path: str, langs: list[str]) -> None:
    """Seconds of each, bytes at most after loading and after all."""
    empty, ends = room("VmRSS"), [now()]
    questions = data.load(f"jsonl:{path}", langs)
    ends.append(now())
    n, loaded = len(questions), room() - empty
    chosen, _ = data.split(questions, 8 * n // 10, n // 10, 0)
    ends.append(now())
    assert all(len(data.sample(question, 2, 0, 0)) == 2 for question in chosen)
    ends.append(now())
    pipe.send([*(end - begun for begun, end in pairwise(ends)), loaded, room() - empty])


def scale_data(number: int = 1_000_000) -> None:
    """Seconds and memory of loading, splitting and sampling a JSON Lines file."""
    rng, words = random.Random(0), {}
    for lang, letters in {"en": "abcde", "es": "áéñab", "ru": "абвгд", "zh": "一二三四五"}.items():
        words[lang] = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(3000)]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        for n in range(number):
            some = rng.choices(range(3000), k=12)
            prompts = {lang: " ".join(each[c] for c in some[:8]) for lang, each in words.items()}
            answers = {lang: [f" {each[c]}" for c in some[8:]] for lang, each in words.items()}
            line = {"id": str(n), "subject": f"s{n % 50}", "gold": n % 4}
            line |= {"prompts": prompts, "answers": answers}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        size, pipe = file.tell() / 2**30, begin(load_split_sample, file.name, list(words))
        load, split, sample, loaded, most = pipe.recv()
    print(
        f"  {number} questions, 4 languages, 4 answers, {size:.2f} GiB of JSON: load {load:.1f} s, "
        f"split {split:.1f} s, sample {sample:.1f} s; {loaded / 2**30:.2f} GiB at most after "
        f"loading, {most / 2**30:.2f} after all, {loaded / number:.0f} bytes a question"
    )


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add, stages = parser.add_argument, ["reference", "step", "evaluation"]
    add("--model", default="", help="folder of a causal language model, dense and like Llama")
    add("--size", default="135M", choices=SIZES, help="else random weights of this size")
    add("--data", default="", help="real questions, as train.py takes them")
    add("--langs", nargs="+", default=["en", "es"])
    add("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    add("--stages", nargs="+", default=stages, choices=stages)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="of matrix products")
    add("--max-tokens", type=int, default=2048, help="at once")
    add("--questions", type=int, default=4, help="in a step", dest="batch_questions")
    add("--repeat", type=int, default=5, help="turns")
    add("--checkpointing", action="store_true", dest="gradient_checkpointing")
    for flag in ("only", "reuse", "processes", "scale", "memory", "precision", "largest"):
        add(f"--{flag}", action="store_true")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    if arguments.data and not arguments.model:
        parser.error("--data needs a --model that can read it")
    several = arguments.data or len(arguments.shapes) > 1
    if arguments.largest and (arguments.device != "cuda" or several):
        parser.error("--largest fills a GPU's memory with one of --shapes")
    if arguments.gradient_checkpointing and not (arguments.only or arguments.largest):
        parser.error("--checkpointing goes with --only: the plain way has none")
    sys.stdout.reconfigure(line_buffering=True)
    train.reuse_memory()  # the bare products are computed in this process
    if arguments.scale:
        scale_measures()
        return scale_data()
    if arguments.processes or arguments.memory:
        os.environ["OMP_NUM_THREADS"] = "1"
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    print(
        f"{arguments.model or arguments.size}, {arguments.dtype}, {name}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians (min - max)"
    )
    if arguments.precision:
        return precision(arguments)
    if arguments.memory:
        return memory(arguments, arguments.shapes[0])
    mode = largest if arguments.largest else processes if arguments.processes else compare
    for shape in ["data"] if arguments.data else arguments.shapes:
        mode(arguments, shape)


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        sys.exit("a process has ended early; above it says why, unless it was killed")
