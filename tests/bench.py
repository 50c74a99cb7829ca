"""How fast and how frugal: `python tests/bench.py` (pytest does not collect it).

This program and another way do the same work, in new processes, in turn; printed are medians (min -
max) of all turns, and ratios. Questions have the lengths of --shapes, and --model is a size of
SIZES, with random weights; or --data and --model DIR are given. Others are train.py's. Stages:

    step        an optimizer step of 4 questions, 2 languages and 2 answers
    evaluation  log-probs of all answers

The plain way has a padded row for each prompt and answer, the logits of every token, and the
reference model in the step. With --peers (`pip install lm_eval trl`) the other way is TRL's
DPOTrainer and lm-evaluation-harness's HFLM, and the method is DPO. --memory instead: what a step
takes on GPUs, traced on tensors without contents; and the trace beside real steps.
"""

import argparse
import copy
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import dco
import train

SHAPES = {  # tokens of prompts in turn; of each answer; how many questions are scored
    "bmlama": ([4, 5, 6, 7, 7, 8, 10, 11, 13, 17], [1, 1, 1, 1, 2, 2, 3, 4, 6, 10], 16),
    "mmmlu": ([250, 270, 290, 310, 330, 350], [1, 1, 1, 1], 4),
    "xcsqa": ([50, 56, 62, 68, 74, 80], [1, 1, 1, 1, 1], 16),
    "equal": ([57], [3, 4], 16),  # for --memory
}
SIZES = {  # layers, heads, heads of keys, their width, width, feed-forward, vocabulary, tied
    "135M": ("llama", 30, 9, 3, 64, 576, 1536, 49152, True),  # SmolLM2
    "3B": ("qwen2", 36, 16, 2, 128, 2048, 11008, 151936, True),  # this and the next two: Qwen2.5
    "7B": ("qwen2", 28, 28, 4, 128, 3584, 18944, 152064, False),
    "14B": ("qwen2", 48, 40, 8, 128, 5120, 13824, 152064, False),
    "8B": ("llama", 32, 32, 8, 128, 4096, 14336, 128256, False),  # Llama 3.1
    # Gemma 3, the larger ones without their image part, which would take 1.7 GB more.
    "1B": ("gemma3_text", 26, 4, 1, 256, 1152, 6912, 262144, True),
    "4B": ("gemma3_text", 34, 8, 4, 256, 2560, 10240, 262208, True),
    "12B": ("gemma3_text", 48, 16, 8, 256, 3840, 15360, 262208, True),
}
ROWS = 16  # sequences that the other way feeds at once
TURNS = 2  # that each process takes after one that warms up


def random_model(size: str, device: str) -> nn.Module:
    family, layers, heads, key_heads, head_dim, width, inner, vocabulary, tied = SIZES[size]
    settings = {"num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
                "num_key_value_heads": key_heads, "hidden_size": width, "intermediate_size": inner,
                "vocab_size": vocabulary, "tie_word_embeddings": tied}  # fmt: skip
    config = AutoConfig.for_model(family, **settings)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def prepare(config: train.Config, shape: str) -> tuple:
    """A model as it is loaded, its tokenizer, 64 questions or fewer, and their trees."""
    torch.manual_seed(0)
    if shape == "data":
        model, tokenizer = train.load_model(config)
        questions = real_questions(config)
        return model, tokenizer, questions, data.encode(tokenizer, questions, config.langs)
    prompts, answers, _ = SHAPES[shape]
    questions, trees = [], []
    for number in range(64):
        questions.append(data.Question(str(number), "", 0, {}, {"": ("",) * len(answers)}))
        row = []
        for language in range(len(config.langs)):
            prompt = range(prompts[(2 * number + language) % len(prompts)])
            row.append(data.Tree(list(prompt), [list(range(length)) for length in answers]))
        trees.append(row)
    return random_model(config.model, config.device), None, questions, trees


