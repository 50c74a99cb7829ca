"""How it runs: `torchrun train.py` makes a model rank the answers to a question alike everywhere.

Covers Eqs. 11 and 15 as they are trained (section 4.4, Apps. G and H) and what the paper compares
them with (section 6.1): one reference pass, after which r_ALIGN is a table of numbers and DCO a
regression on it; then the step, one screen long; then the report. Leaves out the equations (dco.py)
and the measures (rankc.py).
"""
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import get_scheduler

import data
import rankc
from dco import (
    align_reward,
    completion_logps,
    dco_loss,
    dpo_loss,
    implicit_reward,
    majority_vote,
    sft_loss,
)
from rankc import EvalConfig, option, progress

RATES = {"dco": 1e-5, "sft": 5e-7, "dpo": 5e-6, "calm": 5e-6}  # App. G


@dataclass(frozen=True)
class Config(EvalConfig):
    """Train a multilingual language model by Direct Consistency Optimization, or by what the paper
    compares it with. The defaults are the paper's; without --model a tiny model is made on the
    spot, with defaults of its own."""

    method: str = option("dco", "dco; sft: the gold answer in every language; dpo: the gold answer "
                         "over a random other; calm: the majority's answer over a language's own, "
                         "without gold. DPO, then DCO: --model at the folder of the DPO run",
                         choices=["dco", "sft", "dpo", "calm"])
    beta: float = option(1.0, "strength of the KL term (Eq. 1); dpo and calm: 0.1 (the paper does "
                         "not say)")
    train_questions: int | None = option(None, "questions to train on (default, App. H: 5000, 800 "
                                         "of X-CSQA; 160 of atlas)")
    objective: str = option("joint", "each language's target sums over all others (Eq. 15), or a "
                            "random language pair a question, as the authors' release trains; the "
                            "same for two languages", choices=["joint", "pairwise"])
    lr: float = option(RATES["dco"], "rate of AdamW; sft 5e-7, dpo and calm 5e-6; betas 0.9, 0.999,"
                       " eps 1e-8, no weight decay (App. G)")
    schedule: str = option("linear", "how the rate falls to zero, or does not",
                           choices=["linear", "cosine", "constant"])
    warmup: float = option(0.0, "share of the steps in which the rate rises")
    epochs: int = option(1, "passes over the training questions")
    batch_questions: int = option(4, "questions in an optimizer step, over all processes")
    pairs_per_question: int = option(1, "draws of candidates from each question (App. H: 7 of "
                                     "X-CSQA); sft and calm have but one")
    candidates: int = option(2, "candidates in a draw; a question with fewer gives all it has")
    seed: int = option(0, "seed of draws, of their order and of the embedded model")
    grad_clip: float = option(1.0, "largest gradient norm; 0 for none")
    gradient_checkpointing: bool = option(False, "compute activations twice and keep few of them")
    log_every: int = option(1, "steps between lines of log.jsonl")


COVERAGE = {"en": 1.0, "fr": 0.75, "es": 0.75, "sw": 0.4}  # share of the facts it is told


def defaults(config: Config) -> dict:
    """What the method, and the lack of a --model, set where the command line does not.

    A tiny model takes more steps, and thirty times the paper's rate, whatever the method.
    """
    found = {"lr": RATES[config.method]}
    if config.method in ("dpo", "calm"):
        found["beta"] = 0.1
    if config.data.startswith("xcsqa:") and config.method in ("dco", "dpo"):
        found["pairs_per_question"] = 7  # App. H
    if not config.model:
        found |= {"lr": 30 * found["lr"], "epochs": 11, "batch_questions": 8}
        if config.method == "dco":
            found["candidates"] = 6
            if "en" in config.langs and not config.gamma:
                found["trust"] = ["en=2"]
    return found


# -------------------------------------------------------------------------------- the step


class Item(NamedTuple):
    """A draw of candidates from one question, with all that a step needs of it."""

    trees: list[data.Tree]  # one a language; where a method prefers an answer, that one is first
    ref: Tensor  # (L, K) nats
    r_align: Tensor  # (L, K) nats: what DCO's r-hat is to become, up to a constant (Eq. 12)
    used: list[int]  # the languages it trains


