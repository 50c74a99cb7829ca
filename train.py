"""How it runs: `torchrun train.py` makes a model rank the answers to a question alike everywhere.

Covers Eqs. 11 and 15 as they are trained (section 4.4, Apps. G and H) and what the paper compares
them with (section 6.1): one reference pass, after which r_ALIGN is a table of numbers and DCO a
regression on it; then the loop, one screen long; then the report. The equations are in dco.py.
"""

import ctypes
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.modeling_layers import GradientCheckpointingLayer

import data
import dco
import rankc
from data import InputError, Question, Tree


# ------------------------------------------------------------------------------------- the settings
@dataclass(frozen=True)
class Config:
    """Train a language model to rank answers alike in every language. None: see `with_defaults`."""

    # Data
    model: str = HfArg(default="", help="folder or hub name (default: a tiny one, made here)")
    data: str = HfArg(default="atlas", help="atlas, bmlama:DIR, mmmlu:DIR, xcsqa:DIR or jsonl:FILE")
    langs: list[str] = HfArg(default_factory=lambda: ["en", "fr", "es", "sw"], help="as in data")
    train_questions: int | None = HfArg(default=None, help="default: the paper's 5000; xcsqa: 800")
    test_questions: int | None = HfArg(default=None, help="held out (default: all others)")
    train_subjects: list[str] = HfArg(default_factory=list, help="train on these subjects alone")
    test_subjects: list[str] = HfArg(default_factory=list, help="hold out these subjects alone")
    split_seed: int = HfArg(default=0, help="seed of the split")
    # Method
    method: Literal["dco", "sft", "dpo", "calm"] = HfArg(default="dco", help="the objective")
    beta: float | None = HfArg(default=None, help="pull to the reference (1; dpo, calm: 0.1)")
    trust: list[str] = HfArg(default_factory=list, help="LANG=WEIGHT, else 1; more moves less")
    gamma: list[float] = HfArg(default_factory=list, help="instead of trust: 2 numbers, or L x L")
    candidates: int | None = HfArg(default=None, help="answers compared; 0: all (default: 2)")
    pairs: Literal["random", "gold"] = HfArg(default="random", help="gold: one is the right answer")
    pairs_per_question: int | None = HfArg(default=None, help="draws an epoch (1; xcsqa: 7)")
    lr: float | None = HfArg(default=None, help="dco 1e-5, sft 5e-7, dpo and calm 5e-6")
    epochs: int | None = HfArg(default=None, help="passes over the training questions (default: 1)")
    batch_questions: int | None = HfArg(default=None, help="a step, of all processes (default: 4)")
    grad_clip: float = HfArg(default=1.0, help="largest gradient norm; 0: none")
    seed: int = HfArg(default=0, help="of the draws, their order and the embedded model")
    # Machine
    max_tokens: int | None = HfArg(default=None, help="in a forward pass (cpu: 512; cuda: 4096)")
    device: Literal["cpu", "cuda"] | None = HfArg(default=None, help="default: cuda if there is")
    dtype: Literal["float32", "bfloat16"] | None = HfArg(default=None, help="of matrix products")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory: recompute activations")
    shard: bool = HfArg(default=False, help="FSDP2: split weights and moments over processes")
    # Output
    out: str = HfArg(default="", help="folder; the same command again continues the run in it")
    eval_only: bool = HfArg(default=False, help="report on the held-out questions, train nothing")
    eval_every: int = HfArg(default=0, help="steps between looks at 200 of them; 0: none")
    save_every: int | None = HfArg(default=None, help="steps between saves; 0: none (cuda: 8000)")


LEARNING_RATE = {"dco": 1e-5, "sft": 5e-7, "dpo": 5e-6, "calm": 5e-6}  # App. G
BETA = {"dco": 1.0, "sft": 1.0, "dpo": 0.1, "calm": 0.1}  # App. G gives DCO's; 0.1 is DPO's usual
# A run may go on with other values of these, as where memory ran out.
MAY_DIFFER = "out max_tokens device gradient_checkpointing shard save_every eval_every".split()


def with_defaults(config: Config) -> Config:
    """The settings, with the paper's values, or ours where it has none, for what was not given."""
    xcsqa = config.data.startswith("xcsqa")
    on_gpu = torch.cuda.is_available() and config.model != "" and config.device != "cpu"
    defaults = {
        "beta": BETA[config.method],
        "candidates": 2,
        "pairs_per_question": 7 if xcsqa and config.method in ("dco", "dpo") else 1,
        "lr": LEARNING_RATE[config.method],
        "epochs": 1,
        "batch_questions": 4,
        "max_tokens": 4096 if on_gpu else 512,
        "device": "cuda" if on_gpu else "cpu",
        "dtype": "bfloat16" if on_gpu else "float32",
        # A tenth of the time at most: on a GPU a checkpoint takes as long as 250 to 800 steps.
        "save_every": 8000 if on_gpu else 250,
    }
    if not config.train_subjects:  # else all questions of these
        of_paper = data.TRAIN_QUESTIONS.get(config.data.partition(":")[0])
        defaults["train_questions"] = 0 if of_paper is None and config.eval_only else of_paper
    if not config.model:  # a tiny model takes more passes, and a larger rate
        defaults |= {"lr": 30 * defaults["lr"], "epochs": 8, "batch_questions": 16, "candidates": 6}
        if "en" in config.langs and not config.gamma:
            defaults["trust"] = ["en=7"]  # by which pi* keeps what English knows: see `forecast`
    missing = {name: x for name, x in defaults.items() if getattr(config, name) in (None, [])}
    return replace(config, **missing)


