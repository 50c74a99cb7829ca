"""How fast, how frugal, how near the floor: `python tests/bench.py` (pytest does not collect it).

A random 135M Llama (SmolLM2's shape), or --size, or --model DIR, and the same questions, in one
run: this program against the plain way, which pads a row for each prompt and answer, 16 at a time,
computes the logits of every token, and keeps the reference model in the step. Repetitions are
interleaved; medians (min - max).

    bmlama      lengths as BMLAMA's in English and Spanish: 4 to 17 tokens, ten answers of 1 to 10
    mmmlu       prompts of 250 to 350 tokens, four letters
    xcsqa       prompts of 50 to 80 tokens, five letters
    --data      or real questions, with --model

    reference   log-probs of two answers to each question, as a peer needs them before it trains
    step        an optimizer step of 4 questions, 2 languages and 2 answers, by train.optimise
    evaluation  log-probs of all answers, by rankc.score; train.py's own reference pass is this one

Tokens are counted against the fewest: each prompt once a language, each answer less its last token.
"bare" are the matrix products alone of a model's layers and head, forward (and backward) at as many
tokens, on matrices that stay in the cache: what the machine can do at most.

    --processes step with 2 processes of one thread against one process of one thread
    --scale     the measures for 17 languages and 100,000 questions; a million questions to load
    --memory    what a process needs in training, beside the formula of `need`; GPUs by formula
    --largest   the most tokens at once that fit
"""

import argparse
import json
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
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import dco
import rankc
import train

SHAPES = {"bmlama": 16, "mmmlu": 4, "xcsqa": 16}  # and how many questions are judged
STAGES = ("reference", "step", "evaluation")
BATCH = 16  # rows that the plain way takes at once


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


def plain(model, trees: list[data.Tree]) -> torch.Tensor:
    """One padded row for each prompt and answer, all logits, as is commonly done: (answers,)."""
    texts = [(tree.prefix, branch) for tree in trees for branch in tree.branches]
    scores = []
    for first in range(0, len(texts), BATCH):
        some = texts[first : first + BATCH]
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


class PlainStep:
    """An optimizer step of the same items with the reference model in it."""

    def __init__(self, model, config):
        import copy

        self.model, self.config = model, config
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=0.0, fused=True
        )

    def __call__(self, items: list[train.Item]) -> None:
        trees = [tree for item in items for tree in item.trees]
        with rankc.autocast(self.config, self.model.device):
            with torch.no_grad():
                ref = plain(self.reference, trees).view(len(items), -1, 2)
            logps = plain(self.model, trees).view(len(items), -1, 2)
        gamma = rankc.gamma_matrix(self.config, lambda *_: None).to(ref)
        r_align = dco.align_reward(ref, gamma)
        loss = dco.dco_loss(logps, ref, r_align, self.config.beta).sum() / len(items)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


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


def bare(shape: Shape, trees: list[data.Tree], device: str, dtype, backward: bool) -> float:
    """Seconds of a model's matrix products for so many tokens at once, the best of five each."""
    tokens, scored, total = sum(t.tokens() for t in trees), sum(map(positions, trees)), 0.0
    sizes = Counter((a, b, tokens) for a, b in shape.products * shape.layers)
    for (a, b, T), times in [*sizes.items(), ((shape.d, shape.V, scored), 1)]:
        x, w, g = (torch.randn(n, device=device, dtype=dtype) for n in ((T, a), (b, a), (T, b)))
        for product in [lambda: x @ w.T, *([lambda: g @ w, lambda: g.T @ x] * backward)]:
            product()
            total += times * min(seconds(product) for _ in range(5))
    return total


# ------------------------------------------------------------------------------------ side by side


