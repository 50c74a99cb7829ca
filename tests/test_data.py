"""Loaders, split, sampling and tokens, on files written here and on the real data sets.

Damaged files are in test_rubbish.py.
"""

import csv
import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import data
from conftest import tiny_tokenizer

# ------------------------------------------------------------------------------ BMLAMA


def bmlama(folder, **files):
    """A BMLAMA folder from rows; the second header has the stray tab of zh.tsv, ends are CRLF."""
    headers = ["Prompt\tAns\tCandidate Ans\tSubject", *["Prompt\tAns\tCandidate\tAns\tSubject"] * 3]
    for header, (lang, rows) in zip(headers, files.items()):
        lines = [header, *("\t".join(row) for row in rows)]
        (folder / f"{lang}.tsv").write_bytes("".join(line + "\r\n" for line in lines).encode())
    return f"bmlama:{folder}"


EN = ["Peru's capital is <mask>.", "Lima", "Quito, Bogota, Lima", "Peru"]
JA = ["ペルーの首都は<mask>です。", "リマ", "キト, ボゴタ, リマ", "ペルー"]


def test_bmlama_answers_hold_what_follows_the_mask_but_not_a_bare_full_stop(tmp_path):
    (question,) = data.load(bmlama(tmp_path, en=[EN], ja=[JA]), ["en", "ja"])
    assert question == data.Question(
        "2",
        "Peru",
        2,
        {"en": "Peru's capital is ", "ja": "ペルーの首都は"},
        {"en": ("Quito", "Bogota", "Lima"), "ja": ("キトです。", "ボゴタです。", "リマです。")},
    )


def test_bmlama_reads_quoted_fields_as_its_hebrew_file_has_them(tmp_path):
    row = ["She is <mask>.", "Lima", '"x, a""b, Lima"', "S"]
    (question,) = data.load(bmlama(tmp_path, en=[row], he=[row]), ["en", "he"])
    assert question.answers["he"] == ("x", 'a"b', "Lima") and question.gold == 2


def test_bmlama_keeps_translations_that_repeat_and_finds_gold_by_position(tmp_path):
    once = ["<x> is <mask>.", "Lima", "Quito, Lima, Callao", "Peru"]
    thrice = ["<x> es <mask>.", "Lima", "Lima, Lima, Lima", "Peru"]
    for langs in (["en", "es"], ["es", "en"]):
        (question,) = data.load(bmlama(tmp_path, en=[once], es=[thrice]), langs)
        assert question.answers["es"] == ("Lima", "Lima", "Lima") and question.gold == 1


def test_bmlama_53_ends_lines_otherwise_and_has_the_gold_answer_anywhere(tmp_path):
    for lang in ("fi", "sv"):
        header = "Prompt\tAns\tCandidate Ans\tSubject"
        row = "X kuoli <mask>: ssä.\tRooma\tRooma, Venetsia\tX"
        (tmp_path / f"{lang}.tsv").write_text(f"{header}\n{row}\n")
    (question,) = data.load(f"bmlama:{tmp_path}", ["fi", "sv"])
    assert question.gold == 0 and question.answers["fi"] == ("Rooma: ssä.", "Venetsia: ssä.")


def test_bmlama_rows_that_open_with_the_mask_are_dropped_everywhere_and_counted(tmp_path):
    printed = []
    opening = ["<mask> da hiriburua.", *EN[1:]]
    questions = data.load(
        bmlama(tmp_path, en=[EN, EN], eu=[EN, opening]), ["en", "eu"], printed.append
    )
    assert [question.id for question in questions] == ["2"] and "dropped 1 questions" in printed[0]


# ------------------------------------------------------------------------------ multiple choice

HEADER = ["", "Question", "A", "B", "C", "D", "Answer", "Subject"]
ROWS = [["2 + 2?", "3", "4", "5", "6", "B"], ['Which is "big", x or y?', "x", "y", "both", "", "A"]]


