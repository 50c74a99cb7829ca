"""Loaders, split, sampling and tokens, on files written here and on the real data sets.

Bad files are in test_bad_input.py.
"""

import csv
import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import data
from conftest import tiny_tokenizer


# ------------------------------------------------------------------------------ BMLAMA
def bmlama(folder, **rows_by_lang):
    """A BMLAMA folder: lines end with CRLF, and all headers have the stray tab of zh.tsv."""
    for lang, rows in rows_by_lang.items():
        lines = ["Prompt\tAns\tCandidate\tAns\tSubject", *("\t".join(row) for row in rows)]
        (folder / f"{lang}.tsv").write_bytes("".join(line + "\r\n" for line in lines).encode())
    return f"bmlama:{folder}"


EN = ["Peru's capital is <mask>.", "Lima", '"Quito, ""La Paz"", Lima"', "Peru"]
JA = ["ペルーの首都は<mask>です。", "リマ", "キト, ラパス, リマ", "ペルー"]


def test_bmlama_answers_hold_what_follows_the_mask_but_not_a_bare_full_stop(tmp_path):
    (question,) = data.load(bmlama(tmp_path, en=[EN], ja=[JA]), ["en", "ja"])
    assert question == data.Question(
        id="2",
        subject="Peru",
        gold=2,
        prompts={"en": "Peru's capital is ", "ja": "ペルーの首都は"},
        answers={
            "en": ("Quito", '"La Paz"', "Lima"),
            "ja": ("キトです。", "ラパスです。", "リマです。"),
        },
    )


def test_bmlama_keeps_translations_that_repeat_and_finds_gold_by_position(tmp_path):
    once = ["<x> is <mask>.", "Lima", "Quito, Lima, Callao", "Peru"]
    thrice = ["<x> es <mask>.", "Lima", "Lima, Lima, Lima", "Peru"]
    for langs in (["en", "es"], ["es", "en"]):
        (question,) = data.load(bmlama(tmp_path, en=[once], es=[thrice]), langs)
        assert question.answers["es"] == ("Lima", "Lima", "Lima") and question.gold == 1


def test_bmlama_rows_without_a_prompt_or_a_choice_are_dropped_everywhere_and_counted(tmp_path):
    opening = ["<mask> da hiriburua.", "Lima", "Quito, La Paz, Lima", "Peru"]
    alone = ["Its capital is <mask>.", "Lima", "Lima", "Peru"]
    spec, printed = bmlama(tmp_path, en=[EN, EN, alone], eu=[EN, opening, alone]), []
    questions = data.load(spec, ["en", "eu"], printed.append)
    assert [question.id for question in questions] == ["2"]
    why = "1 open with <mask>, 1 have one candidate"
    assert printed == [f"{tmp_path}: dropped 2 questions in all languages: {why}"]
    two = ["Its capital is <mask>.", "Lima", "Lima, Quito", "Peru"]
    with pytest.raises(data.InputError, match=r"question '2': answers .* {'en': 2, 'eu': 1}"):
        data.load(bmlama(tmp_path, en=[two], eu=[alone]), ["en", "eu"])


# ------------------------------------------------------------------------------ multiple choice
HEADER = ["", "Question", "A", "B", "C", "D", "Answer", "Subject"]
ROWS = [
    ["2 + 2?", "3", "4", "5", "6", "B"],
    ['Which is "big", x or y?', "x", "y", "both", "", "A "],
]


