"""The measures: RankC by hand and by brute force over sets; then the rest of a report."""

import itertools
import json
import math
import random
import re
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import dco
import rankc
import train
from conftest import tiny_llama


def by_sets(a: list[float], b: list[float]) -> float:
    """App. I as it is written: the overlap of the two top-j sets, weighted by exp(N - j)."""
    N = len(a)
    order = [sorted(range(N), key=lambda k: -scores[k]) for scores in (a, b)]
    weights = [math.exp(N - j) for j in range(1, N + 1)]
    overlap = [len(set(order[0][:j]) & set(order[1][:j])) / j for j in range(1, N + 1)]
    return sum(w * p for w, p in zip(weights, overlap)) / sum(weights)


scores = st.lists(
    st.one_of(st.floats(-50, 0), st.sampled_from([-1.0, -2.0])), min_size=1, max_size=12
)


@given(
    st.lists(
        scores.flatmap(lambda a: st.tuples(st.just(a), st.permutations(a))), min_size=1, max_size=6
    )
)
def test_rankc_is_the_brute_force_over_sets_for_ragged_questions_and_ties(questions):
    K = max(len(a) for a, _ in questions)
    pad = lambda row: list(row) + [-math.inf] * (K - len(row))  # noqa: E731
    a, b = (
        torch.tensor([pad(question[side]) for question in questions], dtype=torch.double)
        for side in (0, 1)
    )
    assert rankc.rankc(a, b).tolist() == pytest.approx(
        [by_sets(*question) for question in questions]
    )


def test_rankc_of_three_candidates_by_hand():
    """w = (e^2, e, 1) / (e^2 + e + 1). The top 1, 2, 3 of ABC and ACB share 1/1, 1/2 and 3/3;
    of ABC and CBA 0/1, 1/2 and 3/3.
    """
    w1, w2, w3 = (math.exp(x) / (math.exp(2) + math.e + 1) for x in (2, 1, 0))
    abc, acb, cba = (torch.tensor([row]) for row in ([3.0, 2, 1], [3.0, 1, 2], [1.0, 2, 3]))
    assert rankc.rankc(abc, acb).item() == pytest.approx(w1 + w2 / 2 + w3)
    assert rankc.rankc(abc, cba).item() == pytest.approx(w2 / 2 + w3)


@given(scores, st.floats(0.1, 5), st.floats(-10, 10))
def test_rankc_depends_on_ranks_alone(row, scale, shift):
    a = torch.tensor([row], dtype=torch.double)
    if len(set((a * scale + shift)[0].tolist())) == len(
        set(row)
    ):  # rounding may tie what was apart
        assert rankc.rankc(a, a * scale + shift).item() == pytest.approx(1)


@given(scores.flatmap(lambda a: st.tuples(st.just(a), st.permutations(a))))
def test_rankc_is_symmetric_and_between_its_bounds(pair):
    a, b = (torch.tensor([row]) for row in pair)
    assert rankc.rankc(a, b).item() == pytest.approx(rankc.rankc(b, a).item())
    assert 0 <= rankc.rankc(a, b).item() <= 1 + 1e-12


def test_a_thousand_candidates_do_not_overflow():
    a = torch.randn(2, 1000)
    assert (
        rankc.rankc(a, a).tolist() == pytest.approx([1, 1]) and rankc.rankc(a, -a).isfinite().all()
    )


@pytest.mark.parametrize("N, published", [(2, 0.634), (4, 0.377), (5, 0.310), (10, 0.158)])
def test_chance_is_what_random_rankings_give(N, published):
    generator = torch.Generator().manual_seed(N)
    a, b = (torch.rand(40_000, N, generator=generator) for _ in range(2))
    simulated = rankc.rankc(a, b)
    assert abs(simulated.mean().item() - rankc.chance(N)) < 4 * simulated.std().item() / 200
    assert rankc.chance(N) == pytest.approx(published, abs=6e-4)


def test_clc_is_symmetric_with_ones_on_its_diagonal_and_the_mean_rankc_elsewhere():
    table = torch.randn(30, 4, 6, generator=torch.Generator().manual_seed(0))
    matrix = rankc.clc(table)
    for a in range(4):
        for b in range(4):
            assert matrix[a, b].item() == pytest.approx(
                rankc.rankc(table[:, a], table[:, b]).mean().item()
            )


@pytest.mark.parametrize(
    "a, b", [([math.nan, 0], [0, 1]), ([-math.inf, 0], [0, 1]), ([-math.inf] * 2, [-math.inf] * 2)]
)
def test_rankc_refuses_nan_and_candidates_missing_in_one_language_only(a, b):
    with pytest.raises(ValueError):
        rankc.rankc(*(torch.tensor([[1.0, 2], x]) for x in (a, b)))  # after a sound question


