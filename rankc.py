"""How a model is judged: RankC, CLC, accuracy, changed answers, entropy; then tables and pictures.

Covers sections 5, 6.1 and 6.3 to 6.5, and App. I, of the paper that dco.py names. Knows score
tables alone, no model and no data set; `python rankc.py RUN ...` compares finished runs.

Axes: a score table is (Q, L, K), questions, languages, candidates, as dco.optimal_policy has it. A
question with fewer than K candidates has -inf in the places left, in every language.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations
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
    return _consist(torch.stack([scores_a, scores_b], dim=1))(0, 1)


def clc(scores: Tensor) -> Tensor:
    """RankC (App. I), the mean over questions, of each language pair: (Q, L, K) -> (L, L).

    Raises ValueError as rankc does.
    """
    consist, L = _consist(scores), scores.shape[1]
    matrix = torch.eye(L, dtype=torch.double)
    for a, b in combinations(range(L), 2):
        matrix[a, b] = matrix[b, a] = consist(a, b).mean()
    return matrix


def _consist(scores: Tensor) -> Callable[[int, int], Tensor]:
    """A function of two languages' indices giving their consist (Q,); sorts each language once.

    Both top-j hold those candidates whose worse rank m is below j. So sum_j w_j P@j, summed over
    candidates c instead of over j, is sum_c sum_{j > m_c} w_j / j: one look-up a candidate.
    """
    _check_axes(scores)
    missing = torch.isneginf(scores)
    if scores.isnan().any() or (missing != missing[:, :1]).any():
        raise ValueError("scores hold NaN, or a candidate missing (-inf) in one language only")
    N = (~missing[:, 0]).sum(-1)  # (Q,) candidates of each question
    if (N == 0).any():
        raise ValueError("a question without candidates has no ranking")
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # (Q, L, K), 0 is best
    w, j = _weights(scores.shape[-1])
    tail = (w / j).flip(-1).cumsum(-1).flip(-1)  # (K + 1, K): at [N, m], sum_{j > m} w_j / j
    return lambda a, b: tail[N[:, None], torch.maximum(ranks[:, a], ranks[:, b])].sum(-1)


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
    logp = scores.double().log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(torch.isneginf(logp), 0.0)).sum(-1)


def measure(scores: Tensor, base: Tensor, gold: list[int | None], langs: list[str]) -> dict:
    """Every measure of a score table (Q, L, K), as JSON; `base` is the table before training."""
    best, matrix = scores.argmax(-1), clc(scores)  # (Q, L), (L, L)
    a, b = torch.triu_indices(len(langs), len(langs), 1)
    known = torch.tensor([g is not None for g in gold])
    answer = torch.tensor([g for g in gold if g is not None], dtype=torch.long)
    right, nats = best[known] == answer[:, None], entropy(scores[known])
    shares = accuracy(scores[known], answer).tolist() if len(answer) else [None] * len(langs)
    return {
        "clc": _mean(matrix[a, b]),
        "clc_matrix": matrix.tolist(),
        "top1_agreement": _mean(best[:, a] == best[:, b]),
        "accuracy": dict(zip(langs, shares, strict=True)),
        "entropy": {"right": _mean(nats[right]), "wrong": _mean(nats[~right])},
        "changed": dict(zip(langs, map(_mean, (best != base.argmax(-1)).T), strict=True)),
    }


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None


# --------------------------------------------------------------------------------------- the report
Splits = dict[str, list[Any]]  # "train" and "test": questions as data.Question has them
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
    splits: Splits, tables: Tables, langs: list[str], metrics: dict, by_subject: bool = False
) -> str:
    """Tables of each split, in per cent; `metrics` is filled with the measures that it lacks."""
    texts = []

    def measured(found, split, picked):
        gold = [splits[split][q].gold for q in picked]
        found.setdefault("questions", len(picked))
        for name in [name for name in tables if name not in found]:
            each, base = (tables[x][split][picked] for x in (name, "base"))
            found[name] = measure(each, base, gold, langs)
        return found

    for split, questions in splits.items():
        found = measured(metrics.setdefault(split, {}), split, range(len(questions)))
        clc_chance, top_chance = chance_levels([question.K for question in questions])
        rows = [[f"{split}, {len(questions)} questions", "chance", *tables, "change"]]

        def add(label, level, values, scale=100, form=".1f"):
            old, new = values[0], values[-1]
            change = f"{scale * (new - old):+{form}}" if None not in (old, new) else ""
            cells = ["" if x is None else f"{scale * x:{form}}" for x in values]
            rows.append([label, percent(level), *cells, change])

        every = [found[name] for name in tables]
        add("CLC", clc_chance, [each["clc"] for each in every])
        add("same top answer", top_chance, [each["top1_agreement"] for each in every])
        for lang in langs:
            add(f"accuracy {lang}", top_chance, [each["accuracy"][lang] for each in every])
        for lang in langs:
            moved = [each["changed"][lang] for each in every[1:]]
            add(f"answers changed {lang}", None, [None, *moved])
        for kind in ("right", "wrong"):
            nats = [each["entropy"][kind] for each in every]
            add(f"entropy of {kind} answers, nats", None, nats, 1, ".2f")
        rows = rows if "trained" in tables else [row[:-1] for row in rows]  # no change yet
        texts += ["", format_table(rows)]
        if len(langs) > 2:
            texts += ["", format_table(_pairs(found, langs))]
        if by_subject:
            rows = [["subject", "questions", "CLC", *(f"accuracy {lang}" for lang in langs)]]
            for subject in sorted({question.subject for question in questions}):
                picked = [q for q, question in enumerate(questions) if question.subject == subject]
                part = found.setdefault("subjects", {}).setdefault(subject, {})
                rows.append([subject, str(len(picked)), *_changes(measured(part, split, picked))])
            texts += ["", format_table(rows)]
    return "\n".join(texts)


def _pairs(found: dict, langs: list[str]) -> list[list[str]]:
    """The CLC matrix (section 6.1, App. L); above its diagonal the change, once there is one."""
    old, new = (found.get(name, found["base"])["clc_matrix"] for name in ("base", "trained"))
    rows = [["CLC \\ change" if "trained" in found else "CLC", *langs]]
    for i, lang in enumerate(langs):
        change = [percent(b - a, "+.1f") * ("trained" in found) for a, b in zip(old[i], new[i])]
        rows.append([lang, *map(percent, old[i][:i]), "", *change[i + 1 :]])
    return rows


def _changes(found: dict) -> list[str]:
    """CLC and each language's accuracy before training, and the change, once there is one."""
    both = [found[name] for name in ("base", "trained") if name in found]
    values = zip(*([each["clc"], *each["accuracy"].values()] for each in both), strict=True)
    return [
        " ".join([percent(old), *(percent(x - old, "+.1f") for x in new if x is not None)])
        for old, *new in values
    ]


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

    model: str  # the one that its chain of runs began with
    about: str
    langs: list[str]
    ids: list[str]
    gold: list[int | None]
    base: Tensor  # (Q, L, K) nats
    trained: Tensor  # (Q, L, K) nats