def choose(question: data.Question, ref_logps: Tensor, number: int, config: Config
           ) -> tuple[Tensor, list[int]]:
    """Which candidates each language compares, the preferred first, (L, K), and who trains.

    ref_logps: (L, K) nats of all the question's candidates; CALM alone looks at them.
    """
    L, K = ref_logps.shape
    used = list(range(L))
    if config.method == "calm":
        winner, own = majority_vote(ref_logps)[0].expand(L), ref_logps.argmax(-1)
        return torch.stack([winner, own], -1), (own != winner).nonzero()[:, 0].tolist()
    if config.method == "dco":
        chosen = data.sample(question, config.candidates, number, config.seed)
        if config.objective == "pairwise":  # Eq. 11 between two; not Eq. 15 where L > 2
            rng = random.Random(f"pair/{config.seed}/{question.id}/{number}")
            used = sorted(rng.sample(used, 2))
    else:
        chosen = [question.gold]
        if config.method == "dpo":
            others = [k for k in data.sample(question, K, number, config.seed)
                      if k != question.gold]
            chosen.append(others[0])
    return torch.tensor(chosen).expand(L, -1), used


def poll(questions: list[data.Question], ref_logps: Tensor, config: Config
         ) -> tuple[list[int], dict]:
    """The questions in which CALM has a language to train, and what to tell of the vote."""
    _, tied = majority_vote(ref_logps.transpose(0, 1))  # (Q,)
    used = [choose(question, ref_logps[:, q, :question.K], 0, config)[1]
            for q, question in enumerate(questions)]
    kept = [q for q, languages in enumerate(used) if languages]
    pairs = {lang: sum(i in languages for languages in used) for i, lang in enumerate(config.langs)}
    return kept, {"unanimous": len(used) - len(kept), "ties": int(tied.sum()), "pairs": pairs}


def draw(questions: list[data.Question], trees: list[list[data.Tree]], ref_logps: Tensor,
         gamma: Tensor, config: Config) -> Iterator[list[Item]]:
    """The items of each step, functions of seed and ids alone. ref_logps: (L, Q, K) nats."""
    L, every = len(config.langs), range(config.pairs_per_question)
    for epoch in range(config.epochs):
        order = [(q, number) for q in range(len(questions)) for number in every]
        random.Random(f"order/{config.seed}/{epoch}").shuffle(order)
        for first in range(0, len(order), config.batch_questions):
            items = []
            for q, number in order[first:first + config.batch_questions]:
                table = ref_logps[:, q, :questions[q].K]
                chosen, used = choose(questions[q], table, number, config)
                ref = torch.full((L, config.candidates), -torch.inf)
                ref[:, :chosen.shape[1]] = table.gather(-1, chosen)
                experts, rows = torch.zeros_like(gamma), torch.tensor(used)
                experts[rows[:, None], rows] = gamma[rows[:, None], rows]
                pruned = [tree._replace(branches=[tree.branches[k] for k in row])
                          for tree, row in zip(trees[q], chosen.tolist(), strict=True)]
                items.append(Item(pruned, ref, align_reward(ref, experts), used))
            yield items


def term(logps: Tensor, ref_logps: Tensor, r_align: Tensor, config: Config) -> Tensor:
    """One language's term of the loss: (..., K) each, nats -> (...,)."""
    if config.method == "dco":
        return dco_loss(logps, ref_logps, r_align, config.beta)  # Eq. 11
    if config.method == "sft":
        return sft_loss(logps[..., 0])  # L^ML of the gold answer
    return dpo_loss(logps, ref_logps, config.beta)  # Eq. 4; CALM is DPO on its votes


