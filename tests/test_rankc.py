"""The measures: RankC by hand and by brute force over sets; then reports, runs and pictures."""

import json
import math
import statistics
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import rankc


def by_sets(a: list[float], b: list[float]) -> float:
    """App. I as it is written: the overlap of the two top-j sets, weighted by exp(N - j)."""
    N = len(a)
    order = [sorted(range(N), key=lambda k: -scores[k]) for scores in (a, b)]
    weights = [math.exp(N - j) for j in range(1, N + 1)]
    overlap = [len(set(order[0][:j]) & set(order[1][:j])) / j for j in range(1, N + 1)]
    return sum(w * p for w, p in zip(weights, overlap)) / sum(weights)


def padded(questions: list[list[list[float]]]) -> torch.Tensor:
    """Scores [question][language][candidate] as a table (Q, L, K), -inf where one has fewer."""
    K = max(len(question[0]) for question in questions)
    rows = [[row + [-math.inf] * (K - len(row)) for row in question] for question in questions]
    return torch.tensor(rows, dtype=torch.double)


def tables_of(draw, languages: int, number: int) -> list[list[list[list[float]]]]:
    """Some tables of the same questions, with ties, and with different numbers of candidates."""
    score = st.one_of(st.floats(-50, 0), st.sampled_from([-1.0, -2.0]))
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
    rows = [st.lists(score, min_size=size, max_size=size) for size in sizes]
    return [[[draw(row) for _ in range(languages)] for row in rows] for _ in range(number)]


@given(st.data())
def test_rankc_is_the_brute_force_over_sets_for_ties_and_ragged_questions(drawn):
    questions = tables_of(drawn.draw, 2, 1)[0]
    a, b = padded(questions).unbind(1)
    expected = [by_sets(*question) for question in questions]
    assert rankc.rankc(a, b).tolist() == pytest.approx(expected)
    assert rankc.rankc(b, a).tolist() == pytest.approx(expected)
    assert rankc.rankc(a, a).tolist() == pytest.approx([1] * len(questions))


def test_rankc_of_three_candidates_by_hand():
    """w = (e^2, e, 1) / (e^2 + e + 1). The top 1, 2, 3 of ABC and ACB share 1/1, 1/2 and 3/3;
    of ABC and CBA 0/1, 1/2 and 3/3.
    """
    w1, w2, w3 = (math.exp(x) / (math.exp(2) + math.e + 1) for x in (2, 1, 0))
    abc, acb, cba = (torch.tensor([row]) for row in ([3.0, 2, 1], [3.0, 1, 2], [1.0, 2, 3]))
    assert rankc.rankc(abc, acb).item() == pytest.approx(w1 + w2 / 2 + w3)
    assert rankc.rankc(abc, cba).item() == pytest.approx(w2 / 2 + w3)


def test_a_thousand_candidates_do_not_overflow():
    a = torch.randn(2, 1000)
    assert rankc.rankc(a, a).tolist() == pytest.approx([1, 1])
    assert rankc.rankc(a, -a).isfinite().all()
    assert rankc.chance(1000) == pytest.approx(math.e / (math.e - 1) / 1000)


@pytest.mark.parametrize("N, published", [(2, 0.634), (4, 0.377), (5, 0.310), (10, 0.158)])
def test_chance_is_what_random_rankings_give(N, published):
    generator = torch.Generator().manual_seed(N)
    a, b = (torch.rand(40_000, N, generator=generator) for _ in range(2))
    simulated = rankc.rankc(a, b)
    assert abs(simulated.mean().item() - rankc.chance(N)) < 4 * simulated.std().item() / 200
    assert rankc.chance(N) == pytest.approx(published, abs=6e-4)


def test_clc_is_the_mean_rankc_of_each_pair_with_ones_on_its_diagonal():
    table = torch.randn(30, 4, 6, generator=torch.Generator().manual_seed(0))
    matrix = rankc.clc(table)
    for a in range(4):
        for b in range(4):
            pair = rankc.rankc(table[:, a], table[:, b])
            assert matrix[a, b].item() == pytest.approx(pair.mean().item())