def check_settings(config: Config) -> None:
    """Raise InputError for settings that are out of range or do not go together."""
    from_one = (config.epochs, config.batch_questions, config.pairs_per_question, config.max_tokens)
    from_zero = (config.grad_clip, config.save_every, config.eval_every, config.candidates)
    number = config.train_questions
    to_train = number or (number is None and config.train_subjects) or config.eval_only
    too_few = len(config.langs) < (3 if config.method == "calm" else 2)
    gpus = torch.cuda.device_count()
    no_gpu = config.device == "cuda" and gpus < int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    refused = {
        "epochs, max_tokens, batch_questions, pairs_per_question: 1 at least": min(from_one) < 1,
        "grad_clip, save_every, eval_every, candidates: 0 at least": min(from_zero) < 0,
        "candidates 1: Eq. 11 compares two or more; 0 is all": config.candidates == 1,
        "beta: must be positive and finite": not 0 < config.beta < math.inf,
        "lr: must be positive and finite": not 0 < config.lr < math.inf,
        "test_questions 0: there is nothing to report on": config.test_questions == 0,
        "trust and --gamma both set Gamma: give one": config.trust and config.gamma,
        "data: without --model there is atlas alone": not config.model and config.data != "atlas",
        "train_questions: how many to train on? The others are held out": not to_train,
        "langs: name two or more, for calm three, with spaces between them": too_few,
        f"device cuda: each process needs a GPU; torch sees {gpus} here": no_gpu,
    }
    for message, applies in refused.items():
        if applies:
            raise InputError(f"--{message}")


def gamma_matrix(config: Config) -> Tensor:
    """gamma (L, L) of --gamma or --trust; warns where Lemma 3 does not hold.

    Section 6.4 names its settings the other way round: EN Stable is `--gamma 0.1 10` by Eq. 6.
    """
    L = len(config.langs)
    try:
        if not config.gamma:
            weights = dict(item.split("=") for item in config.trust)
            if weights.keys() - set(config.langs) or len(weights) < len(config.trust):
                raise ValueError(f"each of --langs once at most, not {' '.join(config.trust)}")
            trust = [float(weights.get(lang, 1)) for lang in config.langs]
            return dco.gamma_from_trust(torch.tensor(trust, dtype=torch.double), config.beta)
        rows = [0, *config.gamma, 0] if len(config.gamma) == 2 else config.gamma  # Eq. 6, Eq. 15
        gamma = torch.tensor(rows, dtype=torch.double).view(L, L)
        dco.align_reward(torch.zeros(L, 2), gamma)  # raises for a diagonal that is not 0
    except (ValueError, RuntimeError) as error:
        form = "--trust takes LANG=NUMBER, --gamma two numbers for two languages, or L x L by rows"
        raise InputError(f"{form}: {error}") from error
    if not dco.is_consistent(gamma, config.beta):
        print0("warning: Gamma has not rank 1 with positive entries: pi* need not be consistent")
    return gamma


# ---------------------------------------------------------------------------- what a step trains on
class Example(NamedTuple):
    """Some candidates of one question, in every language, and what each language is to learn."""

    trees: list[Tree]  # one a language; where a method prefers an answer, that one is first
    ref_logps: Tensor  # (L, K) nats, -inf where a question has fewer
    learns: Tensor  # (L,) bool: the languages that are trained on it


def training_order(questions: int, config: Config) -> list[list[tuple[int, int]]]:
    """The draws of each step, (question, number of the draw): a function of the seed alone."""
    steps = []
    for epoch in range(config.epochs):
        draws = [(q, n) for q in range(questions) for n in range(config.pairs_per_question)]
        random.Random(f"order/{config.seed}/{epoch}").shuffle(draws)
        for start in range(0, len(draws), config.batch_questions):
            steps.append(draws[start : start + config.batch_questions])
    return steps