def test_accuracy_counts_a_tie_by_its_share_wherever_the_gold_answer_stands():
    table = torch.tensor([[[1.0, 1, 0]], [[0, 2, 2]], [[3, 1, 2]]])
    assert rankc.accuracy(table, torch.tensor([1, 2, 0])).item() == pytest.approx(
        (0.5 + 0.5 + 1) / 3
    )
    assert rankc.accuracy(table, torch.tensor([0, 1, 0])).item() == pytest.approx(
        (0.5 + 0.5 + 1) / 3
    )


def test_entropy_of_a_uniform_guess_is_log_k_and_missing_candidates_do_not_count():
    table = torch.tensor([[0.0, 0, 0, 0], [1, 1, -math.inf, -math.inf], [50, 0, 0, 0]])
    assert rankc.entropy(table).tolist() == pytest.approx([math.log(4), math.log(2), 0], abs=1e-6)


def test_a_report_counts_changes_agreement_and_the_entropy_of_right_and_wrong():
    base = torch.tensor([[[2.0, 0], [2, 0]], [[2, 0], [0, 2]]])  # en: 0 0; es: 0 1
    after = torch.tensor([[[2.0, 0], [2, 0]], [[2, 0], [9, 2]]])  # es: 0 0
    report = rankc.measure(after, base, [0, 1], ["en", "es"], after)
    assert (
        report["changed"] == {"en": 0.0, "es": 0.5}
        and report["top1_agreement"] == 1.0
        and report["clc"] == 1.0
    )
    assert report["accuracy"] == {"en": 0.5, "es": 0.5}
    nats = rankc.entropy(torch.tensor([[2.0, 0], [9, 2]])).tolist()
    assert report["entropy"] == {
        "right": pytest.approx(nats[0]),
        "wrong": pytest.approx(sum(nats) / 2),
    }
    spread = pytest.approx(statistics.pstdev(nats))
    assert report["entropy_std"] == {"right": 0, "wrong": spread}
    assert rankc.measure(base, base, [0, 1], ["en", "es"], base)["top1_agreement"] == 0.5


def test_clc_en_is_the_mean_over_pairs_with_english_or_else_the_first_language():
    g = torch.Generator().manual_seed(3)
    scores, logps = (torch.randn(30, 3, 5, generator=g).log_softmax(-1) for _ in range(2))
    matrix = rankc.clc(scores)
    found = rankc.measure(scores, scores, [0] * 30, ["es", "en", "sw"], logps - 1)
    assert found["clc_en"] == pytest.approx((float(matrix[1, 0]) + float(matrix[1, 2])) / 2)
    assert found["clc"] == pytest.approx(float(matrix[0, 1] + matrix[0, 2] + matrix[1, 2]) / 3)
    assert "clc_es" in rankc.measure(scores, scores, [0] * 30, ["es", "fr", "sw"], logps)
    # entropy and total probability are of the log-probs, whatever answers are ranked by
    assert found["probability"] == pytest.approx(dict.fromkeys(["es", "en", "sw"], math.exp(-1)))
    right = [
        -sum(p * math.log(p) for p in logps[q, i].exp().tolist())
        for q in range(30)
        for i in range(3)
        if int(scores[q, i].argmax()) == 0
    ]
    assert found["entropy"]["right"] == pytest.approx(statistics.mean(right), rel=1e-5)
    assert found["entropy_std"]["right"] == pytest.approx(statistics.pstdev(right), rel=1e-5)


def test_a_report_without_gold_answers_has_no_accuracy_but_its_consistency():
    scores = torch.randn(3, 2, 4)
    report = rankc.measure(scores, scores, [None] * 3, ["en", "es"], scores)
    assert report["accuracy"] == {"en": None, "es": None} and report["clc"] > 0
    assert report["entropy"] == {"right": None, "wrong": None}


def test_the_forecast_of_any_trust_is_wholly_consistent():
    config = train.Config(model="m", langs=["en", "es", "sw"], trust=["en=10", "sw=0.5"])
    scores = torch.randn(50, 3, 5).log_softmax(-1)
    table = dco.optimal_policy(scores.double(), train.gamma_matrix(config), 1.0)
    assert rankc.clc(table).min() == pytest.approx(1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"trust": ["en=0"]}, "positive"),
        ({"trust": ["en=-1"]}, "positive"),
        ({"trust": ["en=nan"]}, "positive"),
        ({"trust": ["en=inf"]}, "positive"),
        ({"trust": ["de=1"]}, "'de' is not among --langs en es"),
        ({"trust": ["en"]}, "LANG=NUMBER"),
        ({"trust": ["en=2"], "gamma": ["1", "1"]}, "give one"),
        ({"gamma": ["1"]}, "2 x 2"),
        ({"gamma": ["[[0, 1], [1, 1]]"]}, "gamma_ii must be 0"),
        ({"gamma": ["a", "b"]}, "two numbers for two languages, or a JSON"),
        ({"gamma": ["-1", "-1"]}, "not negative"),
        ({"beta": 0.0}, "--beta"),
    ],
)
def test_directions_that_cannot_be_are_refused(settings, message):
    with pytest.raises(data.InputError, match=message):
        train.gamma_matrix(train.Config(model="m", langs=["en", "es"], **settings))


