"""How it runs: `torchrun train.py` makes a model rank the answers to a question alike everywhere.

Covers Eqs. 11 and 15 as they are trained (section 4.4, Apps. G and H) and what the paper compares
them with (section 6.1): one reference pass, after which r_ALIGN is a table of numbers and DCO a
regression on it; then the loop, one screen long; then the report. The equations are in dco.py.
"""

import argparse
import ctypes
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import combinations, count, islice, product
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.request import Request, urlopen

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save
    from torch import Tensor, nn
    from torch.distributed import fsdp, init_device_mesh
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.nn.utils.rnn import pad_sequence
    from tqdm import tqdm
except ImportError as error:  # no environment, or an old one
    raise SystemExit(f"error: {error}; `pip install -e .` in this folder brings it") from None

import data
import dco
import rankc
from data import InputError, Question, Tree

# ------------------------------------------------------------------------------------- the settings
LR = {"dco": 1e-5, "sft": 5e-7, "dpo": 5e-6, "calm": 5e-6}  # App. G
RATES = "dco 1e-5, on X-CSQA 1e-6 for Gemma (the authors' release: for Llama 3.1 8B, too); "
RATES += "sft 5e-7, dpo and calm 5e-6"
# What --eval_only takes from the run that left --model, unless the command line says otherwise.
OF_THE_RUN = "data langs beta trust gamma score split_seed train_questions test_questions "
OF_THE_RUN += "validation_questions train_subjects test_subjects"
SCALED = 20  # the embedded model, a tiny one, takes a larger rate
COVERAGE = {"en": 1.0, "fr": 0.75, "es": 0.75, "sw": 0.4}  # share of the facts it is taught
UNUSED = {  # settings that --eval_only, or a --method, has no use of
    "--eval_only": "method objective lr schedule warmup epochs batch_questions pairs_per_question "
    "candidates pairs grad_clip gradient_checkpointing save_every eval_every eval_questions",
    "--method sft": "trust gamma objective candidates pairs pairs_per_question beta",
    "--method dpo": "trust gamma objective candidates pairs",
    "--method calm": "trust gamma objective candidates pairs pairs_per_question",
    "--pairs gold": "candidates",
}
AT_LEAST = dict.fromkeys("max_tokens epochs batch_questions pairs_per_question".split(), 1)
AT_LEAST |= dict.fromkeys(
    "save_every eval_every eval_questions grad_clip warmup validation_questions".split(), 0
)
EXAMPLE = """example: python train.py --model DIR --data bmlama:DIR --langs en es \\
    --train_questions 1000 --test_questions 300 --out runs/en-es"""
CONTINUE = "; the same command with --resume continues from the last checkpoint"
# What transformers lets through of a damaged folder.
UNREADABLE = OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError
UNREADABLE += (SafetensorError,)


def opt(default: Any, text: str) -> Any:
    """A setting with its default and its help, which names the default where that is a value."""
    told = text if default in (None, "", False) else f"{text} (default: {default})"
    return field(default=default, metadata={"help": told})


@dataclass(frozen=True)
class What:
    _argument_group_name = "what"
    model: str = opt("", "folder, or hub name, of a causal language model (default: embedded)")
    data: str | None = opt(None, "atlas (the default), or bmlama, mmmlu, xcsqa:DIR, or jsonl:FILE")
    langs: list[str] | None = opt(None, "languages, as the data names them (default: en fr es sw)")
    train_questions: int | None = opt(None, "to train on (App. H: 5000; X-CSQA: 800; atlas: 435)")
    test_questions: int | None = opt(None, "held-out questions (default: all others)")
    validation_questions: int | None = opt(None, "of neither part, to choose trust by (default: 0)")
    train_subjects: list[str] | None = opt(None, "train on these subjects alone (section 6.3)")
    test_subjects: list[str] | None = opt(None, "report on these subjects; each has its row")
    split_seed: int | None = opt(None, "seed of the split (default: 0)")
    trust_remote_code: bool = opt(False, "run code that comes with the model")


@dataclass(frozen=True)
class Method:
    _argument_group_name = "method"
    eval_only: bool = opt(False, "judge the model, of a run on that run's questions; train nothing")
    method: Literal["dco", "sft", "dpo", "calm"] = opt("dco", "what is trained (section 6.1)")
    objective: Literal["joint", "pairwise"] = opt("joint", "Eq. 15, or random pairs of languages")
    beta: float | None = opt(None, "strength of the KL term, Eq. 1 (default: 1; dpo and calm: 0.1)")
    trust: list[str] | None = opt(None, "LANG=WEIGHT where it is not 1; a trusted one moves less")
    gamma: list[str] | None = opt(None, "instead: gamma_1 gamma_2 of Eq. 6, or a JSON matrix")
    pairs_per_question: int | None = opt(None, "draws from each question (App. H: 1; X-CSQA: 7)")
    candidates: str | None = opt(None, "in a draw: a number, or all (default: 2; embedded: 6)")
    pairs: Literal["random", "gold"] = opt("random", "dco's draws; gold: as dpo's (section 6.1)")
    score: Literal["sum", "mean"] | None = opt(None, "rank by answers' log-probs, or their mean")
    seed: int = opt(0, "seed of the draws, their order and the embedded model")


@dataclass(frozen=True)
class Optimizer:
    _argument_group_name = "optimizer"
    lr: float | None = opt(None, f"learning rate (App. G: {RATES}; embedded: {SCALED} times that)")
    schedule: Literal["linear", "cosine", "constant"] = opt("linear", "of the learning rate")
    warmup: float = opt(0.0, "share of the steps in which the learning rate rises")
    epochs: int | None = opt(None, "passes over the training questions (default: 1; embedded: 6)")
    batch_questions: int | None = opt(None, "a step, of all processes (default: 4; embedded: 16)")
    grad_clip: float = opt(1.0, "largest gradient norm; 0 for none")


@dataclass(frozen=True)
class Machine:
    _argument_group_name = "machine"
    max_tokens: int = opt(2048, "tokens fed at once; lower it where memory runs out")
    dtype: Literal["float32", "bfloat16"] | None = opt(None, "of matrix products; cuda: bfloat16")
    device: Literal["cpu", "cuda"] | None = opt(None, "default: cuda if there is, and a --model")
    gradient_checkpointing: bool = opt(False, "less memory, more time: activations twice")
    shard: bool = opt(False, "FSDP2: split weights, gradients and moments over processes")
    offload: bool = opt(False, "--shard, and keep them in the machine's memory: slow, little GPU")
    timeout: float = opt(60.0, "minutes to wait for another process before giving up")


@dataclass(frozen=True)
class Output:
    _argument_group_name = "output"
    out: str = opt("", "new or empty folder for what is written (default: runs/1, runs/2, ...)")
    save_every: int = opt(250, "steps between checkpoints, the last two of which stay; 0: none")
    resume: bool = opt(False, "continue the run in --out, or begin it: safe to leave on")
    eval_every: int = opt(0, "steps between looks at the validation, or held-out, part; 0: none")
    eval_questions: int = opt(0, "for such a look, the first so many; 0: all")


