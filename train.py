"""How it runs: `torchrun train.py` makes a model rank the answers to a question alike everywhere.

Covers Eqs. 11 and 15 as they are trained (section 4.4, Apps. G and H) and what the paper compares
them with (section 6.1): one reference pass, after which r_ALIGN is a table of numbers and DCO a
regression on it; then the step, one screen long; then the report. Whatever kills it, it goes on
from what it has kept. Leaves out the equations (dco.py) and the measures (rankc.py).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count, islice, permutations
from pathlib import Path
from typing import NamedTuple

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from torch import Tensor, nn
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedTokenizerBase, get_scheduler
except ImportError as error:  # no environment, or an old one
    from data import NEEDED

    raise SystemExit(f"error: {error}; needed are {NEEDED}") from None

import data
import dco
import rankc
from data import InputError, Question
from dco import completion_logps
from rankc import Halt, on_first, option, progress

RATES = {"dco": 1e-5, "sft": 5e-7, "dpo": 5e-6, "calm": 5e-6}  # App. G


@dataclass(frozen=True)
class Config(rankc.EvalConfig):
    """Train a multilingual language model by Direct Consistency Optimization, or by what the paper
    compares it with. The defaults are the paper's; without --model a tiny model is made on the
    spot, with defaults of its own."""

    method: str = option(
        "dco",
        "dco; sft: the gold answer in every language; dpo: the gold answer over a random other; "
        "calm: the majority's answer over a language's own. DPO, then DCO: --model DPO-RUN",
        choices=list(RATES),
    )
    objective: str = option(
        "joint",
        "each language's target sums over all others (Eq. 15), or a random pair of languages for "
        "each question, as the authors' release trains; the same for two languages",
        choices=["joint", "pairwise"],
    )
    lr: float = option(RATES["dco"], "rate of AdamW (App. G); sft 5e-7, dpo and calm 5e-6")
    schedule: str = option(
        "linear", "how the rate falls to zero, if at all", choices=["linear", "cosine", "constant"]
    )
    warmup: float = option(0.0, "share of the steps in which the rate rises")
    epochs: int = option(1, "passes over the training questions")
    batch_questions: int = option(4, "questions in an optimizer step, over all processes")
    pairs_per_question: int = option(1, "draws from each question (App. H: 7 of X-CSQA)")
    candidates: int = option(2, "candidates in a draw; a question with fewer gives all it has")
    seed: int = option(0, "seed of the draws, their order and the embedded model")
    grad_clip: float = option(1.0, "largest gradient norm; 0 for none")
    gradient_checkpointing: bool = option(
        False, "less memory, more time: compute activations twice"
    )
    shard: bool = option(False, "FSDP2: split weights, gradients and moments over processes")
    save_every: int = option(250, "steps between checkpoints, the last two of which stay; 0: none")
    resume: bool = option(
        False,
        "continue the run in --out from its last checkpoint, or begin it: safe to leave on; "
        "implied where torchrun restarts a run that has --out",
    )
    log_every: int = option(1, "steps between lines of log.jsonl")


def defaults(config: Config) -> dict:
    """What the method, and the lack of a --model, set where the command line does not.

    A tiny model takes more steps, and thirty times the paper's rate, whatever the method.
    """
    found = {"lr": RATES[config.method]}
    if config.out and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        found["resume"] = True
    if config.method in ("dpo", "calm"):
        found["beta"] = 0.1  # as is usual; the paper does not say
    if config.data.startswith("xcsqa:") and config.method in ("dco", "dpo"):
        found["pairs_per_question"] = 7  # App. H
    if not config.model:
        found |= {"lr": 30 * found["lr"], "epochs": 11, "batch_questions": 8}
        if config.method == "dco":
            found["candidates"] = 6
            if "en" in config.langs and not config.gamma:
                found["trust"] = ["en=2"]
    return found


def check_settings(config: Config) -> None:
    """Raise InputError for settings that do not go together, before anything is read."""
    method, langs = config.method, config.langs
    if config.resume and not config.out:
        raise InputError("--resume needs --out: the folder of the run to continue")
    if len(langs) < 2:
        raise InputError("--langs: consistency takes two languages or more")
    if method == "calm" and len(langs) < 3:
        shown = " ".join(langs)
        raise InputError(
            f"--method calm: a majority takes three languages or more; --langs names {shown}"
        )
    idle = ["trust", "gamma", "objective", "candidates"] * (method != "dco")
    idle += ["pairs_per_question"] * (method in ("sft", "calm")) + ["beta"] * (method == "sft")
    for name in idle:
        if getattr(config, name) != getattr(Config(), name):
            raise InputError(f"--{name}: --method {method} has no use of it; leave it out")
    if not config.model and config.data != "atlas":
        raise InputError(f"--data {config.data} needs --model: without, there is atlas only")


# ----------------------------------------------------------------------------------------- the step


class Item(NamedTuple):
    """A draw of candidates from one question, with all that a step needs of it."""

    trees: list[data.Tree]  # one a language; where a method prefers an answer, that one is first
    ref: Tensor  # (L, K) nats
    r_align: Tensor  # (L, K) nats: what DCO's r-hat is to become, up to a constant (Eq. 12)
    used: list[int]  # the languages it trains
    id: str  # of the question


def choose(
    question: Question, ref_logps: Tensor, number: int, config: Config
) -> tuple[Tensor, list[int]]:
    """Which candidates each language compares, the preferred first, (L, K), and who trains.

    ref_logps: (L, K) nats of all the question's candidates; CALM alone looks at them.
    """
    L, K = ref_logps.shape
    used = list(range(L))
    if config.method == "calm":
        winner, own = dco.majority_vote(ref_logps)[0].expand(L), ref_logps.argmax(-1)
        return torch.stack([winner, own], -1), (own != winner).nonzero()[:, 0].tolist()
    if config.method == "dco":
        chosen = data.sample(question, config.candidates, number, config.seed)
        if config.objective == "pairwise":  # Eq. 11 between two; not Eq. 15 where L > 2
            rng = random.Random(f"pair/{config.seed}/{question.id}/{number}")
            used = sorted(rng.sample(used, 2))
    else:
        chosen = [question.gold]
        if config.method == "dpo":
            order = data.sample(question, K, number, config.seed)
            chosen.append(next(k for k in order if k != question.gold))
    return torch.tensor(chosen).expand(L, -1), used


def poll(questions: list[Question], ref_logps: Tensor, config: Config) -> tuple[list[int], dict]:
    """The questions in which CALM has a language to train, and what to tell of the vote."""
    _, tied = dco.majority_vote(ref_logps.transpose(0, 1))  # (Q,)
    used = [
        choose(question, ref_logps[:, q, : question.K], 0, config)[1]
        for q, question in enumerate(questions)
    ]
    kept = [q for q, languages in enumerate(used) if languages]
    pairs = {lang: sum(i in languages for languages in used) for i, lang in enumerate(config.langs)}
    return kept, {"unanimous": len(used) - len(kept), "ties": int(tied.sum()), "pairs": pairs}


def draw(
    questions: list[Question],
    trees: list[list[data.Tree]],
    ref_logps: Tensor,
    gamma: Tensor,
    config: Config,
) -> Iterator[list[Item]]:
    """The items of each step, functions of seed and ids alone. ref_logps: (L, Q, K) nats."""
    L, size = len(config.langs), config.batch_questions
    for epoch in range(config.epochs):
        every = range(config.pairs_per_question)
        order = [(q, number) for q in range(len(questions)) for number in every]
        random.Random(f"order/{config.seed}/{epoch}").shuffle(order)
        for batch in (order[first : first + size] for first in range(0, len(order), size)):
            items = []
            for q, number in batch:
                table = ref_logps[:, q, : questions[q].K]
                chosen, used = choose(questions[q], table, number, config)
                ref = torch.full((L, config.candidates), -torch.inf)
                ref[:, : chosen.shape[1]] = table.gather(-1, chosen)
                trains = torch.zeros(L).index_fill(0, torch.tensor(used), 1.0)
                experts = gamma * trains * trains[:, None]  # of the languages that train
                pruned = [
                    tree._replace(branches=[tree.branches[k] for k in row])
                    for tree, row in zip(trees[q], chosen.tolist(), strict=True)
                ]
                r_align = dco.align_reward(ref, experts)
                items.append(Item(pruned, ref, r_align, used, questions[q].id))
            yield items


def term(logps: Tensor, ref_logps: Tensor, r_align: Tensor, config: Config) -> Tensor:
    """One language's term of the loss: (..., K) each, nats -> (...,)."""
    if config.method == "dco":
        return dco.dco_loss(logps, ref_logps, r_align, config.beta)  # Eq. 11
    if config.method == "sft":
        return dco.sft_loss(logps[..., 0])  # L^ML of the gold answer
    return dco.dpo_loss(logps, ref_logps, config.beta)  # Eq. 4; CALM is DPO on its votes