def published(folder, locale, rows=ROWS):
    """A file as openai/MMMLU has them."""
    (folder / "test").mkdir(exist_ok=True)
    with open(folder / "test" / f"mmlu_{locale}.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *([i, *row, "maths"] for i, row in enumerate(rows))])


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
    assert "2 + 2? sw" in data.load(f"mmmlu:{tmp_path}", ["sw"])[0].prompts["sw"]


def test_mmmlu_drops_what_has_another_key_or_is_not_everywhere_in_all_languages_and_counts(
    tmp_path,
):
    rows = [[f"Question {n}?", "a", "b", "c", "d", "C"] for n in range(10)]
    original(tmp_path, "maths_test.csv", rows)
    original(tmp_path, "maths_test_zu.csv", [[*rows[0][:5], "D"], *rows[1:]])
    original(tmp_path, "music_test.csv", rows[:3])
    printed = []
    questions = data.load(f"mmmlu:{tmp_path}", ["en", "zu"], printed.append)
    assert [question.id for question in questions] == [f"maths/{n}" for n in range(1, 10)]
    (line,) = printed
    assert "dropped 4 questions in all languages: 3 not in every language, 1 of other keys" in line


def test_mmmlu_names_the_files_that_a_language_may_mean(tmp_path):
    original(tmp_path, "maths_test.csv")
    published(tmp_path, "ES-LA")
    with pytest.raises(data.InputError, match="'sw': expected one mmlu_SW-XX.csv, or .*there are"):
        data.load(f"mmmlu:{tmp_path}", ["en", "sw"])
    published(tmp_path, "ES-ES")
    with pytest.raises(data.InputError, match="'es': .*mmlu_ES-.*csv', 'mmlu_ES-"):
        data.load(f"mmmlu:{tmp_path}", ["en", "es"])
    assert len(data.load(f"mmmlu:{tmp_path}", ["en", "es-es"])) == 2


def xcsqa(folder, part="dev", **langs):
    """X-CSQA files: of each language, (id, gold letter or None) of the lines."""
    for lang, lines in langs.items():
        path = folder / "X-CSQA" / lang / f"{part}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(choice(id, lang, key) + "\n" for id, key in lines))


def choice(id, lang, key):
    options = [{"label": letter, "text": f"{letter.lower()} {lang}"} for letter in "ABCDE"]
    line = {"id": id, "lang": lang, "question": {"stem": f"{id} in {lang}?", "choices": options}}
    return json.dumps({**line, **({"answerKey": key} if key else {})})


def test_xcsqa_is_joined_on_id_and_finds_japanese_as_jap(tmp_path):
    xcsqa(tmp_path, en=[("a", "A"), ("b", "E")], jap=[("b", "E"), ("a", "A")])
    for place in (tmp_path, tmp_path / "X-CSQA"):
        first, second = data.load(f"xcsqa:{place}", ["en", "ja"])
        assert (first.id, first.gold, second.gold) == ("a", 0, 4)
        assert first.prompts["ja"].startswith("a in jap?\nA. a jap\n")
        assert second.prompts["ja"].startswith("b in jap?") and second.answers["ja"][4] == " E"


def test_xcsqa_with_permuted_options_is_refused_with_count_and_example(tmp_path):
    many = [(str(i), "A") for i in range(40)]
    xcsqa(tmp_path, en=many, zh=[*many[5:], *((str(i), "B") for i in range(5))])
    message = "right letter of 5 of 40 .*en/dev.jsonl, line 1': 'A', .*zh/dev.jsonl, line 36': 'B'"
    with pytest.raises(data.InputError, match=message):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])
    xcsqa(tmp_path, zh=[*many[4:], *((str(i), "B") for i in range(4))])  # one in ten: slips
    printed = []
    assert len(data.load(f"xcsqa:{tmp_path}", ["en", "zh"], printed.append)) == 36
    assert "dropped 4 questions in all languages: 0 not in every language, 4 of" in printed[0]


def test_xcsqa_without_a_key_is_refused_since_nothing_shows_that_options_are_parallel(tmp_path):
    xcsqa(tmp_path, en=[("a", "A"), ("b", None)], zh=[("b", "B"), ("a", "A")])
    with pytest.raises(data.InputError, match="en/dev.jsonl, line 2: 'answerKey' is missing"):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])
    xcsqa(tmp_path / "test", part="test", en=[("a", None)], zh=[("a", None)])
    with pytest.raises(data.InputError, match="no en/dev.jsonl in it"):
        data.load(f"xcsqa:{tmp_path / 'test'}", ["en", "zh"])


# ------------------------------------------------------------------------------ own data


OWN = {
    "id": "7",
    "subject": "geography",
    "gold": 2,
    "prompts": {"en": "The capital of Peru is", "es": "La capital de Perú es"},
    "answers": {"en": [" Quito", " Bogotá", " Lima"], "es": [" Quito", " Bogotá", " Lima"]},
}


def test_jsonl_reads_the_fields_of_question_and_ignores_others(tmp_path):
    bare = {"id": 8, "prompts": OWN["prompts"], "answers": OWN["answers"], "source": "me"}
    (tmp_path / "own.jsonl").write_text(json.dumps(OWN) + "\n" + json.dumps(bare) + "\n")
    first, second = data.load(f"jsonl:{tmp_path / 'own.jsonl'}", ["en", "es"])
    answers = (" Quito", " Bogotá", " Lima")
    both = {"en": answers, "es": answers}
    assert first == data.Question("7", "geography", 2, OWN["prompts"], both)
    assert second == data.Question("8", "", None, OWN["prompts"], both)