def make_example(
    question: Question, trees: list[Tree], ref_logps: Tensor, n: int, config: Config
) -> Example:
    """The n-th draw from a question; its trees and ref_logps (L, K) hold all candidates."""
    L, K = len(trees), question.K
    base = ref_logps[:, :K]  # other questions may have more candidates
    learns = torch.ones(L, dtype=torch.bool)
    if config.method == "calm":  # DPO towards the majority's answer, away from one's own
        own, winner = base.argmax(-1), dco.majority_vote(base)[0]
        learns = own != winner
        chosen = torch.stack([winner.expand(L), own], dim=-1)  # (L, 2)
    elif config.method == "dco" and config.pairs == "random":  # App. H: whichever is right
        drawn = data.sample(question, config.candidates or K, n, config.seed)  # y_w, y_l: 2
        chosen = torch.tensor(drawn).expand(L, -1)  # (L, candidates)
    else:  # the right answer and another one; of these SFT takes the first
        wrong = [k for k in data.sample(question, K, n, config.seed) if k != question.gold]
        pair = [question.gold] if config.method == "sft" else [question.gold, wrong[0]]
        chosen = torch.tensor(pair).expand(L, -1)
    drawn_trees = []
    for tree, row in zip(trees, chosen.tolist(), strict=True):
        drawn_trees.append(tree._replace(branches=[tree.branches[k] for k in row]))
    ref = torch.full_like(ref_logps, -torch.inf)  # what is not drawn is missing
    ref[:, : chosen.shape[1]] = base.gather(-1, chosen)
    return Example(drawn_trees, ref, learns)


def language_loss(logps: Tensor, ref_logps: Tensor, r_align: Tensor, config: Config) -> Tensor:
    """One language's term of the loss: (..., K) each, nats -> (...,)."""
    if config.method == "dco":  # Eq. 11: r-hat of the policy is to have r_ALIGN's margins
        return dco.dco_loss(logps, ref_logps, r_align, config.beta)
    if config.method == "sft":
        return dco.sft_loss(logps[..., 0])  # L^ML of the right answer
    return dco.dpo_loss(logps, ref_logps, config.beta)  # Eq. 4; CALM's as well


# ----------------------------------------------------------------------------------------- the loop
def train(
    model: nn.Module, questions: list, trees: list, ref_logps: Tensor, gamma: Tensor, config: Config
) -> Iterator[dict]:
    """Minimise the loss from the newest checkpoint on; yield each step's metrics for the log.

    trees: [question][language]; ref_logps: (Q, L, K) nats of all candidates. Raises
    FloatingPointError, naming the questions, before a step that is not finite.
    """
    device, world = next(model.parameters()).device, dist.get_world_size()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, config.lr, weight_decay=0.0, fused=True)  # App. G
    order = training_order(len(questions), config)
    done = load_checkpoint(config, model, optimizer)  # 0, or where a killed run goes on
    bar = progress(range(done, len(order)), "train", len(order), done)
    for step in bar:
        # What the step compares: a few answers of each question, in every language.
        examples = [
            make_example(questions[q], trees[q], ref_logps[q], n, config) for q, n in order[step]
        ]
        ref = torch.stack([example.ref_logps for example in examples])  # (B, L, K)
        # r_ALIGN, Eq. 15: what r-hat is to become. (On the CPU: a GPU would round it to TF32.)
        r_align = dco.align_reward(ref, gamma)  # (B, L, K)
        learns = torch.stack([example.learns for example in examples])  # (B, L) bool

        # A row is a question in a language, and a term of the loss, which is their sum over the
        # number of questions. Every process feeds some rows, a few at a time.
        step_trees = [tree for example in examples for tree in example.trees]  # B L
        sizes = {n: step_trees[n].tokens() for n in learns.flatten().nonzero()[:, 0].tolist()}
        refs, rewards = (x.flatten(0, 1).to(device, non_blocking=True) for x in (ref, r_align))
        logps = torch.full_like(refs, -torch.inf)  # (B L, K), as these two
        # FSDP takes the mean of gradients over processes, where their sum is wanted.
        scale = (world if config.shard else 1) / len(examples)
        for group in deal(sizes, config.max_tokens):
            new, row, count = feed(model, step_trees, group, logps, config)
            K = new.shape[1]  # of this group
            loss = language_loss(new, refs[row, :K], rewards[row, :K], config)  # (T,) Eq. 11
            (scale * count * loss).sum().backward()

        # Gradients are summed over processes, by FSDP or here: of all weights, also of one that no
        # row needed, so that all processes reduce the same list, and AdamW has moments of each.
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if world > 1 and not config.shard:
            for work in [dist.all_reduce(x.grad, async_op=True) for x in parameters]:
                work.wait()
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        norm = norm.full_tensor() if config.shard else norm

        # A row of logps is -inf but on the process that fed it, so the largest is its value.
        dist.all_reduce(logps, dist.ReduceOp.MAX)
        # Here alone a step waits for the GPU: AdamW's update runs while the next step is prepared.
        logps, norm = logps.cpu().view_as(ref), float(norm)
        losses = language_loss(logps, ref, r_align, config).where(learns, 0.0)  # (B, L)
        if not (losses.isfinite().all() and math.isfinite(norm)):
            ids = ", ".join(questions[q].id for q, _ in order[step])
            raise FloatingPointError(f"step {step + 1}: NaN or infinite for questions {ids}")
        lr = config.lr * (1 - step / len(order))  # linear decay, the authors' release's
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        step += 1
        metrics = step_metrics(logps, ref, r_align, losses, learns, config)
        bar.set_postfix(loss=metrics["loss"], refresh=False)
        yield {"step": step, **metrics, "grad_norm": norm, "lr": lr, "tokens": sum(sizes.values())}
        if config.save_every and step % config.save_every == 0:
            save_checkpoint(config, model, optimizer, step)  # after the caller wrote the line


