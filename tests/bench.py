"""How fast, how frugal, how near the floor: `python tests/bench.py` (pytest does not collect it).

A random 135M Llama (SmolLM2's shape), or --size, or --model DIR, and the same questions, in one
run: this program against the plain way, which pads a row for each prompt and answer, 16 at a time
(8 of mmmlu's), computes the logits of every token, and keeps the reference model in the step. Each
way runs in a process of its own, in turn with the other; medians (min - max). On CPUs this program
has glibc keep freed memory (rankc.reuse_memory); with --reuse the plain way has it too.

    bmlama      lengths as BMLAMA's in English and Spanish: 4 to 17 tokens, ten answers of 1 to 10
    mmmlu       prompts of 250 to 350 tokens, four letters
    xcsqa       prompts of 50 to 80 tokens, five letters
    --data      or real questions, with --model

    reference   log-probs of two answers to each question, as a peer needs them before it trains
    step        an optimizer step of 4 questions, 2 languages and 2 answers, by train.optimise
    evaluation  log-probs of all answers, by rankc.score; train.py's own reference pass is this one

Tokens are counted against the fewest: each prompt once a language, each answer less its last token.
Utilisation: the time of the matrix products alone, of a model's layers and head for as many tokens,
each the best of five, by that of forward (and backward).

    --processes step with 2 processes of one thread against one process of one thread
    --scale     the measures for 17 languages and 100,000 questions; a million questions to load
    --memory    what a process needs in training, beside the formula of `need`; GPUs by formula
    --largest   the most tokens at once that fit
"""

import argparse
import copy
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import dco
import rankc
import train

JUDGED = {"bmlama": 16, "mmmlu": 4, "xcsqa": 16}  # questions in a turn of reference, evaluation
STAGES = ("reference", "step", "evaluation")


class Shape(NamedTuple):
    """What a model's cost depends on."""

    layers: int
    d: int  # width
    f: int  # feed-forward width
    kv: int  # width of keys, and of values
    head: int  # width of an attention head
    V: int  # vocabulary
    tied: bool  # whether the embeddings are the head

    @property
    def products(self) -> list[tuple[int, int]]:
        """Widths in and out of a layer's matrices."""
        d, f, kv = self.d, self.f, self.kv
        return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]

    @property
    def layer(self) -> int:
        return sum(a * b for a, b in self.products)

    @property
    def root(self) -> int:
        return self.V * self.d * (1 if self.tied else 2)


SIZES = {
    "135M": Shape(30, 576, 1536, 192, 64, 49152, True),  # SmolLM2
    "1.5B": Shape(28, 1536, 8960, 256, 128, 151936, True),  # this and the others: Qwen2.5
    "3B": Shape(36, 2048, 11008, 256, 128, 151936, True),
    "7B": Shape(28, 3584, 18944, 512, 128, 152064, False),
    "14B": Shape(48, 5120, 13824, 1024, 128, 152064, False),
}


# ------------------------------------------------------------------------------- what is worked on


