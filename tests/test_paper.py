"""The paper's slips, recomputed from its own figures (README, "Departures")."""

import re
from statistics import mean

import pytest


@pytest.fixture(scope="module")
def paper(real_data):
    return (real_data.parent / "paper.md").read_text()


def rows(paper, number):
    """The rows of a table that hold numbers alone, (name, numbers); captions stand below."""
    until = paper.index(f"Table {number}:")
    for line in paper[max(0, paper.rfind("Table", 0, until)) : until].splitlines():
        name, *cells = line.replace("Base + DCO", "both").split("\t")
        cells = " ".join(cells).split()
        if len(cells) > 2 and all(re.fullmatch(r"[+-]?\d+\.\d+", cell) for cell in cells):
            yield name.strip(), list(map(float, cells))


def models(paper, number):
    """Of a table with a pair of rows for each model: the base's numbers, and DCO's changes."""
    found = list(rows(paper, number))
    return {a.lower(): (x, y) for (a, x), (_, y) in zip(found[::2], found[1::2], strict=True)}


def methods(paper):
    """Table 1: [method][model] is CLC, accuracy in English and in the others."""
    names = ["base", "sft", "dpo", "dpo then dco", "calm", "dco"]
    llms = ["qwen2.5-14b", "gemma3-12b-pt", "qwen3-14b", "aya-expanse-8b", "llama3.1-8b"]
    found = [numbers for _, numbers in rows(paper, 1)]
    cut = [{m: row[3 * i : 3 * i + 3] for i, m in enumerate(llms)} for row in found]
    return dict(zip(names, cut, strict=True))


def test_table_2s_mmmlu_accuracy_before_dco_is_that_after_it(paper):
    full, found = models(paper, 6), methods(paper)
    for model, (base, change) in models(paper, 2).items():
        before, more = (mean(part[1:]) for part in full[model])
        assert found["base"][model][2] == pytest.approx(before, abs=0.011)
        assert change[2] == pytest.approx(more, abs=0.011)
        assert base[2] == pytest.approx(before + more, abs=0.011)


def test_table_1s_clc_all_of_the_base_is_with_english_alone(paper):
    with_english = models(paper, 5)
    for model, (clc, _, _) in methods(paper)["base"].items():
        assert clc == pytest.approx(mean(with_english[model][0]), abs=0.011)
        assert clc == models(paper, 2)[model][0][0]


def test_table_1s_joint_row_of_aya_is_its_bilingual_one_and_contradicts_two_claims(paper):
    found = {method: row["aya-expanse-8b"] for method, row in methods(paper).items()}
    assert found["dco"] == models(paper, 2)["aya-expanse-8b"][1][:3]
    assert found["dpo then dco"][0] < found["sft"][0] < found["dco"][0]  # not "the highest CLC"
    assert found["dpo"][0] < found["sft"][0]  # not "larger gains ... across all LLMs"


def test_table_2_is_the_mean_of_tables_5_to_10_elsewhere_but_for_three_of_qwen3_14b(paper):
    differ = []
    for which, (consistency, accuracy) in enumerate([(5, 6), (7, 8), (9, 10)]):
        clc, right = models(paper, consistency), models(paper, accuracy)
        for model, printed in models(paper, 2).items():
            for kind in (0, 1):
                a, b = clc[model][kind], right[model][kind]
                for column, value in enumerate([mean(a), b[0], mean(b[1:])]):
                    if abs(printed[kind][3 * which + column] - value) > 0.011:
                        differ.append((model, which, kind, column))
    base = [(model, 0, 0, 2) for model in models(paper, 2)]  # the first test of this file
    qwen = [("qwen3-14b", 1, 0, 1), ("qwen3-14b", 2, 1, 0), ("qwen3-14b", 2, 1, 2)]
    assert sorted(differ) == sorted(base + qwen)


def test_out_of_domain_clc_rises_by_eleven_points_in_four_subjects_and_by_three_in_the_fifth(paper):
    rises = [mean(numbers[1::2]) for _, numbers in rows(paper, 11)]
    assert [round(rise, 2) for rise in rises[:4]] == list(rows(paper, 3))[1][1][::3]
    assert mean(rises[:4]) == pytest.approx(10.98, abs=0.01)
    assert rises[4] == pytest.approx(3.09, abs=0.01) and mean(rises) < 9.5


def test_dpo_is_ahead_of_dco_in_four_of_five_models_which_the_abstract_passes_over(paper):
    assert "outperforms existing methods" in paper
    found = methods(paper)
    ahead = [model for model in found["dco"] if found["dpo"][model][0] > found["dco"][model][0]]
    assert len(ahead) == 4 and "aya-expanse-8b" not in ahead
    for other in ("sft", "calm"):
        assert all(found["dco"][m][0] > found[other][m][0] for m in found["dco"])


def test_the_tables_name_27_languages_where_26_are_said(paper):
    assert "covering 26 languages" in paper
    headers = re.findall(r"^(?:Domain|)((?:\t(?:[A-Z]{2}|ко))+)$", paper, re.M)
    found = {lang for header in headers for lang in header.split() if lang.isascii()} | {"EN"}
    assert len(found) == 27 and "BN" in found  # Bengali, in Tables 11 and 12 alone


def test_the_smallest_of_the_nine_models_is_below_the_4b_that_is_said(paper):
    assert "sizes ranging from 4B to 14B" in paper and "llama3.2-3b" in models(paper, 6)
    assert len(models(paper, 6)) == 9