@pytest.mark.parametrize(
    "a, b", [([math.nan, 0], [0, 1]), ([-math.inf, 0], [0, 1]), ([-math.inf] * 2, [-math.inf] * 2)]
)
def test_rankc_refuses_nan_and_candidates_missing_in_one_language_only(a, b):
    with pytest.raises(ValueError, match="missing"):
        rankc.rankc(*(torch.tensor([[1.0, 2], x]) for x in (a, b)))  # after a sound question


def test_accuracy_counts_a_tie_by_its_share_wherever_the_gold_answer_stands():
    table = torch.tensor([[[1.0, 1, 0]], [[0, 2, 2]], [[3, 1, 2]]])
    for gold in ([1, 2, 0], [0, 1, 0]):
        right = rankc.accuracy(table, torch.tensor(gold)).item()
        assert right == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_entropy_of_a_uniform_guess_is_log_k_and_missing_candidates_do_not_count():
    table = torch.tensor([[0.0, 0, 0, 0], [1, 1, -math.inf, -math.inf], [50, 0, 0, 0]])
    assert rankc.entropy(table).tolist() == pytest.approx([math.log(4), math.log(2), 0], abs=1e-6)


# ------------------------------------------------------------------------------------- the measures
@given(st.data())
def test_each_measure_of_a_question_is_what_plain_loops_count(drawn):
    langs = drawn.draw(st.sampled_from([["es", "en", "sw"], ["sw", "es", "fr"], ["es", "en"]]))
    now, base = tables_of(drawn.draw, len(langs), 2)
    gold = [drawn.draw(st.none() | st.integers(0, len(rows[0]) - 1)) for rows in now]
    measures = rankc.per_question(padded(now), padded(base), gold, langs)
    first = "en" if "en" in langs else langs[0]
    pairs = list(combinations(range(len(langs)), 2))
    with_first = [(a, b) for a, b in pairs if first in (langs[a], langs[b])]
    names = {f"{kind}/{lang}" for kind in ("accuracy", "changed", "probability") for lang in langs}
    assert set(measures) == names | {"clc", f"clc_{first}", "top1_agreement"}

    def is_value(name, q, expected):
        assert measures[name][q].item() == pytest.approx(float(expected), nan_ok=True), name

    for q, (rows, before) in enumerate(zip(now, base)):
        consistency = {(a, b): by_sets(rows[a], rows[b]) for a, b in pairs}
        is_value("clc", q, statistics.mean(consistency.values()))
        is_value(f"clc_{first}", q, statistics.mean(consistency[pair] for pair in with_first))
        best = [row.index(max(row)) for row in rows]
        is_value("top1_agreement", q, statistics.mean(best[a] == best[b] for a, b in pairs))
        for i, lang in enumerate(langs):
            ties = [k for k, score in enumerate(rows[i]) if score == max(rows[i])]
            share = math.nan if gold[q] is None else (gold[q] in ties) / len(ties)
            is_value(f"accuracy/{lang}", q, share)
            is_value(f"changed/{lang}", q, best[i] != before[i].index(max(before[i])))
            is_value(f"probability/{lang}", q, sum(math.exp(score) for score in rows[i]))


def test_entropy_is_told_apart_by_whether_the_answer_is_right():
    scores = torch.tensor([[[2.0, 0], [9, 2]], [[0, 0], [1, 4]], [[1, 0], [5, 0]]])
    nats = rankc.entropy(scores)
    spread = rankc.entropy_by_outcome(scores, [0, 1, None])  # of ties the first is the answer
    right, wrong = [*nats[0].tolist(), nats[1, 1].item()], nats[1, 0].item()
    assert spread["right"] == pytest.approx([statistics.mean(right), statistics.pstdev(right)])
    assert spread["wrong"] == pytest.approx([wrong, 0])
    assert all(map(math.isnan, rankc.entropy_by_outcome(scores, [None] * 3)["right"]))


numbers = st.dictionaries(st.integers(0, 12), st.floats(-1, 1), min_size=2)