def feed(model: nn.Module, trees: list[Tree], group: list, table: Tensor, config: Config) -> tuple:
    """Score a micro-batch of `deal` into its rows of the table: its (T, K) nats, rows, counts."""
    with autocast(config):
        logps = dco.completion_logps(model, [trees[row] for row, _ in group])
    row, count = torch.tensor(group).T.to(table.device, non_blocking=True)  # (T,) each
    # The maximum of a NaN and a number may be either: as +inf it is seen by all processes.
    table[row, : logps.shape[1]] = logps.detach().masked_fill(logps.isnan(), torch.inf)
    return logps, row, count


def deal(sizes: dict[int, int], max_tokens: int) -> list[list[tuple[int, int]]]:
    """This process's micro-batches of rows, {row: tokens}: lists of (row, count).

    Longest first, a row to each process in turn, so that none waits long for another. All get as
    many micro-batches, since FSDP gathers each layer's weights on all processes at once; so in the
    last turn those that would get none get the shortest row once more, to count 0 times. For 2
    processes, sizes {0: 9, 1: 5, 2: 7} and 15 tokens:

        process 0   [[(0, 1), (1, 1)]]        the row of 9, then the row of 5
        process 1   [[(2, 1), (1, 0)]]        the row of 7, then that of 5 for nothing
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    order = [(row, 1) for row in sorted(sizes, key=lambda row: -sizes[row])]
    while len(order) % world:
        order.append((order[-1][0], 0))
    groups, room = [], 0
    for start in range(0, len(order), world):
        longest = sizes[order[start][0]]  # of this turn; by it, all processes group alike
        if longest > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(order[start + rank])
        room -= longest
    return groups


def step_metrics(
    logps: Tensor, ref: Tensor, r_align: Tensor, losses: Tensor, learns: Tensor, config: Config
) -> dict[str, float]:
    """What the log shows of a step, from (B, L, K) nats; margins are of the first two answers."""
    metrics = {"loss": losses.sum(1).mean()}
    metrics["probability"] = logps.exp().sum(-1)[learns].mean()  # of all answers drawn
    for i, lang in enumerate(config.langs):
        if learns[:, i].any():  # with CALM, not all do
            metrics[f"loss/{lang}"] = losses[learns[:, i], i].mean()
    if config.method != "sft":
        r_hat = dco.implicit_reward(logps, ref, config.beta)
        margin = r_hat[..., 0] - r_hat[..., 1]  # (B, L)
        if config.method == "dco":
            margin = margin * (r_align[..., 0] - r_align[..., 1]).sign()  # towards r_ALIGN's
            prefers_first = logps[..., 0] > logps[..., 1]  # (B, L)
            metrics["consistent"] = (prefers_first == prefers_first[:, :1]).all(-1).float().mean()
        metrics["rewards/margin"] = margin[learns].mean()
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------------------- processes and scoring
def init_distributed(config: Config) -> None:
    """Join the group that torchrun's environment describes, or make one of one process."""
    if config.device == "cuda":
        # Almost every batch has a new length. Without these, memory fragments,
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.backends.cuda.enable_cudnn_sdp(False)  # and cuDNN plans attention anew each time
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if config.dtype == "bfloat16":  # TF32 for the head: exact enough, faster than float32
            torch.set_float32_matmul_precision("high")
    else:
        reuse_memory()
    transformers.utils.logging.disable_progress_bar()  # one bar at a time
    # The others wait while rank 0 saves a model.
    backend, timeout = "nccl" if config.device == "cuda" else "gloo", timedelta(hours=1)
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a restart, and would lead workers to those of before it.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)