def read_run(folder: Path) -> Run:
    """A finished run. Where its --model is a run on the same questions, that one's base counts.

    Raises RunError.
    """
    try:
        path = folder / "run.json"
        settings = json.loads(path.read_text("utf-8"))
        path = folder / "metrics.json"
        metrics = json.loads(path.read_text("utf-8"))
        path = folder / "answers.jsonl"  # as one JSON text, so that an error names its line
        lines = json.loads("[" + path.read_text("utf-8").strip().replace("\n", ",\n") + "]")
        split, langs = "test" if "test" in metrics else "train", settings["langs"]
        lines = [line for line in lines if line["split"] == split]
        if len(lines) != (wanted := metrics[split]["questions"]):
            raise ValueError(f"it has {len(lines)} of {wanted} questions")
        tables = []
        for name in ("base", "trained"):
            nats = [torch.tensor([line[name][lang] for lang in langs]).T for line in lines]
            pad = {"batch_first": True, "padding_value": -torch.inf}
            tables.append(torch.nn.utils.rnn.pad_sequence(nats, **pad).transpose(1, 2))
        model = settings["model"] or f"embedded model, seed {settings['seed']}"
        about = f"{settings['data']}, {len(lines)} questions of the {split} split, scored by "
        ids, gold = ([line[name] for line in lines] for name in ("id", "gold"))
        run = Run(model, about + settings["score"], langs, ids, gold, *tables)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not of a whole run of train.py: {error!r}") from error
    for first in (Path(model), folder.parent / Path(model).name):  # there, or moved with this one
        if (first / "metrics.json").is_file() and first.resolve() != folder.resolve():
            earlier = read_run(first)
            same = [(each.langs, each.ids, each.base.shape) for each in (earlier, run)]
            if same[0] == same[1] and torch.allclose(earlier.trained, run.base, atol=0.5):  # nats
                return run._replace(model=earlier.model, base=earlier.base)
    return run