@dataclass(frozen=True)
class Config(Output, Machine, Optimizer, Method, What):
    """Train a multilingual language model by Direct Consistency Optimization, or by what the paper
    compares it with. The defaults are the paper's; without --model a tiny model is made on the
    spot, the embedded one, with defaults of its own."""

    def __post_init__(self) -> None:
        """Fill in the defaults; raise InputError for what is out of range or has no use."""
        given = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        method, xcsqa = self.method, (self.data or "").startswith("xcsqa")
        found = dict.fromkeys(["trust", "gamma", "train_subjects", "test_subjects"], [])
        found |= {"data": "atlas", "langs": ["en", "fr", "es", "sw"], "split_seed": 0}
        found |= {"lr": LR[method], "epochs": 1, "batch_questions": 4, "candidates": 2}
        found |= {"score": "sum", "validation_questions": 0}
        device = self.device or ("cuda" if self.model and torch.cuda.is_available() else "cpu")
        found |= {"device": device, "dtype": "bfloat16" if device == "cuda" else "float32"}
        found["beta"] = 0.1 if method in ("dpo", "calm") else 1.0  # as usual: the paper gives none
        found["pairs_per_question"] = 7 if xcsqa and method in ("dco", "dpo") else 1  # App. H
        if xcsqa and method == "dco" and self.lr is None and is_gemma(self.model):
            found["lr"] = 1e-6
        if not self.model:
            found |= {"lr": SCALED * LR[method], "epochs": 6, "batch_questions": 16}
            found["candidates"] = 6 if method == "dco" and self.pairs == "random" else 2
        found = {name: value for name, value in found.items() if getattr(self, name) is None}
        vars(self).update(found, shard=self.shard or self.offload)  # it is frozen from now on
        for name, least in AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if self.candidates != "all":
            if not str(self.candidates).isdecimal() or int(self.candidates) < 2:
                raise InputError(f"--candidates {self.candidates}: must be at least 2, or all")
            vars(self)["candidates"] = int(self.candidates)
        if self.warmup > 1:
            raise InputError(f"--warmup {self.warmup}: a share of the steps lies in [0, 1]")
        for name in ("beta", "lr", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)}: must be positive and finite")
        what = "--eval_only" if self.eval_only else f"--method {method}"
        for what in (what, f"--pairs {self.pairs}"):
            if unused := given & set(UNUSED.get(what, "").split()):
                raise InputError(f"--{min(unused)}: {what} has no use of it; leave it out")


def is_gemma(name: str) -> bool:
    """Whether a model's config.json names it a Gemma; False where there is none to read."""
    with suppress(*UNREADABLE):  # load_model tells of a damaged one
        found, _ = transformers.PretrainedConfig.get_config_dict(name)
        return str(found.get("model_type", "")).startswith("gemma")
    return False