def optimise(
    model: nn.Module,
    steps: Iterator[list[Item]],
    total: int,
    config: Config,
    packed: bool,
    log: Callable[[dict], None],
    folder: Path | None = None,
    signals: Sequence[int] = (),
) -> int:
    """Minimise the terms, summed over languages, averaged over a step's items; the tokens fed.

    Begins at the newest checkpoint in `folder`. Raises Halt, with the step saved, once `signals`
    holds one; and, before it is applied, for a step whose loss or gradient is NaN or infinite.
    """
    world, device = dist.get_world_size(), next(model.parameters()).device
    model.train()  # for checkpointing; load_model has put dropout at zero
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0, fused=True)
    kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(kind, optimizer, round(config.warmup * total), total)
    state = load_checkpoint(folder, model, optimizer, scheduler) if folder else {}
    done, tokens, note = state.get("step", 0), state.get("tokens", 0), {}
    steps, mixed = islice(steps, done, None), rankc.autocast(config, device)
    width = model.config.get_text_config().hidden_size
    for step, items in enumerate(progress(steps, "train", total, note, done), done + 1):
        ref = torch.stack([item.ref for item in items]).to(device)  # (B, L, K)
        r_align = torch.stack([item.r_align for item in items]).to(device)  # (B, L, K)
        logps, losses = torch.full_like(ref, -torch.inf), torch.zeros_like(ref[..., 0])  # (B, L)
        for b, i, batch, weight in turns(items, config, packed, width):
            with mixed:
                got = completion_logps(model, batch, packed)  # (T, K)
            K = got.shape[-1]
            loss = term(got, ref[b, i, :K], r_align[b, i, :K], config)  # (T,)
            (weight * loss.sum()).backward()
            if weight:
                logps[b, i, :K], losses[b, i] = got.detach(), loss.detach()
        sum_gradients(weights, config)
        norm = torch.nn.utils.clip_grad_norm_(weights, config.grad_clip or torch.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        heard = losses.new_tensor([signal.SIGTERM in signals, signal.SIGINT in signals])
        told = torch.cat([losses.flatten(), heard, ~norm.isfinite().view(1)])
        if world > 1:
            dist.all_reduce(told)  # all know each loss, and stop at the same step
        *each, sigterm, sigint, broken, norm = torch.cat([told, norm.view(1)]).tolist()  # one wait
        losses = torch.tensor(each).view(losses.shape)
        if broken or not losses.isfinite().all():
            raise diverged(step, items, losses, config)
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tokens += sum(item.trees[i].tokens(packed) for item in items for i in item.used)
        if step % config.log_every == 0 or step == total:
            note["loss"] = float(losses.sum() / len(items))
            seen = watch(logps, ref, r_align, losses, config)
            log({"step": step, "loss": note["loss"], **seen, "grad_norm": norm, "lr": rate})
        stop = sigterm and signal.SIGTERM or sigint and signal.SIGINT
        due = config.save_every and (step % config.save_every == 0 or step == total)
        if folder and (stop or due):
            state = {"step": step, "tokens": tokens}
            save_checkpoint(folder, model, optimizer, scheduler, state)
        if stop:
            raise Halt(f"stopped by {stop.name}: step {step} of {total} is saved", 128 + stop)
    return tokens


def sum_gradients(weights: list[nn.Parameter], config: Config) -> None:
    """Data parallelism: each gradient becomes its sum over processes. FSDP has done so already."""
    for weight in weights:
        if weight.grad is None:  # this process had no row to feed, or none that needs this weight
            weight.grad = torch.zeros_like(weight)
    if dist.get_world_size() > 1 and not config.shard:
        for pending in [dist.all_reduce(weight.grad, async_op=True) for weight in weights]:
            pending.wait()


def turns(
    items: list[Item], config: Config, packed: bool, width: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], dco.Pack, float]]:
    """What this process feeds, a micro-batch a turn.

    Of its T rows the items b and the languages i, the rows packed, and the weight of their terms.
    Under --shard all processes gather a layer's weights together, so all take as many turns: one
    that has no more to feed feeds a row that counts nothing.
    """
    world = dist.get_world_size()
    shares = micro_batches(items, config, packed, world)
    mine, scale = shares[dist.get_rank()], 1.0
    if config.shard:
        mine += [[]] * (max(map(len, shares)) - len(mine))
        scale = world  # FSDP takes the mean over processes
    for rows in mine:
        weight = scale / len(items) if rows else 0.0
        rows = rows or [(0, items[0].used[0])]
        batch = dco.pack([items[b].trees[i] for b, i in rows], width, packed)
        yield *zip(*rows, strict=True), batch, weight