class Bench:
    """A model, questions of one shape, and both ways through them."""

    def __init__(self, arguments, shape: str):
        self.arguments, self.shape = arguments, shape
        device = torch.device(arguments.device)
        self.model, tokenizer = make(arguments)
        if arguments.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.config = train.Config(
            langs=arguments.langs,
            max_tokens=arguments.max_tokens,
            dtype=arguments.dtype,
            gradient_checkpointing=arguments.checkpointing,
            batch_questions=arguments.questions,
            epochs=10**6,
            save_every=0,
        )
        number = max(SHAPES[shape], arguments.questions * (arguments.repeat + 1))
        self.questions = some_questions(arguments, shape, number, shape_of(self.model).V)
        self.encoding = seconds(lambda: data.encode(tokenizer, self.questions, arguments.langs))
        self.trees = data.encode(tokenizer, self.questions, arguments.langs)
        self.device, self.fed, self.spent = device, Counter(), Counter()

    def judged(self, stage: str) -> list[list[data.Tree]]:
        answers = 2 if stage == "reference" else None
        return [
            [tree._replace(branches=tree.branches[:answers]) for tree in row]
            for row in self.trees[: SHAPES[self.shape]]
        ]

    def forward(self, way: str, trees: list[list[data.Tree]]) -> torch.Tensor:
        self.model.eval()
        if way == "packed":
            scores = rankc.score(self.model, trees, self.config, "score", True).transpose(0, 1)
            return scores[scores.isfinite()]
        with torch.no_grad(), rankc.autocast(self.config, self.device):
            return plain(self.model, [tree for row in trees for tree in row]).cpu()

    def items(self):
        """The items of each step, without end, as train.py draws them."""
        K = max(question.K for question in self.questions)
        ref = torch.randn(len(self.config.langs), len(self.questions), K)
        gamma = rankc.gamma_matrix(self.config, lambda *_: None)
        return train.draw(self.questions, self.trees, ref, gamma, self.config)

    def judge(self, stage: str, ways: list[str], repeat: int) -> tuple[dict, dict]:
        """Of each way (seconds, nothing) of each pass, in turn, and the scores."""
        taken, scores, rows = {way: [] for way in ways}, {}, self.judged(stage)
        for _ in range(repeat + 1):
            for self.way in ways:
                begun = time.perf_counter()
                scores[self.way] = self.forward(self.way, rows)
                taken[self.way].append((time.perf_counter() - begun, None))
        return taken, scores

    def steps(self, ways: list[str], repeat: int) -> tuple[dict, list[list[data.Tree]]]:
        """Of each way (seconds, seconds of the parts) of each step, in turn; each step's trees."""
        taken, trees, drawn = {way: [] for way in ways}, [], self.items()
        other = PlainStep(self.model, self.config) if "plain" in ways else None

        def turns():
            for _ in range(repeat + 1):
                synchronize()
                begun, items = time.perf_counter(), next(drawn)
                trees.append([tree for item in items for tree in item.trees])
                if "packed" in ways:
                    self.way = "packed"
                    self.spent.clear()
                    yield items
                    synchronize()
                    taken["packed"].append((time.perf_counter() - begun, self.spent.copy()))
                if other:
                    self.way = "plain"
                    taken["plain"].append((seconds(lambda: other(items)), None))

        if "packed" in ways:
            nothing = lambda line: None  # noqa: E731
            train.optimise(self.model, turns(), repeat + 1, self.config, True, nothing)
        else:
            list(turns())
        return taken, trees

    def instrument(self) -> None:
        """Have the parts of a packed step timed, and the tokens of each way counted."""

        def timed(owner, name, part):
            work = getattr(owner, name)

            def wrapped(*args, **kwargs):
                synchronize()
                begun = time.perf_counter()
                result = work(*args, **kwargs)
                synchronize()
                if self.way == "packed":
                    self.spent[part] += time.perf_counter() - begun
                return result

            setattr(owner, name, wrapped)

        timed(train, "completion_logps", "forward")
        timed(torch.Tensor, "backward", "backward")
        timed(torch.nn.utils, "clip_grad_norm_", "optimizer")
        timed(torch.optim.AdamW, "step", "optimizer")

        def count(_, __, kwargs):
            self.fed[self.way] += kwargs["input_ids"].numel()

        self.model.register_forward_pre_hook(count, with_kwargs=True)