@given(st.lists(numbers, min_size=1, max_size=4))
def test_the_error_of_a_mean_over_runs_is_that_of_a_sum_over_questions(runs):
    """The delta method by hand: what each question adds, over all the runs that have it."""
    parts, added = [], {}
    for run in runs:
        mean = statistics.mean(run.values())
        for id, value in run.items():
            added[id] = added.get(id, 0) + (value - mean) / len(run) / len(runs)
        unknown = torch.tensor([*run.values(), math.nan], dtype=torch.double)
        parts.append(([*run, "unknown"], unknown))
    n, squares = len(added), math.fsum(share * share for share in added.values())
    mean = statistics.mean(statistics.mean(run.values()) for run in runs)
    expected = mean, math.sqrt(n / (n - 1) * squares)
    assert rankc.mean_and_error(parts) == pytest.approx(expected, abs=1e-9)
    values = list(runs[0].values())
    plain = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    assert rankc.mean_and_error(parts[:1]) == pytest.approx(plain, abs=1e-9)


def test_a_mean_of_nothing_is_unknown_and_so_is_the_error_of_one_question():
    mean, error = rankc.mean_and_error([(["x"], torch.tensor([math.nan]))])
    assert math.isnan(mean) and math.isnan(error)
    mean, error = rankc.mean_and_error([(["x"], torch.tensor([0.5]))])
    assert mean == 0.5 and math.isnan(error)


# --------------------------------------------------------------------------------------- the report
LANGS = ["en", "es", "sw"]


def drawn_tables(seed: int, Q=40, L=3, K=4) -> dict[str, torch.Tensor]:
    """A run's tables; the optimum is drawn like the others, so that none is taken for another."""
    g = torch.Generator().manual_seed(seed)
    stages = ("base", "optimum", "trained")
    return {stage: torch.randn(Q, L, K, generator=g).log_softmax(-1) for stage in stages}


def cells(text: str, name: str) -> list[str]:
    """The cells of the row with this label."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (row,) = [row for row in rows if row[0] == name]
    return row[1:]


def shown(values: torch.Tensor, form: str = ".1f") -> str:
    """Mean and standard error over questions, as a cell has them."""
    error = statistics.stdev(values.tolist()) / len(values) ** 0.5
    return f"{100 * values.mean().item():{form}} ± {100 * error:.1f}"


def clc_of(scores: torch.Tensor) -> torch.Tensor:
    pairs = combinations(scores.unbind(1), 2)
    return torch.stack([rankc.rankc(a, b) for a, b in pairs]).mean(0)


def clc_en_of(scores: torch.Tensor) -> torch.Tensor:
    en, es, sw = scores.unbind(1)
    return (rankc.rankc(en, es) + rankc.rankc(en, sw)) / 2


def right(scores: torch.Tensor, i: int, gold: int = 1) -> torch.Tensor:
    return (scores[:, i].argmax(-1) == gold).double()


def test_a_report_has_a_row_a_measure_and_a_column_a_stage_with_errors():
    tables = drawn_tables(1)
    ids = [str(q) for q in range(40)]
    text, metrics = rankc.report("test, 40 questions", tables, ids, [1] * 40, LANGS)
    assert cells(text, "test, 40 questions") == ["chance", *tables, "change"]
    before = tables["base"].argmax(-1)
    by_hand = {
        "clc": ("37.7", clc_of),
        "clc en": ("37.7", clc_en_of),
        "accuracy sw": ("25.0", lambda x: right(x, 2)),
        "probability es": ("", lambda x: x[:, 1].double().exp().sum(-1)),
        "changed en": ("", lambda x: (x.argmax(-1) != before)[:, 0].double()),
    }
    for name, (chance, measure) in by_hand.items():
        stages = [measure(scores) for scores in tables.values()]
        change = stages[-1] - stages[0]
        assert cells(text, name) == [chance, *map(shown, stages), shown(change, "+.1f")]
        key = "clc_en" if name == "clc en" else name.replace(" ", "/")
        for stage, values in zip((*tables, "change"), (*stages, change)):
            error = statistics.stdev(values.tolist()) / 40**0.5
            expected = [values.mean().item(), error]
            assert metrics[stage][key] == pytest.approx(expected, abs=1e-9)
    assert metrics["trained"]["clc_matrix"] == rankc.clc(tables["trained"]).tolist()
    assert metrics["base"]["entropy"] == rankc.entropy_by_outcome(tables["base"], [1] * 40)
    assert metrics["questions"] == 40
    assert metrics["chance"] == pytest.approx({"clc": rankc.chance(4), "accuracy": 1 / 4})


def test_a_report_leaves_out_what_is_not_known_and_is_json_with_null_for_it():
    tables = {"base": drawn_tables(2, Q=3, L=2)["base"]}
    tables["base"][0, :, 2:] = -math.inf  # two candidates
    text, metrics = rankc.report("test", tables, ["a", "b", "c"], [None] * 3, ["es", "fr"])
    written = json.dumps(metrics).replace("NaN", "null")  # as train.py writes it
    metrics = json.loads(written, parse_constant=pytest.fail)
    assert metrics["base"]["accuracy/es"] == [None, None] and metrics["base"]["clc"][0] > 0
    assert metrics["base"]["entropy"] == {"right": [None, None], "wrong": [None, None]}
    chance = (rankc.chance(2) + 2 * rankc.chance(4)) / 3
    assert metrics["chance"] == pytest.approx({"clc": chance, "accuracy": (1 / 2 + 2 / 4) / 3})
    assert cells(text, "accuracy es") == ["33.3", ""] and "change" not in metrics
    assert "clc es" not in text  # of two languages it is CLC


def test_a_table_is_markdown_whose_cells_stand_below_each_other():
    rows = [["", "CLC"], ["chance", "37.7"], ["a long name", "+1.0 ± 0.1"]]
    assert rankc.format_table(rows).splitlines() == [
        "|             |        CLC |",
        "| ----------- | ---------- |",
        "| chance      |       37.7 |",
        "| a long name | +1.0 ± 0.1 |",
    ]


# ------------------------------------------------------------------------- runs beside each other
def finished(folder, tables, langs=LANGS, gold=1):
    """What rankc.py reads of a run; the first ten prompts are also training questions'."""
    folder.mkdir()
    questions = []
    for q in range(len(tables["base"])):
        prompts = dict.fromkeys(langs, f"prompt {q}")
        answers = dict.fromkeys(langs, tuple("abcd"))
        questions.append(data.Question(str(q), ["law", "art"][q % 2], gold, prompts, answers))
    splits = {"train": questions[:1], "test": questions}
    by_split = {"train": {stage: table[:1] for stage, table in tables.items()}, "test": tables}
    trained_on = {f"prompt {q}" for q in range(10)}
    rankc.write_answers(folder / "answers.jsonl", splits, by_split, langs, trained_on)
    (folder / "run.json").write_text(json.dumps({"langs": langs}))
    (folder / "metrics.json").write_text("{}")
    return folder


