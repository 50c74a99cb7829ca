"""How a model is judged: RankC, CLC, accuracy, changed answers, entropy; `python rankc.py` does it.

Covers the measures of sections 5, 6.4 and 6.5 and App. I, and the forecast that Eq. 10 allows
before a step is taken. Leaves out training (train.py). A score table is (L, Q, K): languages,
questions, candidates; a question with fewer than K has -inf in the places left, in every language.
"""

import ctypes
import gc
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import torch
    import torch.distributed as dist
    from safetensors import SafetensorError
    from torch import Tensor, nn
    from torch.distributed.fsdp import FSDPModule
except ImportError as error:  # no environment, or an old one
    from data import NEEDED

    raise SystemExit(f"error: {error}; needed are {NEEDED}") from None

import data
import dco
from data import InputError, Question

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

# ------------------------------------------------------------------------------------- the measures


def rankc(scores_a: Tensor, scores_b: Tensor) -> Tensor:
    """consist(x1, x2) of App. I for each question: (Q, K), (Q, K) -> (Q,) float64 in [0, 1].

    Candidate k of one language is candidate k of the other; missing ones are -inf in both. Ties are
    broken by candidate number in both. Raises ValueError on NaN, on a candidate missing in one
    language only, and on a question without any.
    """
    return _consist(torch.stack([scores_a, scores_b]))(0, 1)


def clc(scores: Tensor) -> Tensor:
    """RankC (App. I), the mean over questions, of each language pair: (L, Q, K) -> (L, L)."""
    L, consist = len(scores), _consist(scores)
    matrix = torch.eye(L, dtype=torch.double)
    for a in range(L):
        for b in range(a):
            matrix[a, b] = matrix[b, a] = consist(a, b).mean()
    return matrix


def _consist(scores: Tensor) -> Callable[[int, int], Tensor]:
    """A function of two languages' indices giving their consist (Q,); sorts each language once.

    Both top-j hold those candidates whose worse rank m is below j. So sum_j w_j P@j, summed over
    candidates c instead of over j, is sum_c sum_{j > m_c} w_j / j: one look-up a candidate.
    """
    missing = torch.isneginf(scores)
    if scores.isnan().any() or (missing != missing[:1]).any():
        raise ValueError("scores hold NaN, or a candidate missing (-inf) in one language only")
    N = (~missing[0]).sum(-1)  # (Q,) candidates of each question
    if (N == 0).any():
        raise ValueError("a question without candidates has no ranking")
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # (L, Q, K), 0 is best
    w, j = _weights(scores.shape[-1])
    tail = (w / j).flip(-1).cumsum(-1).flip(-1)  # (K + 1, K): at [N, m], sum_{j > m} w_j / j
    return lambda a, b: tail[N[:, None], torch.maximum(ranks[a], ranks[b])].sum(-1)


def _weights(K: int) -> tuple[Tensor, Tensor]:
    """w_j of App. I for N = 0..K candidates (row 0 is unused), (K + 1, K), and j = 1..K, (K,)."""
    j = torch.arange(1, K + 1, dtype=torch.double)
    exponent = torch.where(j <= torch.arange(K + 1)[:, None], -j, -torch.inf)  # exp(N) cancels
    return exponent.softmax(-1), j


def chance(N: int) -> float:
    """RankC of unrelated rankings of N candidates: two top-j share j^2 / N, so P@j is j / N."""
    w, j = _weights(N)
    return float((w[N] * j).sum() / N)


def accuracy(scores: Tensor, gold: Tensor) -> Tensor:
    """Share of questions whose best candidate is the gold one: (L, Q, K), (Q,) -> (L,)."""
    return hits(scores, gold).mean(-1)


def hits(scores: Tensor, gold: Tensor) -> Tensor:
    """Whether the best candidate is the gold one: (L, Q, K), (Q,) -> (L, Q) float64.

    A tie for the best counts by its share, so that no candidate's position pays.
    """
    best = scores == scores.amax(-1, keepdim=True)
    right = best.gather(-1, gold.expand(len(scores), -1)[..., None])[..., 0]
    return right / best.sum(-1).double()


def entropy(scores: Tensor) -> Tensor:
    """Entropy, nats, of the distribution over the candidates (section 6.5): (..., K) -> (...,)."""
    logp = scores.double().log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(torch.isneginf(logp), 0.0)).sum(-1)


def forecast(scores: Tensor, gamma: Tensor, beta: float) -> Tensor:
    """log pi* of Eq. 10 from the base's scores (L, Q, K): what DCO can reach, before a step."""
    return dco.optimal_policy(scores.double().transpose(0, 1), gamma, beta).transpose(0, 1)