def parse_config() -> Config:
    """The command line. Raises InputError for settings that do not exist or do not go together."""
    parser = transformers.HfArgumentParser(
        [What, Method, Optimizer, Machine, Output],
        prog="train.py",
        usage="[torchrun --nproc_per_node N] train.py [--SETTING VALUE ...]",
        description=Config.__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def fail(message):
        raise InputError(f"{message}; --help lists the settings")

    parser.error = fail
    for action in parser._actions:  # in the help, that is: --batch-questions is understood, too
        action.option_strings = action.option_strings[:1]
    given, unknown = parser.parse_known_args()
    if unknown:
        raise InputError(f"no such setting: {' '.join(unknown)}; --help lists them")
    if given.model and Path(given.model).is_dir():  # as run.json is to name it
        given.model = str(Path(given.model).resolve())
    path = Path(given.model, "run.json")
    if given.eval_only and given.model and path.is_file():
        run = read_json(path)
        weighed = given.trust or given.gamma or given.langs  # else as the run's languages were
        for name in OF_THE_RUN.split():
            if getattr(given, name) is None and not (weighed and name in ("trust", "gamma")):
                setattr(given, name, run[name])
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # torchrun began it anew
    given.resume |= bool(restarts and given.out)
    config = Config(**vars(given))
    least = 3 if config.method == "calm" else 2
    if len(config.langs) < least or "," in config.langs[0]:
        why = f"{config.method} takes {least} languages or more, with spaces between them"
        raise InputError(f"--langs {' '.join(config.langs)}: {why}, as en es")
    if not config.model and config.data != "atlas":
        raise InputError(f"--data {config.data} needs --model: without, there is atlas only")
    if config.resume and not config.out:
        raise InputError("--resume needs --out: the folder of the run to continue")
    return config


def gamma_matrix(config: Config) -> Tensor:
    """gamma (L, L) of --trust or --gamma; warns, with the rank, where Lemma 3 does not hold."""
    langs, L, weights = config.langs, len(config.langs), {}
    if config.trust and config.gamma:
        raise InputError("--trust and --gamma say the same thing twice: give one")
    flag, form = "--gamma", f"two numbers for two languages, or a JSON matrix {L} x {L}"
    if config.trust:
        flag, form = f"--trust {' '.join(config.trust)}", "LANG=NUMBER, as en=2"
    try:
        for lang, weight in (item.split("=") for item in config.trust):
            if lang in weights:
                raise ValueError(f"{lang!r} comes twice")
            if lang not in langs:
                raise ValueError(f"{lang!r} is not among --langs {' '.join(langs)}")
            weights[lang] = float(weight)
        if not config.gamma:
            trust = torch.tensor([weights.get(lang, 1.0) for lang in langs], dtype=torch.double)
            return dco.gamma_from_trust(trust, config.beta)
        gamma = torch.tensor([json.loads(item) for item in config.gamma], dtype=torch.double)
        gamma = gamma.squeeze(0) if gamma.ndim == 3 else gamma.diag_embed().flip(-1)
        dco.align_reward(torch.zeros(L, 2), gamma)  # raises for another shape or diagonal
        if not ((gamma >= 0) & gamma.isfinite()).all():
            raise ValueError("each entry must be finite and not negative")
    except (ValueError, TypeError) as error:
        raise InputError(f"{flag}: {error}; wanted: {form}") from error
    if not dco.is_consistent(gamma, config.beta):
        rank = torch.linalg.matrix_rank(gamma / config.beta + torch.eye(L, dtype=torch.double))
        found = f"Gamma has rank {rank}, not rank 1 with positive entries"
        print0(f"warning: {found}: pi* need not be consistent (Lemma 3)")
    return gamma


# ---------------------------------------------------------------------------- what a step trains on
Rows = list[list[Tree]]  # [question][language]


class Item(NamedTuple):
    """A draw of candidates from one question, with all that a step needs of it."""

    trees: list[Tree]  # one a language; where a method prefers an answer, that one is first
    ref_logps: Tensor  # (L, K) nats
    r_align: Tensor  # (L, K) nats: what DCO's r-hat is to become, up to a constant (Eq. 12)
    trained: list[int]  # the languages that learn from it
    id: str  # of the question


def select_candidates(question: Question, ref_logps: Tensor, number: int, config: Config) -> tuple:
    """Which candidates each language compares, the preferred first, (L, K), and who is trained."""
    L, K = ref_logps.shape
    trained = list(range(L))
    if config.method == "calm":  # the only one to look at ref_logps, (L, K)
        winner, own = dco.majority_vote(ref_logps)[0].expand(L), ref_logps.argmax(-1)
        return torch.stack([winner, own], -1), (own != winner).nonzero()[:, 0].tolist()
    if config.method == "dco" and config.pairs == "random":
        size = K if config.candidates == "all" else config.candidates
        chosen = data.sample(question, size, number, config.seed)
    else:
        order = data.sample(question, K, number, config.seed)
        chosen = [question.gold, next(k for k in order if k != question.gold)]
        chosen = chosen[:1] if config.method == "sft" else chosen
    if config.objective == "pairwise":  # Eq. 11 between two; not Eq. 15 where L > 2
        rng = random.Random(f"pair/{config.seed}/{question.id}/{number}")
        trained = sorted(rng.sample(trained, 2))
    return torch.tensor(chosen).expand(L, -1), trained


def make_batches(
    questions: list[Question], trees: Rows, ref_logps: Tensor, gamma: Tensor, config: Config
) -> Iterator[list[Item]]:
    """The items of each step, functions of seed and ids alone. ref_logps: (Q, L, K) nats."""
    L, size = len(config.langs), config.batch_questions
    for epoch in range(config.epochs):
        order = [*product(range(len(questions)), range(config.pairs_per_question))]
        random.Random(f"order/{config.seed}/{epoch}").shuffle(order)
        for first in range(0, len(order), size):
            items = []
            for q, number in order[first : first + size]:
                table = ref_logps[q, :, : questions[q].K]  # (L, K) of all its candidates
                chosen, trained = select_candidates(questions[q], table, number, config)
                ref = torch.full((L, ref_logps.shape[-1]), -torch.inf)
                ref[:, : chosen.shape[1]] = table.gather(-1, chosen)
                learns = torch.zeros(L).index_fill(0, torch.tensor(trained), 1.0)
                experts = gamma * learns * learns[:, None]  # of the languages that are trained
                rows = zip(trees[q], chosen.tolist(), strict=True)
                pruned = [t._replace(branches=[t.branches[k] for k in row]) for t, row in rows]
                r_align = dco.align_reward(ref, experts)
                items.append(Item(pruned, ref, r_align, trained, questions[q].id))
            yield items


def language_loss(logps: Tensor, ref_logps: Tensor, r_align: Tensor, config: Config) -> Tensor:
    """One language's term of the loss: (..., K) each, nats -> (...,)."""
    if config.method == "dco":
        return dco.dco_loss(logps, ref_logps, r_align, config.beta)  # Eq. 11
    if config.method == "sft":
        return dco.sft_loss(logps[..., 0])  # L^ML of the gold answer
    return dco.dpo_loss(logps, ref_logps, config.beta)  # Eq. 4; CALM is DPO on its votes


# ----------------------------------------------------------------------------------------- the loop
def train(
    model: nn.Module,
    batches: Iterator[list[Item]],
    total: int,
    config: Config,
    packed: bool,
    log: Callable[[dict], None],
    folder: Path | None = None,
    evaluate: Callable[[], dict] = dict,
) -> int:
    """Minimise the loss, summed over languages, averaged over a step's items; the tokens fed.

    What `evaluate` finds, every --eval_every steps, goes into the log and on the bar.
    Begins at the newest checkpoint in `folder`, and saves the step after SIGTERM or Ctrl-C. Raises
    FloatingPointError for a step that is not finite, before it is taken.
    """
    device = torch.device(config.device)
    model.train()  # for checkpointing; load_model has put dropout at zero
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if words.weight is head.weight and not config.shard:
        words.sparse = True  # else a second gradient of the whole vocabulary, mostly zeros
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0, fused=True)
    kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = transformers.get_scheduler(kind, optimizer, round(config.warmup * total), total)
    state = load_checkpoint(folder, model, optimizer, scheduler) if folder else {}
    done, tokens = state.get("step", 0), state.get("tokens", 0)
    mixed = autocast(config, device)
    steps, shown = progress(islice(batches, done, None), "train", total, done), {}
    with stop_flags() as flags:
        for step, items in enumerate(steps, done + 1):
            ref = torch.stack([item.ref_logps for item in items])  # (B, L, K)
            r_align = torch.stack([item.r_align for item in items])  # (B, L, K)
            targets = dco.send(torch.stack([ref, r_align]), device)  # (2, B, L, K)
            results = torch.zeros(*ref.shape[:2], 1 + ref.shape[2], device=device)  # loss, logps
            for (b, i), batch, weight in local_microbatches(model, items, config, packed):
                with mixed:
                    got = dco.completion_logps(model, batch, packed)  # (T, up to K)
                loss = language_loss(got, *targets[:, b, i, : got.shape[1]], config)  # (T,)
                (weight * loss.sum()).backward()
                if weight:
                    found = torch.cat([loss[:, None], got], 1).detach()
                    results[b, i, : found.shape[1]] = found
            sum_gradients(weights, config)
            norm = torch.nn.utils.clip_grad_norm_(weights, config.grad_clip or torch.inf)
            norm = norm.full_tensor() if config.shard else norm
            reduced = torch.cat([dco.send(torch.tensor(flags), device), results.flatten()])
            dist.all_reduce(reduced)  # a row is zero but on the process that fed it
            reduced = torch.cat([norm.view(1).to(device), reduced]).cpu()  # the one wait for a GPU
            norm, terminated, interrupted = reduced[:3]
            results = reduced[3:].view(results.shape)
            losses, logps = results[..., 0], results[..., 1:]  # (B, L), (B, L, K)
            if not (losses.isfinite().all() and norm.isfinite()):
                raise diverged(step, items, losses)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            tokens += sum(item.trees[i].tokens(packed) for item in items for i in item.trained)
            metrics = step_metrics(items, logps, ref, r_align, losses, config)
            if config.eval_every and step % config.eval_every == 0:
                looked = evaluate()
                model.train()
                metrics |= looked
                shown = {name.rpartition("/")[2]: share for name, share in looked.items()}
            steps.set_postfix(loss=metrics["loss"], **shown, refresh=False)
            log({"step": step, **metrics, "grad_norm": float(norm), "lr": lr})
            stop = signal.SIGTERM if terminated else signal.SIGINT if interrupted else None
            due = config.save_every and (step % config.save_every == 0 or step == total)
            if folder and (stop or due):
                state = {"step": step, "tokens": tokens, "scheduler": scheduler.state_dict()}
                save_checkpoint(folder, model, optimizer, state)
            if stop:
                print0(f"stopped by {stop.name}: step {step} of {total} is saved{CONTINUE}")
                raise SystemExit(128 + stop)
    return tokens