def compared(*folders, by="", base=None):
    return rankc.compare([rankc.read_run(folder, base) for folder in folders], by)


def test_answers_hold_each_question_and_its_nats_and_are_read_again(tmp_path):
    tables = drawn_tables(3, Q=12)
    folder = finished(tmp_path / "a", tables)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").open()]
    assert [line["split"] for line in lines] == ["train"] + ["test"] * 12
    last = lines[-1]
    assert (last["id"], last["subject"], last["gold"]) == ("11", "art", 1)
    assert last["prompts"]["sw"] == "prompt 11" and last["answers"]["es"] == list("abcd")
    assert last["trained"]["es"] == tables["trained"][11, 1].tolist()
    assert [line["seen"] for line in lines[1:]] == [True] * 10 + [False] * 2
    run = rankc.read_run(folder)
    assert (run.name, run.langs, run.lines) == ("a", LANGS, lines[1:])
    for stage, scores in tables.items():
        assert torch.equal(run.table(stage), scores)
    fewer = {lang: nats[:2] for lang, nats in run.lines[1]["base"].items()}
    run.lines[1]["base"] = fewer
    expected = tables["base"].index_fill(2, torch.tensor([2, 3]), -math.inf)[1]
    assert torch.equal(run.table("base")[1], expected)


def test_runs_on_the_same_questions_have_the_papers_columns_and_a_row_each(tmp_path):
    runs = {"sft": drawn_tables(5), "dco": drawn_tables(6)}
    text = compared(*(finished(tmp_path / name, tables) for name, tables in runs.items()))
    header = ["CLC", "Δ CLC", "CLC-en", "Δ CLC-en", "accuracy en", "Δ accuracy en"]
    header += ["accuracy others", "Δ accuracy others", "changed en", "changed others"]
    assert cells(text, "") == [*header, "accuracy at pi*"]
    for name, tables in runs.items():
        base, trained, optimum = (tables[stage] for stage in ("base", "trained", "optimum"))
        changed = (trained.argmax(-1) != base.argmax(-1)).double()
        expected = []
        for measure in (
            clc_of,
            clc_en_of,
            lambda x: right(x, 0),
            lambda x: (right(x, 1) + right(x, 2)) / 2,
        ):
            change = measure(trained) - measure(base)
            expected += [shown(measure(base)), shown(change, "+.1f")]
        expected += [shown(changed[:, 0]), shown(changed[:, 1:].mean(1))]
        at_optimum = (right(optimum, 0) + right(optimum, 1) + right(optimum, 2)) / 3
        assert cells(text, name) == [*expected, shown(at_optimum)]
    assert "mean" not in text