def measure(scores: Tensor, base: Tensor, gold: list[int | None], langs: list[str]) -> dict:
    """Every measure of a score table (L, Q, K), as JSON; `base` is the table before training."""
    best, matrix = scores.argmax(-1), clc(scores)  # (L, Q), (L, L)
    a, b = torch.triu_indices(len(langs), len(langs), 1)
    known = torch.tensor([g is not None for g in gold])
    answer = torch.tensor([g for g in gold if g is not None], dtype=torch.long)
    right, nats = best[:, known] == answer, entropy(scores[:, known])
    shares = accuracy(scores[:, known], answer).tolist() if len(answer) else [None] * len(langs)
    return {
        "clc": _mean(matrix[a, b]),
        "clc_matrix": matrix.tolist(),
        "top1_agreement": _mean(best[a] == best[b]),
        "accuracy": dict(zip(langs, shares, strict=True)),
        "entropy": {"right": _mean(nats[right]), "wrong": _mean(nats[~right])},
        "changed": dict(zip(langs, map(_mean, best != base.argmax(-1)), strict=True)),
    }


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None


# --------------------------------------------------------------------------------------- the report

Splits = dict[str, list[Question]]  # "train" and "test"
Trees = dict[str, list[list[data.Tree]]]  # of each split, [question][language]
Tables = dict[str, dict[str, Tensor]]  # "base", "optimum", "trained"; of each split, (L, Q, K)


def guessing(sizes: list[int]) -> tuple[float, float]:
    """CLC and accuracy of rankings drawn at random, of questions with so many candidates."""
    return tuple(sum(map(f, sizes)) / len(sizes) for f in (chance, lambda K: 1 / K))


def new_metrics(splits: Splits, langs: list[str]) -> dict:
    """What metrics.json says before anything is measured."""
    sizes = [question.K for questions in splits.values() for question in questions]
    return {"languages": langs, "chance": guessing(sizes)[0]}


def columns(lines: list[list[str]]) -> list[str]:
    """Lines of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        texts.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return texts


def percent(share: float | None, form: str = ".1f") -> str:
    """A share as per cent; nothing for None."""
    return "" if share is None else f"{100 * share:{form}}"


def measure_all(
    questions: list[Question],
    tables: dict[str, Tensor],
    langs: list[str],
    rows: dict,
    picked: Sequence[int],
) -> dict:
    """Fill `rows` with what it lacks: the measures of each table, of the picked questions."""
    rows.setdefault("questions", len(picked))
    gold = [questions[q].gold for q in picked]
    for name, table in tables.items():
        if name not in rows:
            rows[name] = measure(table[:, picked], tables["base"][:, picked], gold, langs)
    return rows


def report(
    splits: Splits, tables: Tables, langs: list[str], metrics: dict, by_subject: bool = False
) -> str:
    """Measure what `metrics` does not hold yet of the tables, and write it all in per cent."""
    texts, L = [], len(langs)
    for split, questions in splits.items():
        mine = {name: table[split] for name, table in tables.items()}
        every = range(len(questions))
        rows = measure_all(questions, mine, langs, metrics.setdefault(split, {}), every)
        luck, guess = guessing([question.K for question in questions])
        moved = [f"Δ {lang}" for lang in langs]
        lines = [
            ["", "CLC", "top-1", *langs, *moved, "H right", "H wrong"],
            ["chance", *map(percent, [luck, guess] + [guess] * L), *[""] * (L + 2)],
        ]
        for name in tables:
            row = rows[name]
            shares = [row["clc"], row["top1_agreement"], *row["accuracy"].values()]
            shares += [None] * L if name == "base" else row["changed"].values()
            nats = ["" if x is None else f"{x:.2f}" for x in row["entropy"].values()]
            lines.append([name, *map(percent, shares), *nats])
        texts.append(
            f"\n{split}, {len(questions)} questions: CLC, top-1 agreement, accuracy, Δ (answers "
            "changed), per cent; H (entropy), nats"
        )
        if L > 6:  # too wide: the languages' columns become rows below
            texts += [*columns([line[:3] + line[-2:] for line in lines]), "by language"]
            known, moving = lines[1:], lines[3:]  # of the base and of chance nothing changes
            lines = [["", *(row[0] for row in known), *(f"Δ {row[0]}" for row in moving)]]
            for i, lang in enumerate(langs, 3):
                lines.append([lang, *(row[i] for row in known), *(row[i + L] for row in moving)])
        texts += columns(lines)
        if L > 2:
            texts += ["CLC of each pair; above the diagonal its change, once there is one"]
            texts += columns(pairs(rows, langs))
        if by_subject:
            texts += ["by subject, with the change, once there is one"]
            texts += columns(subjects(questions, mine, langs, rows.setdefault("subjects", {})))
    return "\n".join(texts)


def pairs(rows: dict, langs: list[str]) -> list[list[str]]:
    """The CLC matrix (section 6.1, App. L) as cells."""
    old, new = (rows.get(name, rows["base"])["clc_matrix"] for name in ("base", "trained"))
    lines = [["", *langs]]
    for i, lang in enumerate(langs):
        change = [percent(b - a, "+.1f") * ("trained" in rows) for a, b in zip(old[i], new[i])]
        lines.append([lang, *map(percent, old[i][:i]), "", *change[i + 1 :]])
    return lines


def subjects(
    questions: list[Question], tables: dict[str, Tensor], langs: list[str], parts: dict
) -> list[list[str]]:
    """A row for each subject (section 6.3), as cells; fills `parts` with each one's measures."""
    lines = [["subject", "questions", "CLC", *langs]]
    for subject in sorted({question.subject for question in questions}):
        picked = [q for q, question in enumerate(questions) if question.subject == subject]
        rows = measure_all(questions, tables, langs, parts.setdefault(subject, {}), picked)
        lines.append([subject, str(len(picked))])
        both = (rows[name] for name in ("base", "trained") if name in rows)
        for old, *new in zip(*([row["clc"], *row["accuracy"].values()] for row in both)):
            change = [" " + percent(x - old, "+.1f") for x in new if x is not None]
            lines[-1].append("".join([percent(old), *change]))
    return lines