def micro_batches(
    items: list[Item], config: Config, packed: bool, world: int
) -> list[list[list[tuple[int, int]]]]:
    """Of each process, what it feeds at once: rows (item, language), of which each is a term.

    Rows are dealt longest first, to the first process and on to the last, then from the last to
    the first, so that none waits long for another.
    """
    rows = [(b, i) for b, item in enumerate(items) for i in item.used]
    rows.sort(key=lambda row: -items[row[0]].trees[row[1]].tokens(packed))
    shares = []
    for rank in range(world):
        mine = [
            row for n, row in enumerate(rows) if n % (2 * world) in (rank, 2 * world - 1 - rank)
        ]
        trees = [items[b].trees[i] for b, i in mine]
        groups = data.batches(trees, config.max_tokens, packed)
        shares.append([[mine[g] for g in group] for group in groups])
    return shares


def diverged(step: int, items: list[Item], losses: Tensor, config: Config) -> Halt:
    """The end of a run at a step that cannot be taken; losses: (B, L)."""
    bad = [item for item, row in zip(items, losses, strict=True) if not row.isfinite().all()]
    ids = ", ".join(dict.fromkeys(repr(item.id) for item in bad or items))
    where = f"the loss of question {ids}" if bad else f"the gradient of questions {ids}"
    found = f"error: step {step}: {where} is NaN or infinite; the step was not taken, and the "
    instead = "a lower --lr" + " or --dtype float32" * (config.dtype != "float32")
    return Halt(f"{found}checkpoints before it stay. Begin anew with {instead}", resume=False)