def test_runs_of_english_with_one_language_each_have_a_mean_row(tmp_path):
    """Of each question's mean over the runs, which share it; its error is over questions."""
    runs = {lang: drawn_tables(seed, L=2) for seed, lang in enumerate(("es", "sw", "fr"))}
    folders = [finished(tmp_path / lang, tables, ["en", lang]) for lang, tables in runs.items()]
    text = compared(*folders)
    for column, measure in ((0, clc_of), (6, lambda scores: right(scores, 1))):
        before = torch.stack([measure(tables["base"]) for tables in runs.values()])
        after = torch.stack([measure(tables["trained"]) for tables in runs.values()])
        for n, lang in enumerate(runs):
            row = [shown(before[n]), shown(after[n] - before[n], "+.1f")]
            assert cells(text, lang)[column : column + 2] == row
        row = [shown(before.mean(0)), shown((after - before).mean(0), "+.1f")]
        assert cells(text, "mean")[column : column + 2] == row


@pytest.mark.parametrize(
    "by, groups",
    [
        ("subject", {"law": slice(0, 40, 2), "art": slice(1, 40, 2)}),
        ("seen", {"True": slice(10), "False": slice(10, 40)}),
    ],
)
def test_groups_of_questions_stand_apart_each_with_its_mean(tmp_path, by, groups):
    runs = {lang: drawn_tables(seed, L=2) for seed, lang in enumerate(("es", "sw"))}
    folders = [finished(tmp_path / lang, tables, ["en", lang]) for lang, tables in runs.items()]
    text = compared(*folders, by=by)
    for group, part in groups.items():
        change = [clc_of(x["trained"]) - clc_of(x["base"]) for x in runs.values()]
        assert cells(text, f"{group} es")[1] == shown(change[0][part], "+.1f")
        mean = (change[0] + change[1]) / 2
        assert cells(text, f"{group} mean")[1] == shown(mean[part], "+.1f")


def test_a_run_that_goes_on_from_another_is_compared_with_that_ones_base(tmp_path):
    """DPO, then DCO (section 6.1). What a run of --eval_only has as base counts as trained."""
    dpo, after = drawn_tables(7), drawn_tables(8)
    first = finished(tmp_path / "dpo", dpo)
    second = finished(tmp_path / "dpo-dco", after)
    looked = finished(tmp_path / "eval", {stage: after[stage] for stage in ("base", "optimum")})
    with pytest.raises(ValueError, match="eval has no 'trained'"):
        compared(looked)
    text, before = compared(second, looked, base=first), clc_of(dpo["base"])
    change = clc_of(after["trained"]) - before
    assert cells(text, "dpo-dco")[:2] == [shown(before), shown(change, "+.1f")]
    change = clc_of(after["base"]) - before
    assert cells(text, "eval")[:2] == [shown(before), shown(change, "+.1f")]


def test_without_right_answers_a_comparison_has_consistency_and_changes_alone(tmp_path):
    text = compared(finished(tmp_path / "a", drawn_tables(9), gold=None))
    known = [bool(cell) for cell in cells(text, "a")]
    assert known == [True] * 4 + [False] * 4 + [True] * 2 + [False]


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["rankc.py", *map(str, arguments)])
    rankc.main()