def write_answers(path: Path, splits: Splits, tables: Tables, langs: list[str]) -> None:
    """A line a question with the nats of each candidate: anything can be computed again."""
    with open(path, "w", encoding="utf-8") as file:
        for split, questions in splits.items():
            for q, question in enumerate(questions):
                line = {name: getattr(question, name) for name in ("id", "subject", "gold")}
                line["split"] = split
                for name, table in tables.items():
                    nats = table[split][:, q, : question.K].tolist()
                    line[name] = dict(zip(langs, nats, strict=True))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------- Table 1, and pictures


class Run(NamedTuple):
    """What a folder of train.py tells of its last split."""

    model: str  # the one that its chain of runs began with
    about: str
    langs: list[str]
    ids: list[str]
    gold: list[int | None]
    base: Tensor  # (L, Q, K) nats
    trained: Tensor  # (L, Q, K) nats


def read_run(folder: Path) -> Run:
    """A finished run. Where its --model is a run on the same questions, that one's base counts."""
    try:
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        split, langs = "test" if "test" in metrics else "train", settings["langs"]
        lines = [line for _, line in data.json_lines(folder / "answers.jsonl")]
        lines = [line for line in lines if line["split"] == split]
        if len(lines) != (wanted := metrics[split]["questions"]):
            raise InputError(f"answers.jsonl has {len(lines)} of {wanted} questions")
        tables = []
        for name in ("base", "trained"):
            nats = [torch.tensor([line[name][lang] for lang in langs]).T for line in lines]
            pad = {"batch_first": True, "padding_value": -torch.inf}
            tables.append(torch.nn.utils.rnn.pad_sequence(nats, **pad).permute(2, 0, 1))
        model = settings["model"] or f"embedded model, seed {settings['seed']}"
        about = f"{settings['data']}, {len(lines)} questions of the {split} split, scored by "
        ids, gold = ([line[name] for line in lines] for name in ("id", "gold"))
        run = Run(model, about + settings["score"], langs, ids, gold, *tables)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not a whole run of train.py: {error!r}") from error
    for home in (Path(model), folder.parent / Path(model).name):  # there, or moved with this one
        if (home / "metrics.json").is_file() and home.resolve() != folder.resolve():
            first = read_run(home)
            same = [(x.langs, x.ids, x.base.shape) for x in (first, run)]
            if same[0] == same[1] and torch.allclose(first.trained, run.base, atol=0.5):  # nats
                return run._replace(model=first.model, base=first.base)
    return run


