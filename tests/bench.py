"""How fast, how frugal, how near the floor: `python tests/bench.py` (pytest does not collect it).

A random 135M Llama (SmolLM2's shape), or --size, or --model DIR, and the same tokens, in one run:
this program against the plain way, which pads a row for each prompt and answer, 16 at a time (8 of
mmmlu's), computes the logits of every token, and keeps the reference model in the step; --only
leaves it out. Each way runs in a process of its own, in turn with the other; medians (min - max).
Questions have the lengths of --shapes, or are real ones: --data, as train.py takes it. Stages:

    step        an optimizer step of 4 questions, 2 languages and 2 answers, by train.train
    evaluation  log-probs of all answers, by train.score; train.py's reference pass is the same

Utilisation: the time of the matrix products alone, of a model's layers and head for as many tokens,
each the best of five, by that of the whole stage.
--memory instead: what a step takes on GPUs, traced on fake tensors; the trace beside the real one.
"""

import argparse
import copy
import multiprocessing
import os
import random
import socket
import sys
import time
import weakref
from collections import Counter, namedtuple
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

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
import train

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
Shape = namedtuple("Shape", "layers d V products layer root")  # products: widths in and out


def shape_of(model) -> Shape:
    """What a model's cost depends on: layers, widths, a layer's matrices, and weights."""
    config = model.config.get_text_config()
    d, f, V = config.hidden_size, config.intermediate_size, config.vocab_size
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    kv = head * config.num_key_value_heads
    products = (d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)
    layer, root = sum(a * b for a, b in products), V * d * (1 if config.tie_word_embeddings else 2)
    return Shape(config.num_hidden_layers, d, V, products, layer, root)


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


def settings(arguments) -> train.Config:
    """train.py's, for at least as many steps as there are turns, without checkpoints."""
    names = "data langs device dtype max_tokens batch_questions gradient_checkpointing shard"
    given = {name: getattr(arguments, name) for name in names.split()}
    given |= {"model": arguments.model or arguments.size, "epochs": arguments.repeat + 1}
    return train.with_defaults(train.Config(**given, save_every=0, out=os.devnull))


def prepare(arguments, shape: str, config: train.Config):
    """A model as it is loaded, what train.train takes of questions, trees and scores, and gamma."""
    torch.manual_seed(0)
    if arguments.model:
        model, tokenizer = train.load_model(config)
    else:
        model = random_model(arguments.size, config.device)
    if arguments.data:
        questions = data.split(data.load(config.data, config.langs), None, 0, 0)[0][:64]
        trees = data.encode(tokenizer, questions, config.langs)
    else:
        rng, V, (prompt, answer, K) = random.Random(0), shape_of(model).V, SHAPES[shape]
        ids = lambda lengths: [rng.randrange(V) for _ in range(rng.choice(lengths))]  # noqa: E731
        prompts = ([ids(prompt) for _ in config.langs] for _ in range(64))
        trees = [[data.Tree(p, [ids(answer) for _ in range(K)]) for p in row] for row in prompts]
        questions = [data.Question(str(n), "", 0, {}, {"": ("",) * K}) for n in range(64)]
    K = max(question.K for question in questions)
    ref_logps = torch.randn(len(questions), len(config.langs), K)
    return model, (questions, trees, ref_logps, train.gamma_matrix(config), config)


def begin(work, *given, world: int = 1):
    """Run work(pipe, *given) in so many new processes; the other end of the pipe.

    One that fails says why on stderr; recv() then raises EOFError at this end.
    """
    spawn = multiprocessing.get_context("spawn")  # they share nothing of this process's memory
    ours, theirs = spawn.Pipe()
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ.update(PYTHONWARNINGS="ignore", MASTER_ADDR="localhost", MASTER_PORT=port)
    for rank in map(str, range(world)):  # as torchrun tells it to train.init_distributed
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world))
        spawn.Process(target=quietly, args=(work, theirs, *given), daemon=True).start()
    theirs.close()
    return ours


def quietly(work, *given) -> None:
    train.progress = lambda steps, *_: train.tqdm(steps, disable=True)
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