def local_microbatches(model: nn.Module, items: list, config: Config, packed: bool) -> Iterator:
    """Micro-batches of this process: items and languages of its rows, (2, T), a Pack, a weight."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [assign_microbatches(items, config, packed, each, world) for each in range(world)]
    # FSDP gathers a layer's weights on all processes at once: all feed as often, some a row of
    # weight zero; and it takes the mean over processes, where the loss is a sum.
    idle = max(map(len, groups)) - len(groups[rank]) if config.shard else 0
    width = model.config.get_text_config().hidden_size
    device = torch.device(config.device)
    for rows in groups[rank] + [[]] * idle:  # packed while a GPU is at work on the one before
        weight = (world if config.shard else 1) / len(items) if rows else 0.0
        rows = rows or [(0, items[0].trained[0])]
        batch = dco.pack([items[b].trees[i] for b, i in rows], width, packed, device)
        yield dco.send(torch.tensor(rows).T, device), batch, weight


def assign_microbatches(items: list, config: Config, packed: bool, rank: int, world: int) -> list:
    """What a process feeds at once: rows (item, language), of which each is a term."""
    # Dealt longest first, to the first process and on to the last, then back, so that none waits.
    rows = [(b, i) for b, item in enumerate(items) for i in item.trained]
    rows.sort(key=lambda row: -items[row[0]].trees[row[1]].tokens(packed))
    turns = rank, 2 * world - 1 - rank
    mine = [row for n, row in enumerate(rows) if n % (2 * world) in turns]
    trees = [items[b].trees[i] for b, i in mine]
    return [[mine[n] for n in group] for group in data.batches(trees, config.max_tokens, packed)]


def sum_gradients(weights: list[nn.Parameter], config: Config) -> None:
    """Data parallelism: each gradient becomes its sum over processes. FSDP has done so already."""
    for weight in weights:
        if weight.grad is None:  # this process had no row to feed, or none that needs this weight
            weight.grad = torch.zeros_like(weight)
    if dist.get_world_size() > 1 and not config.shard:
        for pending in [dist.all_reduce(weight.grad, async_op=True) for weight in weights]:
            pending.wait()


def diverged(step: int, items: list[Item], losses: Tensor) -> FloatingPointError:
    """The error of a step that cannot be taken; losses: (B, L)."""
    bad = [item for item, row in zip(items, losses, strict=True) if not row.isfinite().all()]
    ids = ", ".join(dict.fromkeys(repr(item.id) for item in bad or items))
    where = f"the {'loss' if bad else 'gradient'} of questions {ids} is NaN or infinite"
    left = "the checkpoints before it stay. Begin anew with a lower --lr"
    return FloatingPointError(f"step {step}: {where}; it was not taken, and {left}")


def step_metrics(
    items: list[Item], logps: Tensor, ref: Tensor, r_align: Tensor, losses: Tensor, config: Config
) -> dict:
    """What the log shows of a step; margins are of the first two answers.

    logps, ref, r_align: (B, L, K); losses: (B, L), 0 where a language is not trained.
    """
    L, found = len(config.langs), {"loss": float(losses.sum() / len(items))}
    used = torch.tensor([[i in item.trained for i in range(L)] for item in items])  # (B, L)
    name, unit = ("residual", config.beta) if config.method == "dco" else ("loss", 1.0)
    mean = losses.sum(0) / used.sum(0).clamp(min=1) / unit  # (L,) a residual is in nats
    found |= {f"{name}/{lang}": float(x) for lang, x in zip(config.langs, mean, strict=True)}
    for name, nats in (("probability", logps), ("probability_ref", ref)):  # of all answers drawn
        mass = (nats.exp() * ref.isfinite()).sum(-1)  # (B, L)
        for i in used.any(0).nonzero()[:, 0].tolist():
            found[f"{name}/{config.langs[i]}"] = float(mass[used[:, i], i].mean())
    if config.method == "sft":
        return found
    r_hat = dco.implicit_reward(logps, ref, config.beta)
    margin, target = (x[..., 0] - x[..., 1] for x in (r_hat, r_align))  # (B, L)
    if config.method != "dco":
        means = {"rewards/margin": margin[used], "rewards/accuracy": (margin[used] > 0).float()}
    else:
        first, (a, b) = logps[..., 0] > logps[..., 1], torch.triu_indices(L, L, 1)
        alike = (first[:, a] == first[:, b])[used[:, a] & used[:, b]]
        means = {"rewards/margin": (margin * target.sign())[used]}  # towards the target
        means |= {"rewards/target": target[used].abs(), "consistent": alike.float()}
    return found | {name: float(values.mean()) for name, values in means.items()}


# ---------------------------------------------------------------------- processes, and how they end
def init_distributed(config: Config) -> torch.device:
    """Join the process group that torchrun's environment describes, or make one of one process."""
    device = torch.device(config.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this torch sees no GPU")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if config.dtype == "bfloat16":  # TF32 for the head: finer, and much faster than float32
            torch.set_float32_matmul_precision("high")
    else:
        reuse_memory()
    transformers.utils.logging.disable_progress_bar()  # one bar at a time
    timeout = timedelta(minutes=config.timeout)
    store, rank, world = dist.HashStore(), 0, 1
    if "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # torch's store outlives a restart, and would send workers to those of before it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # --offload is on both
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    if config.offload and device.type == "cpu":
        print0("--offload: without a GPU it does what --shard does")
    return device


def reuse_memory() -> None:
    """Have glibc keep what torch frees: new pages for each step's gradients take a third of it."""
    with suppress(AttributeError, TypeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is not given back


def print0(text: str) -> None:
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


@contextmanager
def stop_flags() -> Iterator[list[float]]:
    """While it lasts, SIGTERM and Ctrl-C only set the first or second of these flags to 1."""
    flags, numbers = [0.0, 0.0], (signal.SIGTERM, signal.SIGINT)

    def on_signal(number, _):
        flags[numbers.index(number)] = 1.0
        with suppress(OSError):  # Ctrl-C may have closed what stands behind a pipe
            os.write(2, b"finishing the step, then saving\n" * (dist.get_rank() == 0))

    before = [signal.signal(number, on_signal) for number in numbers]
    try:
        yield flags
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run(main: Callable[[], None]) -> None:
    """Call main. What a user can mend ends in a line: status 2 for bad input, otherwise 1."""
    status, rank = 1, os.environ.get("RANK", "0")

    def end(message, who=f"process {rank}: " * (rank != "0")):
        print(f"{who}error: {message}", file=sys.stderr, flush=True)

    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        main()
        dist.barrier()  # leave together: one that left early has aborted, now and then
        status = 0
    except KeyboardInterrupt:
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends another
            signal.signal(number, signal.SIG_IGN)
        status = 130
        if rank == "0":
            end(f"stopped{CONTINUE}")
    except (InputError, FloatingPointError) as error:  # the same on every process: said once
        status = 2 if isinstance(error, InputError) else 1
        if os.environ.get("LOCAL_RANK", "0") == "0":
            end(error, "")
    except OSError as error:
        end(f"could not be read or saved: {error}{CONTINUE}")
    except RuntimeError as error:  # gloo and the CPU's allocator have no classes of their own
        text = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            less = "lower --max_tokens; take --gradient_checkpointing, --shard or --offload"
            end(f"out of memory; {less}{CONTINUE}. {text}")
        elif isinstance(error, dist.DistError) or re.search("gloo|pair closure", str(error)):
            lost = "lost the other processes, of which one ended, or the network failed"
            end(f"{lost}{CONTINUE}. {text}")
        else:
            raise
    finally:
        if dist.is_initialized() and (status == 0 or dist.get_backend() == "gloo"):
            dist.destroy_process_group()  # NCCL would wait for what failed
    if status:
        sys.exit(status)


def progress(steps: Iterable, desc: str, total: int, done: int = 0) -> tqdm:
    """Steps under a bar on rank 0 or, without a terminal, a line every ten seconds; "" for none."""
    line = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}\n"
    look = {"leave": False, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        look = {"leave": True, "mininterval": 10, "bar_format": line}
    return tqdm(steps, desc, total, initial=done, disable=dist.get_rank() > 0 or not desc, **look)


# ------------------------------------------------------------------------------ loading and scoring
def load_splits(config: Config) -> rankc.Splits:
    """The questions of "train", "validation" and "test", but for what is empty.

    Validation takes questions after the test's, so it changes neither part. Raises InputError.
    """
    questions, kind = data.load(config.data, config.langs, print0), config.data.partition(":")[0]
    number, subjects = config.train_questions, (config.train_subjects, config.test_subjects)
    if number is None and not config.train_subjects:
        number = data.TRAIN_QUESTIONS.get(kind, 0)
        if not number and not config.eval_only:
            asked = f"how many of {len(questions)} to train on? The others are held out"
            raise InputError(f"--train_questions: {asked}")
        if config.test_subjects:
            number = min(number, sum(q.subject not in config.test_subjects for q in questions))
    more, end = config.validation_questions, config.test_questions
    _, rest = data.split(questions, number, None, config.split_seed, *subjects)
    if more > (left := max(0, len(rest) - (1 if end is None else end))):
        least = ", of one at least" * (end is None)
        others = f"only {left} are left by the training part and the test's{least}"
        raise InputError(f"--validation_questions {more}: {others}")
    end = len(rest) - more if end is None else end
    train, test = data.split(questions, number, end, config.split_seed, *subjects)
    splits = {"train": train, "validation": rest[end : end + more], "test": test}
    splits = {name: part for name, part in splits.items() if part}
    if "train" not in splits and not config.eval_only:
        raise InputError("--train_questions 0: there is nothing to train on")
    unlabelled = [question.id for question in splits.get("train", []) if question.gold is None]
    if unlabelled and (config.method in ("sft", "dpo") or config.pairs == "gold"):
        lack = f"which {len(unlabelled)} training questions lack, {unlabelled[0]!r} first"
        flag = "--pairs gold" if config.method == "dco" else f"--method {config.method}"
        raise InputError(f"{flag} learns from right answers, {lack}")
    return splits


def hub_is_reached() -> bool:
    """Whether there is a network with the Hugging Face hub in it."""
    try:
        url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        urlopen(Request(url, method="HEAD"), timeout=10).close()
    except OSError as error:
        why = getattr(error, "reason", error)  # others, as a status, tell that it is there
        return not isinstance(why, (socket.gaierror, ConnectionError, TimeoutError))
    return True


def load_model(config: Config) -> tuple[nn.Module, Any]:
    """The model in float32, with dropout off, and its tokenizer.

    Rank 0 alone reads the weights: elsewhere they are on `meta` until `distribute` sends them.
    Raises InputError where no causal language model can be loaded.
    """
    name, remote = config.model, {"trust_remote_code": config.trust_remote_code}
    adapters = Path(name, "adapter_config.json").is_file()
    if adapters and not Path(name, "config.json").is_file():
        merge = "merge them into their model first (peft's merge_and_unload), and name the result"
        raise InputError(f"--model {name} holds adapters alone; {merge}")
    if not Path(name).is_dir() and not hub_is_reached():
        remote["local_files_only"] = True  # what was downloaded before; else a try for each file
    try:
        settings = transformers.AutoConfig.from_pretrained(name, **remote)
        for part in (settings, settings.get_text_config()):
            for key, value in part.to_dict().items():
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)  # else policy and reference differ at step 0
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **remote)
        auto, how = transformers.AutoModelForCausalLM, {"dtype": torch.float32, **remote}
        if dist.get_rank() > 0:
            with torch.device("meta"):
                model = auto.from_config(settings, **how)
        else:
            how |= {"config": settings, "use_safetensors": True, "output_loading_info": True}
            model, found = auto.from_pretrained(name, **how)
            if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
                raise ValueError(f"{len(missing)} weights are not in it, {missing[0]} first")
    except UNREADABLE as error:
        where = "" if Path(name).is_dir() else " (there is no such folder)"
        if "local_files_only" in remote:
            where = " (no such folder, and the hub is not reached)"
        form = "wanted is a folder or hub name with config.json, tokenizer and .safetensors"
        form += " (.bin may run code, and GGUF is not read)"
        wrong = f"--model {name}{where}: no causal language model can be loaded from it"
        why = str(error).partition("\n")[0] or repr(error)
        raise InputError(f"{wrong}; {form}. {why}") from error
    model.requires_grad_(False)  # no text reaches what is for pictures, as Gemma 3's vision tower
    for part in (model.get_decoder(), model.get_output_embeddings()):
        part.requires_grad_(True)
    return model, tokenizer