def real_questions(config: train.Config) -> list[data.Question]:
    questions = data.load(config.data, config.langs, lambda text: None)
    known = [question for question in questions if question.gold is not None]  # as DPO needs it
    return data.split(known, None, 0, 0)[0][:64]


def in_new_processes(work, *arguments, world: int = 1) -> dict:
    """What work(*arguments) returns on the first of so many new processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=str(world))
    with ProcessPoolExecutor(world, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(child, rank, work, arguments) for rank in range(world)]
        return ranks[0].result()


def child(rank: int, work, arguments: tuple) -> dict:
    """With the memory that it has taken."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))  # for train.init_distributed
    before = resident("VmRSS")
    result = work(*arguments)
    room = resident("VmHWM") - before  # at most
    if torch.cuda.is_initialized():
        room = torch.cuda.max_memory_allocated()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return {**result, "room": room}


def resident(name: str) -> int:
    """Bytes of memory that this process has (VmRSS), or has had at most (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def measure(turn) -> dict:
    """How long some turns take after one that warms up, and the result of the last."""
    times = []
    for _ in range(1 + TURNS):
        began = time.perf_counter()
        result = turn()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"seconds": times[1:], "result": result}


def this_program(config: train.Config, shape: str, stage: str, way: str) -> dict:
    """Train or score; with way "plain", as is commonly done."""
    if way == "memory":
        train.reuse_memory = lambda: None  # what is freed is to be seen as such
    train.init_distributed(config)
    model, tokenizer, questions, trees = prepare(config, shape)
    if way == "plain":
        model.eval().to(config.device)
        reference = copy.deepcopy(model) if stage == "step" else None
        dco.completion_logps = partial(padded_logps, reference)
        config = replace(config, max_tokens=1200)  # 8 sequences of mmmlu's length
    else:
        train.place(model, config)
    ref_logps = torch.randn(
        len(trees), len(config.langs), max(question.K for question in questions)
    )
    steps = train.train(model, questions, trees, ref_logps, train.gamma_matrix(config), config)
    scored = trees if shape == "data" else trees[: SHAPES[shape][-1]]

    def turn():
        if stage == "step":
            return next(steps)
        if tokenizer:  # as the peers begin with text
            data.encode(tokenizer, questions, config.langs)
        return train.score(model, questions, scored, config)

    return measure(turn)


def padded_logps(reference: nn.Module | None, model: nn.Module, trees: list) -> Tensor:
    """dco.completion_logps by a padded row for each prompt and answer, and all logits."""
    if reference is not None and torch.is_grad_enabled():  # a step: it scores them, too
        with torch.no_grad():
            padded_logps(None, reference, trees)
    sequences, scores = [], []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor(tree.prefix + branch)
            is_answer = torch.arange(len(ids)) >= len(tree.prefix) + tree.prompt_len
            sequences.append(torch.stack([ids, torch.ones_like(ids), is_answer], dim=-1))
    for start in range(0, len(sequences), ROWS):
        padded = nn.utils.rnn.pad_sequence(sequences[start : start + ROWS], batch_first=True)
        ids, mask, is_answer = padded.to(model.device).unbind(-1)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scores.append((logps * is_answer[:, 1:]).sum(-1))
    of_trees = torch.cat(scores).split([len(tree.branches) for tree in trees])
    return nn.utils.rnn.pad_sequence(of_trees, batch_first=True, padding_value=-torch.inf)


def lm_eval(config: train.Config, shape: str, stage: str, way: str) -> dict:
    """Score with lm-evaluation-harness."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = []
    for question in real_questions(config):
        for lang in config.langs:
            texts += [(question.prompts[lang], answer) for answer in question.answers[lang]]
    machine = {"dtype": config.dtype, "device": config.device}
    peer = HFLM(pretrained=config.model, batch_size=ROWS, **machine)

    def turn() -> Tensor:
        requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
        return torch.tensor([x for x, _ in peer.loglikelihood(requests, disable_tqdm=True)])

    return measure(turn)