def watch(logps: Tensor, ref: Tensor, r_align: Tensor, losses: Tensor, config: Config) -> dict:
    """What the log shows of a step; margins are of the first two answers.

    logps, ref, r_align: (B, L, K); losses: (B, L), 0 where a language does not train.
    """
    if dist.get_world_size() > 1:
        dist.all_reduce(logps, op=dist.ReduceOp.MAX)  # -inf but where a process has scored
    logps, ref, r_align = logps.cpu(), ref.cpu(), r_align.cpu()  # else a GPU is asked ten times
    used = logps[..., 0].isfinite()  # (B, L)
    mean = dict(zip(config.langs, losses.sum(0) / used.sum(0).clamp(min=1), strict=True))
    if config.method == "sft":
        return {f"loss/{lang}": float(value) for lang, value in mean.items()}
    r_hat = dco.implicit_reward(logps, ref, config.beta)
    margin, target = (x[..., 0] - x[..., 1] for x in (r_hat, r_align))  # (B, L)
    if config.method != "dco":
        right = (margin[used] > 0).float().mean()
        return {"rewards/margin": float(margin[used].mean()), "rewards/accuracy": float(right)}
    first = logps[..., 0] > logps[..., 1]
    a, b = torch.triu_indices(len(config.langs), len(config.langs), 1)
    alike = (first[:, a] == first[:, b])[used[:, a] & used[:, b]]
    return {
        **{f"residual/{lang}": float(value / config.beta) for lang, value in mean.items()},  # nats
        "rewards/margin": float((margin * target.sign())[used].mean()),  # towards the target
        "rewards/target": float(target[used].abs().mean()),
        "consistent": float(alike.float().mean()),
    }


# -------------------------------------------------------------------------------------- checkpoints

# Settings that may change where a run is resumed: they move nothing but rounding.
FREE = {"out", "resume", "save_every", "log_every", "max_tokens", "gradient_checkpointing", "shard"}
FREE |= {"device", "timeout"}


def atomic_rename(part: Path, path: Path) -> None:
    """Put a finished file or folder in its place: fsync what it holds, then rename."""
    for file in part.iterdir() if part.is_dir() else [part]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    part.replace(path)