def test_an_unknown_language_names_those_that_are_there(tmp_path):
    with pytest.raises(data.InputError, match="xx.tsv.*beside it: .'en.tsv', 'es.tsv'."):
        data.load(bmlama(tmp_path, en=[EN], es=[EN]), ["en", "xx"])


@pytest.mark.parametrize("spec", ["nosuch:x", "bmlama", "mmmlu:", "xcsqa", "jsonl"])
def test_a_kind_that_is_not_there_or_has_no_place_is_refused(spec):
    with pytest.raises(data.InputError, match=f"--data {spec}: expected one of atlas, bmlama"):
        data.load(spec, ["en"])


@pytest.mark.parametrize("kind", ["bmlama", "mmmlu", "xcsqa", "jsonl"])
def test_a_place_that_cannot_be_read_is_named(kind):
    with pytest.raises(data.InputError, match="/no/such"):
        data.load(f"{kind}:/no/such", ["en"])


@pytest.mark.parametrize("langs", [["en", "en"], [], ["en", "xx"], ["en", "country"]])
def test_languages_named_twice_not_at_all_or_that_are_not_there_are_refused(langs):
    with pytest.raises(data.InputError, match="each language once|no language '(xx|country)'"):
        data.load("atlas", langs)


def test_the_atlas_is_whole_parallel_and_without_a_tell_tale_position():
    langs = ["en", "fr", "es", "sw"]
    questions = data.load("atlas", langs)
    assert len(questions) == 735 and len({question.subject for question in questions}) == 5
    for question in questions:
        for lang in langs:
            assert len(set(question.answers[lang])) == 6, (question.id, lang)
            assert "{" not in question.prompts[lang] and "  " not in question.prompts[lang]
    golds = [question.gold for question in questions]
    assert all(90 < golds.count(k) < 160 for k in range(6))
    capital = next(question for question in questions if question.id == "capital-PE")
    assert [capital.prompts[lang] + capital.answers[lang][capital.gold] for lang in langs] == [
        "Peru: the capital is Lima",
        "Pérou: la capitale est Lima",
        "Perú: la capital es Lima",
        "Peru: mji mkuu ni Lima",
    ]


# ------------------------------------------------------------------------------ split and sampling


def questions_with(n, langs=("en",), K=5):
    prompts, answers = dict.fromkeys(langs, "x"), dict.fromkeys(langs, tuple("abcdefghij"[:K]))
    return [data.Question(str(i), "", 0, prompts, answers) for i in range(n)]