def trl(config: train.Config, shape: str, stage: str, way: str) -> dict:
    """Train with TRL on each question's right answer and the first other one."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends, pairs = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **_):
            ends.append(time.perf_counter())

    for question in real_questions(config):
        for lang in config.langs:
            answers, gold = question.answers[lang], question.gold
            pair = {"prompt": question.prompts[lang], "chosen": answers[gold]}
            pairs.append({**pair, "rejected": answers[(gold + 1) % len(answers)]})
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    size = config.batch_questions * len(config.langs)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            folder, max_steps=1 + TURNS, per_device_train_batch_size=size,
            precompute_ref_batch_size=size, precompute_ref_log_probs=True, report_to="none",
            gradient_checkpointing=False, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, use_cpu=config.device == "cpu", bf16=config.dtype == "bfloat16",
        )  # fmt: skip
        parts = {"train_dataset": Dataset.from_list(pairs), "processing_class": tokenizer}
        DPOTrainer(model, args=settings, callbacks=[Clock()], **parts).train()
    times = [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]
    return {"seconds": times}


def compare(config: train.Config, shape: str, stage: str, other: str, repeat: int) -> None:
    """This program and another way through one stage, in turn."""
    work = {"this program": this_program, "plain": this_program, "lm_eval": lm_eval, "trl": trl}
    results = {"this program": [], other: []}
    for _ in range(repeat):
        for way in results:
            results[way].append(in_new_processes(work[way], config, shape, stage, way))
    print(f"\n{shape}, {stage}")
    for way, processes in results.items():
        times = [seconds for process in processes for seconds in process["seconds"]]
        spread = f"{median(times):7.3f} s ({min(times):.3f} - {max(times):.3f})"
        print(f"  {way:12} {spread}  {processes[0]['room'] / 2**30:5.2f} GiB")
    ours, others = results.values()
    faster = median(sum(b["seconds"]) / sum(a["seconds"]) for a, b in zip(ours, others))
    print(f"  {faster:.2f} times as fast, {ours[0]['room'] / others[0]['room']:.2f} of the memory")
    if stage == "evaluation":
        scores = [result[result.isfinite()] for result in (ours[0]["result"], others[0]["result"])]
        apart = (scores[0] - scores[1]).abs().max()
        print(f"  {len(scores[0])} answers, scores within {apart:.0e} nats", flush=True)


class Live(TorchDispatchMode):
    """Bytes of the storages alive under it: states, which stay; now(), all; most, the peak."""

    def __init__(self):
        super().__init__()
        self.kept, self.others = weakref.WeakSet(), weakref.WeakSet()
        self.states = self.most = 0

    def keep(self, tensor: Tensor) -> None:
        """Count a state once: it stays as it is, and there are many."""
        share = getattr(tensor, "_local_tensor", tensor)  # of a tensor that is sharded
        self.kept.add(share.untyped_storage())
        self.others.discard(share.untyped_storage())
        self.states += share.untyped_storage().nbytes()

    def now(self) -> int:  # anew each time, since FSDP frees storages by making them empty
        return self.states + sum(storage.nbytes() for storage in list(self.others))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, FakeTensor) and tensor.untyped_storage() not in self.kept:
                self.others.add(tensor.untyped_storage())
        self.most = max(self.most, self.now())
        return out


def trace(world: int, config: train.Config, trees: list) -> tuple[int, int, int]:
    """Bytes of one of so many processes: weights and moments; at most with the forward pass; ever.

    The real model, sharding, compute precision and checkpointing, on tensors without contents.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = train.init_device_mesh("cpu", (world,))
    row, (column, target, slot) = dco.pack(trees)
    columns = column.unique(return_inverse=True)  # how many depends on contents: found outside
    packed = row, (SimpleNamespace(unique=lambda return_inverse: columns), target, slot)
    live = Live()
    with (
        patch.object(train, "init_device_mesh", lambda *_: mesh),
        patch.object(dco, "pack", lambda _: packed),
        patch.object(nn.Module, "_apply", lambda module, *_: module),  # fake tensors stay
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        with no_init_weights():
            model = random_model(config.model, "cpu")
        model.tie_weights()  # which goes without, too
        train.place(model, config)
        model.get_input_embeddings().sparse = False  # fake tensors know none: a gradient too many
        with live:
            for weight in model.parameters():
                live.keep(weight)
                if weight.requires_grad:
                    weight.moments = [torch.zeros_like(weight), torch.zeros_like(weight)]
                    for moment in weight.moments:
                        live.keep(moment)
            with train.autocast(config):
                logps = dco.completion_logps(model, trees)
            forward = max(live.most, live.now())
            # not Eq. 11, which looks at its rows; a loss of so few numbers takes no room
            dco.dpo_loss(logps, torch.zeros_like(logps), config.beta).sum().backward()
    dist.destroy_process_group()
    return live.states, forward, live.most


def memory(config: train.Config) -> None:
    """One process and two, traced and measured; then the paper's models on GPUs, traced."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back
    config = replace(config, gradient_checkpointing=True)
    tree = data.Tree(list(range(57)), [[0, 1, 2], [0, 1, 2, 3]])  # one of the shape "equal"
    for world, shard in ((1, False), (2, False), (2, True)):
        divided = replace(config, shard=shard)
        real = (divided, "equal", "step", "memory")
        used = in_new_processes(this_program, *real, world=world)["room"]
        *_, traced = trace(world, divided, [tree] * (8 // world))
        title = f"{config.model}, {world} processes, {'sharded' if shard else 'replicated'}"
        print(f"{title}: {used / 2**30:.2f} GiB each, {traced / used:.2f} of it traced", flush=True)
    print("\nGB of each GPU, bfloat16, 2,000 tokens; fits: in so many GB a tenth is left free\n")
    ways = ("forward | backward | fits |", "checkpointed: forward | backward | fits |")
    print(f"| | GPUs | states | {' '.join(ways)}\n|{' --- |' * 9}")
    for size in ("1B", "3B", "4B", "7B", "8B", "12B", "14B"):
        for world in (1, 2, 4, 8):
            config = replace(config, model=size, shard=world > 1, device="cpu", dtype="bfloat16")
            cells = []
            for recompute in (False, True):
                config = replace(config, gradient_checkpointing=recompute)
                states, forward, most = trace(world, config, [tree] * 32)
                fits = [str(GB) for GB in (24, 40, 80, 141) if most < 0.9e9 * GB] + ["none"]
                cells += [f"{forward / 1e9:.1f}", f"{most / 1e9:.1f}", fits[0]]
            row = [f"{SIZES[size][0]} {size}", str(world), f"{states / 1e9:.1f}", *cells]
            print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = HfArgumentParser(train.Config, description=__doc__, formatter_class=form)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES)[:3], choices=SHAPES)
    parser.add_argument("--stages", nargs="+", default=["step", "evaluation"])
    parser.add_argument("--repeat", type=int, default=3, help="processes of each way")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.set_defaults(model="135M", data="", langs=["en", "es"], epochs=10, out=os.devnull)
    config, options = parser.parse_args_into_dataclasses()
    method = "dpo" if options.peers else config.method
    config = train.with_defaults(replace(config, method=method, save_every=0))
    if options.memory:
        return memory(config)
    machine = f"{config.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{config.model}, {config.dtype}, {machine}; medians (min - max)", flush=True)
    for shape in ["data"] if config.data else options.shapes:
        for stage in options.stages:
            peer = "trl" if stage == "step" else "lm_eval"
            compare(config, shape, stage, peer if options.peers else "plain", options.repeat)


if __name__ == "__main__":
    main()