def atomic_write(path: Path, text: str) -> None:
    """Write a file such that it is there whole, or as it was before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    atomic_rename(part, path)


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    found = folder.glob("step-*/state.json")
    return sorted(int(number) for path in found if (number := path.parent.name[5:]).isdigit())


def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The trained weights and AdamW's two moments of each, by name; a tied weight once."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    moments = {
        f"{name}.{kind}": optimizer.state[weight][kind]
        for name, weight in weights.items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return weights | moments


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, state: dict
) -> None:
    """Write step-N/, each process its own shards as safetensors, and keep the last two.

    It is written beside them and renamed when it is whole. Raises OSError, and leaves the others
    as they are, where the disk is full.
    """
    path = folder / f"step-{state['step']}"
    part = path.with_name(path.name + ".part")
    if dist.get_rank() == 0:
        for left in (part, path):  # of a run that was killed while it wrote, or removed
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(part, save_distributed=True)
    try:
        dcp.save(training_state(model, optimizer), storage_writer=writer)
        if dist.get_rank() == 0:
            sizes = {file.name: file.stat().st_size for file in part.iterdir()}
            state |= {"scheduler": scheduler.state_dict(), "sizes": sizes}
            (part / "state.json").write_text(json.dumps(state))
            atomic_rename(part, path)
            for step in saved_steps(folder)[:-2]:
                old = folder / f"step-{step}"
                (old / "state.json").unlink()  # first: without it the rest is no checkpoint
                shutil.rmtree(old)
    except (OSError, dcp.CheckpointException) as error:
        why = error if isinstance(error, OSError) else next(iter(error.failures.values()))[0]
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        left = [f"step {step}" for step in saved_steps(folder)[-1:]] or ["no earlier step"]
        told = f"the checkpoint of step {state['step']} could not be saved: {why}"
        raise OSError(f"{told}. That of {left[0]} is whole") from error
    dist.barrier()


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> dict:
    """Restore the newest checkpoint on any number of processes, sharded or not; {} without one.

    Raises InputError, naming it, where it is damaged or of another model.
    """
    if not (steps := saved_steps(folder)):
        return {}
    path = folder / f"step-{steps[-1]}"
    for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
        moments = {kind: torch.zeros_like(weight) for kind in ("exp_avg", "exp_avg_sq")}
        step = torch.tensor(float(steps[-1]), device=weight.device)
        optimizer.state[weight] = {"step": step, **moments}
    try:
        state = json.loads((path / "state.json").read_text())
        found = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
        if found != state["sizes"]:
            raise ValueError("files are missing, or of another size")
        if state["step"] != steps[-1] or not isinstance(state["tokens"], int):
            raise ValueError(f"state.json is not of step {steps[-1]}")
        reader = dcp.HuggingFaceStorageReader(path)
        dcp.load(training_state(model, optimizer), storage_reader=reader)
        scheduler.load_state_dict(state["scheduler"])
    except (dcp.CheckpointException, OSError, ValueError, KeyError, TypeError) as error:
        failures = getattr(error, "failures", {0: [error]})
        why = next(iter(failures.values()))[0]
        without = "remove it, and --resume continues from the one before"
        raise InputError(f"{path} is damaged, or of another model ({why!r}); {without}") from error
    optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
    return state


def load_or_compute(
    path: Path, shapes: dict[str, tuple[int, ...]], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The score tables in a safetensors file, of these shapes; computed and saved if it is absent.

    Raises InputError where the file is damaged, or of other questions.
    """
    if path.exists():
        try:
            tables = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is damaged ({error}); remove it") from error
        if {name: table.shape for name, table in tables.items()} != shapes:
            raise InputError(f"{path}: scores of other questions; name another --out")
        return tables
    tables = compute()
    if dist.get_rank() == 0:
        part = path.with_name(path.name + ".part")
        save_file(tables, part)
        atomic_rename(part, path)
    return tables


def shard(model: nn.Module, device: torch.device) -> None:
    """FSDP2: of each weight, gradient and moment a process holds its share.

    A layer's weights are gathered where it computes. Raises InputError where no layers are found.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import

    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        name = type(model).__name__
        raise InputError(f"--shard: {name} has no decoder layers that transformers knows as such")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*layers, model):
        fully_shard(part, mesh=mesh)


# --------------------------------------------------------------------------------------- the folder


def settings(config: Config) -> dict:
    """As run.json holds them: a model's folder such that it is found from anywhere."""
    here = config.model and Path(config.model).is_dir()
    return {**asdict(config), "model": str(Path(config.model).resolve()) if here else config.model}