def test_a_gamma_whose_rank_is_not_one_warns_with_its_rank(capsys):
    def matrix(langs, *gamma):
        return train.gamma_matrix(train.Config(model="m", langs=langs, gamma=list(gamma))).tolist()

    assert matrix(["en", "es"], "0.1", "1") == [[0, pytest.approx(0.1)], [1, 0]]
    assert "rank 2" in capsys.readouterr().out
    matrix(["en", "es"], "0.1", "10")
    assert matrix(["en", "es", "fr"], "[[0, 1, 2], [1, 0, 2], [0.5, 0.5, 0]]")[2] == [0.5, 0.5, 0]
    assert not capsys.readouterr().out


def test_every_tree_is_scored_once_and_lands_in_its_row(process_group):
    """Whatever the token budget: the table holds for each question what scoring it alone gives."""
    rng, model = random.Random(0), tiny_llama(100)
    ids = lambda n: [rng.randrange(100) for _ in range(n)]  # noqa: E731
    trees = [
        [
            data.Tree(ids(rng.randint(1, 9)), [ids(rng.randint(1, 4)) for _ in range(2 + q % 3)])
            for _ in "ab"
        ]
        for q in range(11)
    ]
    with torch.no_grad():
        for budget in (1, 40, 10_000):
            config = train.Config(model="m", max_tokens=budget)
            table = train.score(model, trees, config, packed=True)
            assert table.shape == (11, 2, 4)
            for q, row in enumerate(trees):
                for i, tree in enumerate(row):
                    K = len(tree.branches)
                    torch.testing.assert_close(
                        table[q, i, :K], dco.completion_logps(model, [tree])[0]
                    )
                    assert table[q, i, K:].isneginf().all()


LANGS = ["en", "es", "sw", *"abcdefgh"]


def questions(subjects, K=4, gold=0):
    return [
        data.Question(
            str(i),
            s,
            gold,
            dict.fromkeys(LANGS, f"x{i}"),
            dict.fromkeys(LANGS, tuple("abcdefgh"[:K])),
        )
        for i, s in enumerate(subjects)
    ]


def test_a_report_by_subject_measures_each_subject_as_if_it_stood_alone():
    g = torch.Generator().manual_seed(0)
    base, after = (torch.randn(9, 2, 4, generator=g) for _ in range(2))
    every = questions("aabbbcccc")
    metrics = {}
    tables = {"base": {"test": base}, "trained": {"test": after}}
    text = rankc.report({"test": every}, tables, ["en", "es"], metrics, by_subject=True)
    parts = metrics["test"]["subjects"]
    assert [parts[s]["questions"] for s in "abc"] == [2, 3, 4]
    alone = after[2:5], base[2:5], [0] * 3, ["en", "es"], after[2:5]
    assert parts["b"]["trained"] == rankc.measure(*alone)
    moved = 100 * (rankc.rankc(*after[2:5].unbind(1)) - rankc.rankc(*base[2:5].unbind(1)))
    old, error = 100 * rankc.rankc(*base[2:5].unbind(1)), moved.std() / 3**0.5
    first = f"{old.mean():.1f} ± {old.std() / 3**0.5:.1f}, {moved.mean():+.1f} ± {error:.1f}"
    assert cells(text, "b")[:2] == ["3", first]
    assert "subjects" not in rankc.report({"test": every}, tables, ["en", "es"], {})


def test_a_report_of_many_languages_shows_each_pair_before_and_its_change():
    g = torch.Generator().manual_seed(1)
    base, after = (torch.randn(20, 3, 4, generator=g) for _ in range(2))
    tables = {"base": {"test": base}, "trained": {"test": after}}
    text = rankc.report({"test": questions("x" * 20)}, tables, ["en", "es", "sw"], {})
    text = text[text.index("| CLC \\ change") :]
    before, change = 100 * rankc.clc(base), 100 * (rankc.clc(after) - rankc.clc(base))
    assert cells(text, "en") == ["", f"{change[0, 1]:+.1f}", f"{change[0, 2]:+.1f}"]
    assert cells(text, "es") == [f"{before[1, 0]:.1f}", "", f"{change[1, 2]:+.1f}"]
    assert cells(text, "sw") == [f"{before[2, 0]:.1f}", f"{before[2, 1]:.1f}", ""]


def clc_by_hand(scores):
    """The mean over pairs of rankc of each question."""
    pairs = itertools.combinations(scores.unbind(1), 2)
    return torch.stack([rankc.rankc(a, b) for a, b in pairs]).mean(0)


def test_a_verdict_tells_what_rose_what_fell_and_what_did_neither():
    change = {"clc": (0.03, 0.01), "accuracy en": (-0.05, 0.02), "accuracy es": None}
    change["accuracy fr"] = 0.01, 0.02
    found = {"with_error": {"change": change}}
    found["optimum"] = {"clc": 1.0, "accuracy": {"en": 0.5, "fr": 0.25, "es": None}}
    assert rankc.verdict(found, ["en", "fr", "es"], "optimum") == (
        "rose: CLC +3.0 ± 1.0; fell: accuracy en -5.0 ± 2.0; moved by no more than two standard "
        "errors: accuracy fr +1.0 ± 2.0; optimum, what DCO aims at: CLC 100.0, accuracy en 50.0, "
        "accuracy fr 25.0"
    )


