"""The paper's slips, recomputed from its own figures (`.github/departures.md`)."""

import re
from statistics import mean

import pytest


@pytest.fixture(scope="module")
def paper(real_data):
    return (real_data.parent / "paper.md").read_text()


def rows(paper, number):
    """The rows of a table that hold numbers alone, (name, numbers); captions stand below."""
    end = paper.index(f"Table {number}:")
    start = max(0, paper.rfind("Table", 0, end))
    numeric = []
    for line in paper[start:end].splitlines():
        name, *cells = line.replace("Base + DCO", "both").split("\t")
        cells = " ".join(cells).split()
        if len(cells) > 2 and all(re.fullmatch(r"[+-]?\d+\.\d+", cell) for cell in cells):
            numeric.append((name.strip(), [float(cell) for cell in cells]))
    return numeric


def models(paper, number):
    """Of a table with two rows for each model: {model: (the base's numbers, DCO's changes)}."""
    numeric = rows(paper, number)
    pairs = zip(numeric[::2], numeric[1::2], strict=True)
    return {name.lower(): (base, change) for (name, base), (_, change) in pairs}


def methods(paper):
    """Table 1, {method: {model: [CLC, accuracy in English, in the others]}}."""
    names = ["base", "sft", "dpo", "dpo then dco", "calm", "dco"]
    llms = ["qwen2.5-14b", "gemma3-12b-pt", "qwen3-14b", "aya-expanse-8b", "llama3.1-8b"]
    table = {}
    for name, (_, numbers) in zip(names, rows(paper, 1), strict=True):
        table[name] = {llm: numbers[3 * i : 3 * i + 3] for i, llm in enumerate(llms)}
    return table


def test_table_2s_mmmlu_accuracy_before_dco_is_that_after_it(paper):
    by_language, table_1 = models(paper, 6), methods(paper)
    for model, (base, change) in models(paper, 2).items():
        before, rise = (mean(numbers[1:]) for numbers in by_language[model])
        assert table_1["base"][model][2] == pytest.approx(before, abs=0.011)
        assert change[2] == pytest.approx(rise, abs=0.011)
        assert base[2] == pytest.approx(before + rise, abs=0.011)


def test_table_2_is_the_mean_of_tables_5_to_10_elsewhere_but_for_three_of_qwen3_14b(paper):
    table_2, different = models(paper, 2), set()
    for n, data_set in enumerate(("mmmlu", "xcsqa", "bmlama")):
        clc, accuracy = models(paper, 5 + 2 * n), models(paper, 6 + 2 * n)
        for model, printed in table_2.items():
            for row, kind in enumerate(("base", "change")):
                english, *others = accuracy[model][row]
                means = {"clc": mean(clc[model][row]), "en": english, "others": mean(others)}
                for column, (name, value) in enumerate(means.items()):
                    if abs(printed[row][3 * n + column] - value) > 0.011:
                        different.add((model, data_set, kind, name))
    first_test = {(model, "mmmlu", "base", "others") for model in table_2}  # of this file
    assert different - first_test == {
        ("qwen3-14b", "xcsqa", "base", "en"),
        ("qwen3-14b", "bmlama", "change", "clc"),
        ("qwen3-14b", "bmlama", "change", "others"),
    }


def test_dpo_is_ahead_of_dco_in_four_of_five_models_which_the_abstract_passes_over(paper):
    assert "outperforms existing methods" in paper
    clc = {}
    for method, by_model in methods(paper).items():
        clc[method] = {model: numbers[0] for model, numbers in by_model.items()}
    behind_dpo = [model for model in clc["dco"] if clc["dpo"][model] > clc["dco"][model]]
    assert len(behind_dpo) == 4 and "aya-expanse-8b" not in behind_dpo
    for other in ("sft", "calm"):
        assert all(clc["dco"][model] > clc[other][model] for model in clc["dco"])