def compare(folders: list[str], markdown: bool = False) -> str:
    """Table 1: runs as differences to their base, per cent, each with its standard error.

    A block for each base, data set and set of questions. The error is that of a mean over
    questions: what other questions would change. Raises InputError if no folder is a finished run.
    """
    blocks, texts = {}, []
    for folder in map(Path, folders):
        if (folder / "metrics.json").is_file() and (folder / "log.jsonl").is_file():
            run = read_run(folder)
            key = (run.model, run.about, run.base.shape, *run.langs, *run.ids)
            blocks.setdefault(key, []).append((folder.name, run))
        else:
            texts.append(f"left out {folder}: not a finished run of train.py")
    if not blocks:
        raise InputError("--compare: none of the folders is a finished run of train.py")
    for runs in blocks.values():
        first, base = runs[0]
        home = base.langs.index("en") if "en" in base.langs else 0
        others = [i for i in range(len(base.langs)) if i != home]
        known = torch.tensor([g is not None for g in base.gold])
        gold = torch.tensor([g for g in base.gold if g is not None], dtype=torch.long)

        def shares(scores):  # of each question, in the paper's columns
            consist, right = _consist(scores), hits(scores[:, known], gold)
            pairs = [consist(i, j) for i, j in combinations(range(len(scores)), 2)]
            return torch.stack(pairs).mean(0), right[home], right[others].mean(0)

        english = base.langs[home].upper()
        luck, guess = guessing((~torch.isneginf(base.base[0])).sum(-1).tolist())
        lines = [
            ["", "CLC_all", f"A_{english}", f"A_not{english}"],
            ["chance", *map(percent, [luck, guess, guess])],
            ["base", *(percent(_mean(values)) for values in shares(base.base))],
        ]
        for name, run in runs:
            if not torch.allclose(run.base, base.base, atol=0.05):  # nats
                texts.append(f"note: the base of {name} scores otherwise than that of {first}")
            lines.append([name])
            for new, old in zip(shares(run.trained), shares(run.base), strict=True):
                change, n = new - old, len(new)
                error = f" ± {percent(float(change.std()) / n**0.5)}" if n > 1 else ""
                lines[-1].append(percent(_mean(change), "+.1f") + error)
        where = f"{base.model} on {base.about}; {' '.join(base.langs)}"
        texts.append(f"\n{where}; per cent, changes with their standard errors")
        if markdown:
            lines.insert(1, ["---"] * 4)
            texts += ["", *(f"| {' | '.join(line)} |" for line in lines)]
        else:
            texts += columns(lines)
    return "\n".join(texts)