def quietly(work):
    with open(os.devnull, "w") as null, redirect_stdout(null):
        return work()


def peak(shape: str, stage: str, way: str) -> float:
    """GiB at most, of the process or on the GPU, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", shape, stage, way]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments, shape: str) -> None:
    """Every stage of one shape: both ways, and how far this program is from the floor."""
    ways = ["packed"] if arguments.only else ["packed", "plain"]
    memory = {(stage, way): peak(shape, stage, way) for stage in arguments.stages for way in ways}
    bench = Bench(arguments, shape)
    bench.instrument()
    size, counted = shape_of(bench.model), range(1, arguments.repeat + 1)  # the first: a warm-up
    weights = getattr(torch, arguments.dtype)
    computed = torch.bfloat16 if bench.device.type == "cuda" else weights
    for stage in arguments.stages:
        bench.fed.clear()
        step, apart = stage == "step", ""
        if step:
            taken, trees = quietly(lambda: bench.steps(ways, arguments.repeat))
        else:
            taken, scores = quietly(lambda: bench.judge(stage, ways, arguments.repeat))
            trees = [[tree for row in bench.judged(stage) for tree in row]] * len(taken["packed"])
            if len(ways) > 1:
                apart = f", scores within {(scores['packed'] - scores['plain']).abs().max():.0e}"
        answers = sum(len(tree.branches) for tree in trees[0])
        fewest = sum(tree.tokens() for some in trees for tree in some)
        print(f"\n{shape}, {stage}: {answers} answers{apart}")
        middle = {}
        for way in ways:
            times = [taken[way][n][0] for n in counted]
            middle[way] = statistics.median(times)
            rate = (1 if step else answers) / middle[way]
            print(
                f"  {way:8} {middle[way]:7.3f} s ({min(times):.3f} - {max(times):.3f})  "
                f"{rate:7.2f} {'steps' if step else 'answers'}/s  "
                f"{bench.fed[way] / len(trees):7.0f} tokens  {memory[stage, way]:5.2f} GiB"
            )
        over = f"{bench.fed['packed'] / fewest - 1:+.1%} tokens over the fewest"
        if len(ways) > 1:
            over = (
                f"{middle['plain'] / middle['packed']:.2f}x faster, {over}, "
                f"{memory[stage, 'packed'] / memory[stage, 'plain']:.2f} of the memory"
            )
        print(f"  ratio    {over}")
        computing = middle["packed"]
        if step:
            parts = {
                part: statistics.median(taken["packed"][n][1][part] for n in counted)
                for part in ("forward", "backward", "optimizer")
            }
            computing = parts["forward"] + parts["backward"]
            parts["tokenising"] = bench.encoding / len(bench.questions) * arguments.questions
            parts["everything else"] = middle["packed"] - computing - parts["optimizer"]
            shares = (f"{part} {t:.3f} s ({t / middle['packed']:.1%})" for part, t in parts.items())
            print(f"  parts    {', '.join(shares)}")
        floor, work = [], []
        for some in trees[1:] if step else trees[:1]:
            work.append((3 if step else 1) * flops(size, some))
            groups = data.batches(some, arguments.max_tokens)
            floor.append(
                sum(
                    bare(size, [some[i] for i in group], arguments.device, computed, step)
                    for group in groups
                )
            )
        work, floor = statistics.mean(work), statistics.mean(floor)
        print(
            f"  products {work / 1e9:.1f} GFLOP at {work / computing / 1e9:.0f} GFLOP/s; bare "
            f"{work / floor / 1e9:.0f} GFLOP/s: utilisation {floor / computing:.0%}",
            flush=True,
        )


def measure_peak(arguments, shape: str, stage: str, way: str) -> None:
    arguments.repeat = 2
    bench = Bench(arguments, shape)
    if stage == "step":
        quietly(lambda: bench.steps([way], 2))
    else:
        quietly(lambda: bench.forward(way, bench.judged(stage)))
    if bench.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:
        print(resident("VmHWM") / 2**30)


def resident(name: str) -> int:
    """Bytes that this process has in memory, or has had at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