def published(folder, locale, rows=ROWS, subject="maths"):
    """A file as openai/MMMLU has them."""
    (folder / "test").mkdir(exist_ok=True)
    numbered = [[n, *row, subject] for n, row in enumerate(rows)]
    with open(folder / "test" / f"mmlu_{locale}.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *numbered])


def original(folder, name, rows=ROWS):
    """A file as MMLU was first published."""
    with open(folder / name, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_mmmlu_joins_the_published_files_and_the_original_english_under_lm_evals_prompt(tmp_path):
    original(tmp_path, "maths_test.csv")
    published(tmp_path, "SW-KE", [[row[0] + " sw", *row[1:]] for row in ROWS])
    published(tmp_path, "FR-FR")
    original(tmp_path, "maths_test_zu.csv")
    for langs in (["en", "sw"], ["en", "sw-ke"], ["en", "SW-KE"], ["sw", "en", "fr", "zu"]):
        first, second = data.load(f"mmmlu:{tmp_path}", langs)
        assert (first.id, first.subject, first.gold) == ("maths/0", "maths", 1)
        assert first.prompts["en"] == "2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
        assert first.prompts[langs[1]].startswith("2 + 2?")
        assert set(first.answers.values()) == {(" A", " B", " C", " D")}
        assert second.gold == 0 and "\nD. \nAnswer:" in second.prompts["en"]
    assert "2 + 2? sw" in first.prompts["sw"]
    published(tmp_path, "FR-CA")
    with pytest.raises(data.InputError, match="'fr': expected one mmlu_FR-XX.csv, .* 'mmlu_FR-"):
        data.load(f"mmmlu:{tmp_path}", ["en", "fr"])


def test_mmmlu_drops_and_counts_other_keys_and_what_is_not_in_every_language(tmp_path):
    rows = [[f"Question {n}?", "a", "b", "c", "d", "C"] for n in range(10)]
    original(tmp_path, "maths_test.csv", rows)
    original(tmp_path, "maths_test_zu.csv", [[*rows[0][:5], "D"], *rows[1:]])
    original(tmp_path, "music_test.csv", rows[:3])
    printed = []
    questions = data.load(f"mmmlu:{tmp_path}", ["en", "zu"], printed.append)
    assert [question.id for question in questions] == [f"maths/{n}" for n in range(1, 10)]
    (line,) = printed
    assert "dropped 4 questions in all languages: 3 not in every language, 1 of other keys" in line


def xcsqa(folder, **keys_by_lang):
    """X-CSQA files: of each language, the letter of the right option by id."""
    for lang, keys in keys_by_lang.items():
        path = folder / "X-CSQA" / lang / "dev.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for id, key in keys.items():
            options = [{"label": letter, "text": f"{letter} {lang}"} for letter in "ABCDE"]
            question = {"stem": f"{id} in {lang}?", "choices": options}
            lines.append(json.dumps({"id": id, "question": question, "answerKey": key}) + "\n")
        path.write_text("".join(lines))


def test_xcsqa_is_joined_on_id_and_finds_japanese_as_jap(tmp_path):
    xcsqa(tmp_path, en={"a": "A", "b": "E"}, jap={"b": "E", "a": "A"})
    for place in (tmp_path, tmp_path / "X-CSQA"):
        first, second = data.load(f"xcsqa:{place}", ["en", "ja"])
        assert (first.id, first.gold, second.gold) == ("a", 0, 4)
        assert first.prompts["ja"].startswith("a in jap?\nA. A jap\n")
        assert second.prompts["ja"].startswith("b in jap?") and second.answers["ja"][4] == " E"


def test_xcsqa_with_permuted_options_is_refused_with_count_and_example(tmp_path):
    keys = {str(n): "A" for n in range(40)}
    xcsqa(tmp_path, en=keys, zh={**keys, "5": "B", "6": "B", "7": "B", "8": "B", "9": "B"})
    message = "right letter of 5 of 40 .*en/dev.jsonl, line 6': 'A', .*zh/dev.jsonl, line 6': 'B'"
    with pytest.raises(data.InputError, match=message):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])


# ------------------------------------------------------------------------------ other kinds
def test_jsonl_reads_the_fields_of_question_and_ignores_others(tmp_path):
    prompts = {"en": "The capital of Peru is", "es": "La capital de Perú es"}
    answers = {"en": [" Bogota", " Lima"], "es": [" Bogotá", " Lima"]}
    line = {"id": "7", "subject": "geography", "gold": 1, "prompts": prompts, "answers": answers}
    bare = {"id": 8, "prompts": prompts, "answers": answers, "source": "me"}
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(bare) + "\n")
    first, second = data.load(f"jsonl:{tmp_path / 'own.jsonl'}", ["en", "es"])
    read = {"en": (" Bogota", " Lima"), "es": (" Bogotá", " Lima")}
    assert first == data.Question("7", "geography", 1, prompts, read)
    assert second == data.Question("8", "", None, prompts, read)


@pytest.mark.parametrize(
    "spec, langs, message",
    [
        ("nosuch:x", ["en"], "--data nosuch:x: expected one of atlas, bmlama"),
        ("atlas", ["en", "en"], "name each language once"),
        ("atlas", ["en", "country"], "no language 'country'; it has en, fr, es, sw"),
    ],
)
def test_data_and_languages_that_are_not_there_are_refused(spec, langs, message):
    with pytest.raises(data.InputError, match=message):
        data.load(spec, langs)


def test_the_atlas_is_whole_parallel_and_without_a_tell_tale_position():
    langs = ["en", "fr", "es", "sw"]
    questions = data.load("atlas", langs)
    assert len(questions) == 735 and len({question.subject for question in questions}) == 5
    for question in questions:
        for lang in langs:
            assert len(set(question.answers[lang])) == 6, (question.id, lang)
            assert "{" not in question.prompts[lang] and "  " not in question.prompts[lang]
    counts = Counter(question.gold for question in questions)
    assert len(counts) == 6 and all(90 < count < 160 for count in counts.values())