def choose_folder(config: Config) -> tuple[Path, dict]:
    """--out, or the first free one of runs/1, runs/2, ...; and the run.json of a run to resume.

    Raises InputError for a folder that holds something else, or a run of other settings.
    """
    if not config.out:
        return next(path for n in count(1) if not (path := Path("runs", str(n))).exists()), {}
    out = Path(config.out)
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not config.resume or not out.exists() or out.is_dir() and there <= {"run.json.part"}:
        return (out if config.resume else rankc.new_folder(config.out)), {}
    try:
        old, new = json.loads((out / "run.json").read_text()), settings(config)
        pairs = {name: (old[name], new[name]) for name in new if name not in FREE}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--resume: {out} is there, but is no run of this train.py ({error!r})"
        ) from error
    if differ := "; ".join(f"{name} {a!r}, now {b!r}" for name, (a, b) in pairs.items() if a != b):
        told = f"--resume: {out} was begun with other settings: {differ}"
        raise InputError(f"{told}. Give those, or another --out")
    return out, old


def environment() -> dict:
    """What the run ran on; the git revision where there is one."""
    command = ["git", "describe", "--always", "--dirty"]
    git = ""
    with suppress(FileNotFoundError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        git = done.stdout.strip()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "git": git or None, "processes": dist.get_world_size()}


def trim_log(path: Path, done: int) -> None:
    """Leave in log.jsonl the lines of the steps that are done."""
    lines = path.read_text().splitlines(keepends=True) if done else []
    whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= done]
    atomic_write(path, "".join(whole))


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
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
            raise OSError(f"{out}: the model could not be saved: {error}") from error


# ------------------------------------------------------------------------------- the embedded model

COVERAGE = {"en": 1.0, "fr": 0.75, "es": 0.75, "sw": 0.4}  # share of the facts it is told


