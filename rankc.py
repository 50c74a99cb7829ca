"""How a model is judged: RankC, CLC, accuracy, changed answers, entropy; then tables and pictures.

Covers section 5, the tables and figures of section 6, and Apps. I, J and L to N, of the paper that
dco.py names. Leaves out models and data sets: it knows score tables alone. `python rankc.py RUN
...` puts finished runs of train.py into the paper's tables.

Axes: a score table is (Q, L, K), questions, languages, candidates, in nats; -inf in every language
where a question has fewer than K candidates.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


# ------------------------------------------------------------------------------------- the measures
def rankc(scores_a: Tensor, scores_b: Tensor) -> Tensor:
    """consist(x1, x2) of App. I for each question: (Q, K), (Q, K) -> (Q,) float64 in [0, 1].

    Ties are broken by candidate number. Raises ValueError on NaN, on a candidate missing in one
    language only, and on a question without any.
    """
    return pairwise_rankc(torch.stack([scores_a, scores_b], dim=1))[0, 1]


def clc(scores: Tensor) -> Tensor:
    """RankC (App. I) of each pair of languages: (Q, L, K) -> (L, L). Raises as rankc does."""
    matrix = torch.eye(scores.shape[1], dtype=torch.double)
    for (a, b), consistency in pairwise_rankc(scores).items():
        matrix[a, b] = matrix[b, a] = consistency.mean()
    return matrix


def pairwise_rankc(scores: Tensor) -> dict[tuple[int, int], Tensor]:
    """rankc of each pair of languages, {(a, b): (Q,)} by their numbers; (Q, L, K) in."""
    scores = scores.cpu()
    Q, L, K = scores.shape
    missing = torch.isneginf(scores)
    N = (~missing[:, 0]).sum(-1)  # (Q,) candidates of each question
    if scores.isnan().any() or (missing != missing[:, :1]).any() or (N == 0).any():
        raise ValueError("a score is NaN, a candidate missing in one language only, or all are")
    # argsort gives the candidate at each rank; argsort of that, the rank of each candidate.
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # (Q, L, K), 0 is best
    return {(a, b): consist(ranks[:, a], ranks[:, b], N) for a, b in combinations(range(L), 2)}


def consist(ranks_a: Tensor, ranks_b: Tensor, N: Tensor) -> Tensor:
    """The sum of w_j P@j over j = 1..N, App. I: ranks (Q, K) from 0, N (Q,) -> (Q,) float64."""
    total = torch.zeros(len(N), dtype=torch.double)
    for j in range(1, ranks_a.shape[1] + 1):
        in_both = (ranks_a < j) & (ranks_b < j)  # (Q, K) the two top-j lists, intersected
        precision = in_both.sum(-1).double() / j  # P@j
        total += weight(j, N) * precision
    return total


def weight(j: int, N: Tensor) -> Tensor:
    """w_j = exp(N - j) / sum_k exp(N - k) of App. I, 0 for j > N: (Q,) -> (Q,) float64."""
    # exp(N) cancels; left in, it would overflow at 710 candidates.
    k = torch.arange(1, int(N.max()) + 1, dtype=torch.double)
    sums = torch.exp(-k).cumsum(0)  # at n - 1: the sum over k = 1..n
    return torch.where(j <= N, math.exp(-j) / sums[N - 1], 0.0)


def chance(N: int) -> float:
    """RankC of unrelated rankings of N candidates: two top-j share j^2 / N, so P@j is j / N."""
    return sum(float(weight(j, torch.tensor([N]))) * j / N for j in range(1, N + 1))


def accuracy(scores: Tensor, gold: Tensor) -> Tensor:
    """Share of questions whose best candidate is the gold one: (Q, L, K), (Q,) -> (L,)."""
    return top1_correct(scores, gold).mean(0)


def top1_correct(scores: Tensor, gold: Tensor) -> Tensor:
    """Whether the best candidate is gold, ties by their share: (Q, L, K), (Q,) -> (Q, L)."""
    scores, gold = scores.cpu(), gold.cpu()
    Q, L, K = scores.shape
    # Broken by position, ties would leak: BMLAMA's right answer is always the last.
    best = scores == scores.amax(-1, keepdim=True)  # (Q, L, K)
    is_gold = torch.arange(K) == gold[:, None, None]  # (Q, 1, K)
    return (best & is_gold).sum(-1) / best.sum(-1).double()


def entropy(scores: Tensor) -> Tensor:
    """Entropy, nats, of the distribution over the candidates (section 6.5): (..., K) -> (...,)."""
    return torch.special.entr(scores.double().softmax(-1)).sum(-1)


def reference_language(langs: Sequence[str]) -> str:
    """The language whose pairs CLC-EN is of: English, or else the first."""
    return "en" if "en" in langs else langs[0]


def per_question(
    scores: Tensor, base: Tensor, gold: Sequence[int | None], langs: Sequence[str]
) -> dict[str, Tensor]:
    """Each measure of each question, for all tables: {name or name/language: (Q,) float64}.

    scores, base: (Q, L, K) nats, now and before training. NaN where no right answer is known.
    """
    first = reference_language(langs)
    pairs = pairwise_rankc(scores)
    with_first = [pairs[a, b] for a, b in pairs if first in (langs[a], langs[b])]
    best, before = scores.argmax(-1), base.argmax(-1)  # (Q, L)
    same_best = [best[:, a] == best[:, b] for a, b in pairs]
    known = torch.tensor([k is not None for k in gold])
    correct = top1_correct(scores, torch.tensor([k or 0 for k in gold]))  # (Q, L)
    correct[~known] = math.nan
    measures = {
        "clc": torch.stack(list(pairs.values())).mean(0),
        f"clc_{first}": torch.stack(with_first).mean(0),
        "top1_agreement": torch.stack(same_best).double().mean(0),
    }
    for i, lang in enumerate(langs):
        measures[f"accuracy/{lang}"] = correct[:, i]
        measures[f"changed/{lang}"] = (best[:, i] != before[:, i]).double()  # section 6.4
        # Of all answers together. Above 1 where one answer begins another.
        measures[f"probability/{lang}"] = scores[:, i].double().exp().sum(-1)
    return measures


def entropy_by_outcome(scores: Tensor, gold: Sequence[int | None]) -> dict[str, list[float]]:
    """Entropy of right and of wrong answers, [mean, standard deviation] (section 6.5)."""
    known = [q for q, k in enumerate(gold) if k is not None]
    answer = torch.tensor([gold[q] for q in known], dtype=torch.long)
    right = scores[known].argmax(-1).cpu() == answer[:, None]  # (Q, L)
    nats = entropy(scores[known]).cpu()  # (Q, L)
    spread = {}
    for name, x in (("right", nats[right]), ("wrong", nats[~right])):
        deviation = ((x - x.mean()) ** 2).mean().sqrt()
        spread[name] = [float(x.mean()), float(deviation)]  # NaN where there is none
    return spread


Part = tuple[Sequence[str], Tensor]  # ids of questions, and a number of each, (Q,)


def mean_and_error(parts: Sequence[Part]) -> tuple[float, float]:
    """The mean over parts of their means over questions, and its standard error; NaN if unknown.

    The error is clustered by question: one in several parts, as in runs of English with one
    language each, counts once, with its deviations in all of them.
    """
    mean, deviations = 0.0, {}
    for ids, values in parts:
        known = ~values.isnan()
        part_mean = values[known].mean()  # NaN where nothing is known
        mean += float(part_mean) / len(parts)
        shares = (values - part_mean) / (known.sum() * len(parts))
        for id, share in zip(ids, shares.tolist(), strict=True):
            if not math.isnan(share):
                deviations[id] = deviations.get(id, 0.0) + share
    n = len(deviations)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(sum(x * x for x in deviations.values()) * n / (n - 1))


# --------------------------------------------------------------------------------------- the report
def chance_levels(scores: Tensor) -> dict[str, float]:
    """CLC and accuracy of rankings drawn at random, for questions as these: (Q, L, K)."""
    sizes = (~torch.isneginf(scores[:, 0])).sum(-1).tolist()  # candidates of each question
    level = {N: chance(N) for N in set(sizes)}
    means = {"clc": sum(level[N] for N in sizes), "accuracy": sum(1 / N for N in sizes)}
    return {name: total / len(sizes) for name, total in means.items()}


def summarise(
    tables: dict[str, Tensor], ids: list[str], gold: list[int | None], langs: list[str]
) -> dict:
    """What metrics.json has of a split: {stage: {measure: (mean, standard error)}} and more.

    tables: "base", "optimum" (pi*) and, once there is one, "trained"; (Q, L, K) nats each.
    """
    base = tables["base"]
    measures = {stage: per_question(scores, base, gold, langs) for stage, scores in tables.items()}
    if "trained" in tables:  # a change is paired: its error is that of differences
        before, after = measures["base"], measures["trained"]
        measures["change"] = {name: after[name] - before[name] for name in before}
    metrics = {"questions": len(ids), "chance": chance_levels(tables["base"])}
    for stage, by_name in measures.items():
        metrics[stage] = {name: mean_and_error([(ids, x)]) for name, x in by_name.items()}
    for stage, scores in tables.items():
        metrics[stage]["clc_matrix"] = clc(scores).tolist()
        metrics[stage]["entropy"] = entropy_by_outcome(scores, gold)
    return metrics


def report(metrics: dict, questions: list, tables: dict[str, Tensor], langs: list[str]) -> str:
    """What a run prints; metrics: {split: summarise(...)}; questions, tables: the held-out ones."""
    first, test = reference_language(langs), metrics["test"]
    titles = {"base": "before", "trained": "after", "change": "change", "optimum": "pi*"}
    stages = [stage for stage in titles if stage in test]
    names = {"CLC": "clc", f"CLC-{first}": f"clc_{first}", "same best answer": "top1_agreement"}
    if len(langs) == 2:
        del names[f"CLC-{first}"]  # it is CLC
    names.update({f"accuracy {lang}": f"accuracy/{lang}" for lang in langs})
    rows = [[f"{test['questions']} held out, per cent", *(titles[stage] for stage in stages)]]
    for label, name in names.items():
        rows.append([label, *(with_error(test[x][name], x == "change") for x in stages)])
    if "change" not in stages:
        return format_table(rows)
    gold = torch.tensor([-1 if question.gold is None else question.gold for question in questions])
    was_right, is_right = (tables[x].argmax(-1) == gold[:, None] for x in ("base", "trained"))
    turned = f"{(is_right & ~was_right).sum()} right, {(was_right & ~is_right).sum()} wrong"
    return f"{format_table(rows)}\nHeld-out answers that turned: {turned}"


def percent(share: float, form: str = ".1f") -> str:
    return "-" if math.isnan(share) else f"{100 * share:{form}}"


def with_error(value: tuple[float, float], signed: bool = False) -> str:
    """A share and its standard error, in per cent; - where it is not known."""
    share, error = value
    text = percent(share, "+.1f" if signed else ".1f")
    return text if math.isnan(error) else f"{text} ± {percent(error)}"


def format_table(rows: list[list[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table that is aligned in a terminal, too."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["".ljust(width, "-") for width in widths], *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_answers(
    path: Path, splits: dict, tables: dict, langs: list[str], trained_on: set[str]
) -> None:
    """A line a question, with the nats of each candidate: anything can be computed again.

    tables: {split: {stage: (Q, L, K)}}; trained_on: prompts, in the reference language, for "seen".
    """
    first = reference_language(langs)
    with open(path, "w", encoding="utf-8") as file:
        for split, questions in splits.items():
            for q, question in enumerate(questions):
                line = {**asdict(question), "split": split}
                line["seen"] = question.prompts[first] in trained_on
                for stage, scores in tables[split].items():
                    nats = scores[q, :, : question.K].tolist()
                    line[stage] = dict(zip(langs, nats, strict=True))
                print(json.dumps(line, ensure_ascii=False), file=file)


# --------------------------------------------------------------------------- runs beside each other
class Run(NamedTuple):
    """The held-out questions of a finished run of train.py."""

    name: str  # of its folder
    langs: list[str]
    lines: list[dict]  # of answers.jsonl, a question each

    def table(self, stage: str) -> Tensor:
        """The scores at a stage, (Q, L, K) nats; -inf where a question has fewer candidates."""
        scores = [torch.tensor([line[stage][x] for x in self.langs]).T for line in self.lines]
        return torch.nn.utils.rnn.pad_sequence(scores, True, -torch.inf).mT  # of (K, L) each


def read_run(folder: Path, base: Path | None = None) -> Run:
    """A run's held-out answers, with the base of another run if named, as for DPO, then DCO.

    The base of an --eval_only run then counts as trained (App. K's choice by validation). Raises
    ValueError for a folder without a finished run, and where the questions differ.
    """
    if not (folder / "metrics.json").is_file():  # by which a run is finished
        raise ValueError(f"{folder} holds no finished run of train.py")
    langs = json.loads((folder / "run.json").read_text(encoding="utf-8"))["langs"]
    with open(folder / "answers.jsonl", encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if line["split"] == "test"]
    if base is not None:
        other = read_run(base)
        if (langs, [x["id"] for x in lines]) != (other.langs, [x["id"] for x in other.lines]):
            raise ValueError(f"--base {base}: its questions or languages are not {folder}'s")
        for line, before in zip(lines, other.lines, strict=True):
            line["trained"] = line.get("trained", line["base"])
            line["base"] = before["base"]
    return Run(folder.name, langs, lines)


def columns(run: Run, first: str) -> dict[str, Part]:
    """A row of the paper's tables: of each column the questions, by id, and their numbers."""
    ids, gold = [line["id"] for line in run.lines], [line["gold"] for line in run.lines]
    others = [lang for lang in run.langs if lang != first]
    measures = {}  # {stage: {column: (Q,)}}
    for stage in ("base", "trained", "optimum"):
        values = per_question(run.table(stage), run.table("base"), gold, run.langs)
        measures[stage] = {"CLC": values["clc"], f"CLC-{first}": values[f"clc_{first}"]}
        for kind in ("accuracy", "changed"):
            of_others = torch.stack([values[f"{kind}/{lang}"] for lang in others])
            measures[stage][f"{kind} {first}"] = values[f"{kind}/{first}"]
            measures[stage][f"{kind} others"] = of_others.mean(0)
    row = {}
    for column, after in measures["trained"].items():
        before = measures["base"][column]
        if column.startswith("changed"):  # section 6.4's quantity is a change itself
            row[column] = (ids, after)
        else:
            row[column] = (ids, before)
            row[f"Δ {column}"] = (ids, after - before)
    at_optimum = torch.stack([values[f"accuracy/{lang}"] for lang in run.langs])  # the last stage
    row["accuracy at pi*"] = (ids, at_optimum.mean(0))  # of this run, also with --base
    return row


def compare(runs: list[Run], by: str = "") -> str:
    """The paper's Tables 1 to 3 and 5 to 12, per cent with errors: a row a run, and their mean.

    Raises ValueError for what a run lacks.
    """
    first = reference_language(runs[0].langs)
    groups = {}  # {value of the field `by`: runs with its questions alone}
    for run in runs:
        lacking = {by, "trained"} - {"", *run.lines[0]}
        if lacking:  # an --eval_only run has not trained; see --base
            raise ValueError(f"{run.name} has no {min(lacking)!r}, but {', '.join(run.lines[0])}")
        if reference_language(run.langs) != first:
            raise ValueError(f"{run.name} is of {run.langs}, and {runs[0].name} beside {first!r}")
        for value in {str(line.get(by, "")): None for line in run.lines}:
            lines = [line for line in run.lines if str(line.get(by, "")) == value]
            groups.setdefault(value, []).append(run._replace(lines=lines))
    table = [["", *columns(runs[0], first)]]
    for value in sorted(groups):
        parts = [(run.name, [columns(run, first)]) for run in groups[value]]
        if len({tuple(run.langs) for run in runs}) > 1:  # else runs are methods, or seeds
            parts.append(("mean", [row for _, rows in parts for row in rows]))
        for name, rows in parts:
            cells = []
            for column in rows[0]:
                number = mean_and_error([row[column] for row in rows])
                cells.append(with_error(number, signed=column.startswith("Δ")))
            table.append([f"{value} {name}".strip(), *cells])
    return format_table(table)


# ----------------------------------------------------------------------------------------- pictures
def draw_clc(path: Path, metrics: dict, langs: list[str]) -> None:
    """CLC of each pair before training, and its change (Figures 4 to 8), of a split's metrics."""
    from matplotlib.figure import Figure

    before = 100 * torch.tensor(metrics["base"]["clc_matrix"])
    change = 100 * torch.tensor(metrics["trained"]["clc_matrix"]) - before
    before.fill_diagonal_(math.nan)  # each language with itself
    reach = max(25.0, float(change.abs().max()))  # a few points are to look like a few
    side = max(3.2, 0.5 * len(langs) + 1)
    figure = Figure(figsize=(2 * side + 1, side + 0.4), layout="constrained")
    panels = {
        "CLC before training, per cent": (before, "viridis", 0, 100, ".1f"),
        "change by training, points": (change, "RdBu", -reach, reach, "+.1f"),
    }
    ticks = range(len(langs))
    for axes, (name, panel) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        values, colours, low, high, form = panel
        image = axes.imshow(values.numpy(), colours, vmin=low, vmax=high)
        axes.set(title=name, xticks=ticks, yticks=ticks, xticklabels=langs, yticklabels=langs)
        for a, b in permutations(ticks, 2):
            look = {"ha": "center", "va": "center", "fontsize": 8, "backgroundcolor": "#ffffff80"}
            axes.text(b, a, f"{values[a, b]:{form}}", **look)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"{metrics['questions']} held-out questions", fontsize=10)
    figure.savefig(path, dpi=150)


