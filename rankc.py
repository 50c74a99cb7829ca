"""How a model is judged: RankC, CLC, accuracy, changed answers, entropy; then tables and pictures.

Covers section 5, the tables and figures of section 6, and Apps. I, J and L to N, of the paper that
dco.py names. Knows score tables alone, no model and no data set; `python rankc.py RUN ...` puts
finished runs into the paper's tables.

Axes: a score table is (Q, L, K), questions, languages, candidates, as dco.optimal_policy has it. A
question with fewer than K candidates has -inf in the places left, in every language.
"""

import argparse
import json
import math
from collections.abc import Sequence
from itertools import chain, combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


# ------------------------------------------------------------------------------------- the measures
def rankc(scores_a: Tensor, scores_b: Tensor) -> Tensor:
    """consist(x1, x2) of App. I for each question: (Q, K), (Q, K) -> (Q,) float64 in [0, 1].

    Candidate k is the same answer in both; missing ones are -inf in both. Ties are broken by
    candidate number. Raises ValueError on NaN, on a candidate missing in one language only, on a
    question without any, and on other axes.
    """
    return _consist(torch.stack([scores_a, scores_b], dim=1))[0, 1]


def clc(scores: Tensor) -> Tensor:
    """RankC (App. I) of each pair of languages: (Q, L, K) -> (L, L). Raises ValueError as rankc."""
    pairs, matrix = _consist(scores), torch.eye(scores.shape[1], dtype=torch.double)
    for (a, b), consist in pairs.items():
        matrix[a, b] = matrix[b, a] = consist.mean()
    return matrix


def _consist(scores: Tensor) -> dict[tuple[int, int], Tensor]:
    """The consist, (Q,), of each pair of languages, by their indices; sorts each language once.

    Both top-j hold those candidates whose worse rank m is below j. So sum_j w_j P@j, summed over
    candidates c instead of over j, is sum_c sum_{j > m_c} w_j / j: one look-up a candidate.
    """
    _check_axes(scores)
    missing = torch.isneginf(scores)
    if scores.isnan().any() or (missing != missing[:, :1]).any():
        raise ValueError("scores hold NaN, or a candidate missing (-inf) in one language only")
    N = (~missing[:, 0]).sum(-1, keepdim=True)  # (Q, 1) candidates of each question
    if (N == 0).any():
        raise ValueError("a question without candidates has no ranking")
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # (Q, L, K), 0 is best
    w, j = _weights(scores.shape[-1])
    tail = (w / j).flip(-1).cumsum(-1).flip(-1)  # (K + 1, K): at [N, m], sum_{j > m} w_j / j
    pairs = combinations(range(scores.shape[1]), 2)
    return {(a, b): tail[N, torch.maximum(ranks[:, a], ranks[:, b])].sum(-1) for a, b in pairs}


def _check_axes(scores: Tensor) -> None:
    if scores.ndim != 3:
        axes = "(questions, languages, candidates)"
        raise ValueError(f"a score table has three axes, {axes}, not the shape {(*scores.shape,)}")


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
    """Share of questions whose best candidate is the gold one: (Q, L, K), (Q,) -> (L,)."""
    return top1_correct(scores, gold).mean(0)


def top1_correct(scores: Tensor, gold: Tensor) -> Tensor:
    """Whether the best candidate is the gold one, ties by their share: (Q, L, K), (Q,) -> (Q, L).

    Raises ValueError on other axes.
    """
    _check_axes(scores)
    best = scores == scores.amax(-1, keepdim=True)
    right = best.gather(-1, gold[:, None, None].expand(-1, scores.shape[1], 1))[..., 0]
    return right / best.sum(-1).double()


def entropy(scores: Tensor) -> Tensor:
    """Entropy, nats, of the distribution over the candidates (section 6.5): (..., K) -> (...,)."""
    return torch.special.entr(scores.double().softmax(-1)).sum(-1)