def draw_clc(path: Path, before: dict, after: dict | None, langs: list[str]) -> bool:
    """The CLC matrix and its change, if any, as in Figures 4 to 8; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    old, new = (100 * torch.tensor(row["clc_matrix"]) for row in (before, after or before))
    change, L = new - old, len(langs)
    old.fill_diagonal_(math.nan)
    panels = [
        ("CLC before, per cent" if after else "CLC, per cent", old, "{:.1f}", "viridis", 0, 100)
    ]
    if after:
        reach = max(1.0, change.abs().max().item())  # the scale is centred at zero
        panels.append(("change, points", change, "{:+.1f}", "RdBu", -reach, reach))
    side = max(3.2, 0.5 * L + 1)
    figure = Figure(figsize=((side + 0.5) * len(panels), side + 0.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values, form, colours, low, high) in zip(grid, panels, strict=True):
        image = axes.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high)
        axes.set(title=title)
        axes.set_xticks(range(L), langs)
        axes.set_yticks(range(L), langs)
        for a, b in permutations(range(L), 2):
            red, green, blue, _ = image.cmap(image.norm(float(values[a, b])))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            look = {"color": ink, "fontsize": 8, "ha": "center", "va": "center"}
            axes.text(b, a, form.format(values[a, b]), **look)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=150)
    return True


# --------------------------------------------------------------------------------- the command line


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of the configuration whose help is `text`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **more})
    return field(default=default, metadata={"help": text, **more})


LIMITS = {  # what the numbers among the settings must do
    "be at least 1": (
        lambda x: x >= 1,
        {"max_tokens", "epochs", "batch_questions", "pairs_per_question", "log_every"},
    ),
    "be two or more, for Eq. 11 compares them": (lambda x: x >= 2, {"candidates"}),
    "be positive": (lambda x: 0 < x < math.inf, {"beta", "lr", "timeout"}),
    "not be negative": (lambda x: x >= 0, {"save_every", "grad_clip"}),
    "lie in [0, 1]": (lambda x: 0 <= x <= 1, {"warmup"}),
}


@dataclass(frozen=True)
class EvalConfig:
    """What judging and training have in common. Raises InputError for a number out of LIMITS."""

    model: str = option("", "folder, or hub name, of a causal language model")
    data: str = option(
        "atlas",
        "atlas, bmlama:DIR, mmmlu:DIR, xcsqa:DIR or jsonl:FILE; for mmmlu and xcsqa also the "
        "hub's ORG/NAME in place of DIR",
    )
    langs: list[str] = option(["en", "fr", "es", "sw"], "languages, by the codes of the data set")
    out: str = option("", "new or empty folder for what is written; train.py: runs/1, runs/2, ...")
    beta: float = option(1.0, "strength of the KL term (Eq. 1); train.py: 0.1 for dpo and calm")
    trust: list[str] = option(
        [], "LANG=WEIGHT where it is not 1; a language trusted more moves less"
    )
    gamma: list[str] = option(
        [],
        "instead of trust: gamma_1 gamma_2 (Eq. 6) for two languages, or a JSON matrix of gamma_ij "
        "(Eq. 15)",
    )
    train_questions: int | None = option(
        None,
        "questions to train on, which rankc.py reports apart (default: App. H's 5000, 800 of "
        "X-CSQA, 160 of atlas, all of --train_subjects; for rankc.py none)",
    )
    test_questions: int | None = option(None, "held-out questions (default: all others)")
    train_subjects: list[str] = option([], "train on these subjects alone (section 6.3)")
    test_subjects: list[str] = option([], "report on these subjects; each has its row")
    split_seed: int = option(0, "seed of the split")
    max_tokens: int = option(2048, "tokens fed at once; lower it where memory runs out")
    dtype: str = option(
        "float32",
        "of the weights. float32 computes in bfloat16 autocast on CUDA; bfloat16 halves the "
        "memory, but rounds most small updates away",
        choices=["float32", "bfloat16"],
    )
    device: str = option("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    score: str = option(
        "sum",
        "rank by the sum of the answer's log-probs, their mean, or (string) the mean over prompt "
        "and answer; training always uses the sum",
        choices=["sum", "mean", "string"],
    )
    trust_remote_code: bool = option(False, "run code that comes with the model")
    timeout: float = option(60.0, "minutes to wait for another process before giving up")

    def __post_init__(self) -> None:
        for words, (holds, names) in LIMITS.items():
            for name in names & vars(self).keys():
                if not holds(getattr(self, name)):
                    raise InputError(f"--{name} {getattr(self, name)}: must {words}")
        if len(self.langs) == 1 and "," in self.langs[0]:
            raise InputError(f"--langs {self.langs[0]}: separate them by spaces, as en es")


def parse(config_class: type, prog: str, defaults: Callable[..., dict] = lambda config: {}) -> Any:
    """The command line as a frozen config; `defaults` may set other ones, seeing what was given."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(config_class, prog=prog, description=config_class.__doc__)
    config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise InputError(f"no such setting: {' '.join(unknown)}; --help lists them")
    parser.set_defaults(**defaults(config))
    return parser.parse_args_into_dataclasses()[0]


def gamma_matrix(config: EvalConfig, say: Callable = print) -> Tensor:
    """gamma (L, L) of --trust or --gamma; warns, with the rank, where Lemma 3 does not hold."""
    langs, L, weights = config.langs, len(config.langs), dict.fromkeys(config.langs, 1.0)
    if config.trust and config.gamma:
        raise InputError("--trust and --gamma say the same thing twice: give one")
    for item in config.trust:
        lang, _, weight = item.partition("=")
        if lang not in langs and weight:
            raise InputError(f"--trust {item}: {lang!r} is not among --langs {' '.join(langs)}")
        try:
            weights[lang] = float(weight)
        except ValueError:
            raise InputError(f"--trust {item}: write LANG=NUMBER, as in en=2") from None
        if not 0 < weights[lang] < math.inf:
            raise InputError(f"--trust {item}: must be positive")
    if not config.gamma:
        trust = torch.tensor(list(weights.values()), dtype=torch.double)
        return dco.gamma_from_trust(trust, config.beta)
    try:
        gamma = torch.tensor([json.loads(item) for item in config.gamma], dtype=torch.double)
    except (ValueError, TypeError) as error:
        raise InputError("--gamma: neither two numbers nor a JSON matrix") from error
    gamma = gamma.squeeze(0) if gamma.ndim == 3 else gamma.diag_embed().flip(-1)
    finite = bool(((gamma >= 0) & (gamma < math.inf)).all())
    if gamma.shape != (L, L) or gamma.diagonal().any() or not finite:
        raise InputError(
            f"--gamma must be {L} x {L} for --langs {' '.join(langs)} (or two numbers for two), "
            "finite, not negative, with zeros on the diagonal"
        )
    if not dco.is_consistent(gamma, config.beta):
        rank = torch.linalg.matrix_rank(gamma / config.beta + torch.eye(L, dtype=torch.double))
        found = f"Gamma has rank {rank}, not rank 1 with positive entries"
        say(f"warning: {found}: pi* need not be consistent (Lemma 3)")
    return gamma