def compare(folders: Sequence[str]) -> str:
    """Table 1: runs as differences to their base, per cent, each with its standard error.

    A table for each base, data set and set of questions. The error is that of a mean over
    questions: what other questions would change. Raises RunError if no folder is a finished run.
    """
    groups, texts = {}, []
    for folder in map(Path, folders):
        if (folder / "metrics.json").is_file() and (folder / "log.jsonl").is_file():
            run = read_run(folder)
            key = (run.model, run.about, run.base.shape, *run.langs, *run.ids)
            groups.setdefault(key, []).append((folder.name, run))
        else:
            texts.append(f"left out {folder}: not a finished run of train.py")
    if not groups:
        raise RunError("none of the folders is a finished run of train.py")
    for runs in groups.values():
        first, base = runs[0]
        en = base.langs.index("en") if "en" in base.langs else 0  # the reference language
        others = [i for i in range(len(base.langs)) if i != en]
        known = [q for q, gold in enumerate(base.gold) if gold is not None]
        gold = torch.tensor([base.gold[q] for q in known], dtype=torch.long)

        def by_question(scores):  # the paper's columns, (Q,) each
            consist, right = _consist(scores), top1_correct(scores[known], gold)
            pairs = [consist(i, j) for i, j in combinations(range(scores.shape[1]), 2)]
            return torch.stack(pairs).mean(0), right[:, en], right[:, others].mean(1)

        name = base.langs[en].upper()
        levels = chance_levels((~torch.isneginf(base.base[:, 0])).sum(-1).tolist())
        rows = [["", "CLC_all", f"A_{name}", f"A_not{name}"]]
        rows += [["chance", *map(percent, [*levels, levels[1]])]]
        rows += [["base", *(percent(_mean(values)) for values in by_question(base.base))]]
        for name, run in runs:
            if not torch.allclose(run.base, base.base, atol=0.05):  # nats
                texts.append(f"note: the base of {name} scores otherwise than that of {first}")
            rows.append([name])
            for new, old in zip(by_question(run.trained), by_question(run.base), strict=True):
                change, n = new - old, len(new)
                error = f" ± {percent(float(change.std()) / n**0.5)}" if n > 1 else ""
                rows[-1].append(percent(_mean(change), "+.1f") + error)
        head = f"\n{base.model} on {base.about}; {' '.join(base.langs)}; per cent, changes"
        texts.append(f"{head} with their standard errors\n\n{format_table(rows)}")
    return "\n".join(texts)


def draw_clc(path: Path, before: dict, after: dict | None, langs: list[str]) -> bool:
    """The CLC matrix and its change, if any, as in Figures 4 to 8; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    old, new = (100 * torch.tensor(each["clc_matrix"]) for each in (before, after or before))
    change, L = new - old, len(langs)
    old.fill_diagonal_(math.nan)
    reach = max(1.0, change.abs().max().item())  # the scale is centred at zero
    title = "CLC before, per cent" if after else "CLC, per cent"
    panels = [(title, old, ".1f", "viridis", 0, 100)]
    panels += [("change, points", change, "+.1f", "RdBu", -reach, reach)] * bool(after)
    side = max(3.2, 0.5 * L + 1)
    figure = Figure(figsize=((side + 0.5) * len(panels), side + 0.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values, form, colours, low, high) in zip(grid, panels, strict=True):
        image = axes.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high)
        axes.set(title=title, xticks=range(L), yticks=range(L))
        axes.set(xticklabels=langs, yticklabels=langs)
        for a, b in permutations(range(L), 2):
            red, green, blue, _ = image.cmap(image.norm(float(values[a, b])))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            look = {"color": ink, "fontsize": 8, "ha": "center", "va": "center"}
            axes.text(b, a, f"{values[a, b]:{form}}", **look)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare runs of train.py as Table 1 does")
    parser.add_argument("runs", nargs="+", help="their folders")
    try:
        print(compare(parser.parse_args().runs))
    except RunError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