def distribute(model: nn.Module, config: Config, device: torch.device) -> None:
    """Give every process rank 0's weights on its device; with --shard (FSDP2) its share of each.

    A share is gathered where a layer computes. Raises InputError where no layers are found.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import

    rank = dist.get_rank()

    def receive(modules):
        place = torch.empty_like if rank else Tensor.to  # rank 0 has what it sends
        for module in modules if rank or device.type != "cpu" else []:
            module._apply(partial(place, device=device), recurse=False)
        model.tie_weights()  # a weight that two modules had was placed twice
        own = (t for m in modules for t in (*m.parameters(False), *m.buffers(False)))
        for tensor in {id(t): t for t in own}.values():
            dist.broadcast(tensor.detach(), 0)

    if not config.shard:
        return receive([*model.modules()])
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        name = type(model).__name__
        raise InputError(f"--shard: {name} has no decoder layers that transformers knows as such")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    how = {"mesh": mesh, "reshard_after_forward": True, "offload_policy": fsdp.OffloadPolicy()}
    if config.offload:
        how["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    dtypes = (torch.bfloat16, torch.float32) if config.dtype == "bfloat16" else (None, None)
    mixed = fsdp.MixedPrecisionPolicy(*dtypes)  # autocast would keep a copy of each weight
    inside = {module for layer in layers for module in layer.modules()}
    for layer in layers:  # one after the other: no process but rank 0 ever has the whole model
        receive([*layer.modules()])
        fsdp.fully_shard(layer, mp_policy=mixed, **how)
    receive([module for module in model.modules() if module not in inside])
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[0].weight is not ends[1].weight:  # else both are the root's
        for part in ends:
            fsdp.fully_shard(part, **how)
    fsdp.fully_shard(model, **how)  # in float32: the head's logits


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """bfloat16 products over float32 weights; without its cache, a second copy of the model."""
    enabled = config.dtype == "bfloat16" and not config.shard  # there FSDP converts
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


@torch.no_grad()
def score(
    model: nn.Module, trees: Rows, config: Config, packed: bool, desc: str = "", ids: Any = ()
) -> Tensor:
    """log pi(y|x): trees [question][language] -> (Q, L, K) nats, on every process.

    Raises FloatingPointError, naming questions by their ids, where one is NaN or infinite.
    """
    model.eval()
    flat = [tree for row in trees for tree in row]
    rank, world, device = dist.get_rank(), dist.get_world_size(), torch.device(config.device)
    groups = data.batches(flat, config.max_tokens, packed)
    sizes = torch.tensor([len(tree.branches) for tree in flat])
    missing = torch.arange(int(sizes.max())) >= sizes[:, None]  # (trees, K)
    table = torch.zeros(missing.shape, device=device)
    rounds = range(rank, -(-len(groups) // world) * world, world)  # FSDP: as many for every process
    with autocast(config, device):
        for n in progress(rounds, desc, len(rounds)):
            group = groups[min(n, len(groups) - 1)]
            logps = dco.completion_logps(model, [flat[t] for t in group], packed)
            if n < len(groups):
                table[dco.send(torch.tensor(group), device), : logps.shape[1]] = logps
    dist.all_reduce(table)  # a row is zero but on the process that scored it
    table = table.cpu().masked_fill(missing, 0.0)
    if where := (~table.isfinite()).view(len(trees), -1).any(-1).nonzero()[:, 0].tolist():
        names = ", ".join(repr(ids[q] if ids else q) for q in where[:5])
        found = f"log-probs are NaN or infinite in {len(where)} of {len(trees)} questions: {names}"
        broken = f"the model is broken, or overflows in {config.dtype}"
        raise FloatingPointError(f"{desc}: {found}; {broken}")
    return table.masked_fill_(missing, -torch.inf).view(len(trees), -1, table.shape[1])


# -------------------------------------------------------------------------------------- checkpoints
def atomic_rename(part: Path, path: Path) -> None:
    """Put a finished file or folder in its place: fsync what it holds, then rename."""
    for file in part.iterdir() if part.is_dir() else [part]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    part.replace(path)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file such that it is there whole, or as it was before."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:  # of a full disk, which does not name the file
        raise OSError(f"{path}: {error}") from error
    atomic_rename(part, path)


def read_json(path: Path) -> dict:
    """The settings in a run.json. Raises InputError where another program wrote it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {each.name: found[each.name] for each in fields(Config)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} was not written by this train.py ({error!r})") from error


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    found = folder.glob("step-*/state.json")
    return sorted(int(number) for path in found if (number := path.parent.name[5:]).isdigit())