def by_question(
    scores: Tensor, gold: Sequence[int | None], langs: Sequence[str], first: str = ""
) -> dict[str, Tensor]:
    """Each measure of each question: (Q, L, K) -> {"clc" or "accuracy <lang>": (Q,) float64}.

    "clc" is the mean over pairs of languages, "clc_<first>" over those with `first`, by default the
    reference language. Accuracy is NaN where the right answer is not known. Raises ValueError as
    rankc does.
    """
    pairs, first = _consist(scores), first or reference_language(langs)
    known = torch.tensor([math.nan if g is None else float(g) for g in gold], dtype=torch.double)
    right = top1_correct(scores, known.nan_to_num().long()) + 0 * known[:, None]  # (Q, L)
    with_first = [x for pair, x in pairs.items() if langs.index(first) in pair]
    found = {"clc": [*pairs.values()], f"clc_{first}": with_first}
    found = {name: torch.stack(values).mean(0) for name, values in found.items()}
    return found | {f"accuracy {lang}": x for lang, x in zip(langs, right.T, strict=True)}


def reference_language(langs: Sequence[str]) -> str:
    """The language whose pairs CLC-EN is of: English, or else the first."""
    return "en" if "en" in langs else langs[0]


def measure(
    scores: Tensor, base: Tensor, gold: list[int | None], langs: list[str], sums: Any = None
) -> dict:
    """Every measure of a score table (Q, L, K), as JSON; `base` is the table before training.

    `sums` are log-probs where answers are ranked by another score: entropy and the candidates'
    total probability are of them. (It may exceed 1: an answer that begins another holds it.)
    """
    logps = scores if sums is None else sums
    best, matrix = scores.argmax(-1), clc(scores)  # (Q, L), (L, L)
    a, b = torch.triu_indices(len(langs), len(langs), 1)
    known = torch.tensor([g is not None for g in gold])
    answer = torch.tensor([g for g in gold if g is not None], dtype=torch.long)
    right, nats = best[known] == answer[:, None], entropy(logps[known])
    shares = accuracy(scores[known], answer).tolist() if len(answer) else [None] * len(langs)
    en = langs.index(first := reference_language(langs))
    kinds = {"right": nats[right], "wrong": nats[~right]}
    mass = logps.double().exp().sum(-1).mean(0).tolist()  # (L,)
    spread = {kind: float(x.std(correction=0)) if len(x) else None for kind, x in kinds.items()}
    return {
        "clc": _mean(matrix[a, b]),
        f"clc_{first}": _mean(matrix[en][torch.arange(len(langs)) != en]),
        "clc_matrix": matrix.tolist(),
        "top1_agreement": _mean(best[:, a] == best[:, b]),
        "accuracy": dict(zip(langs, shares, strict=True)),
        "entropy": {kind: _mean(values) for kind, values in kinds.items()},
        "entropy_std": spread,
        "probability": dict(zip(langs, mass, strict=True)),
        "changed": dict(zip(langs, map(_mean, (best != base.argmax(-1)).T), strict=True)),
    }


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None


# --------------------------------------------------------------------------------------- the report
Splits = dict[str, list[Any]]  # "train", "validation", "test": questions as data.Question has them
Tables = dict[str, dict[str, Tensor]]  # "base", "optimum", "trained"; of each split, (Q, L, K)


def chance_levels(sizes: Sequence[int]) -> tuple[float, float]:
    """CLC and accuracy of rankings drawn at random, of questions with so many candidates."""
    return tuple(sum(map(f, sizes)) / len(sizes) for f in (chance, lambda K: 1 / K))