def read(config: EvalConfig, say: Callable = print) -> Splits:
    """The questions of both splits; an empty split is left out."""
    questions, kind = data.load(config.data, config.langs, say), config.data.partition(":")[0]
    train, test_subjects = config.train_questions, config.test_subjects
    if train is None and not config.train_subjects:
        if kind not in data.TRAIN_QUESTIONS:
            rest = "the others are held out"
            raise InputError(f"--train_questions: how many of {len(questions)} to train on? {rest}")
        train = data.TRAIN_QUESTIONS[kind]
        if test_subjects:
            train = min(train, sum(q.subject not in test_subjects for q in questions))
    subjects = config.train_subjects, test_subjects
    parts = data.split(questions, train, config.test_questions, config.split_seed, *subjects)
    return {name: part for name, part in zip(("train", "test"), parts, strict=True) if part}


def new_folder(path: str) -> Path:
    """The path, which must not hold anything yet."""
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        go_on = "a run of train.py that was killed: --resume goes on with it"
        raise InputError(
            f"--out {out} is there and not empty; name another, or remove it ({go_on})"
        )
    return out


# ---------------------------------------------------------------------- processes, and how they end


def start(device: str, timeout: float = 60.0) -> tuple[torch.device, Callable]:
    """Join the process group that torchrun's environment tells of, or make one of a single process.

    Returns the device, and a `print` that only process 0 heeds. timeout: minutes.
    """
    from transformers.utils.logging import disable_progress_bar

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here["cpu"] = True
    if device == "auto":
        device = next(name for name, there in here.items() if there)
    if not here[device]:
        raise InputError(f"--device {device}: this torch sees no such device; use auto or cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    disable_progress_bar()  # transformers' own: one bar at a time
    if device == "cpu":
        reuse_memory()
    wait = timedelta(minutes=timeout)
    store, rank, world = dist.HashStore(), 0, 1
    if "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        # a restarted worker must not be sent to where one of the life before listened
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"life-{life}", store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, killed, would leave its workers behind
        threading.Thread(target=leave_with, args=[os.getppid()], daemon=True).start()
    return torch.device(device), partial(print, flush=True) if rank == 0 else lambda *_: None


def reuse_memory() -> None:
    """Have glibc keep what torch frees, so that the process stays as large as it was at most.

    Else each step's gradients are new pages, which takes a third of a step on CPUs.
    """
    with suppress(AttributeError, TypeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is not given back


def leave_with(parent: int) -> None:
    """Ask this process to stop once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


class Halt(Exception):
    """The end of a run that is not whole, on every process.

    why: the message; status: the exit status; resume: whether the same command could go on.
    """

    def __init__(self, why: str, status: int = 1, resume: bool = True):
        super().__init__(why, status, resume)  # all, so that it can be sent to another process

    def __str__(self) -> str:
        return self.args[0]


def on_first(work: Callable, *arguments: Any) -> Any:
    """What `work` returns on rank 0, on every process; an error of its input or disk likewise."""
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work(*arguments)
        except (InputError, Halt, OSError) as error:
            outcome[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def on_signals(handler: Callable) -> Iterator[None]:
    """While it lasts, SIGTERM and Ctrl-C call handler(number, frame)."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def run(main: Callable, hint: str = "") -> None:
    """Run a command line, so that whatever ends it early has a message and an exit status.

    2: bad input; 128 + the signal's number: stopped; 1: all else. What all processes know, one a
    machine tells; the rest is told by each with its rank. `hint` says how to go on.
    """
    rank, status = os.environ.get("RANK", "0"), 1
    me = f"process {rank}: " if "RANK" in os.environ else ""

    def tell(message, everyone=True):  # else once a machine: not all need to see the same files
        if everyone or os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):
                print(me * (everyone or rank != "0") + message, file=sys.stderr, flush=True)

    def stop(number, _):
        nonlocal status
        status = 128 + number
        tell(f"stopped by {signal.Signals(number).name}{hint}")
        sys.exit(status)

    try:
        with on_signals(stop):
            main()
            if dist.is_initialized():
                dist.barrier()  # leave together: one that left early has aborted, now and then
        status = 0
    except InputError as error:
        status = 2
        tell(f"error: {error}", everyone=False)
    except Halt as error:
        _, status, resume = error.args
        tell(f"{error}{hint * resume}", everyone=False)
    except OSError as error:
        tell(f"error: {error}{hint}")
    except RuntimeError as error:  # gloo and the CPU's allocator have no classes of their own
        first = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in first:
            less = "Lower --max_tokens"
            if hint:  # of train.py
                less += ", take --gradient_checkpointing, or --shard over more GPUs"
            tell(
                f"error: out of memory. {less}{hint}; or begin anew with --dtype bfloat16. {first}"
            )
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            lost = "lost the other processes, of which one ended, or the network failed"
            tell(f"error: {lost}{hint}. {first}")
        else:
            raise
    finally:
        gc.collect()  # what still holds the group, as DDP may, goes before it
        if dist.is_initialized() and (status == 0 or dist.get_backend() == "gloo"):
            dist.destroy_process_group()  # NCCL would wait for what failed
    if status:
        sys.exit(status)


# ---------------------------------------------------------------------------------- scoring a model


def load_model(
    config: EvalConfig, device: torch.device
) -> tuple[nn.Module, "PreTrainedTokenizerBase"]:
    """The model, in the asked number format and with dropout off, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name, remote = config.model, {"trust_remote_code": config.trust_remote_code}
    try:
        settings = AutoConfig.from_pretrained(name, **remote)
        for part in (settings, settings.get_text_config()):
            for key, value in part.to_dict().items():
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)  # else policy and reference differ at step 0
        tokenizer = AutoTokenizer.from_pretrained(name, **remote)
        how = {"dtype": getattr(torch, config.dtype), "use_safetensors": True, **remote}
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=settings, output_loading_info=True, **how
        )
        if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
            raise ValueError(f"{len(missing)} weights are not in it, {missing[0]} first")
    except torch.OutOfMemoryError:
        raise
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError),
        SafetensorError,
    ) as error:  # what transformers lets through of a damaged folder
        place, why = Path(name), "give a folder that save_pretrained wrote, with safetensors"
        if place.is_file():
            why = "it is a file; give the folder it lies in (GGUF is not read)"
        elif not place.is_dir():
            why = f"{place.absolute()} is no folder, and the hub does not give it; name a folder, "
            why += "or a hub name where there is network"
        elif not [*place.glob("*.safetensors")]:
            why = "it holds no .safetensors file; a .bin file may run code: "
            why += "where you trust it, convert it by save_pretrained"
        wrong = f"--model {name}: no causal language model can be loaded from it: {why}"
        raise InputError(f"{wrong}. {error!r}") from error
    return model.to(device), tokenizer


def plant(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    splits: Splits,
    config: EvalConfig,
    say: Callable,
    whole: bool = False,
) -> tuple[Trees, bool]:
    """The trees of each split, [question][language], and whether this model scores them packed."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    trees, every = {}, []
    for name, questions in splits.items():
        trees[name] = data.encode(tokenizer, questions, config.langs, context, whole)
        every += [tree for row in trees[name] for tree in row]
    packed = dco.packs_exactly(model, [max(every, key=data.Tree.tokens), every[0]])
    rest(model)
    if not packed:
        say(
            "warning: this model does not score packed questions as it scores separate ones; "
            "scoring each answer apart, which is slower"
        )
    return trees, packed


def rest(model: nn.Module) -> None:
    """Let go of the weights that FSDP gathers for a forward pass and keeps for a backward one."""
    if isinstance(model, FSDPModule):
        model.reshard()


def autocast(config: EvalConfig, device: torch.device) -> torch.autocast:
    """bfloat16 matrix products over float32 weights on CUDA; elsewhere in the weights' format."""
    enabled = device.type == "cuda" and config.dtype == "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def progress(
    steps: Iterable, desc: str, total: int, note: dict | None = None, first: int = 0
) -> Iterator:
    """Iterate under a tqdm bar on rank 0, or plain lines where it has no terminal; shows `note`.

    The `first` of the `total` steps were done before.
    """
    from tqdm import tqdm

    if dist.get_rank():
        yield from steps
        return
    plain, note = not sys.stderr.isatty(), {} if note is None else note
    look = {"leave": False, "dynamic_ncols": True, "disable": plain}
    begun = told = time.monotonic()
    with tqdm(desc=desc, total=total, initial=first, **look) as bar:
        for done, step in enumerate(steps, first + 1):
            yield step
            if not plain:
                bar.set_postfix(note, refresh=False)
                bar.update()
            now = time.monotonic()
            if plain and (done == total or now - told > max(5, (now - begun) / 10)):
                told, rate = now, (done - first) / (now - begun)
                notes = "".join(f", {name} {float(value):.4g}" for name, value in note.items())
                left = (total - done) / rate
                print(f"{desc}: {done}/{total}, {rate:.2f}/s, {left:.0f} s left{notes}", flush=True)


