"""The measures: RankC by hand and by brute force over sets; then reports, runs and pictures."""

import json
import math
from collections import defaultdict
from itertools import combinations, permutations
from statistics import mean, pstdev, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import rankc


def by_sets(a: list[float], b: list[float]) -> float:
    """App. I as it is written: the overlap of the two top-j sets, weighted by exp(N - j)."""
    N = len(a)
    order_a = sorted(range(N), key=lambda k: -a[k])
    order_b = sorted(range(N), key=lambda k: -b[k])
    weights = [math.exp(N - j) for j in range(1, N + 1)]
    total = 0.0
    for j, weight in enumerate(weights, start=1):
        total += weight * len(set(order_a[:j]) & set(order_b[:j])) / j
    return total / sum(weights)


def score_tables(L: int):
    """Scores [question][language][candidate], with ties and different numbers of candidates."""
    score = st.floats(-50, 0) | st.sampled_from([-1.0, -2.0])

    def question(K):
        row = st.lists(score, min_size=K, max_size=K)
        return st.lists(row, min_size=L, max_size=L)

    return st.lists(st.integers(1, 8).flatmap(question), min_size=1, max_size=5)


def padded(questions: list[list[list[float]]]) -> torch.Tensor:
    """The same as a table (Q, L, K), -inf where a question has fewer candidates."""
    K = max(len(question[0]) for question in questions)
    rows = [[row + [-math.inf] * (K - len(row)) for row in question] for question in questions]
    return torch.tensor(rows, dtype=torch.double)


@given(score_tables(2))
def test_rankc_is_the_brute_force_over_sets_for_ties_and_ragged_questions(questions):
    table = padded(questions)
    expected = [by_sets(*question) for question in questions]
    assert rankc.rankc(table[:, 0], table[:, 1]).tolist() == pytest.approx(expected)
    average = mean(expected)
    assert rankc.clc(table).tolist() == [[1, pytest.approx(average)], [pytest.approx(average), 1]]


def test_ties_among_hundreds_of_candidates_are_broken_by_their_number():
    a, b = torch.randint(0, 3, (2, 1, 300), generator=torch.Generator().manual_seed(0))
    expected = by_sets(a[0].tolist(), b[0].tolist())
    assert rankc.rankc(a.double(), b.double()).item() == pytest.approx(expected)


@pytest.mark.parametrize("a", [[math.nan, 0], [-math.inf, 0], [-math.inf, -math.inf]], ids=str)
def test_rankc_refuses_nan_and_candidates_missing_in_one_language_only(a):
    for b in ([0, 1], a[::-1]):
        with pytest.raises(ValueError, match="missing"):
            rankc.rankc(torch.tensor([[1.0, 2], a]), torch.tensor([[1.0, 2], b]))


def test_accuracy_counts_a_tie_by_its_share_wherever_the_gold_answer_stands():
    table = torch.tensor([[[1.0, 1, 0]], [[0, 2, 2]], [[3, 1, 2]]])
    for gold in ([1, 2, 0], [0, 1, 0]):
        accuracy = rankc.accuracy(table, torch.tensor(gold)).item()
        assert accuracy == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_entropy_of_a_uniform_guess_is_log_k_and_missing_candidates_do_not_count():
    table = torch.tensor([[0.0, 0, 0, 0], [1, 1, -math.inf, -math.inf], [50, 0, 0, 0]])
    assert rankc.entropy(table).tolist() == pytest.approx([math.log(4), math.log(2), 0], abs=1e-6)


# ------------------------------------------------------------------------------------- the measures
golds = st.lists(st.none() | st.integers(0, 7), min_size=5, max_size=5)


@given(score_tables(6), golds, st.permutations(["en", "es", "sw"]) | st.just(["sw", "es", "fr"]))
def test_each_measure_of_a_question_is_what_plain_loops_count(questions, gold, langs):
    now = [question[:3] for question in questions]
    before = [question[3:] for question in questions]
    gold = [k if k is None else k % len(rows[0]) for k, rows in zip(gold, now)]
    first = "en" if "en" in langs else langs[0]
    pairs = list(combinations(range(3), 2))
    expected = defaultdict(list)
    for rows, rows_before, right in zip(now, before, gold):
        consistency = {(a, b): by_sets(rows[a], rows[b]) for a, b in pairs}
        with_first = [consistency[a, b] for a, b in pairs if first in (langs[a], langs[b])]
        best = [row.index(max(row)) for row in rows]
        expected["clc"].append(mean(consistency.values()))
        expected[f"clc_{first}"].append(mean(with_first))
        expected["top1_agreement"].append(mean(float(best[a] == best[b]) for a, b in pairs))
        for lang, row, row_before in zip(langs, rows, rows_before):
            ties = [k for k, score in enumerate(row) if score == max(row)]
            share = math.nan if right is None else (right in ties) / len(ties)
            expected[f"accuracy/{lang}"].append(share)
            moved = row.index(max(row)) != row_before.index(max(row_before))
            expected[f"changed/{lang}"].append(float(moved))
            expected[f"probability/{lang}"].append(sum(math.exp(score) for score in row))
    measures = rankc.per_question(padded(now), padded(before), gold, langs)
    assert set(measures) == set(expected)
    for name, values in expected.items():
        assert measures[name].tolist() == pytest.approx(values, nan_ok=True), name