def test_a_folder_of_runs_in_place_of_runs_is_told(tmp_path, scored):
    (tmp_path / "runs").mkdir()
    finished(tmp_path / "runs" / "a", *scored[:2])
    with pytest.raises(rankc.RunError, match="it holds some: give .*runs/\\*"):
        rankc.compare([tmp_path / "runs"])


def test_answers_turn_right_or_wrong_where_the_right_one_is_known():
    before = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    after = torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]])
    assert rankc.turned(before, after, [1, 0, 0, 1, None]) == [1, 1, 1]


def test_a_report_has_a_row_for_each_measure_and_language_and_is_narrow_for_any_number_of_them():
    g, langs = torch.Generator().manual_seed(1), list("abcdefgh")
    base, after = (torch.randn(20, 8, 4, generator=g) for _ in range(2))
    tables = {name: {"test": t} for name, t in
              {"base": base, "optimum": after.flip(1), "trained": after}.items()}  # fmt: skip
    metrics = {}
    text = rankc.report({"test": questions("x" * 20)}, tables, langs, metrics)
    row = metrics["test"]
    for label, chance, values in (
        ("CLC", "37.7", [clc_by_hand(tables[name]["test"]) for name in tables]),
        ("accuracy c", "25.0", [(t["test"][:, 2].argmax(-1) == 0) for t in tables.values()]),
    ):
        values = [100 * x.double() for x in values]
        error = [x.std() / 20**0.5 for x in (*values, values[-1] - values[0])]
        shown = [f"{x.mean():.1f} ± {e:.1f}" for x, e in zip(values, error)]
        shown += [f"{(values[-1] - values[0]).mean():+.1f} ± {error[-1]:.1f}"]
        assert cells(text, label) == [chance, *shown]
    was, now = (table[:, 2].argmax(-1) for table in (base, after))
    turned = [
        (now == 0) & (was != 0),
        (was == 0) & (now != 0),
        (was != now) & (was > 0) & (now > 0),
    ]
    (row_of_c,) = re.findall(r"^\| c +\|(.*)\|$", text.partition("wrong to right")[2], re.M)[:1]
    assert [int(x) for x in row_of_c.split("|")] == [int(x.sum()) for x in turned]
    assert cells(text, "CLC-A")[1].startswith(f"{100 * row['base']['clc_a']:.1f} ± ")
    mass = [row[name].get("probability", {}).get("c") for name in tables]
    assert mass[1] is None  # pi* is normalised over the candidates
    shown = [
        f"{100 * mass[0]:.3g}",
        "",
        f"{100 * mass[2]:.3g}",
        f"{100 * (mass[2] - mass[0]):+.3g}",
    ]
    assert cells(text, "probability of all answers c") == ["", *shown]
    nats, spread = ([row[x][y]["right"] for x in tables] for y in ("entropy", "entropy_std"))
    shown = [f"{x:.2f}, {y:.2f}" for x, y in zip(nats, spread)] + [""]
    assert cells(text, "entropy if right: nats, std") == ["", *shown]
    assert max(map(len, text.splitlines())) < 100


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4, 1)])
def test_a_table_with_other_axes_than_questions_languages_candidates_is_refused(shape):
    for measure in (rankc.clc, lambda scores: rankc.accuracy(scores, torch.zeros(2).long())):
        with pytest.raises(ValueError, match="three axes"):
            measure(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_rankc_refuses_scores_with_other_axes_than_questions_and_candidates(shape):
    with pytest.raises(ValueError, match="three axes"):
        rankc.rankc(torch.zeros(shape), torch.zeros(shape))


# ------------------------------------------------------------------------------------ the table


def finished(
    folder, base, trained, model="base/model", gold=0, langs=("en", "es", "sw"), subject="x", **more
):
    """What a run leaves that a comparison reads; the tables are (Q, L, K)."""
    folder.mkdir()
    settings = {"model": model, "data": "jsonl:q", "langs": langs, "score": "sum", "seed": 0}
    (folder / "run.json").write_text(json.dumps({**settings, **more}))
    every = questions([subject] * len(base), gold=gold)
    splits = {"train": questions("t", gold=gold), "test": every}
    tables = {
        name: {"train": table[:1], "test": table}
        for name, table in {"base": base, "trained": trained}.items()
    }
    rankc.write_answers(folder / "answers.jsonl", splits, tables, list(langs))
    (folder / "metrics.json").write_text(json.dumps({"test": {"questions": len(base)}}))
    (folder / "log.jsonl").write_text("")
    return folder


def cells(text, name):
    """The cells of the row with this label, in whichever table of the text it is."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (row,) = [row for row in rows if row and row[0] == name]
    return row[1:]


@pytest.fixture
def scored():
    g = torch.Generator().manual_seed(2)
    return [torch.randn(40, 3, 4, generator=g) for _ in range(3)]


def test_a_comparison_has_the_papers_columns_as_differences_to_the_base(tmp_path, scored):
    base, first, second = scored
    folders = [
        finished(tmp_path / "sft", base, first, gold=1),
        finished(tmp_path / "dco", base, second, gold=1),
    ]
    text = rankc.compare(map(str, folders))
    assert "base/model on jsonl:q, the test split, scored by sum" in text
    assert "en es sw, 40 questions" in text
    assert cells(text, "") == ["CLC", "CLC-EN", "A_EN", "A_notEN", "A at pi*"]
    gold = torch.ones(40, dtype=torch.long)
    a, b = torch.triu_indices(3, 3, 1)
    rows = {}
    for name, table in {"base": base, "sft": first, "dco": second}.items():
        right = rankc.accuracy(table, gold)
        matrix = rankc.clc(table)
        rows[name] = [100 * float(x) for x in (matrix[a, b].mean(), matrix[0, 1:].mean(), right[0],
                                               right[1:].mean())]  # fmt: skip
    assert [cell.split()[0] for cell in cells(text, "base")[:4]] == [
        f"{x:.1f}" for x in rows["base"]
    ]
    assert cells(text, "chance") == ["37.7", "37.7", "25.0", "25.0", ""]
    for name in ("sft", "dco"):
        change = [new - old for new, old in zip(rows[name], rows["base"])]
        assert [cell.split()[0] for cell in cells(text, name)[:4]] == [f"{x:+.1f}" for x in change]
    moved = (second[:, 0].argmax(-1) == 1).double() - (base[:, 0].argmax(-1) == 1).double()
    assert cells(text, "dco")[2].endswith(f"± {100 * float(moved.std()) / 40**0.5:.1f}")
    assert cells(text, "dco, new prompts")[2] == shown(moved[1:], "+.1f")  # question 0's is not


def test_the_accuracy_at_pi_star_stands_beside_each_run_of_dco_on_its_own_base(tmp_path, scored):
    at = {"optimum": {"accuracy": {"en": 0.5, "es": 0.25, "sw": None}}}
    for name, more in (("a", {}), ("b", {"method": "sft"}), ("c", {"model": str(tmp_path / "a")})):
        tables = scored[1:] if name == "c" else scored[:2]
        folder = finished(tmp_path / name, *tables, **{"method": "dco", **more})
        found = {"questions": 40, **at}
        (folder / "metrics.json").write_text(json.dumps({"test": found}))
    text = rankc.compare([tmp_path / name for name in "abc"])
    assert [cells(text, name)[4] for name in ("base", "a", "b", "c")] == ["", "37.5", "", ""]
    assert cells(text, "a, new prompts")[4] == ""


def test_a_report_counts_questions_apart_whose_prompt_was_trained_on():
    g, every = torch.Generator().manual_seed(0), questions("x" * 9)
    tables = {x: {"train": t[:3], "test": t} for x, t in zip(
        ("base", "trained"), torch.randn(2, 9, 2, 4, generator=g))}  # fmt: skip
    langs, metrics = ["en", "es"], {}
    text = rankc.report({"train": every[:3], "test": every}, tables, langs, metrics)
    assert "prompts" not in metrics["train"]
    for name, part in (("new", slice(3, 9)), ("of a training question", slice(3))):
        old, new = (tables[x]["test"][part] for x in tables)
        found = metrics["test"]["prompts"][name]
        assert found["trained"] == rankc.measure(new, old, [0] * len(old), langs)
        change = columns(new)[:, 0] - columns(old)[:, 0]
        told = f"{shown(columns(old)[:, 0])}, {shown(change, '+.1f')}"
        assert cells(text, name)[:2] == [str(len(old)), told]
    tables = {x: {"train": t["test"], "test": t["train"]} for x, t in tables.items()}
    rankc.report({"train": every, "test": every[:3]}, tables, langs, metrics := {})
    assert list(metrics["test"]["prompts"]) == ["of a training question"]  # none is new


def test_a_table_is_markdown_whose_cells_stand_below_each_other():
    rows = [["", "CLC"], ["chance", "37.7"], ["a long name", "+1.0 ± 0.1"]]
    assert rankc.format_table(rows).splitlines() == [
        "|             |        CLC |",
        "| ----------- | ---------- |",
        "| chance      |       37.7 |",
        "| a long name | +1.0 ± 0.1 |",
    ]


def test_the_command_compares_runs_and_refuses_what_is_none_with_status_2(
    tmp_path, scored, monkeypatch, capsys
):
    folder = finished(tmp_path / "a", *scored[:2])
    monkeypatch.setattr("sys.argv", ["rankc.py", str(folder)])
    rankc.main()
    assert capsys.readouterr().out.strip() == rankc.compare([folder]).strip()
    for folders, message in (
        ([str(tmp_path / "nothing")], "error: none of the folders is a finished run"),
        ([], "error: the following arguments are required: runs"),
    ):
        monkeypatch.setattr("sys.argv", ["rankc.py", *folders])
        with pytest.raises(SystemExit) as stop:
            rankc.main()
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_run_that_goes_on_from_a_run_is_compared_with_where_the_first_began(tmp_path, scored):
    base, dpo, both = scored
    one = finished(tmp_path / "dpo", base, dpo)
    two = finished(tmp_path / "dpo-dco", dpo, both, model=str(one))
    direct = finished(tmp_path / "direct", base, both)
    text = rankc.compare([one, two, direct])
    assert cells(text, "dpo-dco") == cells(text, "direct") and text.count("base/model") == 1
    (tmp_path / "moved").mkdir()
    for folder in (one, two, direct):
        folder.rename(tmp_path / "moved" / folder.name)
    again = rankc.compare(sorted((tmp_path / "moved").iterdir()))
    assert cells(again, "dpo-dco") == cells(text, "dpo-dco") and again.count("base/model") == 1


def test_a_run_that_goes_on_is_not_joined_with_one_that_does_not(tmp_path, scored):
    base, dpo, both = (table[:, :2] for table in scored)
    one = finished(tmp_path / "dpo", base, dpo, langs=("en", "es"), method="dpo")
    finished(tmp_path / "dpo-dco", dpo, both, model=str(one), langs=("en", "es"))
    finished(tmp_path / "dco", base, both, langs=("en", "sw"))
    text = rankc.compare([tmp_path / name for name in ("dco", "dpo-dco")])
    assert "A change" not in text and "dpo-dco is not joined with dco: after [" in text


def test_a_run_that_began_elsewhere_is_compared_with_its_own_base(tmp_path, scored):
    base, dpo, both = scored
    one = finished(tmp_path / "dpo", base, dpo)
    other = finished(tmp_path / "other", both, dpo, model=str(one))  # dpo was trained again since
    fewer = finished(tmp_path / "fewer", dpo[:9], both[:9], model=str(one))
    assert rankc.compare([other, fewer]).count(f"{one} on jsonl:q") == 2
    itself = finished(tmp_path / "itself", base, dpo, model=str(tmp_path / "itself"))
    assert "itself on jsonl:q" in rankc.compare([itself])


def test_bases_that_score_otherwise_are_told(tmp_path, scored):
    base, first, second = scored
    folders = [finished(tmp_path / "a", base, first), finished(tmp_path / "b", second, first)]
    assert "note: the base of b scores otherwise than that of a" in rankc.compare(folders)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("run.json", "{", "run.json is not of a whole run of train.py: JSONDecodeError"),
        ("run.json", "{}", "not of a whole run of train.py: KeyError"),
        ("answers.jsonl", "", "answers.jsonl is not .* has 0 of 40 questions"),
        ("answers.jsonl", "{}\n{\n", "answers.jsonl is not .* JSONDecodeError.*: line 2 col"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, scored, file, text, message):
    folder = finished(tmp_path / "a", *scored[:2])
    (folder / file).write_text(text)
    with pytest.raises(rankc.RunError, match=message) as refused:
        rankc.compare([folder])
    assert str(folder) in str(refused.value)


def test_runs_on_other_questions_stand_in_a_table_of_their_own(tmp_path, scored):
    base, first, second = scored
    folders = [
        finished(tmp_path / "a", base, first),
        finished(tmp_path / "b", base[:30], second[:30]),
        finished(tmp_path / "c", base[:, 1:], first[:, 1:], langs=("es", "sw")),
    ]
    text = rankc.compare([*folders, tmp_path / "notes"])
    assert (
        text.count("CLC-") == 3
        and text.count("is not joined") == 3
        and "A_notES" in text
        and "30 questions" in text
    )
    assert "a is not joined with b: other questions" in text
    assert "c is not joined with a: langs ['es', 'sw'], not ['en', 'es', 'sw']" in text
    assert f"left out {tmp_path / 'notes'}: not a finished run" in text
    with pytest.raises(rankc.RunError, match="none of the folders is a finished run"):
        rankc.compare([tmp_path / "notes"])


def test_without_gold_answers_a_comparison_has_consistency_alone(tmp_path, scored):
    text = rankc.compare([finished(tmp_path / "a", *scored[:2], gold=None)])
    assert [bool(cell) for cell in cells(text, "base")] == [True, True, False, False, False]
    assert [bool(cell) for cell in cells(text, "a")] == [True, True, False, False, False]


# ------------------------------------------------------------- runs that are joined in one table


def pairwise(folder, others=("es", "sw", "a"), Q=40, seed=5, **more):
    """A run of English with each of these languages, and its two tables."""
    g, runs = torch.Generator().manual_seed(seed), {}
    folder.mkdir(exist_ok=True)
    for lang in others:
        tables = torch.randn(2, Q, 2, 4, generator=g)
        finished(folder / f"en-{lang}", *tables, langs=("en", lang), **more)
        runs[lang] = tables
    return runs


def columns(scores, gold=0):
    """CLC and the two accuracies of each question: (Q, 3)."""
    right = (scores.argmax(-1) == gold).double()
    return torch.stack([rankc.rankc(scores[:, 0], scores[:, 1]), right[:, 0], right[:, 1]], 1)


def shown(values, form=".1f"):
    """Mean and standard error over questions, as a cell has them."""
    error = statistics.stdev(values.tolist()) / len(values) ** 0.5
    return f"{100 * float(values.mean()):{form}} ± {100 * error:.1f}"


def test_runs_of_one_language_each_beside_english_are_joined_with_their_mean(tmp_path):
    runs = pairwise(tmp_path / "runs")
    text = rankc.compare(sorted((tmp_path / "runs").iterdir()), plot=tmp_path / "no.png")
    names = [f"{x}{y}" for x in ("CLC-EN", "A_EN", "A") for y in ("", " change")]
    assert cells(text, "") == [*names, "A at pi*"] and text.count("CLC-EN change") == 1
    every = []
    for lang, (base, trained) in runs.items():
        old, new = columns(base), columns(trained)
        each = [(old[:, c], new[:, c] - old[:, c]) for c in range(3)]
        assert cells(text, lang)[:6] == [
            shown(values, form) for both in each for values, form in zip(both, (".1f", "+.1f"))
        ]
        every.append(torch.stack([torch.stack(both) for both in each]))
    mean = torch.stack(every).mean(0)  # of each question over the runs, which share them
    assert cells(text, "mean")[:6] == [
        shown(values, form) for both in mean for values, form in zip(both, (".1f", "+.1f"))
    ]
    assert (
        cells(text, "mean, new prompts")[:6]
        == [  # question 0 has a training question's
            shown(values[1:], form) for both in mean for values, form in zip(both, (".1f", "+.1f"))
        ]
    )
    assert not (tmp_path / "no.png").exists()


def test_subjects_are_joined_each_by_itself_from_runs_that_tested_one_or_several(tmp_path):
    g, runs = torch.Generator().manual_seed(6), {}
    for lang, subjects in (("es", "law"), ("sw", "law"), ("es", "art"), ("sw", "art")):
        tables = torch.randn(2, 30, 2, 4, generator=g)
        folder = tmp_path / f"{subjects}-{lang}"
        finished(folder, *tables, langs=("en", lang), test_subjects=[subjects], subject=subjects)
        runs[subjects, lang] = tables
    text = rankc.compare(sorted(tmp_path.iterdir()))
    assert text.count("CLC-EN change") == 1
    for (subject, lang), (base, trained) in runs.items():
        old, new = columns(base), columns(trained)
        found = cells(text, f"{subject} {lang}")
        assert found[:2] == [shown(old[:, 0]), shown((new - old)[:, 0], "+.1f")]
    both = torch.stack([columns(runs["law", lang][1]) for lang in ("es", "sw")]).mean(0)
    base = torch.stack([columns(runs["law", lang][0]) for lang in ("es", "sw")]).mean(0)
    assert cells(text, "law mean")[3] == shown((both - base)[:, 1], "+.1f")


def test_runs_that_cannot_be_joined_are_named_with_what_differs(tmp_path):
    pairwise(tmp_path / "r", ("es", "sw"), lr=1e-5)
    pairwise(tmp_path / "r", ("a",), lr=1e-4, model="other")
    pairwise(tmp_path / "r2", ("es",), lr=1e-5)
    text = rankc.compare([*sorted((tmp_path / "r").iterdir()), tmp_path / "r2" / "en-es"])
    assert (
        "en-a is not joined with en-es: langs ['en', 'a'], not ['en', 'es']; lr 0.0001, not" in text
    )
    assert "model 'other', not 'base/model'" in text and text.count("is not joined") == 1
    assert "note: es is that of another run, en-es is left out" in text
    with pytest.raises(rankc.RunError, match="--reference fr: no run has it; they have a, en, es"):
        rankc.compare(sorted((tmp_path / "r").iterdir()), "fr")
    swapped = rankc.compare([tmp_path / "r" / "en-es"], "es")
    assert cells(swapped, "")[1:3] == ["CLC-ES", "A_ES"]
    one = rankc.compare([tmp_path / "r" / "en-es"])
    assert cells(swapped, "base")[2:4] == cells(one, "base")[3:1:-1]


@given(
    st.lists(st.sets(st.integers(0, 12), min_size=2), min_size=1, max_size=4), st.integers(0, 99)
)
def test_the_error_of_a_mean_over_runs_is_that_of_a_sum_over_questions(sets, seed):
    """The delta method by hand: what each question adds, over all the runs that have it."""
    g, parts, added = torch.Generator().manual_seed(seed), [], {}
    for ids in map(sorted, sets):
        values = torch.randn(len(ids), generator=g, dtype=torch.double)
        parts.append((list(map(str, ids)), values))
        for id, x in zip(ids, values.tolist()):
            part = (x - float(values.mean())) / len(ids) / len(sets)
            added[id] = added.get(id, 0) + part
    mean, error = rankc.mean_and_error(parts)
    assert mean == pytest.approx(statistics.mean(float(v.mean()) for _, v in parts))
    n = len(added)
    assert error == pytest.approx(math.sqrt(n / (n - 1) * math.fsum(x * x for x in added.values())))
    ids, values = parts[0]
    plain = rankc.mean_and_error([([*ids, "?"], torch.cat([values, torch.tensor([math.nan])]))])
    error = statistics.stdev(values.tolist()) / len(ids) ** 0.5
    assert plain == pytest.approx((float(values.mean()), error))
    assert rankc.mean_and_error([(["x"], torch.tensor([math.nan]))]) is None
    assert math.isnan(rankc.mean_and_error([(["x"], torch.tensor([1.0]))])[1])


def test_runs_that_differ_in_direction_alone_are_drawn_as_figure_2(tmp_path, scored, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="pictures need the [plot] extra")
    drawn, (base, *others) = [], scored
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    ways = [{"gamma": ["1", "1"]}, {"trust": ["en=10"]}]
    folders = [
        finished(tmp_path / name, base[:, :2], table[:, :2], langs=("en", "es"), **way)
        for name, table, way in zip("ab", others, ways)
    ]
    sft = finished(tmp_path / "c", base[:, :2], others[0][:, :2], langs=("en", "es"), method="sft")
    text = rankc.compare([sft, *folders], plot=tmp_path / "directions.png")
    assert f"{tmp_path / 'directions.png'} shows a, b" in text
    assert (tmp_path / "directions.png").read_bytes()[:4] == b"\x89PNG"
    left, right = drawn[0].axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["base", "1, 1", "en=10"]
    heights = [bar.get_height() for bar in left.patches]
    tables = [base, *others]
    wanted = [(table[:, i].argmax(-1) == 0).double().mean() for i in range(2) for table in tables]
    assert heights == pytest.approx([100 * float(x) for x in wanted])
    heights = [bar.get_height() for bar in right.patches]
    before = base.argmax(-1)
    moved = [(t.argmax(-1) != before)[:, i].double().mean() for i in range(2) for t in others]
    assert heights == pytest.approx([100 * float(x) for x in moved])
    green = [text.get_text() for text in right.texts if text.get_color() == "green"]
    assert green == [f"{100 * float(rankc.clc(t[:, :2])[0, 1]):.1f}" for t in others]
    assert len(drawn) == 1 and len(left.get_legend().get_texts()) == 2
    more = [
        finished(tmp_path / name, base[:, 1:], table[:, 1:], langs=("es", "sw"), gold=None, **way)
        for name, table, way in zip("de", others, ways)
    ]
    text = rankc.compare([*folders, *more], plot=tmp_path / "directions.png")
    assert f"{tmp_path / 'directions-2.png'} shows d, e" in text and len(drawn) == 3
    assert [label.get_text() for label in drawn[-1].axes[0].texts] == [""] * 6  # no gold


def test_folders_that_name_each_other_end(tmp_path, scored):
    for name, other in ("ac", "ca"):
        (tmp_path / name).mkdir()
        finished(tmp_path / name / name, *scored[:2], model=f"/gone/{other}")
    for name, other in ("ac", "ca"):
        finished(tmp_path / name / other, *scored[:2], model=f"/gone/{name}")
    assert "base" in rankc.compare([tmp_path / "a" / "a"])


@pytest.mark.parametrize("languages", [2, 4, 17])
def test_the_picture_shows_every_pair_in_numbers_and_centres_the_change(
    tmp_path, languages, monkeypatch
):
    figure = pytest.importorskip("matplotlib.figure", reason="pictures need the [plot] extra")
    langs, drawn = list("abcdefghijklmnopq"[:languages]), []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    before, after = (
        rankc.measure(t, t, [0] * 20, langs, t) for t in torch.randn(2, 20, languages, 5)
    )
    for last, panels in ((after, 2), (None, 1)):
        assert rankc.draw_clc(
            tmp_path / "clc.png", "test", {"base": before, "trained": last, "questions": 20}, langs
        )
        axes = [axes for axes in drawn[-1].axes if axes.images]
        assert len(axes) == panels
        assert all(len(ax.texts) == languages * (languages - 1) for ax in axes)
        assert [label.get_text() for label in axes[0].get_xticklabels()] == langs
        (score,) = axes[0].images
        assert (score.norm.vmin, score.norm.vmax) == (0, 100)
        shown = {text.get_position(): text.get_text() for text in axes[0].texts}
        assert shown[1, 0] == f"{100 * before['clc_matrix'][0][1]:.1f}"
    change = next(axes for axes in drawn[0].axes[1:] if axes.images)
    assert change.images[0].norm.vmin == -change.images[0].norm.vmax
    shown = {text.get_position(): text.get_text() for text in change.texts}
    difference = after["clc_matrix"][0][1] - before["clc_matrix"][0][1]
    assert shown[1, 0] == f"{100 * difference:+.1f}"
    assert (tmp_path / "clc.png").read_bytes()[:4] == b"\x89PNG"