@given(st.integers(1, 60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_split_depends_on_seed_and_ids_alone(n, seed, rng):
    questions = questions_with(n)
    train, test = data.split(questions, n // 2, None, seed)
    shuffled = rng.sample(questions_with(n, ("en", "sw")), n)
    again = data.split(shuffled, n // 2, None, seed)
    for part, same in zip((train, test), again):
        assert [q.id for q in part] == [q.id for q in same]
    assert sorted(q.id for q in train + test) == sorted(q.id for q in questions)


def test_another_seed_splits_and_draws_otherwise():
    questions = questions_with(100)
    ids = lambda seed: [q.id for q in data.split(questions, 50, 50, seed)[0]]  # noqa: E731
    assert ids(0) != ids(1)
    draws = lambda seed, number: [data.sample(q, 2, number, seed) for q in questions]  # noqa: E731
    assert draws(0, 0) == draws(0, 0) and draws(0, 0) != draws(1, 0) and draws(0, 0) != draws(0, 1)


def test_draws_are_distinct_candidates_each_as_likely():
    draws = [data.sample(question, 2, 0, 0) for question in questions_with(4000)]
    assert all(len(set(draw)) == 2 for draw in draws)
    counts = [sum(draw.count(k) for draw in draws) for k in range(5)]
    assert all(abs(count - 1600) < 150 for count in counts)
    assert sorted(data.sample(questions_with(1)[0], 9, 0, 0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("train, test", [(11, None), (8, 3), (-1, None), (2, -1)])
def test_more_questions_than_there_are_is_an_error(train, test):
    with pytest.raises(data.InputError, match="there are 10"):
        data.split(questions_with(10), train, test, 0)


def of_subjects(*subjects):
    questions = questions_with(len(subjects))
    return [replace(question, subject=s) for question, s in zip(questions, subjects)]


def test_subjects_are_kept_apart_and_unnamed_ones_go_to_the_other_part():
    questions = of_subjects(*"aaaabbbccc")
    part = lambda *settings: [  # noqa: E731
        sorted(q.subject for q in part) for part in data.split(questions, None, None, 0, *settings)
    ]
    assert part(["a"], ["b"]) == [list("aaaa"), list("bbb")]
    assert part(["a"]) == [list("aaaa"), list("bbbccc")]
    assert part([], ["b"]) == [list("aaaaccc"), list("bbb")]
    train, test = data.split(questions, 2, 3, 0, ["a"], ["a", "b"])  # what is left of a is held out
    assert [q.subject for q in train] == ["a", "a"] and len(test) == 3
    assert not {q.id for q in train} & {q.id for q in test}


@given(st.lists(st.sampled_from("ab"), min_size=6, max_size=30), st.integers(0, 5))
def test_naming_all_subjects_names_none(subjects, seed):
    questions, names = of_subjects(*subjects), sorted(set(subjects))
    assert data.split(questions, 3, 2, seed, names, names) == data.split(questions, 3, 2, seed)


@pytest.mark.parametrize(
    "train, test, train_subjects, test_subjects, message",
    [
        (None, None, ["d"], [], "no subject 'd'; there are a, b, c"),
        (None, None, ["a"], ["d"], "no subject 'd'"),
        (5, None, ["a"], [], "there are 4.* then 6"),
        (None, 4, ["a"], ["b"], "there are 4.* then 3"),
        (None, None, [], [], "there are 10.* then 0"),
    ],
)
def test_subjects_that_cannot_be_are_refused(train, test, train_subjects, test_subjects, message):
    with pytest.raises(data.InputError, match=message):
        data.split(of_subjects(*"aaaabbbccc"), train, test, 0, train_subjects, test_subjects)


# ------------------------------------------------------------------------------ tokens


TEXT = "The capital of Peru is Lima . Quito Bogotá La capital de Perú es " * 3


def as_lm_evaluation_harness(tokenizer, context, continuation):
    """Their rule: trailing spaces move; what lies beyond the context's length is scored."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation)["input_ids"]
    return whole, len(tokenizer(context)["input_ids"])


words = st.text("Peru Limabosá .", min_size=1, max_size=12)


@example("The capital is ", ["boom", "ssss", " room"])
@given(words.filter(str.strip), st.lists(words.filter(str.strip), min_size=2, max_size=4))
def test_trees_hold_the_tokens_and_scored_part_of_lm_evaluation_harness(prompt, answers):
    tokenizer = tiny_tokenizer(TEXT)
    question = data.Question("1", "", None, {"en": prompt}, {"en": tuple(answers)})
    expected = [as_lm_evaluation_harness(tokenizer, prompt, answer) for answer in answers]
    if min(len(whole) - start for whole, start in expected) < 1 or expected[0][1] < 1:
        return  # there the rule leaves an answer without a token; ours scores one
    if len({whole[0] for whole, _ in expected}) > 1:
        with pytest.raises(data.InputError, match="'1', 'en': no token stands before the answers"):
            data.encode(tokenizer, [question], ["en"])
        return  # no token is common to all
    ((tree,),) = data.encode(tokenizer, [question], ["en"])
    for k, (whole, start) in enumerate(expected):
        assert tree.prefix + tree.branches[k] == whole
        assert len(tree.prefix) + tree.prompt_len == start
    fed = [len(whole) - 1 - len(tree.prefix) for whole, _ in expected]
    assert tree.tokens() == len(tree.prefix) + sum(fed)


def test_an_answer_that_merges_with_the_prompt_still_scores_a_token():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3}, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    question = data.Question("1", "", None, {"en": "ab"}, {"en": ("c", "b")})
    ((tree,),) = data.encode(tokenizer, [question], ["en"])
    # a|bc and a|bb: the answer c alone has no token of its own.
    assert tree == data.Tree([0], [[3], [1, 1]], 0)


@pytest.mark.parametrize("prompt", ["The capital", "<s>The capital"])  # as chat templates begin
@pytest.mark.parametrize("uses_it", [True, False])
def test_a_beginning_token_stands_once_where_the_tokenizer_uses_one(uses_it, prompt):
    from tokenizers import processors

    tokenizer = tiny_tokenizer(TEXT)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if uses_it:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    question = data.Question("1", "", None, {"en": prompt}, {"en": (" is", " of")})
    ((tree,),) = data.encode(tokenizer, [question], ["en"])
    begins = uses_it or prompt.startswith("<s>")
    assert tree.prefix.count(tokenizer.bos_token_id) == begins
    assert (tree.prefix[0] == tokenizer.bos_token_id) == begins


def test_the_longest_text_that_fits_the_context_passes_and_one_token_more_is_refused():
    prompts = {"en": "The", "es": "La capital " * 20}
    answers = {"en": (" a", " b"), "es": (" Lima", " Quito Quito")}
    question = data.Question("q7", "", 0, prompts, answers)
    tokenizer = tiny_tokenizer(TEXT)
    longest = len(tokenizer(prompts["es"] + " Quito Quito")["input_ids"])
    data.encode(tokenizer, [question], ["en", "es"], context=longest)
    message = f"question 'q7', 'es': {longest} tokens, but the model's context is {longest - 1}"
    with pytest.raises(data.InputError, match=message):
        data.encode(tokenizer, [question], ["en", "es"], context=longest - 1)


def dropping(letter):
    """A tokenizer that deletes this letter before it looks at a text."""
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer(TEXT)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(letter, "")
    return tokenizer


@pytest.mark.parametrize(
    "prompt, answers, message",
    [
        ("La capital es", ("Ω", " Lima"), "answer 0 has no token"),
        ("La capital es", (" Lima", " Ω"), "answer 1 has no token"),  # a space alone is no answer
        ("La capital es ", ("Lima", "Ω"), "answer 1 has no token"),
        ("Ω", ("Lima", "Quito"), "no token stands before the answers"),
    ],
)
def test_answers_and_prompts_that_the_tokenizer_drops_are_refused(prompt, answers, message):
    question = data.Question("q7", "", 0, {"es": prompt}, {"es": answers})
    with pytest.raises(data.InputError, match=f"question 'q7', 'es': {message}"):
        data.encode(dropping("Ω"), [question], ["es"])
    data.encode(dropping("ж"), [question], ["es"])


def test_letters_that_the_vocabulary_lacks_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))  # it drops all others
    question = data.Question("q7", "", 0, {"en": "ab"}, {"en": ("b", "é")})
    with pytest.raises(data.InputError, match="question 'q7', 'en': answer 1 has no token"):
        data.encode(PreTrainedTokenizerFast(tokenizer_object=core), [question], ["en"])


# ------------------------------------------------------------------------------ the real data


def test_bmlama_17_loads_whole_in_all_its_languages(real_data):
    folder = real_data / "bmlama17"
    langs = sorted(path.stem for path in folder.glob("*.tsv"))
    questions = data.load(f"bmlama:{folder}", langs)
    assert len(langs) == 17 and len(questions) == 6792
    assert sum(len(question.answers["en"]) != 10 for question in questions) == 574
    assert all(question.gold == len(question.answers["en"]) - 1 for question in questions)


def test_the_published_bmlama_53_is_refused_at_its_first_row_of_a_single_candidate(real_data):
    spec = f"bmlama:{real_data / 'bmlama53_sample'}"
    with pytest.raises(data.InputError, match="zh.tsv, line 11: question '11': .* two or more"):
        data.load(spec, ["en", "ka", "th", "zh"])


def test_the_african_translations_of_mmlu_load_whole_in_all_six_languages(real_data):
    langs = ["en", "af", "am", "ig", "sn", "zu"]
    questions = data.load(f"mmmlu:{real_data / 'mmlu_afr'}", langs)
    assert len(questions) == 604 and {question.subject for question in questions} == {
        "clinical_knowledge", "college_medicine", "virology"}  # fmt: skip
    assert {question.id for question in questions} >= {"virology/0", "virology/165"}
    shares = [sum(question.gold == k for question in questions) / 604 for k in range(4)]
    assert all(0.18 < share < 0.33 for share in shares)
    first = next(question for question in questions if question.id == "virology/0")
    assert "100\nB. 1\nC. 10\nD. unknown\nAnswer:" in first.prompts["en"] and first.gold == 0
    assert "D. awaziwa" in first.prompts["zu"]


def test_the_published_xcsqa_loads_in_one_language_and_its_permuted_pairs_are_refused(
    real_data, tmp_path
):
    assert len(data.load(f"xcsqa:{real_data / 'xcsqa'}", ["en"])) == 5
    with open(real_data / "xcsqa" / "genuine_en_zh_permuted_12.jsonl", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    for lang in ("en", "zh"):
        path = tmp_path / "X-CSQA" / lang / "dev.jsonl"
        path.parent.mkdir(parents=True)
        lines = [{"id": str(i), "lang": lang, "answerKey": pair[lang]["answerKey"],
                  "question": pair[lang]} for i, pair in enumerate(pairs)]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(data.InputError, match="of 12 questions differs between languages"):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])