def test_entropy_is_split_by_whether_the_answer_is_right():
    scores = torch.tensor([[[2.0, 0], [9, 2]], [[0, 0], [1, 4]], [[1, 0], [5, 0]]])
    *right, wrong = rankc.entropy(scores[:2]).flatten().tolist()
    # Without a right answer, the last question is neither.
    spread = rankc.entropy_by_outcome(scores, [0, 0, None])
    assert spread["right"] == pytest.approx([mean(right), pstdev(right)])
    assert spread["wrong"] == pytest.approx([wrong, 0])
    assert all(map(math.isnan, rankc.entropy_by_outcome(scores, [None] * 3)["right"]))


numbers = st.dictionaries(st.integers(0, 12), st.floats(-1, 1), min_size=2)  # {id: number}


@given(st.lists(numbers, min_size=1, max_size=4))
def test_the_error_of_a_mean_over_runs_is_that_of_a_sum_over_questions(runs):
    """The delta method by hand: what each question adds, over all the runs that have it."""
    parts, added = [], {}
    for run in runs:
        for id, value in run.items():
            share = (value - mean(run.values())) / len(run) / len(runs)
            added[id] = added.get(id, 0) + share
        values = torch.tensor([*run.values(), math.nan], dtype=torch.double)
        parts.append(([*run, "unknown"], values))
    n, squares = len(added), math.fsum(share**2 for share in added.values())
    expected = mean(mean(run.values()) for run in runs), math.sqrt(n / (n - 1) * squares)
    assert rankc.mean_and_error(parts) == pytest.approx(expected, abs=1e-9)


# --------------------------------------------------------------------------------------- the report
LANGS = ["en", "es", "sw"]
IDS = [str(q) for q in range(40)]


def drawn_tables(seed: int, L=3) -> dict[str, torch.Tensor]:
    """A run's tables of 40 questions of 4 candidates, the fourth of 2; all are drawn alike."""
    g = torch.Generator().manual_seed(seed)
    tables = {}
    for stage in ("base", "optimum", "trained"):
        tables[stage] = torch.randn(40, L, 4, generator=g).log_softmax(-1)
        tables[stage][3, :, 2:] = -math.inf
    return tables