def draw_directions(path: Path, runs: list[Run]) -> None:
    """Figures 2 and 3: accuracy and changed answers of runs on the same questions."""
    langs, gold = runs[0].langs, [line["gold"] for line in runs[0].lines]
    asked = [(run.langs, [line["id"] for line in run.lines]) for run in runs]
    if asked.count(asked[0]) < len(runs):
        raise ValueError("--plot: the runs are not on the same questions in the same languages")
    from matplotlib.figure import Figure

    base = runs[0].table("base")
    scores = {"base": base} | {run.name: run.table("trained") for run in runs}
    means = {}  # {name: {measure: per cent}}
    for name, table in scores.items():
        measures = per_question(table, base, gold, langs)
        means[name] = {measure: float(100 * x.nanmean()) for measure, x in measures.items()}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, kind, names in ((left, "accuracy", list(means)), (right, "changed", list(means)[1:])):
        width = 0.8 / len(langs)
        for i, lang in enumerate(langs):
            places = [n + (i + 0.5) * width - 0.4 for n in range(len(names))]
            heights = [means[name][f"{kind}/{lang}"] for name in names]
            axes.bar_label(axes.bar(places, heights, width, label=lang), fmt="%.1f", fontsize=8)
        labels = [f"{name}\nCLC {means[name]['clc']:.1f}" for name in names]
        axes.set(title=f"{kind}, per cent", xticks=range(len(names)), xticklabels=labels)
    left.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put runs of train.py into the paper's tables")
    parser.add_argument("runs", nargs="+", type=Path, help="their folders")
    parser.add_argument("--by", default="", metavar="FIELD", help="a row a value: subject, seen")
    parser.add_argument("--base", type=Path, metavar="RUN", help="take the base from this run")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy and changes there")
    args = parser.parse_args()
    try:
        runs = [read_run(folder, args.base) for folder in args.runs]
        print(compare(runs, args.by))
        if args.plot:
            draw_directions(args.plot, runs)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # as train.py
    main()