def optimise(model, steps: Iterator[list[Item]], total: int, config: Config, packed: bool,
             log: Callable[[dict], None]) -> int:
    """Minimise the terms, summed over languages, averaged over a step's items; the tokens fed."""
    rank, world, device = dist.get_rank(), dist.get_world_size(), next(model.parameters()).device
    model.train()  # for checkpointing; load_model has put dropout at zero
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(kind, optimizer, round(config.warmup * total), total)
    tokens, note = 0, {}
    for step, items in enumerate(progress(steps, "train", total, note), 1):
        ref = torch.stack([item.ref for item in items]).to(device)  # (B, L, K)
        r_align = torch.stack([item.r_align for item in items]).to(device)  # (B, L, K)
        logps = torch.full_like(ref, -torch.inf)  # what this process scores, for the log
        rows = [(b, i) for b, item in enumerate(items) for i in item.used]  # a term each
        mine = rows[rank::world] or rows[:1]  # DDP waits for every process: one without a row
        weight = world / len(items) if rows[rank::world] else 0.0  # feeds one that counts nothing
        groups = data.batches([items[b].trees[i] for b, i in mine], config.max_tokens, packed)
        for group in groups:
            b, i = map(list, zip(*(mine[g] for g in group), strict=True))
            trees = [items[question].trees[lang] for question, lang in zip(b, i, strict=True)]
            with nullcontext() if world == 1 or group is groups[-1] else policy.no_sync():
                with rankc.autocast(config, device):
                    got = completion_logps(policy, trees, packed)  # (T, K)
                K = got.shape[-1]
                losses = term(got, ref[b, i, :K], r_align[b, i, :K], config)  # (T,)
                (weight * losses.sum()).backward()  # DDP's mean over processes undoes `world`
            if weight:
                logps[b, i, :K] = got.detach()
            tokens += sum(tree.tokens(packed) for tree in trees)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or torch.inf)
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % config.log_every == 0 or step == total:
            seen = watch(logps, ref, r_align, config)
            note["loss"] = seen["loss"]
            log({"step": step, **seen, "grad_norm": float(norm), "lr": rate})
    return tokens


def watch(logps: Tensor, ref: Tensor, r_align: Tensor, config: Config) -> dict:
    """What the log shows of a step's (B, L, K) tables; margins are of the first two answers."""
    if dist.get_world_size() > 1:
        dist.all_reduce(logps, op=dist.ReduceOp.MAX)  # -inf but where a process has scored
    used = logps[..., 0].isfinite()  # (B, L)
    losses = term(logps, ref, r_align, config).masked_fill(~used, 0.0)
    mean = losses.sum(0) / used.sum(0).clamp(min=1)  # (L,)
    seen = {"loss": float(losses.sum() / len(logps))}
    if config.method == "sft":
        return {**seen, **{f"loss/{lang}": float(mean[i]) for i, lang in enumerate(config.langs)}}
    r_hat = implicit_reward(logps, ref, config.beta)
    margin, target = (x[..., 0] - x[..., 1] for x in (r_hat, r_align))  # (B, L)
    if config.method != "dco":
        return {**seen, "rewards/margin": float(margin[used].mean()),
                "rewards/accuracy": float((margin[used] > 0).float().mean())}
    first = logps[..., 0] > logps[..., 1]
    a, b = torch.triu_indices(len(config.langs), len(config.langs), 1)
    both = used[:, a] & used[:, b]
    distance = mean / config.beta  # (L,) nats of log-odds
    return {**seen, **{f"residual/{lang}": float(distance[i])
                       for i, lang in enumerate(config.langs)},
            "rewards/margin": float((margin * target.sign())[used].mean()),  # towards the target
            "rewards/target": float(target[used].abs().mean()),
            "consistent": float((first[:, a] == first[:, b])[both].float().mean())}


# ------------------------------------------------------------------------------- the embedded model