def room(name: str = "VmHWM") -> int:
    """Bytes this process has had at most, on a GPU if it uses one, or has in memory (VmRSS)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def note_groups() -> list[list[data.Tree]]:
    """The trees of each micro-batch from now on."""
    groups, score = [], dco.completion_logps
    dco.completion_logps = lambda model, trees: groups.append(trees) or score(model, trees)
    return groups


def plain(model, trees: list[data.Tree], rows: int, config: train.Config) -> torch.Tensor:
    """A padded row for each prompt and answer, all logits, as is commonly done: (answers,)."""
    texts, scores = [(tree, tree.prefix + branch) for tree in trees for branch in tree.branches], []
    for first in range(0, len(texts), rows):
        columns = []  # of each row: its tokens, ones, and ones where it is the answer
        for tree, text in texts[first : first + rows]:
            answer = torch.arange(len(text)) >= len(tree.prefix) + tree.prompt_len
            columns.append(torch.stack([torch.tensor(text), torch.ones_like(answer), answer], -1))
        ids, mask, answer = pad_sequence(columns, batch_first=True).to(model.device).unbind(-1)
        with train.autocast(config):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scores.append((logps * answer[:, 1:]).sum(-1))
    return torch.cat(scores)


def plain_steps(model, rows: int, questions, trees, ref_logps, gamma, config: train.Config):
    """What train.train does, with the reference model in the step."""
    reference, table = copy.deepcopy(model).requires_grad_(False), (-1, len(config.langs), 2)
    weights, some = list(model.parameters()), max(1, rows // 2 // len(config.langs))
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0, fused=True)
    for step in train.training_order(len(questions), config):
        for first in range(0, len(step), some):  # so many questions at once
            flat = []
            for q, n in step[first : first + some]:
                drawn = questions[q], trees[q], ref_logps[q], n, config
                flat += train.make_example(*drawn).trees
            with torch.no_grad():
                ref = plain(reference, flat, rows, config).view(table)  # (B, L, K)
            logps = plain(model, flat, rows, config).view(table)
            losses = dco.dco_loss(logps, ref, dco.align_reward(ref, gamma), config.beta)
            (losses.sum() / len(step)).backward()
        torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        yield


def one_way(pipe, arguments, shape: str, stage: str, way: str) -> None:
    """A process of `compare`: one way through one stage, a turn for each message."""
    train.init_distributed(config := settings(arguments))
    model, (questions, trees, *more) = prepare(arguments, shape, config)
    rows, judged = (8, trees[:4]) if shape == "mmmlu" else (16, trees[:16])
    pipe.send(shape_of(model))
    groups, fed = note_groups(), []
    note = lambda _, __, given: fed.append(given["input_ids"].numel())  # noqa: E731
    model.register_forward_pre_hook(note, with_kwargs=True)  # of its copy, the reference, too
    if way == "plain":
        model.eval().to(config.device, torch.float32)
        steps = plain_steps(model, rows, questions, trees, *more)
    else:
        train.place(model, config)
        steps = train.train(model, questions, trees, *more)
    for _ in iter(pipe.recv, None):
        groups.clear(), fed.clear()
        begun, scores = now(), None
        if stage == "step":
            next(steps)
        elif way == "plain":
            with torch.no_grad():
                scores = plain(model, sum(judged, []), rows, config).cpu()
        else:
            scores = train.score(model, questions, judged, config)
            scores = scores[scores.isfinite()]
        turn = {"seconds": now() - begun, "fed": sum(fed), "groups": groups, "scores": scores}
        pipe.send({**turn, "peak": room()})


def compare(arguments, shape: str) -> None:
    """Every stage of one shape: both ways in turn, and how far this program is from the floor."""
    for stage in arguments.stages:
        ways = ("packed",) if arguments.only else ("packed", "plain")
        pipes = {way: begin(one_way, arguments, shape, stage, way) for way in ways}
        size, *_ = [pipe.recv() for pipe in pipes.values()]
        turns = {way: [] for way in ways}
        for _ in range(arguments.repeat + 1):
            for way, pipe in pipes.items():
                pipe.send("your turn")
                turns[way].append(pipe.recv())
        for way, pipe in pipes.items():
            pipe.send(None)
            del turns[way][0]  # which warms up
        for process in multiprocessing.active_children():
            process.join()  # what follows is timed, too
        show(arguments, f"{shape}, {stage}", size, turns)


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


def show(arguments, title: str, size: Shape, turns: dict[str, list[dict]]) -> None:
    """Print what the turns of each way took."""
    mine, theirs = turns["packed"], turns.get("plain")
    answers = sum(len(tree.branches) for group in mine[0]["groups"] for tree in group)
    print(f"\n{title}: {answers} answers")
    for way, some in turns.items():
        times, fed = [turn["seconds"] for turn in some], median(turn["fed"] for turn in some)
        spread = f"{median(times):7.3f} s ({min(times):.3f} - {max(times):.3f})"
        print(f"  {way:8} {spread}  {fed:6.0f} tokens  {some[-1]['peak'] / 2**30:5.2f} GiB")
    ours, trained = median(turn["seconds"] for turn in mine), mine[0]["scores"] is None
    if theirs:
        faster = median(turn["seconds"] for turn in theirs) / ours
        memory = mine[-1]["peak"] / theirs[-1]["peak"]
        print(f"  ratio    {faster:.2f}x faster, {memory:.2f} of the memory")
    if theirs and not trained:
        apart = (mine[0]["scores"] - theirs[0]["scores"]).abs().max()
        print(f"  scores   within {apart:.0e} nats of each other")
    floors, work, passes = [], [], 3 if trained else 1  # a backward pass is two forward ones
    for turn in mine if trained else mine[:1]:  # what is judged is the same in every turn
        given = arguments.device, getattr(torch, arguments.dtype), trained
        floors.append(sum(bare(size, group, *given) for group in turn["groups"]))
        work.append(passes * sum(flops(size, group) for group in turn["groups"]) / 1e9)
    print(f"  flops    {median(work):.1f} G at {median(work) / ours:.0f} GFLOP/s", end="; ")
    print(f"products alone {median(floors):.3f} s: utilisation {median(floors) / ours:.0%}")


def training(pipe, arguments, shape: str) -> None:
    """Bytes that steps by train.train take at most, and their largest micro-batch."""
    train.reuse_memory = lambda: None  # what is freed is to be seen as such
    train.init_distributed(config := settings(arguments))
    model, given = prepare(arguments, shape, config)
    weights, before, groups = sum(w.numel() for w in model.parameters()), 0, note_groups()
    train.place(model, config)
    if config.device == "cpu":  # what there is beside the weights; then VmHWM begins anew
        before = room("VmRSS") - 4 * weights // (dist.get_world_size() if config.shard else 1)
        Path("/proc/self/clear_refs").write_text("5")
    steps = train.train(model, *given)
    next(steps), next(steps)
    largest = max(groups, key=lambda trees: sum(tree.tokens() for tree in trees))
    if dist.get_rank() == 0:
        pipe.send((room() - before, largest))


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive under it: now, and at most."""

    def __init__(self):
        super().__init__()
        self.storages, self.operations, self.most = weakref.WeakKeyDictionary(), 0, 0

    def now(self) -> int:
        return sum(storage.nbytes() for storage in list(self.storages))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, FakeTensor):
                self.storages[tensor.untyped_storage()] = None
        self.operations += 1
        if self.operations % 4 == 0:
            self.most = max(self.most, self.now())
        return out