def make(arguments):
    """A model, and its tokenizer; random weights where no --model is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    if arguments.model:
        settings = rankc.EvalConfig(model=arguments.model, dtype=arguments.dtype)
        return rankc.load_model(settings, torch.device(arguments.device))
    torch.manual_seed(0)
    shape = SIZES[arguments.size]
    config = AutoConfig.for_model(
        "llama" if arguments.size == "135M" else "qwen2",
        vocab_size=shape.V,
        hidden_size=shape.d,
        intermediate_size=shape.f,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.d // shape.head,
        num_key_value_heads=shape.kv // shape.head,
        tie_word_embeddings=shape.tied,
    )
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(shape.V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=words)


def shape_of(model) -> Shape:
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        head * config.num_key_value_heads,
        head,
        config.vocab_size,
        config.tie_word_embeddings,
    )


def some_questions(arguments, shape: str, number: int, V: int) -> list[data.Question]:
    """Of --data, or words drawn at random in the lengths of a data set."""
    if arguments.data:
        with redirect_stdout(sys.stderr):
            questions = data.load(arguments.data, arguments.langs)
        return data.split(questions, number, 0, 0)[0]
    rng = random.Random(0)
    words = lambda lengths: " ".join(f"w{rng.randrange(V)}" for _ in range(rng.choice(lengths)))  # noqa: E731
    prompt, answer, K = {  # bmlama: its deciles under SmolLM2's tokenizer
        "bmlama": ([4, 5, 6, 7, 7, 8, 10, 11, 13, 17], [1, 1, 1, 1, 2, 2, 3, 4, 6, 10], 10),
        "mmmlu": (range(250, 350), [1], 4),
        "xcsqa": (range(50, 80), [1], 5),
    }[shape]
    return [
        data.Question(
            str(n),
            "",
            0,
            {lang: words(prompt) for lang in arguments.langs},
            {lang: tuple(" " + words(answer) for _ in range(K)) for lang in arguments.langs},
        )
        for n in range(number)
    ]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work) -> float:
    synchronize()
    begun = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begun


# ------------------------------------------------------------------------------------ the plain way


def plain(model, trees: list[data.Tree], rows: int) -> torch.Tensor:
    """A padded row for each prompt and answer, all logits, as is commonly done: (answers,)."""
    texts = [
        (tree.prefix + branch[: tree.lead], branch[tree.lead :])
        for tree in trees
        for branch in tree.branches
    ]
    scores = []
    for first in range(0, len(texts), rows):
        some = texts[first : first + rows]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(prompt + answer) for prompt, answer in some], batch_first=True
        ).to(model.device)
        start, end = torch.tensor([[len(p), len(p) + len(a)] for p, a in some]).to(ids).T[..., None]
        column = torch.arange(ids.shape[1], device=model.device)
        logits = model(input_ids=ids, attention_mask=(column < end).long(), use_cache=False).logits[
            :, :-1
        ]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scores.append((logps * ((column[1:] >= start) & (column[1:] < end))).sum(-1))
    return torch.cat(scores)


# ------------------------------------------------------------------------------------ the floor


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


def bare(shape: Shape, tokens: int, scored: int, device: str, dtype, backward: bool) -> float:
    """Seconds of a model's matrix products for so many tokens at once, the best of five each."""
    total = 0.0
    sizes = Counter((a, b, tokens) for a, b in shape.products * shape.layers)
    for (a, b, T), times in [*sizes.items(), ((shape.d, shape.V, scored), 1)]:
        x, w, g = (torch.randn(n, device=device, dtype=dtype) for n in ((T, a), (b, a), (T, b)))
        for product in [lambda: x @ w.T, *([lambda: g @ w, lambda: g.T @ x] * backward)]:
            product()
            total += times * min(seconds(product) for _ in range(5))
    return total


# ------------------------------------------------------------------------------------ side by side