def embedded_model(config: Config):
    """A tiny Llama over whole words, told the facts unevenly as real models are, by plain SFT.

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
    facts += [f"{row[a]} = {row[b]}" for row in data.atlas() if row["relation"] == "of"
              for a in config.langs for b in config.langs if a != b]
    words = dict.fromkeys(word for text in texts + facts for word in text.split())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=None))
    if dist.get_rank() == 0:
        ids = [torch.tensor(row) for row in tokenizer(facts)["input_ids"]]
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.5, betas=(0.9, 0.98))
        scheduler = get_scheduler("cosine", optimizer, 40, 800)
        rng, note = random.Random(config.seed), {}
        for _ in progress(range(800), "make the embedded model", 800, note):
            batch = torch.nn.utils.rnn.pad_sequence(rng.sample(ids, 96), batch_first=True)
            seen = batch > 0
            loss = model(input_ids=batch, attention_mask=seen.long(),
                         labels=batch.masked_fill(~seen, -100)).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            note["loss"] = loss.detach()
    for weight in model.parameters():
        dist.broadcast(weight.data, 0)
    return model, tokenizer


# -------------------------------------------------------------------------------- the report


def check_settings(config: Config) -> None:
    """Raise InputError for settings that cannot be, before anything is read."""
    if len(config.langs) < 2:
        raise data.InputError("--langs: consistency takes two languages or more")
    if config.method == "calm" and len(config.langs) < 3:
        raise data.InputError("--method calm: a majority takes three languages or more; "
                              f"--langs names {' '.join(config.langs)}")
    idle = ["trust", "gamma", "objective", "candidates"] * (config.method != "dco")
    idle += ["pairs_per_question"] * (config.method in ("sft", "calm"))
    idle += ["beta"] * (config.method == "sft")
    for name in idle:
        if getattr(config, name) != getattr(Config(), name):
            raise data.InputError(f"--{name}: --method {config.method} has no use of it")
    if not config.model and config.data != "atlas":
        raise data.InputError(f"--data {config.data} needs --model: without, there is atlas only")
    for name in ("epochs", "batch_questions", "pairs_per_question", "log_every"):
        if getattr(config, name) < 1:
            raise data.InputError(f"--{name} {getattr(config, name)}: must be at least 1")
    if config.candidates < 2:
        raise data.InputError(f"--candidates {config.candidates}: Eq. 11 compares two or more")
    if not config.lr > 0 or not config.grad_clip >= 0 or not 0 <= config.warmup <= 1:
        raise data.InputError("--lr must be positive, --grad_clip not negative, --warmup in [0, 1]")


def choose_folder(config: Config) -> Path:
    """--out, refused unless new or empty; without it the first free one of runs/1, runs/2, ..."""
    if config.out:
        return rankc.new_folder(config.out)
    found = [next(path for n in count(1) if not (path := Path("runs", str(n))).exists())]
    dist.broadcast_object_list(found)
    return found[0]


def environment() -> dict:
    """What the run ran on; the git revision where there is one."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                             capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        git = ""
    return {"torch": torch.__version__, "transformers": transformers.__version__,
            "git": git or None, "processes": dist.get_world_size()}