def reuse_memory() -> None:
    """Have glibc keep what torch frees: new pages for each step's gradients take 13% of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:  # other C libraries have none
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is not given back


def autocast(config: Config) -> torch.autocast:
    """bfloat16 products over float32 weights. Its cache would keep a second copy of the model."""
    enabled = config.dtype == "bfloat16" and not config.shard  # there FSDP converts
    return torch.autocast(config.device, torch.bfloat16, enabled=enabled, cache_enabled=False)


@torch.no_grad()
def score(model: nn.Module, questions: list, trees: list, config: Config, desc="") -> Tensor:
    """log pi(y|x), trees [question][language] -> (Q, L, K) nats, on every process.

    Raises FloatingPointError, naming questions, where one is NaN or infinite.
    """
    flat = [tree for row in trees for tree in row]
    K = max(len(tree.branches) for tree in flat)
    table = torch.full((len(flat), K), -torch.inf, device=config.device)
    groups = deal({row: tree.tokens() for row, tree in enumerate(flat)}, config.max_tokens)
    for group in progress(groups, desc, len(groups)):
        feed(model, flat, group, table, config)
    dist.all_reduce(table, dist.ReduceOp.MAX)  # as in `train`: -inf but where it was scored
    table = table.cpu().view(len(trees), -1, K)  # (Q, L, K)
    sizes = torch.tensor([len(tree.branches) for tree in flat]).view(len(trees), -1, 1)
    bad = ~table.isfinite() & (torch.arange(K) < sizes)  # -inf is right where one is missing
    ids = [questions[q].id for q in bad.any(-1).any(-1).nonzero()[:, 0].tolist()]
    if ids:
        some = ", ".join(ids[:5])
        raise FloatingPointError(f"{len(ids)} questions score NaN or infinite: {some}")
    return table


def progress(steps: Iterable, desc: str, total: int, done: int = 0) -> tqdm:
    """Steps under a bar on rank 0; "" for none. Into a file it is drawn every ten seconds."""
    hidden, interval = dist.get_rank() > 0 or not desc, 0.1 if sys.stderr.isatty() else 10
    return tqdm(steps, desc, total, False, initial=done, disable=hidden, mininterval=interval)


# -------------------------------------------------------------------------------------- checkpoints
def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The trained weights and AdamW's two moments of each, by name; a tied weight once."""
    tensors = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            tensors[name] = weight
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = optimizer.state[weight][moment]
    return tensors