# ------------------------------------------------------------------------------ split and sampling
def with_ids(ids, langs=("en",)):
    prompts, answers = dict.fromkeys(langs, "x"), dict.fromkeys(langs, tuple("abcde"))
    return [data.Question(str(id), "", 0, prompts, answers) for id in ids]


def of_subjects(subjects):
    questions = with_ids(range(len(subjects)))
    return [replace(question, subject=x) for question, x in zip(questions, subjects)]


def ids_of(questions):
    return [question.id for question in questions]


@given(st.lists(st.integers(0, 999), min_size=2, unique=True), st.integers(0, 5))
def test_the_split_depends_on_seed_and_ids_alone(ids, seed):
    half = len(ids) // 2
    train, test = data.split(with_ids(ids), half, None, seed)
    again = data.split(with_ids(sorted(ids), ("en", "sw")), half, None, seed)
    assert (ids_of(train), ids_of(test)) == (ids_of(again[0]), ids_of(again[1]))
    assert len(train) == half and sorted(ids_of(train + test)) == sorted(map(str, ids))


def test_another_seed_splits_otherwise_and_another_seed_or_number_draws_otherwise():
    questions = with_ids(range(100))
    splits = [ids_of(data.split(questions, 50, 50, seed)[0]) for seed in (0, 1)]
    assert splits[0] != splits[1]
    draws = []
    for number, seed in ((0, 0), (0, 1), (1, 0)):
        draws.append([data.sample(question, 2, number, seed) for question in questions])
    assert draws[0] != draws[1] and draws[0] != draws[2]