def count_steps(questions: int, config: Config) -> int:
    """Optimizer steps for so many training questions; a last, smaller step counts."""
    return config.epochs * -(-questions * config.pairs_per_question // config.batch_questions)


def describe(model, tokenizer, splits, trees, config: Config) -> str:
    """What is about to be done, and an example in two languages as the model will see it."""
    fewer = sum(question.K < config.candidates for question in splits["train"])
    compared = {"dco": f"dco ({config.objective}, beta {config.beta:g}), {config.candidates} "
                f"candidates each" + f" ({fewer} questions have fewer)" * (fewer > 0),
                "sft": "sft on the gold answers",
                "dpo": f"dpo (beta {config.beta:g}), gold answer over a random other",
                "calm": f"calm (beta {config.beta:g}), fewer if some questions are unanimous"}
    weight = next(model.parameters())
    mixed = weight.is_cuda and config.dtype == "float32"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join([
        f"{config.model or 'embedded model'}: {parameters:,} parameters, all trained, "
        f"{config.dtype}{', bfloat16 autocast' * mixed}, on {dist.get_world_size()} x "
        f"{weight.device.type}",
        f"{config.data} in {' '.join(config.langs)}: " +
        ", ".join(f"{len(part)} questions to {name}" for name, part in splits.items()),
        f"{count_steps(len(splits['train']), config)} steps of {config.batch_questions} questions "
        f"over all processes, epochs {config.epochs}, rate {config.lr:g} {config.schedule}: "
        + compared[config.method],
        *(f"  {lang}: {tokenizer.decode(tree.prefix)!r} + {[*map(tokenizer.decode, tree.branches)]}"
          for lang, tree in zip(config.langs[:2], trees["train"][0], strict=False))])


def changes(questions: list[data.Question], base: Tensor, trained: Tensor, langs: list[str]) -> str:
    """The first few questions some of whose answers changed: before and after in every language."""
    lines = []
    before, after = base.argmax(-1), trained.argmax(-1)  # (L, Q)
    for q in (before != after).any(0).nonzero()[:4, 0].tolist():
        question = questions[q]
        right = "" if question.gold is None else question.answers[langs[0]][question.gold].strip()
        asked = question.prompts[langs[0]].strip().partition("\n")[0]
        lines.append(f"  {asked} ...   right: {right or 'not known'}")
        for i, lang in enumerate(langs):
            old, new = (question.answers[lang][int(best[i, q])].strip() for best in (before, after))
            lines.append(f"    {lang}  {old}" + ("" if old == new else f"  ->  {new}"))
    return "\n".join(lines)


# -------------------------------------------------------------------------------- from end to end


def main() -> None:
    config = rankc.parse(Config, "train.py", defaults)
    check_settings(config)
    if not config.model:
        torch.set_num_threads(1)  # as fast as two for a model this small, faster on a busy machine
    device, rank, _ = rankc.start(config.device if config.model else "cpu")
    say = (lambda *text: print(*text, flush=True)) if rank == 0 else lambda *text: None
    seconds, langs = {}, config.langs
    subjects = bool(config.train_subjects or config.test_subjects)

    @contextmanager
    def stage(name):
        begun = time.time()
        yield
        seconds[name] = round(time.time() - begun, 2)

    gamma, out = rankc.gamma_matrix(config, say), choose_folder(config)
    splits = rankc.read(config, say)
    if "train" not in splits:
        raise data.InputError("--train_questions 0: there is nothing to train on")
    unlabelled = [question.id for question in splits["train"] if question.gold is None]
    if unlabelled and config.method in ("sft", "dpo"):
        raise data.InputError(f"--method {config.method} learns from the right answers, which "
                              f"{len(unlabelled)} training questions lack, {unlabelled[0]!r} first;"
                              " dco and calm do without")
    with stage("load"):
        model, tokenizer = (rankc.load_model(config, device) if config.model
                            else embedded_model(config))
        trees, packed = rankc.plant(model, tokenizer, splits, config, say)
        asked = trees  # what is judged: the same, unless --score string wants the prompt scored too
        if config.score == "string":
            asked, _ = rankc.plant(model, tokenizer, splits, config, say, whole=True)
    say(describe(model, tokenizer, splits, trees, config))

    def judge(desc, asked, config=config):
        return {name: rankc.score(model, trees, config, f"{desc} {name}", packed)
                for name, trees in asked.items()}

    with stage("reference"):
        base = judge("reference", asked)
        sums = base if config.score == "sum" else judge("reference", {"train": trees["train"]},
                                                        replace(config, score="sum"))
    tables = {"base": base, "optimum": {name: rankc.forecast(table, gamma, config.beta)
                                        for name, table in base.items()}}
    sizes = [question.K for questions in splits.values() for question in questions]
    metrics = {"languages": langs, "chance": rankc.guessing(sizes)[0]}
    say(rankc.report(splits, tables, langs, metrics, subjects) + "\n")
    kept = list(range(len(splits["train"])))
    if config.method == "calm":
        kept, metrics["vote"] = poll(splits["train"], sums["train"], config)
        say(f"calm: {len(kept)} questions to train on, {json.dumps(metrics['vote'])}\n")
        if not kept:
            raise data.InputError("--method calm: the languages agree on every training question")

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(config), "out": str(out), **environment()}
        if config.model and Path(config.model).is_dir():  # so that it is found from anywhere
            settings["model"] = str(Path(config.model).resolve())
        (out / "run.json").write_text(json.dumps(settings, indent=1))
    with stage("train"), open(out / "log.jsonl" if rank == 0 else os.devnull, "w") as file:
        steps = draw([splits["train"][q] for q in kept], [trees["train"][q] for q in kept],
                     sums["train"][:, kept], gamma, config)
        tokens = optimise(model, steps, count_steps(len(kept), config), config, packed,
                          lambda line: print(json.dumps(line), file=file, flush=True))
    if rank == 0:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

    with stage("evaluate"):
        tables["trained"] = judge("evaluate", asked)
    say(rankc.report(splits, tables, langs, metrics, subjects))
    last = list(splits)[-1]
    say(f"\nanswers that changed in {last}, the first few questions:")
    say(changes(splits[last], base[last], tables["trained"][last], langs) or "  none")
    if rank == 0:
        metrics |= {"seconds": seconds, "tokens": {"train": tokens}}
        del tables["optimum"]  # it can be computed again
        rankc.write_answers(out / "answers.jsonl", splits, tables, langs)
        rankc.draw_clc(out / "clc.png", metrics[last]["base"], metrics[last]["trained"], langs)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1))  # last: the run is whole
    spent = ", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items())
    say(f"\n{spent}; wrote {out}")


if __name__ == "__main__":
    rankc.run(main)