def format_table(rows: list[list[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table that is aligned in a terminal, too."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in [rows[0], ["-" * n for n in widths], *rows[1:]]:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *right])} |")
    return "\n".join(lines)


def percent(share: float | None, form: str = ".1f") -> str:
    """A share as per cent; nothing for None."""
    return "" if share is None else f"{100 * share:{form}}"


def report(
    splits: Splits,
    tables: Tables,
    langs: list[str],
    metrics: dict,
    by_subject: bool = False,
    sums: Tables | None = None,
) -> str:
    """Tables of each split, in per cent; `metrics` is filled with the measures that it lacks.

    `sums` are log-probs where `tables` rank by another score.
    """
    texts, first, trained = [], reference_language(langs), "trained" in tables
    keys = {"clc": "CLC", f"clc_{first}": f"CLC-{first.upper()}"}
    keys |= {f"accuracy {lang}": f"accuracy {lang}" for lang in langs}
    shown = [key for key in keys if key != f"clc_{first}"]

    def measured(found, split, picked):
        gold, ids = ([getattr(splits[split][q], x) for q in picked] for x in ("gold", "id"))
        scores = {name: table[split][picked] for name, table in tables.items()}
        every = {name: by_question(table, gold, langs) for name, table in scores.items()}
        if trained:
            every["change"] = {x: every["trained"][x] - old for x, old in every["base"].items()}
            pairs = zip(langs, scores["base"].unbind(1), scores["trained"].unbind(1), strict=True)
            found["answers"] = {lang: turned(old, new, gold) for lang, old, new in pairs}
        found |= {"questions": len(picked), "with_error": {}}
        for name, values in every.items():
            found["with_error"][name] = {x: mean_and_error([(ids, values[x])]) for x in values}
        for name in [name for name in tables if name not in found]:
            logps = (sums or tables)[name][split][picked]
            found[name] = measure(scores[name], scores["base"], gold, langs, logps)
            if name.endswith("optimum"):
                del found[name]["probability"]  # normalised: it is 1
        return found

    def cells(found, key, names):
        return [_with_error(found["with_error"][x][key], "+" * (x == "change")) for x in names]

    for split, questions in reversed(splits.items()):  # held out first
        found = measured(metrics.setdefault(split, {}), split, range(len(questions)))
        clc, top = map(percent, chance_levels([question.K for question in questions]))
        names, every = [*found["with_error"]], [found[name] for name in tables]
        rows = [[f"{split}, {len(questions)} questions", "chance", *names]]
        for key in keys if len(langs) > 2 else shown:  # CLC with one of two languages is CLC
            level = clc if key.startswith("clc") else top
            rows.append([keys[key], level, *cells(found, key, names)])
        shares = [("same top answer", top, [each["top1_agreement"] for each in every], ".1f")]
        for lang in langs:
            mass = [each.get("probability", {}).get(lang) for each in every]
            shares.append((f"probability of all answers {lang}", "", mass, ".3g"))
        for label, level, values, form in shares:
            change = [percent(values[-1] - values[0], f"+{form}")] if trained else []
            rows.append([label, level, *(percent(x, form) for x in values), *change])
        for kind in ("right", "wrong"):
            nats = [(each["entropy"][kind], each["entropy_std"][kind]) for each in every]
            nats = ["" if None in pair else "{:.2f}, {:.2f}".format(*pair) for pair in nats]
            rows.append([f"entropy if {kind}: nats, std", "", *nats, *[""] * trained])
        texts += ["", format_table(rows)]
        if trained and any(question.gold is not None for question in questions):
            kinds = ["wrong to right", "right to wrong", "wrong to wrong"]
            rows = [[f"answers changed, of {len(questions)}", *kinds]]
            rows += [[lang, *map(str, found["answers"][lang])] for lang in langs]
            texts += ["", format_table(rows)]
        if len(langs) > 2:
            texts += ["", format_table(_pairs(found, langs))]
        parts, new = {}, {*new_prompts(splits, split, first)}
        if len(new) < len(questions):
            told = "of a training question"
            parts["prompts"] = ["new" if q in new else told for q in range(len(questions))]
        if by_subject:
            parts["subjects"] = [question.subject for question in questions]
        for kind, labels in parts.items():
            rows = [[kind[:-1], "questions", *(keys[key] for key in shown)]]
            for name in sorted({*labels}):
                picked = [q for q, label in enumerate(labels) if label == name]
                part = measured(found.setdefault(kind, {}).setdefault(name, {}), split, picked)
                both = [cells(part, key, ["base", *["change"] * trained]) for key in shown]
                rows.append([name, str(len(picked)), *(", ".join(filter(None, x)) for x in both)])
            texts += ["", format_table(rows)]
    return "\n".join(texts)


def new_prompts(splits: Splits, split: str, lang: str) -> list[int]:
    """Which questions of a split are not asked by the prompt of a training question, too."""
    trained = {question.prompts[lang] for question in splits.get("train", []) if split != "train"}
    return [q for q, each in enumerate(splits[split]) if each.prompts[lang] not in trained]


def turned(before: Tensor, after: Tensor, gold: Sequence[int | None]) -> list[int]:
    """How many best answers turned from wrong to right, right to wrong, wrong to wrong.

    before, after: (Q, K) scores. Questions whose right answer is not known do not count.
    """
    known = torch.tensor([-1 if g is None else g for g in gold])
    old, new = (scores.argmax(-1) for scores in (before, after))
    was, now, moved = old == known, new == known, (old != new) & (known >= 0)
    return [int((moved & kind).sum()) for kind in (now, was, ~was & ~now)]


def _with_error(both: tuple[float, float] | None, sign: str = "") -> str:
    if both is None:
        return ""
    return percent(both[0], f"{sign}.1f") + f" ± {percent(both[1])}" * (not math.isnan(both[1]))


def verdict(found: dict, langs: Sequence[str], reached: str) -> str:
    """One line on what training changed in a split, beyond two standard errors or within them."""
    names = {"clc": "CLC"} | {f"accuracy {lang}": f"accuracy {lang}" for lang in langs}
    kinds = {"rose": [], "fell": [], "moved by no more than two standard errors": []}
    for key, name in names.items():
        if change := found["with_error"]["change"][key]:
            kind = 2 if not abs(change[0]) > 2 * change[1] else int(change[0] < 0)
            kinds[[*kinds][kind]].append(f"{name} {_with_error(change, '+')}")
    told = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    aim = [f"CLC {percent(found[reached]['clc'])}"]
    shares = found[reached]["accuracy"].items()
    aim += [f"accuracy {lang} {percent(share)}" for lang, share in shares if share is not None]
    return f"{'; '.join(told)}; {reached}, what DCO aims at: {', '.join(aim)}"


def _pairs(found: dict, langs: list[str]) -> list[list[str]]:
    """The CLC matrix (section 6.1, App. L); above its diagonal the change, once there is one."""
    old, new = (found.get(name, found["base"])["clc_matrix"] for name in ("base", "trained"))
    rows = [["CLC \\ change" if "trained" in found else "CLC", *langs]]
    for i, lang in enumerate(langs):
        change = [percent(b - a, "+.1f") * ("trained" in found) for a, b in zip(old[i], new[i])]
        rows.append([lang, *map(percent, old[i][:i]), "", *change[i + 1 :]])
    return rows


def write_answers(path: Path, splits: Splits, tables: Tables, langs: list[str]) -> None:
    """A line a question, with the nats of each candidate: anything can be computed again."""
    with open(path, "w", encoding="utf-8") as file:
        for split, questions in splits.items():
            for q, question in enumerate(questions):
                line = {name: getattr(question, name) for name in ("id", "subject", "gold")}
                line["split"] = split
                for name in ("prompts", "answers"):
                    line[name] = {lang: getattr(question, name)[lang] for lang in langs}
                for name, table in tables.items():
                    nats = table[split][q, :, : question.K].tolist()
                    line[name] = dict(zip(langs, nats, strict=True))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------ runs beside another
class RunError(ValueError):
    """A folder that is no finished run of train.py; the message names it."""


class Run(NamedTuple):
    """What a folder of train.py tells of its last split."""

    name: str  # of the folder
    settings: dict  # run.json; `model` is the one that its chain of runs began with
    langs: list[str]
    ids: list[str]
    subjects: list[str]
    gold: list[int | None]
    new: list[bool]  # whether its prompt is no training question's
    pi_star: dict[str, float]  # accuracy at pi*, mean over languages; by subject, "": of all
    base: Tensor  # (Q, L, K) nats
    trained: Tensor  # (Q, L, K) nats


# Settings that say where and how a run is computed: they move nothing but rounding.
MACHINE = "out resume save_every eval_every eval_questions max_tokens gradient_checkpointing "
MACHINE += "shard offload device timeout"
# In which runs of one table may differ.
FREE = MACHINE + " langs test_subjects validation_questions processes torch transformers git"
NEW = ", new prompts"


def read_run(folder: Path, later: frozenset[Path] = frozenset()) -> Run:
    """A finished run, or RunError; with the base of its --model if a run on the same questions."""
    try:
        path = folder / "run.json"
        settings = json.loads(path.read_text("utf-8"))
        path = folder / "metrics.json"
        metrics = json.loads(path.read_text("utf-8"))
        path = folder / "answers.jsonl"  # as one JSON text, so that an error names its line
        lines = json.loads("[" + path.read_text("utf-8").strip().replace("\n", ",\n") + "]")
        split = [name for name in ("train", "validation", "test") if name in metrics][-1]
        langs = settings["langs"]
        lang = reference_language(langs)
        trained = {line["prompts"][lang] for line in lines if "train" == line["split"] != split}
        lines = [line for line in lines if line["split"] == split]
        if len(lines) != (wanted := metrics[split]["questions"]):
            raise ValueError(f"it has {len(lines)} of {wanted} questions")
        tables = []
        for name in ("base", "trained"):
            nats = [torch.tensor([line[name][lang] for lang in langs]).T for line in lines]
            tables.append(torch.nn.utils.rnn.pad_sequence(nats, True, -torch.inf).transpose(1, 2))
        settings["model"] = settings["model"] or f"embedded model, seed {settings['seed']}"
        settings |= {"split": split, "data": settings["data"], "score": settings["score"]}
        columns = [[line[name] for line in lines] for name in ("id", "subject", "gold")]
        new = [line["prompts"][lang] not in trained for line in lines]
        parts = {"": metrics[split], **metrics[split].get("subjects", {})}
        pi_star = {name: _accuracy_at_pi_star(part) for name, part in parts.items()}
        pi_star = pi_star if settings.get("method") == "dco" else {}
        run = Run(folder.name, settings, langs, *columns, new, pi_star, *tables)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not of a whole run of train.py: {error!r}") from error
    model, later = settings["model"], later | {folder.resolve()}
    for first in (Path(model), folder.parent / Path(model).name):  # there, or moved with this one
        if (first / "metrics.json").is_file() and first.resolve() not in later:
            earlier = read_run(first, later)
            same = [(each.langs, each.ids, each.base.shape) for each in (earlier, run)]
            if same[0] == same[1] and torch.allclose(earlier.trained, run.base, atol=0.5):  # nats
                after = [earlier.settings.get(x) for x in "method lr epochs beta seed".split()]
                settings |= {"model": earlier.settings["model"], "after": after}
                return run._replace(base=earlier.base, pi_star={})
    return run


def _accuracy_at_pi_star(found: dict) -> float | None:
    """The optimum's accuracy in the measures of a split or subject, mean over the languages."""
    kinds = [each["accuracy"] for name, each in found.items() if name.endswith("optimum")]
    shares = [share for each in kinds for share in each.values() if share is not None]
    return sum(shares) / len(shares) if shares else None


def mean_and_error(parts: Sequence[tuple[Sequence[str], Tensor]]) -> tuple[float, float] | None:
    """The mean over parts of their means over questions, and its standard error, NaN for one.

    A part: ids of questions, and a number of each, NaN where there is none. The error is what other
    questions would change: one in several parts counts once, with all that it adds. None where a
    part has no numbers.
    """
    mean, added = 0.0, {}
    for ids, values in parts:
        if not (there := ~values.isnan()).any():
            return None
        mean += float(values[there].mean()) / len(parts)
        share = (values - values[there].mean()) / (int(there.sum()) * len(parts))
        for id, x in zip(ids, share.tolist(), strict=True):
            if not math.isnan(x):
                added[id] = added.get(id, 0.0) + x
    n = len(added)
    return mean, math.sqrt(sum(x * x for x in added.values()) * n / (n - 1)) if n > 1 else math.nan


def _picked(run: Run, picked: Sequence[bool], share: float | None = None) -> Run:
    """A run with those of its questions alone that are picked, and the accuracy at pi* of them."""
    at = [q for q, each in enumerate(picked) if each]
    columns = {x: [getattr(run, x)[q] for q in at] for x in ("ids", "subjects", "gold", "new")}
    return run._replace(base=run.base[at], trained=run.trained[at], pi_star={"": share}, **columns)


def _cells(runs: list[Run], first: str) -> list[str]:
    """The mean over runs of four measures before training, each with its change; accuracy at pi*.

    The measures: CLC, CLC with language `first`, accuracy in it and in the others.
    """
    parts = []
    for run in runs:
        both = by_question(torch.cat([run.base, run.trained]), 2 * run.gold, run.langs, first)
        clc, with_first, *right = both.values()  # (2Q,) each
        own = right.pop(run.langs.index(first))
        old, new = torch.stack([clc, with_first, own, torch.stack(right).mean(0)]).chunk(2, dim=1)
        parts.append([(run.ids, x) for x in chain(*zip(old, new - old, strict=True))])  # (Q,) each
    found = zip(zip(*parts, strict=True), 4 * ["", "+"], strict=True)
    shares = [run.pi_star.get("") for run in runs]
    at_pi_star = "" if None in shares else percent(sum(shares) / len(shares))
    return [*(_with_error(mean_and_error(part), sign) for part, sign in found), at_pi_star]


def _settings(run: Run, but_for: str = FREE) -> dict:
    return {name: x for name, x in sorted(run.settings.items()) if name not in but_for.split()}


def compare(folders: Sequence[str], reference: str = "", plot: Path | None = None) -> str:
    """The paper's tables of finished runs, in per cent, with standard errors.

    Runs on the same questions are rows of one table (Table 1); if they differ in gamma or trust
    alone, `plot` is drawn (Figures 2, 3). Runs that differ in the language beside `reference` (by
    default English, or else a run's first), or in the subjects tested, are joined in one (Tables 2,
    3, 5 to 12). Raises RunError if no folder is a finished run, or none has that language.
    """
    runs, texts, alike, pairs, drawn = [], [], {}, {}, 0
    for folder in map(Path, folders):
        if (folder / "metrics.json").is_file() and (folder / "log.jsonl").is_file():
            runs.append(read_run(folder))
        else:
            runs_in = f", but it holds some: give {folder}/*" * any(folder.glob("*/metrics.json"))
            texts.append(f"left out {folder}: not a finished run of train.py{runs_in}")
    if not runs:
        raise RunError(f"none of the folders is a finished run of train.py: {'; '.join(texts)}")
    there = sorted({lang for run in runs for lang in run.langs})
    if reference and reference not in there:
        raise RunError(f"--reference {reference}: no run has it; they have {', '.join(there)}")
    for run in runs:
        first = reference if reference in run.langs else reference_language(run.langs)
        about = [run.settings[name] for name in ("model", "data", "split", "score")]
        alike.setdefault((first, *about, run.base.shape, *run.langs, *run.ids), []).append(run)
        if len(run.langs) == 2:
            pairs.setdefault((first, str(_settings(run))), []).append(run)
    joined = set()
    for (first, _), group in pairs.items():
        if len({(*run.langs, *run.ids) for run in group}) > 1:
            texts.append(_joined(group, first))
            joined |= {*map(id, group)}
    for (first, *_), group in alike.items():
        apart = joined.isdisjoint(map(id, group))
        if apart or len(group) > 1:
            texts.append(_beside(group, first))
        if others := [run for each in alike.values() if each is not group for run in each] * apart:
            texts.append(_apart(group[0], others))
        directions = {}
        for run in group:
            way = run.settings.get("gamma") or run.settings.get("trust") or ["equal trust"]
            same = directions.setdefault(str(_settings(run, FREE + " gamma trust")), {})
            same.setdefault(", ".join(way), run)
        for found in [found for found in directions.values() if plot and len(found) > 1]:
            path = plot.with_stem(plot.stem + f"-{drawn + 1}" * bool(drawn))
            done = draw_directions(path, found)
            drawn += done
            told = f"shows {', '.join(run.name for run in found.values())}"
            told = told if done else "is left out; to draw it: pip install -e '.[plot]'"
            texts.append(f"\n{path} {told}")
    return "\n".join(texts)


def _apart(run: Run, others: list[Run]) -> str:
    """Why a run is in no table with those, told by the one that differs least."""
    found = []
    for other in others:
        a, b = (_settings(each, FREE.replace("langs", "")) for each in (run, other))
        names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
        why = "; ".join(f"{name} {a.get(name)!r}, not {b.get(name)!r}" for name in names)
        found.append((len(names), f"{other.name}: {why or 'other questions'}"))
    return f"\n{run.name} is not joined with {min(found)[1]}"


def _titled(run: Run, about: str, rows: list[list[str]], notes: list[str]) -> str:
    what = f"{run.settings['model']} on {run.settings['data']}, the {run.settings['split']} split"
    head = f"{what}, scored by {run.settings['score']}; {about}; per cent, with standard errors"
    return "\n".join([*notes, "", head, "", format_table(rows)])


def _chance(run: Run) -> list[str]:
    """What chance gives, as a row of _cells."""
    clc, top = map(percent, chance_levels((~run.base[:, 0].isneginf()).sum(-1).tolist()))
    return [clc, "", clc, "", top, "", top, "", ""]


def _beside(runs: list[Run], first: str) -> str:
    """Runs on the same questions, a row each, as differences to their base (Table 1)."""
    base, name = runs[0], first.upper()
    rows = [["", "CLC", f"CLC-{name}", f"A_{name}", f"A_not{name}", "A at pi*"]]
    rows += [["chance", *_chance(base)[::2]]]
    other = [run.name for run in runs if not torch.allclose(run.base, base.base, atol=0.05)]  # nats
    notes = [f"note: the base of {x} scores otherwise than that of {base.name}" for x in other]
    groups = {"": runs}
    if not all(base.new):
        groups[NEW] = [_picked(run, run.new) for run in runs]
    for more, group in groups.items():
        found = [_cells([run], first) for run in group]  # each measure before its change
        rows.append([f"base{more}", *found[0][:8:2], ""])
        rows += [[run.name + more, *x[1:8:2], x[8]] for run, x in zip(group, found, strict=True)]
    return _titled(base, f"{' '.join(base.langs)}, {len(base.ids)} questions", rows, notes)


def _joined(runs: list[Run], first: str) -> str:
    """Runs of one language each beside `first`: a row each and their mean (Tables 2, 5 to 10).

    Where subjects to test were named, so for each subject (Tables 3, 11 and 12).
    """
    name, notes = first.upper(), []
    header = [x + y for x in (f"CLC-{name}", f"A_{name}", "A") for y in ("", " change")]
    rows = [["", *header, "A at pi*"], ["chance", *_chance(runs[0])[2:]]]
    named = any(run.settings.get("test_subjects") for run in runs)
    for subject in sorted({each for run in runs for each in run.subjects}) if named else [""]:
        own = {}
        for run in [run for run in runs if subject in ("", *run.subjects)]:
            (lang,) = set(run.langs) - {first}
            note = f"note: {lang} is that of another run, {run.name} is left out"
            notes += [note] * (lang in own and note not in notes)
            picked = [subject in ("", each) for each in run.subjects]
            own.setdefault(lang, _picked(run, picked, run.pi_star.get(subject)))
        groups = {**{lang: [run] for lang, run in own.items()}, "mean": [*own.values()]}
        if not all(all(run.new) for run in own.values()):
            groups[f"mean{NEW}"] = [_picked(run, run.new) for run in own.values()]
        for label, group in groups.items():
            rows.append([f"{subject} {label}".strip(), *_cells(group, first)[2:]])
    return _titled(runs[0], f"{first} and each language", rows, notes)


def draw_directions(path: Path, runs: dict[str, Run]) -> bool:
    """Figures 2 and 3: runs by their gamma or trust; False without matplotlib."""
    if not (figure := _figure(10, 4)):
        return False
    base = next(iter(runs.values()))
    tables = [base.base, *(run.trained for run in runs.values())]
    found = [measure(table, base.base, base.gold, base.langs) for table in tables]
    title = f"answers changed; CLC in green (base {percent(found[0]['clc'])})"
    panels = [("accuracy", "accuracy", found, ["base", *runs]), (title, "changed", found[1:], runs)]
    for axes, (title, what, shown, names) in zip(figure.subplots(1, 2), panels, strict=True):
        width = 0.8 / len(base.langs)
        for i, lang in enumerate(base.langs):
            at = [n + (i + 0.5) * width - 0.4 for n in range(len(names))]
            values = [each[what][lang] for each in shown]  # None where no right answer is known
            bars = axes.bar(at, [100 * (x or 0) for x in values], width, label=lang)
            axes.bar_label(bars, [*map(percent, values)], fontsize=8)
        axes.set(title=title, ylabel="per cent", xticks=range(len(names)), xticklabels=[*names])
        axes.margins(y=0.2)  # room for what is written
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    for n, each in enumerate(found[1:]):
        above = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
        axes.text(n, 0.98, percent(each["clc"]), color="green", **above)
    figure.supxlabel("gamma, or trust where it is not 1", fontsize=9)
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)
    return True


def _figure(width: float, height: float) -> Any:
    """A figure of so many inches; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def draw_clc(path: Path, split: str, found: dict, langs: list[str]) -> bool:
    """The CLC matrix of a split and its change, if any (Figures 4 to 8); False without matplotlib.

    found: what metrics.json has of the split.
    """
    before, after = found["base"], found.get("trained")
    old, new = (100 * torch.tensor(each["clc_matrix"]) for each in (before, after or before))
    change, L = new - old, len(langs)
    old.fill_diagonal_(math.nan)
    reach = max(25.0, change.abs().max().item())  # a few points are to look like a few
    title = "CLC before training, per cent" if after else "CLC, per cent"
    panels = [(title, old, ".1f", "viridis", 0, 100)]
    panels += [("change by training, points", change, "+.1f", "RdBu", -reach, reach)] * bool(after)
    side = max(3.2, 0.5 * L + 1)
    if not (figure := _figure((side + 0.5) * len(panels), side + 0.4)):
        return False
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values, form, colours, low, high) in zip(grid, panels, strict=True):
        image = axes.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high)
        axes.set(title=title, xticks=range(L), yticks=range(L))
        axes.set(xticklabels=langs, yticklabels=langs, xlabel="language", ylabel="language")
        for a, b in permutations(range(L), 2):
            red, green, blue, _ = image.cmap(image.norm(float(values[a, b])))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            look = {"color": ink, "fontsize": 8, "ha": "center", "va": "center"}
            axes.text(b, a, f"{values[a, b]:{form}}", **look)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"{split}, {found['questions']} questions", fontsize=10)
    figure.savefig(path, dpi=150)
    return True


def draw_curve(path: Path, points: list[dict], title: str) -> bool:
    """CLC and accuracy over the steps, dotted where pi* is; False without matplotlib.

    points: lines of log.jsonl with `eval/...`; the first is the base, step 0, the last pi*.
    """
    if not (figure := _figure(9, 3.6)):
        return False
    panels, steps = figure.subplots(1, 2), [point["step"] for point in points[:-1]]
    for axes, name in zip(panels, ("clc", "accuracy"), strict=True):
        for n, key in enumerate(key for key in points[0] if key.startswith(f"eval/{name}")):
            values = [100 * point[key] for point in points]
            axes.plot(steps, values[:-1], f"C{n}.-", label=key.rpartition("/")[2])
            axes.axhline(values[0], color=f"C{n}", linewidth=0.6)
            axes.axhline(values[-1], color=f"C{n}", linestyle=":")
        axes.set(xlabel="step", ylabel="per cent", title="CLC" if name == "clc" else name)
    panels[1].legend()
    figure.suptitle(f"{title}; thin line: base, dotted: pi*, what DCO aims at", fontsize=10)
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Put runs of train.py into the paper's tables")
    parser.add_argument("runs", nargs="+", help="their folders")
    told = "the language that CLC-EN and A_EN are of (default: en, or else a run's first)"
    parser.add_argument("--reference", default="", metavar="LANG", help=told)
    told = "Figure 2, of runs that differ in gamma or trust alone (%(default)s)"
    parser.add_argument("--plot", type=Path, default="directions.png", metavar="FILE", help=told)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # without the usage
    given = parser.parse_args()
    try:
        print(compare(given.runs, given.reference, given.plot))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