@torch.no_grad()
def score(
    model: nn.Module,
    trees: list[list[data.Tree]],
    config: EvalConfig,
    desc: str,
    packed: bool,
    ids: Sequence[str] = (),
) -> Tensor:
    """log pi(y|x), or what --score makes of it: trees [question][language] -> (L, Q, K) on the CPU.

    Each tree is scored once, by one process; every process returns the whole table. Raises Halt,
    naming questions by their ids, where a log-prob is NaN or infinite.
    """
    model.eval()
    flat = [tree for row in trees for tree in row]
    rank, world, device = dist.get_rank(), dist.get_world_size(), next(model.parameters()).device
    groups, mine = data.batches(flat, config.max_tokens, packed), []
    K = max(len(tree.branches) for tree in flat)
    out = torch.full((len(flat), K), torch.nan, device=device)
    rounds = range(rank, -(-len(groups) // world) * world, world)  # FSDP: as many for every process
    for n in progress(rounds, desc, len(rounds)):
        group = groups[min(n, len(groups) - 1)]
        with autocast(config, device):
            logps = dco.completion_logps(model, [flat[i] for i in group], packed)
        if n < len(groups):
            out[group] = torch.nn.functional.pad(logps, (0, K - logps.shape[1]), value=-torch.inf)
            mine += group
    out = out.cpu()
    rest(model)
    parts = [None] * world
    dist.all_gather_object(parts, (mine, out[mine]))
    for theirs, values in parts:
        out[theirs] = values
    sizes = torch.tensor([len(tree.branches) for tree in flat])
    bad = ~out.isfinite() & (torch.arange(K) < sizes[:, None])  # (trees, K)
    if where := bad.view(len(trees), -1).any(-1).nonzero()[:, 0].tolist():
        names = ", ".join(repr(ids[q] if ids else q) for q in where[:5])
        raise Halt(
            f"error: {desc}: log-probs are NaN or infinite in {len(where)} of {len(trees)} "
            f"questions: {names}; the model is broken, or overflows in {config.dtype}",
            resume=False,
        )
    if config.score != "sum":
        scored = [[len(b) - tree.lead for b in tree.branches] for tree in flat]
        out /= torch.tensor([row + [1] * (K - len(row)) for row in scored])
    return out.view(len(trees), -1, K).transpose(0, 1).contiguous()


# ---------------------------------------------------------------------------------- from end to end


@dataclass(frozen=True)
class RankcConfig(EvalConfig):
    """Judge a model: CLC, accuracy, entropy, and the forecast of what DCO can make of it; or
    compare runs that train.py has finished."""

    compare: list[str] = option([], "folders of runs, to be shown as Table 1 shows them")
    markdown: bool = option(False, "write the comparison as a Markdown table")


def main() -> None:
    none = {"train_questions": 0}
    config = parse(RankcConfig, "rankc.py", lambda given: {} if given.train_subjects else none)
    if config.markdown and not config.compare:
        raise InputError("--markdown is for --compare")
    if config.compare:
        print(compare(config.compare, config.markdown))
        return
    if not config.model:
        raise InputError("give --model FOLDER, to judge it, or --compare RUN ..., to compare runs")
    device, say = start(config.device, config.timeout)
    gamma = gamma_matrix(config, say)
    out = new_folder(config.out) if config.out else None
    splits = read(config, say)
    model, tokenizer = load_model(config, device)
    trees, packed = plant(model, tokenizer, splits, config, say, whole=config.score == "string")
    begun, base = time.time(), {}
    for name, questions in splits.items():
        ids = [question.id for question in questions]
        base[name] = score(model, trees[name], config, f"score {name}", packed, ids)
    seconds = {"score": round(time.time() - begun, 2)}
    optimum = {name: forecast(base[name], gamma, config.beta) for name in splits}
    metrics, tables = new_metrics(splits, config.langs), {"base": base, "optimum": optimum}
    subjects = bool(config.train_subjects or config.test_subjects)
    say(report(splits, tables, config.langs, metrics, subjects))
    if out and dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(json.dumps(asdict(config), indent=1))
        (out / "metrics.json").write_text(json.dumps({**metrics, "seconds": seconds}, indent=1))
        write_answers(out / "answers.jsonl", splits, {"base": base}, config.langs)
        if not draw_clc(out / "clc.png", metrics[list(splits)[-1]]["base"], None, config.langs):
            say("clc.png is left out; to draw it: pip install -e '.[plot]'")
        say(f"\nwrote {out}")


if __name__ == "__main__":
    run(main)