def embedded_model(config: Config) -> tuple[nn.Module, PreTrainedTokenizerBase, list[str]]:
    """A tiny Llama over whole words that knows nothing yet, its tokenizer, and what to tell it.

    English has every fact, the other languages a share (COVERAGE), drawn by the seed; all have the
    countries' names in the other languages, the bridge over which a fact can come.
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
    names = [row for row in data.atlas() if row["relation"] == "of"]
    facts += [f"{r[a]} = {r[b]}" for r in names for a, b in permutations(config.langs, 2)]
    words = dict.fromkeys(word for text in texts + facts for word in text.split())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(config.seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes, **special))
    return model, tokenizer, facts


def tell(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: list[str], seed: int
) -> dict[str, Tensor]:
    """Tell the embedded model its facts, unevenly as real ones are told, by plain SFT."""
    ids = [torch.tensor(row) for row in tokenizer(facts)["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.5, betas=(0.9, 0.98))
    scheduler = get_scheduler("cosine", optimizer, 40, 800)
    rng, note = random.Random(seed), {}
    for _ in progress(range(800), "make the embedded model", 800, note):
        batch = torch.nn.utils.rnn.pad_sequence(rng.sample(ids, 96), batch_first=True)
        seen = batch > 0
        labels = batch.masked_fill(~seen, -100)
        loss = model(input_ids=batch, attention_mask=seen.long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        note["loss"] = loss.item()
    return {name: weight.detach() for name, weight in model.named_parameters()}


# ---------------------------------------------------------------------------------- from end to end


def count_steps(questions: int, config: Config) -> int:
    """Optimizer steps for so many training questions; a last, smaller step counts."""
    return config.epochs * -(-questions * config.pairs_per_question // config.batch_questions)


def freeze_other_modalities(model: nn.Module) -> None:
    """Only the language model and its head are trained: no text reaches what is for pictures.

    Gemma 3's vision tower never gets a gradient, and needs no moments and no exchange.
    """
    model.requires_grad_(False)
    for part in (model.get_decoder(), model.get_output_embeddings()):
        part.requires_grad_(True)


def describe(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    splits: rankc.Splits,
    trees: rankc.Trees,
    config: Config,
) -> str:
    """What is about to be done, and an example in two languages as the model will see it."""
    method = config.method + f", beta {config.beta:g}" * (config.method != "sft")
    if config.method == "dco":
        fewer = sum(question.K < config.candidates for question in splits["train"])
        method += f", {config.objective}, {config.candidates} candidates each"
        method += f" ({fewer} questions have fewer)" * (fewer > 0)
        trust = f"trust {' '.join(config.trust) or 'equal'}"
        method += f", gamma {' '.join(config.gamma)}" if config.gamma else f", {trust}"
    weight = next(model.parameters())
    mixed = ", bfloat16 autocast" * (weight.is_cuda and config.dtype == "float32")
    where = f"{dist.get_world_size()} x {weight.device.type}{', sharded' * config.shard}"
    size = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    trained = "all" if trained == size else f"{trained:,}"
    parts = ", ".join(f"{len(part)} questions to {name}" for name, part in splits.items())
    total = count_steps(len(splits["train"]), config)
    total = f"{'at most ' * (config.method == 'calm')}{total}"
    lines = [
        f"{config.model or 'embedded model'}: {size:,} parameters, {trained} trained, "
        f"{config.dtype}{mixed}, on {where}",
        f"{config.data} in {' '.join(config.langs)}: {parts}",
        f"{total} steps of {config.batch_questions} questions over all processes, epochs "
        f"{config.epochs}, rate {config.lr:g} {config.schedule}; {method}",
    ]
    for lang, tree in zip(config.langs[:2], trees["train"][0], strict=False):
        answers = [tokenizer.decode(branch) for branch in tree.branches]
        lines.append(f"  {lang}: {tokenizer.decode(tree.prefix)!r} + {answers}")
    return "\n".join(lines)


def changes(questions: list[Question], base: Tensor, trained: Tensor, langs: list[str]) -> str:
    """The first few questions some of whose answers changed: before and after in every language."""
    lines = []
    before, after = base.argmax(-1), trained.argmax(-1)  # (L, Q)
    for q in (before != after).any(0).nonzero()[:4, 0].tolist():
        question, first = questions[q], langs[0]
        gold = question.gold
        right = "not known" if gold is None else question.answers[first][gold].strip()
        asked = question.prompts[first].strip().partition("\n")[0]
        lines.append(f"  {asked} ...   right: {right}")
        for i, lang in enumerate(langs):
            old, new = (question.answers[lang][int(best[i, q])].strip() for best in (before, after))
            lines.append(f"    {lang}  {old}" + ("" if old == new else f"  ->  {new}"))
    return "\n".join(lines)


def main() -> None:
    config = rankc.parse(Config, "train.py", defaults)
    check_settings(config)
    if not config.model:
        torch.set_num_threads(1)  # as fast as two for a model this small, faster on a busy machine
    device, say = rankc.start(config.device if config.model else "cpu", config.timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    seconds, langs = {}, config.langs
    subjects = bool(config.train_subjects or config.test_subjects)

    @contextmanager
    def stage(name):
        begun = time.time()
        yield
        seconds[name] = round(time.time() - begun, 2)

    gamma, (out, old) = rankc.gamma_matrix(config, say), on_first(choose_folder, config)
    folder = out / "checkpoint"
    if old and (out / "metrics.json").exists():
        dist.barrier()
        shutil.rmtree(folder, ignore_errors=True)
        return say(f"resume: {out} is finished, nothing is left to do")
    splits = rankc.read(config, say)
    if "train" not in splits:
        raise InputError("--train_questions 0: there is nothing to train on")
    unlabelled = [question.id for question in splits["train"] if question.gold is None]
    if unlabelled and config.method in ("sft", "dpo"):
        raise InputError(
            f"--method {config.method} learns from the right answers, which {len(unlabelled)} "
            f"training questions lack, {unlabelled[0]!r} first; dco and calm do without"
        )

    say(f"loading {config.model or 'the embedded model'}; what is written goes to {out}")
    with stage("load"):
        if config.model:
            model, tokenizer = rankc.load_model(config, "cpu" if config.shard else device)
            freeze_other_modalities(model)
        else:
            model, tokenizer, facts = embedded_model(config)
        if config.shard and config.model:
            shard(model, device)
        trees, packed = rankc.plant(model, tokenizer, splits, config, say)
        asked = trees  # what is judged: the same, unless --score string wants the prompt scored too
        if config.score == "string":
            asked, _ = rankc.plant(model, tokenizer, splits, config, say, whole=True)
        (done,), total = saved_steps(folder)[-1:] or [0], count_steps(len(splits["train"]), config)
        if config.resume:
            fresh = "from the start: no checkpoint yet" if old else "a new run: nothing is there"
            say(f"resume: {out}, " + (f"from step {done} of {total}" if done else fresh))
        resumed = [*old.get("resumed", []), *[done] * bool(done)]

        def begin():
            out.mkdir(parents=True, exist_ok=True)
            told = {**settings(config), "out": str(out), **environment(), "resumed": resumed}
            atomic_write(out / "run.json", json.dumps(told, indent=1))
            folder.mkdir(exist_ok=True)

        on_first(begin)
        if not config.model:
            if not (done and (folder / "reference.safetensors").exists()):
                base = on_first(tell, model, tokenizer, facts, config.seed)
                model.load_state_dict(base, strict=False)  # the head is the embeddings
            if config.shard:
                shard(model, device)
    say(describe(model, tokenizer, splits, trees, config))

    def judge(desc, asked, config=config):
        found = {}
        for name, rows in asked.items():
            ids = [question.id for question in splits[name]]
            found[name] = rankc.score(model, rows, config, f"{desc} {name}", packed, ids)
        return found

    def refer():
        tables = judge("reference", asked)
        if config.score == "sum":
            return tables
        summed = judge("sums", {"train": trees["train"]}, replace(config, score="sum"))
        return {**tables, "sums": summed["train"]}

    with stage("reference"):
        K = {name: max(question.K for question in part) for name, part in splits.items()}
        shapes = {name: (len(langs), len(part), K[name]) for name, part in splits.items()}
        if config.score != "sum":
            shapes["sums"] = shapes["train"]
        base = load_or_compute(folder / "reference.safetensors", shapes, refer)
        sums = base.pop("sums", base["train"])
        base = {name: base[name] for name in splits}
    optimum = {name: rankc.forecast(table, gamma, config.beta) for name, table in base.items()}
    tables = {"base": base, "optimum": optimum}
    metrics = rankc.new_metrics(splits, langs)
    say(rankc.report(splits, tables, langs, metrics, subjects) + "\n")
    used = list(range(len(splits["train"])))
    if config.method == "calm":
        used, metrics["vote"] = poll(splits["train"], sums, config)
        say(f"calm: {len(used)} questions to train on, {json.dumps(metrics['vote'])}\n")
        if not used:
            raise InputError("--method calm: the languages agree on every training question")

    total, signals = count_steps(len(used), config), []

    def heed(number, _):
        signals.append(number)
        with suppress(OSError):  # Ctrl-C may have closed what stands behind a pipe
            os.write(2, b"finishing the step, then saving\n" * (rank == 0))

    on_first(trim_log, out / "log.jsonl", done)
    path = os.devnull if rank else out / "log.jsonl"
    with stage("train"), rankc.on_signals(heed), open(path, "a") as file:
        questions, rows = ([part["train"][q] for q in used] for part in (splits, trees))
        steps = draw(questions, rows, sums[:, used], gamma, config)

        def log(line):
            print(json.dumps(line), file=file, flush=True)

        tokens = optimise(model, steps, total, config, packed, log, folder, signals)
    late = [None] * world
    dist.all_gather_object(late, max(signals, default=0))
    if max(late) and config.save_every:  # it came while the last step was saved
        name = signal.Signals(max(late)).name
        raise Halt(f"stopped by {name}: all {total} steps are saved", 128 + max(late))
    save_model(model, tokenizer, out)
    with stage("evaluate"):
        tables["trained"] = judge("evaluate", asked)
    say(rankc.report(splits, tables, langs, metrics, subjects))
    last = list(splits)[-1]
    say(f"\nanswers that changed in {last}, the first few questions:")
    say(changes(splits[last], base[last], tables["trained"][last], langs) or "  none")

    def finish():
        after = "base", "trained"
        metrics.update({"seconds": seconds, "tokens": {"train": tokens}})
        del tables["optimum"]  # it can be computed again
        rankc.write_answers(out / "answers.jsonl", splits, tables, langs)
        if not rankc.draw_clc(out / "clc.png", *(metrics[last][x] for x in after), langs):
            say("clc.png is left out; to draw it: pip install -e '.[plot]'")
        atomic_write(out / "metrics.json", json.dumps(metrics, indent=1))  # last: it is finished
        shutil.rmtree(folder)

    on_first(finish)
    spent = ", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items())
    say(f"\n{spent}; wrote {out}")


if __name__ == "__main__":
    rankc.run(main, "; the same command with --resume goes on")