# ------------------------------------------------------------------------------------ processes


def launch(arguments, processes: int, *more: str):
    """What the first of so many processes, of one thread each, prints last, as JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), __file__, "--device", arguments.device]
    command += ["--model", arguments.model] * bool(arguments.model)
    done = subprocess.run(
        [*command, "--size", arguments.size, *more],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def processes_of(arguments) -> None:
    """In each process: seconds of steps, of steps without the exchange, of the exchange alone."""
    bench, found, replicate = Bench(arguments, *arguments.shapes), [], train.replicate
    for train.replicate in (replicate, lambda model, *_: model):
        taken, _ = quietly(lambda: bench.steps(["packed"], arguments.repeat))
        found.append([spent for spent, _ in taken["packed"][1:]])
    gradients = torch.zeros(sum(weight.numel() for weight in bench.model.parameters()))
    found.append([seconds(lambda: dist.all_reduce(gradients.to(bench.device))) for _ in range(3)])
    if dist.get_rank() == 0:
        print(json.dumps(found))


def processes(arguments, shape: str) -> None:
    """Rounds of one process and of two, in turn."""
    times = {"one process, one thread": [], "two, one thread each": [],
             "two, gradients not exchanged": [], "the exchange alone": []}  # fmt: skip
    for _ in range(3):
        one, two = (
            launch(arguments, n, "--processes-of", "--shapes", shape, "--repeat", "6")
            for n in (1, 2)
        )
        for all, some in zip(times.values(), (one[0], *two), strict=True):
            all += some
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
    import math

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
    for L, Q in ((17, 25_000), (17, 50_000), (17, 100_000), (8, 100_000), (4, 100_000)):
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


def memory_of(arguments, way: str) -> None:
    """Measure one process of two: GiB at most after its model is there; printed by the first."""
    device, world = torch.device(arguments.device), dist.get_world_size()
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
        used, tokens, scored = launch(arguments, processes, "--memory-of", way)
        formula = need(SIZES["135M"], processes, way == "shard", tokens, scored, 4) / 2**30
        print(
            f"135M, {tokens} tokens a step, {way} over {processes}: {used:.2f} GiB a process at "
            f"most, by formula {formula:.2f}",
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
        share = sum(tree.tokens() for row in bench.trees for tree in row) / len(bench.trees)
        number = max(1, round(tokens / share))
        bench.config = replace(bench.config, max_tokens=tokens, batch_questions=number)
        times = max(1, number // len(bench.trees) + 1)
        bench.questions, bench.trees = bench.questions * times, bench.trees * times
        try:
            quietly(lambda: bench.steps(["packed"], 1))
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
    add("--model", default="", help="folder of a causal language model")
    add("--size", default="135M", choices=SIZES, help="else random weights of this size")
    add("--data", default="", help="real questions, as train.py takes them")
    add("--langs", nargs="+", default=["en", "es"])
    add("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    add("--only", action="store_true", help="this program alone, without the plain way")
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
    add("--peak", nargs=3, help=argparse.SUPPRESS)
    add("--memory-of", help=argparse.SUPPRESS)
    add("--processes-of", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.largest and arguments.device != "cuda":
        parser.error("--largest fills a GPU's memory; there is none here")
    if arguments.memory:
        return memory(arguments)
    if arguments.processes:
        for shape in arguments.shapes:
            processes(arguments, shape)
        return
    if arguments.scale:
        scale_measures()
        return scale_data()
    rankc.start(arguments.device)
    if arguments.memory_of:
        memory_of(arguments, arguments.memory_of)
    elif arguments.processes_of:
        processes_of(arguments)
    elif arguments.peak:
        measure_peak(arguments, *arguments.peak)
    else:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
        print(
            f"{arguments.model or arguments.size}, {arguments.dtype}, {name}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of "
            f"{arguments.repeat} (min - max)"
        )
        for shape in ["--data"] if arguments.data else arguments.shapes:
            (largest if arguments.largest else compare)(arguments, shape)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