def test_the_command_prints_the_table_by_a_field_and_against_a_base(tmp_path, monkeypatch, capsys):
    a, b = (finished(tmp_path / name, drawn_tables(seed)) for seed, name in enumerate("ab"))
    command(monkeypatch, a, b, "--by", "subject")
    assert capsys.readouterr().out.strip() == compared(a, b, by="subject")
    command(monkeypatch, b, "--base", a)
    assert capsys.readouterr().out.strip() == compared(b, base=a)


def test_the_command_refuses_what_it_cannot_compare_by_name(tmp_path, monkeypatch):
    a = finished(tmp_path / "a", drawn_tables(0))
    b = finished(tmp_path / "b", drawn_tables(0, L=2), ["es", "sw"])
    c = finished(tmp_path / "c", drawn_tables(0, L=2), ["en", "es"])
    fewer = finished(tmp_path / "fewer", drawn_tables(0, Q=9))
    (tmp_path / "killed").mkdir()
    for arguments, message in (
        ([tmp_path / "killed"], "error: .*killed holds no finished run of train.py"),
        ([a, "--by", "topic"], "error: a has no 'topic', but id, subject, gold, prompts"),
        ([a, "--base", b], "error: --base .*b: its questions or languages are not .*a's"),
        ([a, "--base", fewer], "error: --base .*fewer: its questions"),
        ([a, b], "error: b is of .*and a beside 'en'"),
        ([b, c], "error: c "),  # Spanish it has, but not as its reference
    ):
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, *arguments)


# ----------------------------------------------------------------------------------------- pictures
@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as matplotlib's objects; none may be blank."""
    figure = pytest.importorskip("matplotlib.figure", reason="pictures need the [plot] extra")
    from matplotlib.image import imread

    figures, save = [], figure.Figure.savefig

    def savefig(self, path, **how):
        save(self, path, **how)
        assert imread(path, format="png").std() > 0.05
        figures.append(self)

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize("languages", [2, 9])
def test_the_picture_of_clc_shows_every_pair_in_numbers_and_centres_the_change(
    tmp_path, drawn, languages
):
    langs, tables = list("abcdefghi"[:languages]), drawn_tables(1, L=languages)
    ids = [str(q) for q in range(40)]
    _, metrics = rankc.report("test", tables, ids, [1] * 40, langs)
    rankc.draw_clc(tmp_path / "clc.png", metrics, langs)
    (figure,) = drawn
    left, right = (axes for axes in figure.axes if axes.images)
    before = 100 * rankc.clc(tables["base"])
    change = 100 * rankc.clc(tables["trained"]) - before
    for axes, matrix, signs in ((left, before, ""), (right, change, "")):
        assert [label.get_text() for label in axes.get_xticklabels()] == langs
        numbers = {text.get_position(): text.get_text() for text in axes.texts}
        assert len(numbers) == languages * (languages - 1)
        assert numbers[1, 0] == f"{matrix[0, 1]:{signs}.1f}"
    assert (left.images[0].norm.vmin, left.images[0].norm.vmax) == (0, 100)
    assert right.images[0].norm.vmin == -right.images[0].norm.vmax <= -25


def test_directions_are_drawn_as_accuracy_and_changed_answers(tmp_path, drawn, monkeypatch):
    base = drawn_tables(0)["base"]
    tables = [drawn_tables(seed) | {"base": base} for seed in (1, 2)]
    folders = [finished(tmp_path / name, x) for name, x in zip(("equal", "keep-en"), tables)]
    command(monkeypatch, *folders, "--plot", tmp_path / "directions.png")
    left, other = drawn[0].axes
    names = [label.get_text().split("\n")[0] for label in left.get_xticklabels()]
    assert names == ["base", "equal", "keep-en"]
    stages = [base, *(x["trained"] for x in tables)]
    expected = [right(table, i).mean().item() for i in range(3) for table in stages]
    assert [bar.get_height() / 100 for bar in left.patches] == pytest.approx(expected)
    moved = [(table.argmax(-1) != base.argmax(-1)).double().mean(0) for table in stages[1:]]
    expected = [share[i].item() for i in range(3) for share in moved]
    assert [bar.get_height() / 100 for bar in other.patches] == pytest.approx(expected)
    clc = [f"CLC {100 * clc_of(table).mean().item():.1f}" for table in stages]
    assert [label.get_text().split("\n")[1] for label in left.get_xticklabels()] == clc