def trace(size: str, world: int, config: train.Config, trees: list) -> tuple[int, int, int]:
    """Bytes of one of so many processes: weights and moments; with them the peak of a micro-batch's
    forward pass, and of its backward pass and the update.

    The real model, sharding, compute precision and checkpointing, on tensors without contents.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = train.init_device_mesh("cpu", (world,))
    row, (column, target, slot) = dco.pack(trees)
    columns = column.unique(return_inverse=True)  # how many depends on contents: found outside
    packed = row, (SimpleNamespace(unique=lambda return_inverse: columns), target, slot)
    local = lambda x: getattr(x, "_local_tensor", x).untyped_storage()  # noqa: E731
    with (
        patch.object(train, "init_device_mesh", lambda *_: mesh),
        patch.object(dco, "pack", lambda _: packed),
        patch.object(torch.nn.Module, "_apply", lambda module, *_: module),  # fake tensors stay
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        with no_init_weights():
            model = random_model(size, "cpu")
        model.tie_weights()  # which goes without, too
        train.place(model, config)
        model.get_input_embeddings().sparse = False  # fake tensors know none: a gradient too many
        with (live := Live()):
            for weight in model.parameters():
                live.storages[local(weight)] = None
                if weight.requires_grad:
                    weight.moments = torch.zeros_like(weight), torch.zeros_like(weight)
                    live.storages |= {local(moment): None for moment in weight.moments}
            states, live.most = live.now(), 0
            with train.autocast(config):
                logps = dco.completion_logps(model, trees)
            forward, live.most = live.most, 0
            # not Eq. 11, which looks at its rows; a loss of so few numbers takes no room
            dco.dpo_loss(logps, torch.zeros_like(logps), config.beta).sum().backward()
            backward = max(live.most, live.now())
    dist.destroy_process_group()
    return states, forward, backward


def memory(arguments, shape: str) -> None:
    """One process and two, traced and measured; then the paper's models on GPUs, traced."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back
    arguments.gradient_checkpointing, arguments.batch_questions, arguments.repeat = True, 12, 1
    for world, way in ((1, "replicate"), (2, "replicate"), (2, "shard")):
        arguments.shard = way == "shard"
        used, trees = begin(training, arguments, shape, world=world).recv()
        *_, traced = trace(arguments.size, world, settings(arguments), trees)
        tokens = sum(tree.tokens() for tree in trees)
        print(f"{arguments.size}, {shape}, {way} over {world}, {tokens} tokens at once:", end=" ")
        print(f"{used / 2**30:.2f} GiB a process, {traced / used:.2f} of it traced")
    trees = [data.Tree(list(range(1, 58)), [[5, 6, 7], [8, 9, 10, 11]]) for _ in range(32)]
    print("\nGB of each GPU, --gradient_checkpointing, bfloat16, 2,048 tokens at once; states, and")
    print("with them the peak of forward, of backward; what it fits, with a tenth left free\n")
    print("| | GPUs | states | forward | backward | fits |\n| --- | --- | --- | --- | --- | --- |")
    for size in ("3B", "4B", "7B", "8B", "12B", "14B"):
        for world in (1, 2, 4, 8):
            arguments.shard, arguments.device, arguments.dtype = world > 1, "cpu", "bfloat16"
            sizes = trace(size, world, settings(arguments), trees)
            fits = [f"{GB} GB" for GB in (24, 40, 80) if max(sizes) < 0.9e9 * GB]
            columns = [f"{world} --shard" if world > 1 else "1"]
            columns += [*(f"{x / 1e9:.1f}" for x in sizes), fits[0] if fits else "none"]
            print(f"| {SIZES[size][0]} {size} | {' | '.join(columns)} |")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add, stages = parser.add_argument, ["step", "evaluation"]
    add("--model", default="", help="folder of a causal language model, dense and like Llama")
    add("--size", default="135M", choices=SIZES, help="else random weights of this size")
    add("--data", default="", help="real questions, as train.py takes them")
    add("--langs", nargs="+", default=["en", "es"])
    add("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    add("--stages", nargs="+", default=stages, choices=stages)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="of matrix products")
    add("--max-tokens", type=int, help="at once, as train.py has it")
    add("--questions", type=int, default=4, help="in a step", dest="batch_questions")
    add("--repeat", type=int, default=5, help="turns")
    add("--only", action="store_true", help="leave the plain way out")
    add("--memory", action="store_true", help="trace what a step takes, instead")
    parser.set_defaults(shard=False, gradient_checkpointing=False)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    if arguments.data and not arguments.model:
        parser.error("--data needs a --model that can read it")
    sys.stdout.reconfigure(line_buffering=True)
    train.reuse_memory()  # the bare products are computed in this process
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    print(f"{arguments.model or arguments.size}, {arguments.dtype}, {name}", end=", ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians (min - max)")
    if arguments.memory:
        return memory(arguments, arguments.shapes[0])
    for shape in ["data"] if arguments.data else arguments.shapes:
        compare(arguments, shape)


if __name__ == "__main__":
    main()