def test_draws_are_distinct_candidates_each_as_likely():
    draws = [data.sample(question, 2, 0, 0) for question in with_ids(range(4000))]
    assert all(len(set(draw)) == 2 for draw in draws)
    counts = Counter(k for draw in draws for k in draw)
    assert len(counts) == 5 and all(abs(count - 1600) < 150 for count in counts.values())
    assert sorted(data.sample(with_ids([0])[0], 9, 0, 0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "train_subjects, test_subjects, train, test",
    [
        ("a", "b", "aa", "bbb"),
        ("a", "", "aa", "bbbccc"),  # unnamed subjects go to the other part
        ("", "b", "ac", "bbb"),
        ("a", "ab", "aa", "aabbb"),  # what is left of a subject is held out
    ],
)
def test_subjects_are_kept_apart(train_subjects, test_subjects, train, test):
    questions = of_subjects("aaaabbbccc")
    parts = data.split(questions, 2, None, 0, train_subjects, test_subjects)
    subjects = ["".join(sorted(question.subject for question in part)) for part in parts]
    assert subjects == [train, test]


@pytest.mark.parametrize(
    "train, test, train_subjects, test_subjects, message",
    [
        (11, None, "", "", "there are 10 to train on"),
        (8, 3, "", "", "then 2 others"),
        (-1, None, "", "", "there are 10"),
        (None, None, "", "", "there are 10.* then 0"),
        (None, None, "d", "", "no subject 'd'; there are a, b, c"),
        (2, 6, "a", "ab", "there are 4.* then 5"),
    ],
)
def test_a_split_that_cannot_be_is_refused(train, test, train_subjects, test_subjects, message):
    with pytest.raises(data.InputError, match=message):
        data.split(of_subjects("aaaabbbccc"), train, test, 0, train_subjects, test_subjects)


# ------------------------------------------------------------------------------ tokens
TEXT = "The capital of Peru is Lima . Quito Bogotá La capital de Perú es " * 3


def encode(tokenizer, prompt, *answers, **limits):
    """The tree of one question."""
    question = data.Question("q7", "", None, {"en": prompt}, {"en": answers})
    ((tree,),) = data.encode(tokenizer, [question], ["en"], **limits)
    return tree


def as_lm_evaluation_harness(tokenizer, context, continuation):
    """Their rule: trailing spaces move; what lies beyond the context's length is scored."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    ids = tokenizer(context + continuation)["input_ids"]
    return ids, len(tokenizer(context)["input_ids"])


words = st.text("Peru Limabosá .", min_size=1, max_size=12).filter(str.strip)


@example("The capital is ", ["boom", "ssss", " room"])
@given(words, st.lists(words, min_size=2, max_size=4))
def test_trees_hold_the_tokens_and_scored_part_of_lm_evaluation_harness(prompt, answers):
    tokenizer = tiny_tokenizer(TEXT)
    expected = [as_lm_evaluation_harness(tokenizer, prompt, answer) for answer in answers]
    if min(len(ids) - start for ids, start in expected) < 1 or expected[0][1] < 1:
        return  # there the rule leaves an answer without a token; ours scores one
    if len({ids[0] for ids, _ in expected}) > 1:  # no token is common to all
        with pytest.raises(data.InputError, match="'q7', 'en': no token stands before the answers"):
            encode(tokenizer, prompt, *answers)
        return
    tree = encode(tokenizer, prompt, *answers)
    for branch, (ids, start) in zip(tree.branches, expected, strict=True):
        assert tree.prefix + branch == ids
        assert len(tree.prefix) + tree.prompt_len == start
    fed = [len(ids) - 1 - len(tree.prefix) for ids, _ in expected]
    assert tree.tokens() == len(tree.prefix) + sum(fed)


def test_an_answer_that_merges_with_the_prompt_still_scores_a_token():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3}, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    # a|bc and a|bb: the answer c alone has no token of its own.
    assert encode(tokenizer, "ab", "c", "b") == data.Tree([0], [[3], [1, 1]], 0)


@pytest.mark.parametrize("prompt", ["The capital", "<s><t>The capital"])  # as chat templates begin
@pytest.mark.parametrize("template", ["$A", "<s> <t> $A", "<s> <t> $A <s>"])
def test_what_the_tokenizer_puts_before_a_text_stands_there_once(template, prompt):
    """Whether it is the BOS token, which is <t> here, or not; what it puts behind is not fed."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer(TEXT)
    tokenizer.add_special_tokens({"bos_token": "<t>", "additional_special_tokens": ["<s>"]})
    ids = tokenizer.convert_tokens_to_ids(["<s>", "<t>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(zip(["<s>", "<t>"], ids, strict=True))
    )
    tree = encode(tokenizer, prompt, " is", " of")
    begins = template != "$A" or prompt.startswith("<s>")
    assert (tree.prefix[:2] == ids) == begins and tree.prefix.count(ids[0]) == begins
    assert tree.branches == tokenizer([" is", " of"], add_special_tokens=False)["input_ids"]


def test_a_text_longer_than_the_context_and_a_token_beyond_the_vocabulary_are_refused():
    """A token more, or one that was added to the tokenizer alone."""
    tokenizer = tiny_tokenizer(TEXT)
    size = len(tokenizer)
    tokenizer.add_tokens(["Cusco"])
    texts = ["La capital " * 20, " Lima", " Quito Quito"]
    longest = len(tokenizer(texts[0] + texts[2])["input_ids"])
    encode(tokenizer, *texts, context=longest, vocab=size)
    message = f"question 'q7', 'en': {longest} tokens, but the model's context is {longest - 1}"
    with pytest.raises(data.InputError, match=message):
        encode(tokenizer, *texts, context=longest - 1)
    message = f"question 'q7', 'en': token {size}, but the model's vocabulary is {size}"
    with pytest.raises(data.InputError, match=message):
        encode(tokenizer, *texts, " Cusco", vocab=size)


@pytest.mark.parametrize(
    "prompt, answers, message",
    [
        ("La capital es", ("Ω", " Lima"), "answer 0 has no token"),
        ("La capital es", (" Lima", " Ω"), "answer 1 has no token"),  # a space alone is no answer
        ("Ω", ("Lima", "Quito"), "no token stands before the answers"),
    ],
)
def test_answers_and_prompts_that_the_tokenizer_drops_are_refused(prompt, answers, message):
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer(TEXT)
    encode(tokenizer, prompt, *answers)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Ω", "")
    with pytest.raises(data.InputError, match=f"question 'q7', 'en': {message}"):
        encode(tokenizer, prompt, *answers)


# ------------------------------------------------------------------------------ the real data
def test_bmlama_17_loads_whole_in_all_its_languages(real_data):
    folder = real_data / "bmlama17"
    langs = sorted(path.stem for path in folder.glob("*.tsv"))
    questions = data.load(f"bmlama:{folder}", langs)
    assert len(langs) == 17 and len(questions) == 6792
    assert sum(question.K != 10 for question in questions) == 574
    assert all(question.gold == question.K - 1 for question in questions)


def test_the_sample_of_bmlama_53_loads_without_the_rows_of_one_candidate(real_data):
    printed = []
    folder = real_data / "bmlama53_sample"
    questions = data.load(f"bmlama:{folder}", ["en", "ka", "th", "zh"], printed.append)
    assert len(questions) == 13 and min(question.K for question in questions) > 1
    assert "dropped 28 questions in all languages: 0 open with <mask>, 28 have one" in printed[0]


def test_the_african_translations_of_mmlu_load_whole_in_all_six_languages(real_data):
    langs = ["en", "af", "am", "ig", "sn", "zu"]
    questions = data.load(f"mmmlu:{real_data / 'mmlu_afr'}", langs)
    subjects = Counter(question.subject for question in questions)
    assert len(questions) == 604 and len(subjects) == 3 and subjects["virology"] == 166
    (first,) = [question for question in questions if question.id == "virology/0"]
    assert "100\nB. 1\nC. 10\nD. unknown\nAnswer:" in first.prompts["en"] and first.gold == 0
    assert "D. awaziwa" in first.prompts["zu"]