def cells(text: str, name: str) -> list[str]:
    """The cells of the row with this label."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (row,) = [row for row in rows if row[:1] == [name]]
    return row[1:]


def shown(values: torch.Tensor, form: str = ".1f") -> str:
    """Mean and standard error over questions, as a cell has them."""
    error = stdev(values.tolist()) / len(values) ** 0.5
    return f"{100 * values.mean().item():{form}} ± {100 * error:.1f}"


def questions_of(tables, langs):
    """Questions to which these tables belong; the second answer is right."""
    questions = []
    for q, table in enumerate(tables["base"]):
        K = int((~torch.isneginf(table[0])).sum())
        prompts = dict.fromkeys(langs, f"prompt {q}")
        answers = dict.fromkeys(langs, tuple("abcd"[:K]))
        questions.append(data.Question(str(q), ["law", "art"][q % 2], 1, prompts, answers))
    return questions


def measures_of(tables, stage, langs=LANGS):
    """What each question measures, {name: (Q,)}: against plain loops above."""
    return rankc.per_question(tables[stage], tables["base"], [1] * 40, langs)


def test_a_report_has_a_row_a_measure_and_a_column_a_stage_with_errors():
    tables = drawn_tables(1)
    metrics = rankc.summarise(tables, IDS, [1] * 40, LANGS)
    both = {"train": metrics, "test": metrics}
    text = rankc.report(both, questions_of(tables, LANGS), tables, LANGS)
    assert cells(text, "40 held out, per cent") == ["before", "after", "change", "pi*"]
    labels = {"clc": "CLC", "clc_en": "CLC-en", "top1_agreement": "same best answer"}
    measures = {stage: measures_of(tables, stage) for stage in tables}
    for name in measures["base"]:
        before, optimum, after = (measures[stage][name] for stage in tables)
        change = after - before
        if name in labels or name.startswith("accuracy"):
            row = cells(text, labels.get(name, name.replace("/", " ")))
            assert row == [shown(before), shown(after), shown(change, "+.1f"), shown(optimum)]
        values = {"base": before, "optimum": optimum, "trained": after, "change": change}
        for stage, x in values.items():
            expected = [x.mean().item(), stdev(x.tolist()) / 40**0.5]
            assert metrics[stage][name] == pytest.approx(expected, abs=1e-9)
    chances = {
        "clc": (39 * rankc.chance(4) + rankc.chance(2)) / 40,
        "accuracy": (39 / 4 + 1 / 2) / 40,
    }
    assert metrics["chance"] == pytest.approx(chances)
    assert metrics["trained"]["clc_matrix"] == rankc.clc(tables["trained"]).tolist()
    assert metrics["base"]["entropy"] == rankc.entropy_by_outcome(tables["base"], [1] * 40)


def test_a_report_leaves_out_what_is_not_known():
    base = drawn_tables(2, L=2)["base"]
    metrics = rankc.summarise({"base": base}, IDS, [None] * 40, ["es", "fr"])
    assert all(map(math.isnan, metrics["base"]["accuracy/es"])) and metrics["base"]["clc"][0] > 0
    text = rankc.report({"test": metrics}, [], {"base": base}, ["es", "fr"])
    assert cells(text, "accuracy es") == ["-"] and "change" not in metrics
    assert "CLC-es" not in text  # of two languages it is CLC


# ------------------------------------------------------------------------- runs beside each other
def finished(folder, tables, langs=LANGS):
    """What rankc.py reads of a run; the first ten prompts are also training questions'."""
    folder.mkdir()
    questions = questions_of(tables, langs)
    splits = {"train": questions[:1], "test": questions}
    by_split = {"train": {stage: table[:1] for stage, table in tables.items()}, "test": tables}
    trained_on = {f"prompt {q}" for q in range(10)}
    rankc.write_answers(folder / "answers.jsonl", splits, by_split, langs, trained_on)
    assert "Infinity" not in (folder / "answers.jsonl").read_text()  # it is no JSON
    (folder / "run.json").write_text(json.dumps({"langs": langs}))
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python rankc.py` with these arguments; returns what it prints."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["rankc.py", *map(str, arguments)])
        rankc.main()
        return capsys.readouterr().out

    return run


def test_runs_on_the_same_questions_have_the_papers_columns_and_a_row_each(tmp_path, command):
    runs = {"sft": drawn_tables(5), "dco": drawn_tables(6)}
    text = command(*(finished(tmp_path / name, tables) for name, tables in runs.items()))
    header = ["CLC", "Δ CLC", "CLC-en", "Δ CLC-en", "accuracy en", "Δ accuracy en"]
    header += ["accuracy others", "Δ accuracy others", "changed en", "changed others"]
    assert cells(text, "") == [*header, "accuracy at pi*"]
    for name, tables in runs.items():
        base, trained = measures_of(tables, "base"), measures_of(tables, "trained")
        for measures in (base, trained):
            for kind in ("accuracy", "changed"):
                others = measures[f"{kind}/es"] + measures[f"{kind}/sw"]
                measures[f"{kind}/others"] = others / 2
        expected = []
        for measure in ("clc", "clc_en", "accuracy/en", "accuracy/others"):
            change = trained[measure] - base[measure]
            expected += [shown(base[measure]), shown(change, "+.1f")]
        expected += [shown(trained["changed/en"]), shown(trained["changed/others"])]
        optimum = measures_of(tables, "optimum")
        right = torch.stack([optimum[f"accuracy/{lang}"] for lang in LANGS]).mean(0)
        assert cells(text, name) == [*expected, shown(right)]
    assert "mean" not in text


@pytest.mark.parametrize(
    "by, groups",
    [
        ([], {"": slice(40)}),
        (["--by", "subject"], {"law": slice(0, 40, 2), "art": slice(1, 40, 2)}),
        (["--by", "seen"], {"True": slice(10), "False": slice(10, 40)}),
    ],
    ids=["all questions", "by subject", "by seen"],
)
def test_runs_of_english_with_one_language_each_have_a_mean_row(tmp_path, command, by, groups):
    """Of each question's mean over the runs, which share it; its error is over questions."""
    runs = {lang: drawn_tables(seed, L=2) for seed, lang in enumerate(("es", "sw", "fr"))}
    folders = [finished(tmp_path / lang, tables, ["en", lang]) for lang, tables in runs.items()]
    text = command(*folders, *by)
    for group, part in groups.items():
        changes = {}
        for lang, tables in runs.items():
            before = measures_of(tables, "base", ["en", lang])["clc"]
            after = measures_of(tables, "trained", ["en", lang])["clc"]
            changes[lang] = (after - before)[part]
        changes["mean"] = torch.stack(list(changes.values())).mean(0)
        for name, change in changes.items():
            assert cells(text, f"{group} {name}".strip())[1] == shown(change, "+.1f")


def test_a_run_that_goes_on_from_another_is_compared_with_that_ones_base(tmp_path, command):
    """DPO, then DCO (section 6.1). What a run of --eval_only has as base counts as trained."""
    dpo, after = drawn_tables(7), drawn_tables(8)
    first = finished(tmp_path / "dpo", dpo)
    second = finished(tmp_path / "dpo-dco", after)
    looked = finished(tmp_path / "eval", {"base": after["base"], "optimum": after["optimum"]})
    text = command(second, looked, "--base", first)
    before = measures_of(dpo, "base")["clc"]
    for name, stage in (("dpo-dco", "trained"), ("eval", "base")):
        change = measures_of(after, stage)["clc"] - before
        assert cells(text, name)[:2] == [shown(before), shown(change, "+.1f")]


def test_the_command_refuses_what_it_cannot_compare_by_name(tmp_path, command):
    a = finished(tmp_path / "a", drawn_tables(0))
    b = finished(tmp_path / "b", drawn_tables(0, L=2), ["es", "sw"])
    c = finished(tmp_path / "c", drawn_tables(0, L=2), ["en", "es"])
    nine = {stage: table[:9] for stage, table in drawn_tables(0).items()}
    fewer = finished(tmp_path / "fewer", nine)
    eval_only = finished(tmp_path / "eval", {"base": drawn_tables(0)["base"]})
    (tmp_path / "killed").mkdir()
    for arguments, message in (
        ([tmp_path / "killed"], "error: .*killed holds no finished run of train.py"),
        ([a, "--by", "topic"], "error: a has no 'topic', but id, subject, gold, prompts"),
        ([a, "--base", b], "error: --base .*b: its questions or languages are not .*a's"),
        ([a, "--base", fewer], "error: --base .*fewer: its questions"),
        ([eval_only], "error: eval has no 'trained'"),
        ([a, b], "error: b is of .*and a beside 'en'"),
        ([b, c], "error: c "),  # Spanish it has, but not as its reference
        ([a, fewer, "--plot", "x.png"], "error: --plot: the runs are not on the same questions"),
    ):
        with pytest.raises(SystemExit, match=message):
            command(*arguments)


# ----------------------------------------------------------------------------------------- pictures
@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, as matplotlib's objects."""
    matplotlib = pytest.importorskip("matplotlib.figure", reason="pictures need the [plot] extra")
    saved = []

    def savefig(figure, path, dpi):
        figure.draw_without_rendering()
        saved.append(figure)

    monkeypatch.setattr(matplotlib.Figure, "savefig", savefig)
    return saved


def test_the_picture_of_clc_shows_every_pair_in_numbers_and_centres_the_change(figures):
    tables = drawn_tables(1)
    metrics = rankc.summarise(tables, IDS, [1] * 40, LANGS)
    rankc.draw_clc("clc.png", metrics, LANGS)
    before = 100 * rankc.clc(tables["base"])
    change = 100 * rankc.clc(tables["trained"]) - before
    panels = [axes for axes in figures[0].axes if axes.images]
    for axes, matrix, limits in zip(panels, (before, change), ((0, 100), (-25, 25)), strict=True):
        assert [label.get_text() for label in axes.get_xticklabels()] == LANGS
        numbers = {text.get_position(): text.get_text() for text in axes.texts}
        form = ".1f" if matrix is before else "+.1f"
        pairs = permutations(range(3), 2)
        assert numbers == {(b, a): f"{matrix[a, b]:{form}}" for a, b in pairs}
        assert axes.images[0].get_clim() == limits


def test_runs_are_drawn_as_accuracy_and_changed_answers(tmp_path, figures, command):
    tables = drawn_tables(0)
    command(finished(tmp_path / "equal", tables), "--plot", tmp_path / "directions.png")
    accuracy_axes, changed_axes = figures[0].axes
    base, trained = measures_of(tables, "base"), measures_of(tables, "trained")
    for kind, axes, stages in (
        ("accuracy", accuracy_axes, [base, trained]),
        ("changed", changed_axes, [trained]),
    ):
        shares = [measures[f"{kind}/{lang}"].mean().item() for lang in LANGS for measures in stages]
        assert [bar.get_height() / 100 for bar in axes.patches] == pytest.approx(shares)