MOMENTS = "exp_avg", "exp_avg_sq"


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained weights and AdamW's two moments of each, by name; a tied weight once."""
    weights = [(name, w) for name, w in model.named_parameters() if w.requires_grad]
    moments = [(f"{name}.{x}", optimizer.state[w][x]) for name, w in weights for x in MOMENTS]
    return dict(weights + moments)


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Any, state: dict) -> None:
    """Write step-N/, each process its own shards as safetensors, and keep the last two.

    Raises OSError, and leaves the others as they are, where the disk is full.
    """
    path, rank = folder / f"step-{state['step']}", dist.get_rank()
    part = path.with_name(path.name + ".part")
    if rank == 0:
        for left in (part, path):  # of a run that was killed while it wrote, or removed
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    try:
        tensors = training_state(model, optimizer)
        files = {name: n for n, name in enumerate(tensors, 1)}  # each is in memory twice meanwhile
        writer = dcp.HuggingFaceStorageWriter(part, files, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        if rank == 0:
            sizes = {file.name: file.stat().st_size for file in part.iterdir()}
            (part / "state.json").write_text(json.dumps({**state, "sizes": sizes}))
            atomic_rename(part, path)
            for old in [folder / f"step-{step}" for step in saved_steps(folder)[:-2]]:
                (old / "state.json").unlink()  # first: without it the rest is no checkpoint
                shutil.rmtree(old)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(part, ignore_errors=True)
        left = f"step {state['step']} was not saved, steps {saved_steps(folder)} are whole"
        raise OSError(f"{cause(error)}; {left}") from error
    dist.barrier()


def cause(error: BaseException) -> BaseException:
    """What went wrong, of the first process whose part of a checkpoint failed."""
    failed = [each for each, _ in getattr(error, "failures", {}).values()] or [error]
    if interrupted := [each for each in failed if isinstance(each, KeyboardInterrupt)]:
        raise interrupted[0]
    return failed[0]


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> dict:
    """Restore the newest checkpoint on any number of processes, sharded or not; {} without one.

    Raises InputError, naming it, where it is damaged or of another model.
    """
    if not (steps := saved_steps(folder)):
        return {}
    path = folder / f"step-{steps[-1]}"
    for weight in optimizer.param_groups[0]["params"]:
        optimizer.state[weight] = {kind: torch.zeros_like(weight) for kind in MOMENTS}
        optimizer.state[weight]["step"] = torch.tensor(float(steps[-1]), device=weight.device)
    try:
        state = json.loads((path / "state.json").read_text())
        found = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
        whole = (found, steps[-1]) == (state["sizes"], state["step"])
        if not whole or not isinstance(state["tokens"], int):
            raise ValueError("files are missing, or of another size or step")
        reader = dcp.HuggingFaceStorageReader(path)
        dcp.load(training_state(model, optimizer), storage_reader=reader)
        scheduler.load_state_dict(state["scheduler"])
        optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
    except (dcp.CheckpointException, OSError, ValueError, KeyError, TypeError) as error:
        wrong = f"{path} is damaged, or of another model ({cause(error)!r})"
        without = "remove it, and --resume continues from the one before"
        raise InputError(f"{wrong}; {without}") from error
    return state


def load_or_compute(path: Path, shapes: dict, compute: Callable[[], dict]) -> dict[str, Tensor]:
    """The tables of these shapes in a safetensors file; computed and saved if it is absent.

    Raises InputError where the file is damaged, or of other questions.
    """
    if path.exists():
        try:
            tables = load_file(path)
            if {name: table.shape for name, table in tables.items()} != shapes:
                raise ValueError("scores of other questions")
            return tables
        except (OSError, ValueError, SafetensorError) as error:
            wrong = f"{path} is damaged, or of other questions ({error})"
            raise InputError(f"{wrong}; remove it, or name another --out") from error
    tables = compute()
    if dist.get_rank() == 0:
        atomic_write(path, save(tables))
    return tables


def choose_folder(config: Config) -> tuple[Path, bool]:
    """--out, or the first free one of runs/1, runs/2, ...; and whether it holds a run to resume.

    Raises InputError for a folder that holds something else, or a run of other settings.
    """
    free = (str(path) for n in count(1) if not (path := Path("runs", str(n))).exists())
    chosen = [config.out or next(free)]
    dist.broadcast_object_list(chosen)  # of rank 0
    out = Path(chosen[0])
    there = [path.name for path in out.iterdir()] if out.is_dir() else [out.name] * out.exists()
    if set(there) <= {"run.json.part"}:  # new, or killed before it began
        return out, False
    if not config.resume:
        go_on = "of a run that was killed: --resume continues it"
        raise InputError(f"--out {out} is not empty; name another, or remove it ({go_on})")
    old, new = read_json(out / "run.json"), asdict(config)
    pairs = {name: (old[name], new[name]) for name in new if name not in rankc.MACHINE.split()}
    if differ := "; ".join(f"{name} {a!r}, now {b!r}" for name, (a, b) in pairs.items() if a != b):
        begun = f"--resume: {out} was begun with other settings: {differ}"
        raise InputError(f"{begun}. Give those, or another --out")
    return out, True


def begin(out: Path, config: Config, done: int) -> None:
    """Make the folder of a run: run.json holds its settings and what it runs on."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    made = {**asdict(config), "out": str(out), "processes": dist.get_world_size()}
    made |= {"torch": torch.__version__, "transformers": transformers.__version__, "git": None}
    with suppress(FileNotFoundError):
        made["git"] = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "run.json", json.dumps(made, indent=1))
    (out / "checkpoint").mkdir(exist_ok=True)  # after run.json, by which a run is known
    # a line a step: what a killed run logged after its last checkpoint is logged again
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)[:done] if done else []
    if not config.eval_only:
        atomic_write(out / "log.jsonl", "".join(lines))


def save_model(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """The model as a Hugging Face folder. Raises OSError where the disk is full."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(model, options=options)  # {} but on rank 0
    if dist.get_rank() == 0:
        names = {name for name, _ in model.named_parameters()}  # a tied weight once
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tensors = {name: t for name, t in tensors.items() if name not in every - names}
        try:
            model.save_pretrained(out, state_dict=tensors)
            tokenizer.save_pretrained(out)
        except SafetensorError as error:
            raise OSError(f"the model in {out}: {error}") from error


# ------------------------------------------------------------------------------- the embedded model
def embedded_model(config: Config, known: bool) -> tuple[nn.Module, Any]:
    """A tiny Llama over whole words that has learnt real facts unevenly, and its tokenizer.

    Each language has its share of them (COVERAGE), drawn by the seed, and the countries' names from
    the first language and into it. One whose weights are `known`, from a checkpoint, is not taught.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts, facts = [], []
    for question in data.load("atlas", config.langs):
        for lang in config.langs:
            sentences = [question.prompts[lang] + answer for answer in question.answers[lang]]
            texts += sentences
            if random.Random(f"{config.seed}/{question.id}/{lang}").random() < COVERAGE[lang]:
                facts.append(sentences[question.gold])
    first, *rest = config.langs
    pairs = [pair for lang in rest for pair in ((first, lang), (lang, first))]
    facts += [f"{r[a]} = {r[b]}" for r in data.atlas() if r["relation"] == "of" for a, b in pairs]
    words = dict.fromkeys(word for text in texts + facts for word in text.split())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(config.seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes, **special))
    if known:
        return model, tokenizer
    taught = [torch.tensor(ids) for ids in tokenizer(facts)["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.5, betas=(0.9, 0.98))
    scheduler = transformers.get_scheduler("cosine", optimizer, 40, 1400)
    rng = random.Random(config.seed)
    for _ in (bar := progress(range(1400 if dist.get_rank() == 0 else 0), "pretrain", 1400)):
        batch = pad_sequence(rng.sample(taught, 96), batch_first=True)
        labels, mask = batch.masked_fill(batch == 0, -100), (batch > 0).long()
        loss = model(input_ids=batch, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=loss.item(), refresh=False)
    return model, tokenizer


# ---------------------------------------------------------------------------------- from end to end
def describe(
    model: nn.Module, tokenizer: Any, splits: rankc.Splits, trees: dict, total: int, config: Config
) -> str:
    """What is about to be done, and an example in two languages as the model will see it."""
    size, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    where = f"computed in {config.dtype}, on {dist.get_world_size()} x {config.device}"
    where += ", sharded" * config.shard + ", offloaded" * config.offload
    lines = [f"{size:,} parameters, {trained:,} trained, {where}"]
    parts = ", ".join(f"{len(part)} questions to {name}" for name, part in splits.items())
    lines += [f"{config.data} in {' '.join(config.langs)}: {parts}"]
    if not config.eval_only:
        unused = UNUSED.get(f"--method {config.method}", "").split()
        names = "batch_questions epochs beta trust gamma objective candidates pairs lr schedule"
        used = {name: getattr(config, name) for name in names.split() if name not in unused}
        used = [f"{x} {y:g}" if isinstance(y, float) else f"{x} {y}" for x, y in used.items() if y]
        sizes = [question.K for question in splits["train"]]
        if config.candidates != "all" and (fewer := sum(K < config.candidates for K in sizes)):
            used += [f"{fewer} questions have fewer candidates"]
        bound = "at most " * (config.method == "calm")  # the votes are not counted yet
        lines += [f"{config.method}, {bound}{total} steps: {', '.join(used)}"]
    for lang, tree in zip(config.langs[:2], next(iter(trees.values()))[0], strict=False):
        answers = [tokenizer.decode(branch) for branch in tree.branches]
        lines += [f"  {lang}: {tokenizer.decode(tree.prefix)!r} + {answers}"]
    return "\n".join(lines)


def doubts(splits: rankc.Splits, trees: dict, base: dict, config: Config) -> Iterator[str]:
    """What makes a number of the report mislead; base: a table (Q, L, K) of each split."""
    langs = config.langs
    yield from data.doubts([q for part in splits.values() for q in part], langs)
    rows = [row for part in trees.values() for row in part]
    alike = [any(len({*map(tuple, t.branches)}) < len(t.branches) for t in row) for row in rows]
    if same := sum(alike):
        yield f"{same} of {len(rows)} questions have answers of the same tokens: they tie"
    for split, scores in base.items():
        ties = (scores.sort(-1).values.diff() == 0).any(-1).double().mean(0)  # (L,) not -inf's
        for lang, share in zip(langs, ties.tolist(), strict=True):
            if share > 0.05:
                found = f"candidates tie in {100 * share:.0f}% of {split}, {lang}"
                yield f"{found}: CLC and the best answer then follow their order"
        level, matrix = rankc.chance_levels([q.K for q in splits[split]])[0], rankc.clc(scores)
        for i, j in combinations(range(len(langs)), 2):
            if matrix[i, j] < level - 0.03:
                below = f"CLC of {langs[i]} and {langs[j]} in {split} is below chance"
                yield f"{below}: do their answers stand in the same order?"


def forecast(splits: rankc.Splits, base: dict, ref_logps: dict, config: Config) -> str:
    """Where pi* is less right than the base, and the least trust that mends it; "" where nowhere.

    A point less counts as mended: more trust than needed moves the other languages' targets away.
    Looks at the validation part or, without one, at the training part: not at the test's labels.
    """
    split = next(name for name in ("validation", "train", "test") if name in splits)
    known = [q for q, question in enumerate(splits[split]) if question.gold is not None]
    gold = torch.tensor([splits[split][q].gold for q in known], dtype=torch.long)
    if not known or config.gamma:
        return ""

    def right(trust):
        gamma = dco.gamma_from_trust(trust, config.beta)
        return rankc.accuracy(dco.optimal_policy(ref[known], gamma, config.beta), gold)

    weights, ref = dict.fromkeys(config.langs, 1.0), ref_logps[split].double()
    weights |= {lang: float(x) for lang, x in (item.split("=") for item in config.trust)}
    trust = torch.tensor([*weights.values()], dtype=torch.double)
    before, after, lines = rankc.accuracy(base[split][known], gold), right(trust), []
    enough = before - 0.01  # (L,)
    for i in (after < enough).nonzero()[:, 0].tolist():
        lang, shares = config.langs[i], f"{100 * after[i]:.1f}, not {100 * before[i]:.1f}"
        told = f"the optimum is less right than the base in {lang} ({shares}; {split})"
        for factor in (1.5, 2, 3, 5, 10, 20, 50, 100):
            more = trust.clone()
            more[i] *= factor
            if (found := right(more)[i]) >= enough[i]:
                told += f"; --trust {lang}={more[i]:g} would make it {100 * found:.1f}"
                break
        lines.append(told)
    return "\n".join(lines)


def changes(questions: list[Question], base: Tensor, trained: Tensor, langs: list[str]) -> str:
    """The first few questions some of whose answers changed: right or wrong, before and after."""
    lines, before, after = [], base.argmax(-1), trained.argmax(-1)  # (Q, L)
    for q in (before != after).any(1).nonzero()[:4, 0].tolist():
        question, gold = questions[q], questions[q].gold
        lines += [f"  {question.prompts[langs[0]].strip().partition(chr(10))[0]} ..."]
        marks = ["" if gold is None else "✓ " if k == gold else "✗ " for k in range(question.K)]
        for lang, old, new in zip(langs, before[q].tolist(), after[q].tolist(), strict=True):
            told = [x + y.strip() for x, y in zip(marks, question.answers[lang], strict=True)]
            lines += [f"    {lang}  {told[old]}" + f"  ->  {told[new]}" * (old != new)]
            if gold not in (None, new):
                lines[-1] += f"  (right: {question.answers[lang][gold].strip()})"
    return "\n".join(lines)


def main() -> None:
    config, seconds, started = parse_config(), {}, time.time()
    if not config.model:
        torch.set_num_threads(1)  # as fast as two for a model this small, faster on a busy machine
    device, langs = init_distributed(config), config.langs
    rank, gamma = dist.get_rank(), gamma_matrix(config)

    def lap(name):
        seconds[name] = round(time.time() - started - sum(seconds.values()), 2)

    out, resumed = choose_folder(config)
    folder, finished = out / "checkpoint", resumed and (out / "metrics.json").exists()
    dist.barrier()  # all have looked before one writes
    if finished:
        shutil.rmtree(folder, ignore_errors=True)
        return print0(f"resume: {out} is finished, nothing is left to do")
    splits, done = load_splits(config), max(saved_steps(folder), default=0)
    print0(f"loading {config.model or 'the embedded model'}; what is written goes to {out}")
    kept = folder / "reference.safetensors"
    if config.model:
        model, tokenizer = load_model(config)
    else:
        model, tokenizer = embedded_model(config, known=done > 0 and kept.exists())
    distribute(model, config, device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    trees = {s: data.encode(tokenizer, part, langs, context) for s, part in splits.items()}
    every = [tree for rows in trees.values() for row in rows for tree in row]
    some = [max(every, key=Tree.tokens), every[0]]
    computed = getattr(torch, config.dtype if config.shard else "float32")
    packed = dco.packs_exactly(model, some, autocast(config, device), computed)
    if not packed:
        found = "this model does not score packed questions as it scores separate ones"
        print0(f"warning: {found}; scoring each answer apart, which is slower")
    draws = len(splits.get("train", [])) * config.pairs_per_question
    total = config.epochs * -(-draws // config.batch_questions)
    if config.resume:
        print0(f"resume: {out}, " + (f"from step {done} of {total}" if resumed else "a new run"))
    if rank == 0:
        begin(out, config, done)
    dist.barrier()
    print0(describe(model, tokenizer, splits, trees, total, config))
    lap("load")

    def score_splits(desc, parts=splits):
        tables = {}
        for name, part in parts.items():
            rows, ids = trees[name][: len(part)], [question.id for question in part]
            tables[name] = score(model, rows, config, packed, desc and f"{desc} {name}", ids)
        return tables

    def ranked(sums):  # what --score ranks answers by
        if config.score == "sum":
            return sums
        parts = {s: trees[s][: len(sums[s])] for s in sums}
        flat = {s: [torch.tensor(t.scored()) for row in parts[s] for t in row] for s in sums}
        return {s: sums[s] / pad_sequence(flat[s], True, 1).view_as(sums[s]) for s in sums}

    shapes = {s: (len(part), len(langs), max(q.K for q in part)) for s, part in splits.items()}
    ref_logps = load_or_compute(kept, shapes, partial(score_splits, "reference"))
    lap("reference")
    base = ranked(ref_logps)
    optimum = {s: dco.optimal_policy(t.double(), gamma, config.beta) for s, t in ref_logps.items()}
    reached = "joint " * (config.objective == "pairwise" and len(langs) > 2) + "optimum"
    sums, tables = {"base": ref_logps, reached: optimum}, {"base": base, reached: optimum}
    for warning in doubts(splits, trees, base, config) if rank == 0 else ():
        print0(f"warning: {warning}")
    sizes = [question.K for questions in splits.values() for question in questions]
    metrics = {"languages": langs, "chance": rankc.chance_levels(sizes)[0]}
    by_subject = bool(config.train_subjects or config.test_subjects)
    if rank == 0 and config.method == "dco":
        if told := forecast(splits, base, ref_logps, config):
            print0(f"\n{told}")
    print0(rankc.report(splits, tables, langs, metrics, by_subject, sums) + "\n")
    last = list(splits)[-1]
    watched = "validation" if "validation" in splits else last
    seen = splits[watched][: config.eval_questions or None]

    def look(scores=None):  # at the questions of --eval_every: these scores, or new ones
        scores = scores or ranked(score_splits("", {watched: seen}))
        found = rankc.by_question(scores[watched][: len(seen)], [q.gold for q in seen], langs)
        names = ["clc", *(f"accuracy {lang}" for lang in langs)]
        found = {x: found[x].nanmean().item() for x in names if not found[x].isnan().all()}
        return {f"eval/{x.replace(' ', '/')}": share for x, share in found.items()}

    if not config.eval_only:
        questions, rows, ref = splits["train"], trees["train"], ref_logps["train"]
        if config.method == "calm":
            winner, tied = dco.majority_vote(ref)  # (Q,) each
            used = (ref.argmax(-1) != winner[:, None]).any(-1).nonzero()[:, 0].tolist()
            metrics["vote"] = {"unanimous": len(ref) - len(used), "ties": int(tied.sum())}
            print0(f"calm: {len(used)} questions to train on, {json.dumps(metrics['vote'])}\n")
            if not used:
                raise InputError("--method calm: the languages agree on every training question")
            questions, rows = ([part[q] for q in used] for part in (questions, rows))
            ref = ref[used]
            total = config.epochs * -(-len(used) // config.batch_questions)
        batches = make_batches(questions, rows, ref, gamma, config)
        lap("report")
        with open(os.devnull if rank else out / "log.jsonl", "a") as file:

            def log(line):
                print(json.dumps(line), file=file, flush=True)

            tokens = train(model, batches, total, config, packed, log, folder, look)
        metrics["tokens"] = {"train": tokens}
        lap("train")
        save_model(model, tokenizer, out)
        lap("save")
        sums["trained"] = score_splits("evaluate")
        tables["trained"] = ranked(sums["trained"])
        lap("evaluate")
        print0(rankc.report(splits, tables, langs, metrics, by_subject, sums))
        if told := changes(splits[last], base[last], tables["trained"][last], langs):
            print0(f"\nquestions of {last} whose answers changed, the first few:\n{told}")
        print0(f"\nverdict, {last}: {rankc.verdict(metrics[last], langs, reached)}")
    if rank == 0:
        metrics["seconds"] = seconds
        del tables[reached]  # it can be computed again
        rankc.write_answers(out / "answers.jsonl", splits, tables, langs)
        drawn = rankc.draw_clc(out / "clc.png", last, metrics[last], langs)
        if config.eval_every:
            lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
            points = [{"step": 0, **look(base)}, *(x for x in lines if "eval/clc" in x)]
            points += [look(optimum)]
            rankc.draw_curve(out / "curve.png", points, f"{watched}, {len(seen)} questions")
        if not drawn:
            print0("pictures are left out; to draw them: pip install -e '.[plot]'")
        atomic_write(out / "metrics.json", json.dumps(metrics, indent=1))  # last: it is finished
        shutil.rmtree(folder)
    spent = ", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items())
    print0(f"\n{spent}; wrote {out}")


if __name__ == "__main__":
    run(main)