class Bench:
    """A model, and questions of one shape: what a process of its own does of one way and stage."""

    def __init__(self, arguments, shape: str):
        self.device = torch.device(arguments.device)
        self.model, tokenizer = make(arguments)
        self.size, self.judged = shape_of(self.model), JUDGED.get(shape, 16)
        self.rows = 8 if shape == "mmmlu" else 16
        self.config = train.Config(
            langs=arguments.langs,
            max_tokens=arguments.max_tokens,
            dtype=arguments.dtype,
            gradient_checkpointing=arguments.checkpointing,
            batch_questions=arguments.questions,
            epochs=10**6,
            save_every=0,
        )
        number = max(self.judged, arguments.questions * (arguments.repeat + 1))
        self.questions = some_questions(arguments, shape, number, self.size.V)
        self.trees = data.encode(tokenizer, self.questions, arguments.langs)
        some = self.questions[: arguments.questions]
        self.encoding = seconds(lambda: data.encode(tokenizer, some, arguments.langs))
        self.spent, self.fed = Counter(), 0
        if not dco.packs_exactly(self.model, [row[0] for row in self.trees[:2]]):
            sys.exit("this model does not score packed questions as it scores separate ones")

    def count(self, model) -> None:
        """Count the tokens that a model is fed."""

        def add(_, __, kwargs):
            self.fed += kwargs["input_ids"].numel()

        model.register_forward_pre_hook(add, with_kwargs=True)

    def items(self):
        """The items of each step, without end, as train.py draws them."""
        K = max(question.K for question in self.questions)
        ref = torch.randn(len(self.config.langs), len(self.questions), K)
        gamma = rankc.gamma_matrix(self.config, lambda *_: None)
        return train.draw(self.questions, self.trees, ref, gamma, self.config)

    def time_parts(self) -> None:
        """Have the parts of a packed step timed."""

        def timed(owner, name, part):
            work = getattr(owner, name)

            def wrapped(*args, **kwargs):
                result = []
                self.spent[part] += seconds(lambda: result.append(work(*args, **kwargs)))
                return result[0]

            setattr(owner, name, wrapped)

        timed(train, "completion_logps", "forward")
        timed(torch.Tensor, "backward", "backward")
        timed(torch.nn.utils, "clip_grad_norm_", "optimizer")
        timed(torch.optim.AdamW, "step", "optimizer")

    def packed_steps(self, turns) -> None:
        """A step by train.optimise whenever `turns` yields; it is sent the trees and the time."""
        drawn = self.items()

        def steps():
            for report in turns:
                self.spent.clear()
                synchronize()
                begun, items = time.perf_counter(), next(drawn)
                yield items
                synchronize()
                spent = time.perf_counter() - begun
                report([tree for item in items for tree in item.trees], spent)

        train.optimise(self.model, steps(), 10**6, self.config, True, lambda line: None)

    def plain_steps(self, turns) -> None:
        """The same items with the reference model in the step."""
        reference, drawn = copy.deepcopy(self.model).requires_grad_(False), self.items()
        self.count(reference)
        self.count(self.model)
        weights, config = list(self.model.parameters()), self.config
        optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0, fused=True)
        gamma = rankc.gamma_matrix(config, lambda *_: None)

        def step(items):
            each = max(1, self.rows // 2 // len(config.langs))  # questions at once
            for first in range(0, len(items), each):
                some = items[first : first + each]
                trees = [tree for item in some for tree in item.trees]
                with rankc.autocast(config, self.device):
                    with torch.no_grad():
                        ref = plain(reference, trees, self.rows).view(len(some), -1, 2)
                    logps = plain(self.model, trees, self.rows).view(len(some), -1, 2)
                r_align = dco.align_reward(ref, gamma.to(ref))
                loss = dco.dco_loss(logps, ref, r_align, config.beta).sum() / len(items)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        for report in turns:
            items = next(drawn)
            spent = seconds(lambda: step(items))
            report([tree for item in items for tree in item.trees], spent)

    def judge(self, way: str, stage: str, turns) -> None:
        """The same questions again and again."""
        trees = [
            [tree._replace(branches=tree.branches[: 2 if stage == "reference" else None])
             for tree in row]
            for row in self.trees[: self.judged]
        ]  # fmt: skip
        flat = [tree for row in trees for tree in row]
        self.model.eval()
        for report in turns:
            begun = time.perf_counter()
            if way == "packed":
                scores = rankc.score(self.model, trees, self.config, "", True).transpose(0, 1)
                scores = scores[scores.isfinite()]
            else:
                with torch.no_grad(), rankc.autocast(self.config, self.device):
                    scores = plain(self.model, flat, self.rows).cpu()
            report(flat, time.perf_counter() - begun, scores.tolist())

    def work(self, way: str, stage: str, reply) -> None:
        """A turn for each line of standard input, and a reply to each."""

        def turns():
            for _ in sys.stdin:
                self.fed = 0
                yield report

        def report(trees, spent, scores=()):
            groups = [
                [trees[i] for i in group] for group in data.batches(trees, self.config.max_tokens)
            ]
            cuda = self.device.type == "cuda"
            reply({
                "seconds": spent, "fed": self.fed, "scores": scores, "parts": self.spent,
                "fewest": sum(tree.tokens() for tree in trees),
                "answers": sum(len(tree.branches) for tree in trees),
                "groups": [[sum(t.tokens() for t in g), sum(map(positions, g))] for g in groups],
                "flops": flops(self.size, trees), "encoding": self.encoding, "size": self.size,
                "peak": torch.cuda.max_memory_allocated() if cuda else resident("VmHWM"),
            })  # fmt: skip

        if stage != "step":
            self.count(self.model)
            self.judge(way, stage, turns())
        elif way == "plain":
            self.plain_steps(turns())
        else:
            self.count(self.model)
            self.time_parts()
            self.packed_steps(turns())


def work(arguments, shape: str, stage: str, way: str) -> None:
    """A worker of `compare`: one way through one stage."""
    if way == "packed":
        rankc.start(arguments.device)
    elif arguments.reuse:
        rankc.reuse_memory()
    pipe = sys.stdout
    reply = lambda found: print(json.dumps(found), file=pipe, flush=True)  # noqa: E731
    quietly(lambda: Bench(arguments, shape).work(way, stage, reply))


def quietly(work):
    with open(os.devnull, "w") as null, redirect_stdout(null):
        return work()


def compare(arguments, shape: str) -> None:
    """Every stage of one shape: both ways in turn, and how far this program is from the floor."""
    ways = ["packed"] if arguments.only else ["packed", "plain"]
    for stage in arguments.stages:
        errors = tempfile.TemporaryFile("w+")
        workers = {
            way: subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--work", shape, stage, way],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            for way in ways
        }  # fmt: skip
        found = {way: [] for way in ways}
        for _ in range(arguments.repeat + 1):
            for way, worker in workers.items():
                print(file=worker.stdin, flush=True)
                if not (line := worker.stdout.readline()):
                    errors.seek(0)
                    sys.exit(f"{shape}, {stage}: the {way} way has ended\n{errors.read()}")
                found[way].append(json.loads(line))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
        show(arguments, shape, stage, {way: turns[1:] for way, turns in found.items()})


def show(arguments, shape: str, stage: str, found: dict[str, list[dict]]) -> None:
    """Print what the turns of each way have shown."""
    step, mine, middle = stage == "step", found["packed"], {}
    apart = ""
    if not step and len(found) > 1:
        scores = [torch.tensor(turns[0]["scores"]) for turns in found.values()]
        apart = f", scores within {(scores[0] - scores[1]).abs().max():.0e} nats"
    answers = mine[0]["answers"]
    print(f"\n{shape}, {stage}: {answers} answers{apart}")
    for way, turns in found.items():
        times = [turn["seconds"] for turn in turns]
        middle[way], peak = statistics.median(times), turns[-1]["peak"] / 2**30
        print(
            f"  {way:8} {middle[way]:7.3f} s ({min(times):.3f} - {max(times):.3f})  "
            f"{(1 if step else answers) / middle[way]:7.2f} {'steps' if step else 'answers'}/s  "
            f"{statistics.mean(turn['fed'] for turn in turns):6.0f} tokens  {peak:5.2f} GiB"
        )
    fed, fewest = (sum(turn[name] for turn in mine) for name in ("fed", "fewest"))
    ratio = f"{fed / fewest - 1:+.1%} tokens over the fewest"
    if len(found) > 1:
        memory = mine[-1]["peak"] / found["plain"][-1]["peak"]
        ratio = (
            f"{middle['plain'] / middle['packed']:.2f}x faster, {ratio}, {memory:.2f} of the memory"
        )
    print(f"  ratio    {ratio}")
    whole = computing = middle["packed"]
    if step:
        parts = {
            part: statistics.median(turn["parts"][part] for turn in mine)
            for part in ("forward", "backward", "optimizer")
        }
        computing = parts["forward"] + parts["backward"]
        parts["everything else"] = whole - computing - parts["optimizer"]
        shares = [f"{part} {t:.3f} s ({t / whole:.1%})" for part, t in parts.items()]
        shares.append(f"tokenising, before the first step, {mine[0]['encoding']:.3f} s")
        print(f"  parts    {', '.join(shares)}")
    on_gpu, size = arguments.device == "cuda", Shape(*mine[0]["size"])
    computed = torch.bfloat16 if on_gpu else getattr(torch, arguments.dtype)
    floor = statistics.mean(
        sum(bare(size, *group, arguments.device, computed, step) for group in turn["groups"])
        for turn in (mine if step else mine[:1])
    )
    work = (3 if step else 1) * statistics.mean(turn["flops"] for turn in mine)
    print(
        f"  flops    {work / 1e9:.1f} G at {work / computing / 1e9:.0f} GFLOP/s; products alone "
        f"{floor:.3f} of {computing:.3f} s: utilisation {floor / computing:.0%}",
        flush=True,
    )


def resident(name: str) -> int:
    """Bytes that this process has in memory, or has had at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


# ------------------------------------------------------------------------------------ processes


def launch(processes: int, *more: str):
    """What the first of so many processes, of one thread each, prints last, as JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), __file__, *sys.argv[1:], *more]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    if "--memory-of" in more:
        one_thread["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def times_of(bench: Bench, number: int) -> list[float]:
    """Seconds of so many packed steps."""
    found = []
    report = lambda _, spent: found.append(spent)  # noqa: E731
    quietly(lambda: bench.packed_steps(repeat(report, number)))
    return found


def processes_of(arguments) -> None:
    """In each process: seconds of steps, of steps without the exchange, of the exchange alone."""
    bench, found = Bench(arguments, *arguments.shapes), []
    found.append(times_of(bench, arguments.repeat + 1)[1:])
    train.replicate = lambda model, *_: model  # each process for itself
    found.append(times_of(bench, arguments.repeat + 1)[1:])
    size = sum(weight.numel() for weight in bench.model.parameters())
    gradients = torch.zeros(size, device=bench.device)
    found.append([seconds(lambda: dist.all_reduce(gradients)) for _ in range(4)][1:])
    if dist.get_rank() == 0:
        print(json.dumps(found))


def processes(arguments, shape: str) -> None:
    """Rounds of one process and of two, in turn."""
    times = {"one process, one thread": [], "two, one thread each": [],
             "two, gradients not exchanged": [], "the exchange alone": []}  # fmt: skip
    for _ in range(3):
        one, two = (launch(n, "--processes-of", "--shapes", shape, "--repeat", "6") for n in (1, 2))
        for each, some in zip(times.values(), (one[0], *two), strict=True):
            each += some
    for name, each in times.items():
        middle = statistics.median(each)
        print(f"{shape}: {name:28} {middle:.3f} s ({min(each):.3f} - {max(each):.3f})")
    one, two, apart, exchange = map(statistics.median, times.values())
    print(
        f"{shape}: efficiency {one / 2 / two:.0%}, without the exchange {one / 2 / apart:.0%}; the "
        f"exchange costs {two - apart:.3f} s of the {exchange:.3f} s that it takes alone",
        flush=True,
    )


# ------------------------------------------------------------------------------------ scale


def brute_force(a: list[float], b: list[float]) -> float:
    """RankC of a question as App. I writes it."""
    N = len(a)
    first, second = (sorted(range(N), key=lambda k: (-s[k], k)) for s in (a, b))
    weights = [math.exp(N - j) for j in range(1, N + 1)]
    shared = [len(set(first[:j]) & set(second[:j])) / j for j in range(1, N + 1)]
    return sum(w * p for w, p in zip(weights, shared, strict=True)) / sum(weights)


def scale_measures() -> None:
    """Seconds and memory of every measure, on one thread."""
    torch.set_num_threads(1)
    print("every measure of rankc.measure, 10 candidates, one thread")
    empty = resident("VmRSS")
    for L, Q in ((4, 100_000), (8, 100_000), (17, 25_000), (17, 50_000), (17, 100_000)):
        scores, langs = torch.randn(L, Q, 10), [str(n) for n in range(L)]
        spent = seconds(lambda: rankc.measure(scores, scores, [0] * Q, langs))
        sample = random.Random(0).sample(range(Q), 20)
        wrong = max(
            abs(float(value) - brute_force(scores[a, q].tolist(), scores[b, q].tolist()))
            for a, b in ((0, 1), (L - 1, 2))
            for q, value in zip(sample, rankc.rankc(scores[a, sample], scores[b, sample]))
        )
        most = (resident("VmHWM") - empty) / 2**30
        print(
            f"  {L:2} languages, {Q:6} questions: {spent:5.2f} s, {most:.2f} GiB at most so far; "
            f"brute force on 20 questions of two pairs within {wrong:.0e}",
            flush=True,
        )


def scale_data(rows: int = 1_000_000) -> None:
    """Seconds and memory of loading, splitting and sampling a JSON Lines file."""
    rng, letters = (
        random.Random(0),
        {"en": "abcde", "es": "áéñab", "ru": "абвгд", "zh": "一二三四五"},
    )
    langs = list(letters)
    words = {
        lang: ["".join(rng.choices(letters[lang], k=rng.randint(3, 9))) for _ in range(3000)]
        for lang in langs
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "questions.jsonl")
        for number in (rows // 10, rows):
            with open(path, "w", encoding="utf-8") as file:
                for n in range(number):
                    chosen = [rng.randrange(3000) for _ in range(12)]
                    line = {"id": str(n), "subject": f"s{n % 50}", "gold": n % 4,
                            "prompts": {lang: " ".join(words[lang][c] for c in chosen[:8])
                                        for lang in langs},
                            "answers": {lang: [f" {words[lang][c]}" for c in chosen[8:]]
                                        for lang in langs}}  # fmt: skip
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            code = (
                "import sys, time, json; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, "
                "sys.argv[2]); import bench, data; t = time.time; empty = bench.resident('VmRSS')\n"
                "a = t(); qs = data.load('jsonl:' + sys.argv[3], ['en', 'es', 'ru', 'zh'])\n"
                "b = t(); loaded = bench.resident('VmHWM'); n = len(qs)\n"
                "train, test = data.split(qs, 8 * n // 10, n // 10, 0)\n"
                "c = t(); assert all(len(data.sample(q, 2, 0, 0)) == 2 for q in train)\n"
                "print(json.dumps([b - a, c - b, t() - c, loaded - empty, "
                "bench.resident('VmHWM') - empty]))"
            )
            here = Path(__file__).resolve().parent
            done = subprocess.run([sys.executable, "-c", code, str(here.parent), str(here), path],
                                  capture_output=True, text=True, check=True)  # fmt: skip
            load, split, sample, loaded, most = json.loads(done.stdout.splitlines()[-1])
            print(
                f"  {number:7} questions, 4 languages, 4 answers, {path.stat().st_size / 2**30:.2f}"
                f" GiB of JSON: load {load:.1f} s, split {split:.1f} s, sample {sample:.1f} s; "
                f"{loaded / 2**30:.2f} GiB at most after loading, {most / 2**30:.2f} after all, "
                f"{loaded / number:.0f} bytes a question",
                flush=True,
            )


# ------------------------------------------------------------------------------------ memory


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


def memory_of(arguments) -> None:
    """Measure one process of two: GiB at most after its model is there; printed by the first."""
    device, world, way = torch.device(arguments.device), dist.get_world_size(), arguments.memory_of
    model, tokenizer = make(arguments)
    if way == "shard":
        train.shard(model, device)
    policy = train.replicate(model, [], True) if way == "replicate" and world > 1 else model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    questions = some_questions(arguments, "bmlama", 4, shape_of(model).V)
    trees = [
        tree._replace(branches=tree.branches[:2])
        for row in data.encode(tokenizer, questions, arguments.langs)
        for tree in row
    ]
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
    if dist.get_rank() == 0:
        print(
            json.dumps([used / 2**30, sum(t.tokens() for t in trees), sum(map(positions, trees))])
        )


def memory(arguments) -> None:
    """Two processes measured; then GPUs by formula."""
    for processes, way in ((1, "replicate"), (2, "replicate"), (2, "shard")):
        used, tokens, scored = launch(processes, "--memory-of", way)
        formula = need(SIZES[arguments.size], processes, way == "shard", tokens, scored, 4) / 2**30
        print(
            f"{arguments.size}, {tokens} tokens a step, {way} over {processes}: at most {used:.2f} "
            f"GiB a process, by formula {formula:.2f}",
            flush=True,
        )
    print("\nGPUs by formula, --shard --gradient_checkpointing, 2048 tokens at once, all scored")
    for name in ("3B", "7B", "14B"):
        counts = []
        for size in (4, 2):
            for room in (40, 80):
                fits = [
                    n
                    for n in range(1, 65)
                    if need(SIZES[name], n, True, 2048, 2048, size) < 0.9e9 * room
                ]
                counts.append(f"{'float32' if size == 4 else 'bfloat16'} {room} GB: {fits[0]}")
        print(f"  Qwen2.5 {name:4} {'   '.join(counts)}")


def largest(arguments, shape: str) -> None:
    """Double the tokens at once until a step does not fit."""
    bench = Bench(arguments, shape)
    tokens, fits = arguments.max_tokens, 0
    while True:
        pairs = [tree._replace(branches=tree.branches[:2]) for row in bench.trees for tree in row]
        number = 1 + 2 * tokens * len(bench.trees) // sum(tree.tokens() for tree in pairs)
        bench.config = replace(bench.config, max_tokens=tokens, batch_questions=number)
        times = max(1, number // len(bench.trees) + 1)
        bench.questions, bench.trees = bench.questions * times, bench.trees * times
        torch.cuda.reset_peak_memory_stats()
        try:
            times_of(bench, 2)
        except torch.OutOfMemoryError:
            break
        fits, tokens = tokens, tokens * 2
        print(
            f"{shape}: {fits} tokens at once fit in "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
            flush=True,
        )
        torch.cuda.empty_cache()
    print(f"{shape}: at most {fits} tokens at once ({tokens} do not fit)", flush=True)


# ------------------------------------------------------------------------------------ command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="", help="folder of a causal language model, dense and like Llama")
    add("--size", default="135M", choices=SIZES, help="else random weights of this size")
    add("--data", default="", help="real questions, as train.py takes them")
    add("--langs", nargs="+", default=["en", "es"])
    add("--shapes", nargs="+", default=list(JUDGED), choices=JUDGED)
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    add("--only", action="store_true", help="without the plain way, which needs memory beside it")
    add("--reuse", action="store_true", help="the plain way keeps freed memory too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    add("--checkpointing", action="store_true", help="gradient checkpointing")
    add("--max-tokens", type=int, default=2048)
    add("--questions", type=int, default=4, help="in a step")
    add("--repeat", type=int, default=5)
    add("--processes", action="store_true")
    add("--scale", action="store_true")
    add("--memory", action="store_true")
    add("--largest", action="store_true")
    add("--work", nargs=3, help=argparse.SUPPRESS)
    add("--memory-of", help=argparse.SUPPRESS)
    add("--processes-of", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.largest and (arguments.device != "cuda" or len(arguments.shapes) > 1):
        parser.error("--largest fills a GPU's memory with one of --shapes")
    if arguments.checkpointing and not (arguments.only or arguments.largest):
        parser.error("--checkpointing goes with --only: the plain way has none")
    if arguments.work:
        return work(arguments, *arguments.work)
    if arguments.memory_of or arguments.processes_of:
        if arguments.memory_of:
            rankc.reuse_memory = lambda: None  # what is freed is to be seen as such
        rankc.start(arguments.device)
        part_of = memory_of if arguments.memory_of else processes_of
        part_of(arguments)
        dist.barrier()
        return dist.destroy_process_group()
    rankc.reuse_memory()
    if arguments.scale:
        scale_measures()
        return scale_data()
    if arguments.memory:
        return memory(arguments)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    print(
        f"{arguments.model or arguments.size}, {arguments.dtype}, {name}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians (min - max)",
        flush=True,
    )
    if arguments.largest:
        rankc.start(arguments.device)
    mode = largest if arguments.largest else processes if arguments.processes else compare
    for shape in ["data"] if arguments.data else arguments.shapes:
        mode(arguments, shape)
    if arguments.largest:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