def save_checkpoint(config: Config, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """checkpoint-STEP/, each process its own shards as safetensors; it replaces the one before."""
    folder = Path(config.out, f"checkpoint-{step}")
    part = folder.with_suffix(".part")
    tensors = training_state(model, optimizer)
    files = {name: number for number, name in enumerate(tensors, start=1)}
    writer = dcp.HuggingFaceStorageWriter(part, files, save_distributed=True)
    dcp.save(tensors, storage_writer=writer)
    if dist.get_rank() == 0:
        older = checkpoints(config).values()
        part.rename(folder)  # only now it is a checkpoint
        for old in older:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(config: Config, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore the newest checkpoint, on any number of processes; its step, or 0 without one."""
    saved = checkpoints(config)
    if not saved:
        return 0
    step = max(saved)
    for weight in optimizer.param_groups[0]["params"]:
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        moments["step"] = torch.tensor(float(step), device=weight.device)
        optimizer.state[weight] = moments
    reader = dcp.HuggingFaceStorageReader(saved[step])
    dcp.load(training_state(model, optimizer), storage_reader=reader)
    return step


def checkpoints(config: Config) -> dict[int, Path]:
    """The whole checkpoints of a run, by their steps."""
    folders = Path(config.out).glob("checkpoint-*[0-9]")
    return {int(folder.name.partition("-")[2]): folder for folder in folders}


def write_whole(path: Path, text: str) -> None:
    """Write a file such that it is there whole, or as it was before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def open_run(config: Config) -> tuple[Config, bool]:
    """The settings with the run's folder, and whether it is finished. Raises InputError."""
    # One looks, and tells the others: a folder changes while it is made.
    answer = [find_run(config) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    out, finished, problem = answer[0]
    if problem:
        raise InputError(f"--out {out} {problem}; name another")
    return replace(config, out=out), finished


def find_run(config: Config) -> tuple[str, bool, str]:
    """--out, or a new runs/N that no other run has; whether its run is finished; a problem."""
    number = 1
    while Path("runs", str(number)).exists():
        number += 1
    out = Path(config.out or f"runs/{number}").expanduser()
    path, part = out / "run.json", out / "run.json.part"
    try:
        out.mkdir(parents=True, exist_ok=bool(config.out))
        if not (out / "metrics.json").exists():  # else the run is finished
            part.touch()  # may it be written to? (A run killed at its start left this, too.)
            part.unlink()
        if not path.exists():
            return str(out), False, "is not empty, and holds no run" if any(out.iterdir()) else ""
    except OSError as error:
        return str(out), False, f"cannot be used ({error})"
    before, now = json.loads(path.read_text(encoding="utf-8")), asdict(config)
    for name in now.keys() - MAY_DIFFER:
        if before.get(name) != now[name]:
            change = f"--{name} was {before.get(name)!r}, now {now[name]!r}"
            return str(out), False, f"holds a run of other settings: {change}"
    return str(out), (out / "metrics.json").exists(), ""


def begin_run(config: Config, sha256: str) -> None:
    """Write run.json; InputError unless all processes see it, and have read its data and model."""
    path = Path(config.out, "run.json")
    if dist.get_rank() == 0 and not path.exists():
        write_whole(path, json.dumps({**asdict(config), "sha256": sha256}, indent=1))
    dist.barrier()
    seen = torch.tensor(int(path.exists()), device=config.device)
    dist.all_reduce(seen, dist.ReduceOp.MIN)
    if not seen:
        raise InputError(f"--out {config.out}: not all processes see it: machines must share it")
    if json.loads(path.read_text(encoding="utf-8")).get("sha256") != sha256:
        raise InputError(f"--out {config.out} holds a run of other data or model; name another")


# ---------------------------------------------------------------------------------- loading, saving
def load_model(config: Config) -> tuple[nn.Module, Any]:
    """The model, in float32, and its tokenizer; InputError where it is no causal language model."""
    folder = os.path.expanduser(config.model)
    how = {"trust_remote_code": False, "use_safetensors": True}  # other formats can run code
    # Not in the dtype that it was saved in: Gemma 3 would keep constants rounded to bfloat16.
    how |= {"dtype": torch.float32, "output_loading_info": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
        if info["missing_keys"]:  # transformers has drawn these at random
            raise ValueError(f"it lacks weights: {sorted(info['missing_keys'])}")
        if Path(folder, "adapter_config.json").exists() or hasattr(model, "peft_config"):
            raise ValueError("it has an adapter, which must be merged first")
        if type(model.config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError("AutoModelForCausalLM could not load what would be saved")
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(f"--model {config.model} cannot be loaded: {error}") from error
    return model, tokenizer


def place(model: nn.Module, config: Config) -> None:
    """Put the model on its device; with --shard (FSDP2), this process's share of it."""
    model.eval()  # for good: with dropout, policy and reference would differ at step 0
    if model.config.get_text_config() is not model.config:  # it has other parts than text
        model.requires_grad_(False)  # such as Gemma 3's vision tower
        for part in (model.get_decoder(), model.get_output_embeddings()):
            part.requires_grad_(True)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.forward = partial(float32_logits, head)
    embeddings.padding_idx = None  # nothing is padded; to skip it, the CPU would wait for a GPU
    # GradientCheckpointingLayer is transformers' name for a decoder layer.
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers and (config.shard or config.gradient_checkpointing):
        raise InputError("--shard, --gradient_checkpointing: no decoder layers found in this model")
    if config.gradient_checkpointing:
        # By hand, inside FSDP's hooks. Outside, where transformers up to 5.18 has it, torch up to
        # 2.12 does not cast to bfloat16 when a layer is computed again.
        how = {"use_reentrant": False, "preserve_rng_state": False}
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, **how)
    if not config.shard:
        model.to(config.device)
        if embeddings.weight is head.weight:
            embeddings.sparse = True  # else a second gradient of the whole vocabulary: mostly zeros
        return
    mesh = init_device_mesh(config.device, (dist.get_world_size(),))
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    if embeddings.weight is not head.weight:  # tied ones belong to both, that is to the whole
        fully_shard(embeddings, mesh=mesh)
        fully_shard(head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def float32_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What a model's head computes, from float32 numbers whatever the rest computes in.

    In bfloat16 logits near 20 are 0.125 apart: the letters of a multiple-choice question tie.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden.float(), head.weight.float(), bias)


def check_model(model: nn.Module, trees: list[list[Tree]], config: Config) -> None:
    """Raise InputError unless the model scores packed questions as it scores each alone."""
    by_tokens = sorted((tree for row in trees for tree in row), key=Tree.tokens)
    try:
        with autocast(config):
            dco.check_packing(model, by_tokens[-1], getattr(torch, config.dtype), by_tokens[:4])
    except torch.OutOfMemoryError:  # perhaps on one process alone
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(f"--model {config.model} cannot be trained here: {e!r}") from e


def save_model(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """The model as a Hugging Face folder."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(model, options=options)  # {} but on rank 0
    if dist.get_rank() == 0:
        names = dict(model.named_parameters(remove_duplicate=False)).keys()
        for name in names - dict(model.named_parameters()).keys():
            del tensors[name]  # a tied weight has two names, and is saved under one
        model.save_pretrained(out, state_dict=tensors)
        tokenizer.save_pretrained(out)


# ------------------------------------------------------------------------------- the embedded model
COVERAGE = {"en": 1.0, "fr": 0.3, "es": 0.3, "sw": 0.1}  # share of the facts it is taught
TEACHING_STEPS = 700


def embedded_model(config: Config) -> tuple[nn.Module, Any]:
    """A tiny Llama over whole words, taught a share of the facts by SFT, and its tokenizer.

    Every process teaches its own: they end up the same.
    """
    texts, facts = [], []  # all that can be asked, and (prompt, answer) of what is taught
    for question in data.load("atlas", config.langs):
        for lang in config.langs:
            prompt, answers = question.prompts[lang], question.answers[lang]
            texts += [prompt, *answers]
            if random.Random(f"{config.seed}/{question.id}/{lang}").random() < COVERAGE[lang]:
                facts.append((prompt, answers[question.gold]))
    words = ["<unk>", *dict.fromkeys(" ".join(texts).split())]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    torch.manual_seed(config.seed)
    shape = {"vocab_size": len(words), "hidden_size": 128, "intermediate_size": 256}
    shape.update(num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64)
    shape.update(bos_token_id=None, eos_token_id=None, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))

    ids = [[tokenizer(text)["input_ids"] for text in fact] for fact in facts]
    trees = [Tree(prompt, [answer]) for prompt, answer in ids]
    optimizer = AdamW(model.parameters(), weight_decay=0.5, betas=(0.9, 0.98), fused=True)
    shares = ", ".join(f"{lang} {COVERAGE[lang]:.0%}" for lang in config.langs)
    for step in progress(range(TEACHING_STEPS), f"teaching facts: {shares}", TEACHING_STEPS):
        batch = random.Random(f"{config.seed}/{step}").sample(trees, 96)
        dco.sft_loss(dco.completion_logps(model, batch)).mean().backward()
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / TEACHING_STEPS)  # as in `train`
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


# ---------------------------------------------------------------------------------- from end to end
def print0(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def describe(model: nn.Module, tokenizer: Any, trees: list[list[Tree]], config: Config) -> str:
    """What is about to be done, and an example in two languages as the model will see it."""
    where = f"{dist.get_world_size()} x {config.device}, {config.dtype}"
    lines = [f"{model.num_parameters():,} parameters on {where}; settings: {config.out}/run.json"]
    largest = max(tree.tokens() for row in trees for tree in row)
    lines.append(f"{config.max_tokens:,} tokens at a time; the largest question takes {largest:,}")
    for lang, tree in zip(config.langs[:2], trees[-1], strict=False):
        answers = [tokenizer.decode(branch) for branch in tree.branches]
        lines.append(f"  {lang}: {tokenizer.decode(tree.prefix)!r} + {answers}")
    return "\n".join(lines)


def forecast(name: str, ref_logps: Tensor, questions: list[Question], config: Config) -> str:
    """Accuracy of the base, and of pi*, the same in all languages, by trust in the reference one.

    To choose --trust: the least at which pi* is within a point of the base in that language.
    """
    first = rankc.reference_language(config.langs)
    known = [q for q, question in enumerate(questions) if question.gold is not None]
    gold = torch.tensor([questions[q].gold for q in known])
    base = ref_logps[known].double()
    now = zip(config.langs, rankc.accuracy(base, gold).tolist(), strict=True)
    right = ", ".join(f"{lang} {rankc.percent(share)}" for lang, share in now)
    at_optimum = []
    for weight in (1, 2, 3, 5, 7, 10):
        trust = torch.tensor([weight if lang == first else 1 for lang in config.langs]).double()
        gamma = dco.gamma_from_trust(trust, config.beta)
        share = float(rankc.accuracy(dco.optimal_policy(base, gamma, config.beta), gold)[0])
        at_optimum.append(f"{first}={weight} {rankc.percent(share)}")
    before = f"Accuracy before, {name}, per cent: {right}"
    return f"{before}\nForecast at pi*, by --trust: {', '.join(at_optimum)}"


def main() -> None:
    config = with_defaults(Config(**vars(HfArgumentParser(Config).parse_args())))
    check_settings(config)
    if not config.model:
        torch.set_num_threads(1)  # as fast as two for a model this small
    init_distributed(config)
    seconds, began, gamma = {}, time.time(), gamma_matrix(config)
    config, finished = open_run(config)
    out, langs = Path(config.out), config.langs
    if finished:
        print0(f"{out} holds this run, finished; name another --out to run it again")
        return dist.destroy_process_group()  # else its threads may abort the exit

    # Questions, and the model that answers them.
    questions = data.load(config.data, langs, print0)
    subjects = (config.train_subjects, config.test_subjects)
    train_part, test_part = data.split(
        questions, config.train_questions, config.test_questions, config.split_seed, *subjects
    )
    splits = {"test": test_part} if config.eval_only else {"train": train_part, "test": test_part}
    model, tokenizer = load_model(config) if config.model else embedded_model(config)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    limits = (context, len(model.get_input_embeddings().weight))
    trees = {name: data.encode(tokenizer, part, langs, *limits) for name, part in splits.items()}
    weights = [hashlib.sha256(x.detach().contiguous().numpy()).digest() for x in model.parameters()]
    alike = (replace(config, **dict.fromkeys(MAY_DIFFER)), model.config.to_dict(), splits, trees)
    sha256 = hashlib.sha256(repr((alike, weights)).encode()).hexdigest()  # of what each has read
    place(model, config)
    rows = [row for part in trees.values() for row in part]
    print0(describe(model, tokenizer, rows, config))
    check_model(model, rows, config)
    begin_run(config, sha256)
    if not config.eval_only and shutil.disk_usage(out).free < 4 * model.num_parameters():
        raise InputError(f"--out {out}: its disk has no room for the trained model")
    seconds["load"] = time.time() - began

    # The reference pass: all that training and pi* need of the model before training. A resumed
    # run repeats it: the checkpoint is loaded later, and the scores are the same.
    tables = {}  # {split: {stage: (Q, L, K) nats}}
    for name, part in splits.items():
        base = score(model, part, trees[name], config, f"reference {name}")
        optimum = dco.optimal_policy(base.double(), gamma, config.beta)
        tables[name] = {"base": base, "optimum": optimum}
    seconds["reference"] = time.time() - began
    # Trust is chosen by the forecast, so it looks at no label of a test that follows.
    shown = "test" if config.eval_only else "train"
    print0(f"\n{forecast(shown, tables[shown]['base'], splits[shown], config)}")

    metrics = {"languages": langs}
    if not config.eval_only:
        metrics["tokens"] = {"train": run_training(model, splits, trees, tables, gamma, config)}
        seconds["train"] = time.time() - began
        save_model(model, tokenizer, out)
    for name, part in splits.items():
        if not config.eval_only:
            tables[name]["trained"] = score(model, part, trees[name], config, f"evaluate {name}")
        ids, gold = [question.id for question in part], [question.gold for question in part]
        metrics[name] = rankc.summarise(tables[name], ids, gold, langs)
    seconds["evaluate"] = time.time() - began
    print0(f"\n{rankc.report(metrics, test_part, tables['test'], langs)}")
    if dist.get_rank() == 0:
        trained_on = {question.prompts[rankc.reference_language(langs)] for question in train_part}
        rankc.write_answers(out / "answers.jsonl", splits, tables, langs, trained_on)
        metrics["seconds"] = seconds  # since the start, at the end of each part
        # By this file a run is known to be finished. JSON has no NaN.
        write_whole(out / "metrics.json", json.dumps(metrics, indent=1).replace("NaN", "null"))
        for folder in checkpoints(config).values():
            shutil.rmtree(folder)
        if not config.eval_only and find_spec("matplotlib"):
            rankc.draw_clc(out / "clc.png", metrics["test"], langs)
        elif not config.eval_only:
            print("no picture: pip install -e '.[plot]' brings matplotlib")
    print0(f"wrote {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    dist.barrier()
    dist.destroy_process_group()


def run_training(
    model: nn.Module, splits: dict, trees: dict, tables: dict, gamma: Tensor, config: Config
) -> int:
    """Train on the questions that the method can use, a log.jsonl line a step; the tokens fed."""
    questions, ref_logps = splits["train"], tables["train"]["base"]
    used = list(range(len(questions)))
    if config.method == "calm":  # where languages disagree
        winner = dco.majority_vote(ref_logps)[0]  # (Q,)
        used = (ref_logps.argmax(-1) != winner[:, None]).any(-1).nonzero()[:, 0].tolist()
    elif config.method != "dco" or config.pairs == "gold":  # where the right answer is known
        used = [q for q in used if questions[q].gold is not None]
    print0(f"\n{config.method}: {len(used)} of {len(questions)} questions to train on")
    if not used:
        raise InputError(f"--method {config.method}: no question to train on")
    questions, rows = [questions[q] for q in used], [trees["train"][q] for q in used]

    path, step = Path(config.out, "log.jsonl"), max(checkpoints(config), default=0)
    # What a killed run logged after its last checkpoint is logged again.
    kept = path.read_text().splitlines(keepends=True)[:step] if step else []
    tokens = sum(json.loads(line)["tokens"] for line in kept)
    if dist.get_rank() == 0:
        write_whole(path, "".join(kept))
        for part in path.parent.glob("checkpoint-*.part"):
            shutil.rmtree(part)  # of a run that was killed while it wrote one
    dist.barrier()
    watched, base = splits["test"][:200], tables["test"]["base"][:200]
    with open(os.devnull if dist.get_rank() else path, "a") as file:
        for line in train(model, questions, rows, ref_logps[used], gamma, config):
            if config.eval_every and line["step"] % config.eval_every == 0:
                scores = score(model, watched, trees["test"][:200], config)
                measures = rankc.per_question(scores, base, [q.gold for q in watched], config.langs)
                line |= {f"eval/{name}": float(x.nanmean()) for name, x in measures.items()}
            tokens += line["tokens"]
            print(json.dumps(line).replace("NaN", "null"), file=file, flush=True)
    return tokens


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal's encoding lacks becomes ?
    try:
        main()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes see it; one says so
            print(f"error: {error}", file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(2)
