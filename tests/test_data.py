"""Loaders, split, sampling and tokens, on files written here; the real data where it is at hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from conftest import tiny_tokenizer


def bmlama(folder, **files):
    """A BMLAMA folder from rows; the second header has the stray tab of zh.tsv, ends are CRLF."""
    for n, (lang, rows) in enumerate(files.items()):
        header = (
            ["Prompt", "Ans", "Candidate Ans", "Subject"]
            if n == 0
            else ["Prompt", "Ans", "Candidate", "Ans", "Subject"]
        )
        lines = ["\t".join(row) for row in [header, *rows]]
        (folder / f"{lang}.tsv").write_bytes("".join(line + "\r\n" for line in lines).encode())
    return f"bmlama:{folder}"


EN = ["Peru's capital is <mask>.", "Lima", "Quito, Bogota, Lima", "Peru"]
JA = ["ペルーの首都は<mask>です。", "リマ", "キト, ボゴタ, リマ", "ペルー"]


def jsonl(folder, *lines):
    path = folder / "own.jsonl"
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return f"jsonl:{path}"


OWN = {
    "id": "7",
    "gold": 2,
    "prompts": {"en": "The capital of Peru is", "es": "La capital de Perú es"},
    "answers": {"en": [" Quito", " Bogotá", " Lima"], "es": [" Quito", " Bogotá", " Lima"]},
}


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
    twice = ["<x> is <mask>.", "Lima", "Lima, Bogota, Lima", "Peru"]
    (question,) = data.load(bmlama(tmp_path, en=[EN], es=[twice]), ["en", "es"])
    assert question.answers["es"] == ("Lima", "Bogota", "Lima") and question.gold == 2


def test_bmlama_53_ends_lines_otherwise_and_has_the_gold_answer_anywhere(tmp_path):
    for lang in ("fi", "sv"):
        rows = (
            "Prompt\tAns\tCandidate Ans\tSubject\nX kuoli <mask>: ssä.\tRooma\tRooma, Venetsia\tX\n"
        )
        (tmp_path / f"{lang}.tsv").write_text(rows)
    (question,) = data.load(f"bmlama:{tmp_path}", ["fi", "sv"])
    assert question.gold == 0 and question.answers["fi"] == ("Rooma: ssä.", "Venetsia: ssä.")


def test_bmlama_rows_that_open_with_the_mask_are_dropped_everywhere_and_counted(tmp_path):
    said = []
    opening = ["<mask> da hiriburua.", *EN[1:]]
    questions = data.load(
        bmlama(tmp_path, en=[EN, EN], eu=[EN, opening]), ["en", "eu"], said.append
    )
    assert [question.id for question in questions] == ["2"] and "dropped 1 questions" in said[0]


@pytest.mark.parametrize(
    "es, message",
    [
        ([EN[:3]], "es.tsv, line 2: 3 fields"),
        ([["no mask", *EN[1:]]], "es.tsv, line 2: 0 times <mask>"),
        ([["<mask> a <mask>", *EN[1:]]], "es.tsv, line 2: 2 times <mask>"),
        ([[EN[0], "Cusco", *EN[2:]]], "es.tsv, line 2: the answer 'Cusco' is none"),
        (
            [[EN[0], "Lima", "Lima, Quito, Bogota", "Peru"]],
            "es.tsv, line 2: the answer is another candidate than in en",
        ),
        ([[EN[0], "Lima", "Quito, Lima", "Peru"]], "their number differs"),
        ([[EN[0], "Lima", "Quito, , Lima", "Peru"]], "es.tsv, line 2.*answer 1 in 'es' is empty"),
        ([EN, EN], "es.tsv: 2 rows, but en.tsv has 1"),
    ],
)
def test_bmlama_refuses_what_is_not_parallel_naming_file_and_line(tmp_path, es, message):
    with pytest.raises(data.InputError, match=message):
        data.load(bmlama(tmp_path, en=[EN], es=es), ["en", "es"])


def test_an_unknown_language_names_those_that_are_there(tmp_path):
    with pytest.raises(data.InputError, match="no language 'xx'.*en, es"):
        data.load(bmlama(tmp_path, en=[EN], es=[EN]), ["en", "xx"])
    with pytest.raises(data.InputError, match="no language 'xx'.*en, fr, es, sw"):
        data.load("atlas", ["en", "xx"])


def test_jsonl_reads_the_fields_of_question_and_ignores_others(tmp_path):
    bare = {"id": 8, "prompts": OWN["prompts"], "answers": OWN["answers"], "source": "me"}
    first, second = data.load(jsonl(tmp_path, OWN, bare), ["en", "es"])
    assert (
        first.gold == 2
        and first.answers["es"] == (" Quito", " Bogotá", " Lima")
        and first.subject == ""
    )
    assert second.id == "8" and second.gold is None


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(OWN).encode() + b"\n")
    assert data.load(f"jsonl:{tmp_path / 'own.jsonl'}", ["en"])[0].id == "7"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not JSON"),
        ("", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[]", "line 2: field 'id'"),
        ({**OWN, "id": None}, "line 2: field 'id'"),
        ({**OWN, "gold": "2"}, "line 2: field 'gold'"),
        ({**OWN, "gold": True}, "line 2: field 'gold'"),
        ({**OWN, "prompts": "x"}, "line 2: field 'prompts'"),
        (
            {**OWN, "id": "8", "prompts": {"en": "x"}},
            "line 2: question '8' has nothing in language 'es'; it has en",
        ),
        (
            {**OWN, "id": "8", "prompts": {"en": "x", "es": " "}},
            "line 2: question '8': the prompt in 'es' is empty",
        ),
        ({**OWN, "prompts": {"en": "x", "es": 5}}, "line 2: prompts must hold"),
        ({**OWN, "answers": {"en": "abc", "es": ["a"]}}, "line 2: answers must hold"),
        ({**OWN, "answers": {"en": ["a", 5], "es": ["a", "b"]}}, "line 2: answers must hold"),
        (
            {**OWN, "id": "8", "answers": {"en": [" a", " b"], "es": [" a"]}},
            "question '8'.*their number differs",
        ),
        (
            {**OWN, "id": "8", "gold": None, "answers": {"en": [" a"], "es": [" a"]}},
            "question '8': 1 answer; .*two or more",
        ),
        (
            {**OWN, "id": "8", "answers": {"en": [" a", " ", " c"], "es": [" a"] * 3}},
            "question '8': answer 1 in 'en' is empty",
        ),
        ({**OWN, "id": "8", "gold": 3}, "question '8': gold 3 is none of the answers 0 to 2"),
        ({**OWN, "id": "8", "gold": -1}, "question '8': gold -1"),
        (OWN, "line 2: id '7' stands at .*line 1 already"),
    ],
)
def test_jsonl_refuses_what_is_no_parallel_question_naming_the_line(tmp_path, line, message):
    with pytest.raises(data.InputError, match=message):
        data.load(jsonl(tmp_path, OWN, line), ["en", "es"])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nosuch:x", "unknown kind 'nosuch'"),
        ("bmlama", "say where"),
        ("jsonl:/no/such/file", "No such file"),
        ("jsonl:/", "directory"),
        ("bmlama:/no/such", "no .tsv file"),
    ],
)
def test_a_place_that_cannot_be_read_is_named(spec, message):
    with pytest.raises(data.InputError, match=message):
        data.load(spec, ["en"])


def test_what_is_not_utf_8_is_refused_by_name(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(data.InputError, match="own.jsonl: not UTF-8"):
        data.load(f"jsonl:{tmp_path / 'own.jsonl'}", ["en"])
    with pytest.raises(data.InputError, match="no questions"):
        (tmp_path / "own.jsonl").write_text("")
        data.load(f"jsonl:{tmp_path / 'own.jsonl'}", ["en"])


def test_languages_named_twice_are_refused():
    with pytest.raises(data.InputError, match="once"):
        data.load("atlas", ["en", "en"])


def test_the_atlas_is_whole_parallel_and_without_a_tell_tale_position():
    langs = ["en", "fr", "es", "sw"]
    questions = data.load("atlas", langs)
    assert len(questions) == 240 and len({question.subject for question in questions}) == 6
    for question in questions:
        for lang in langs:
            assert len(set(question.answers[lang])) == 6, (
                question.id,
                lang,
            )  # six different answers in each language
            assert "{" not in question.prompts[lang] and "  " not in question.prompts[lang]
    golds = [question.gold for question in questions]
    assert all(25 < golds.count(k) < 60 for k in range(6))
    capital = next(question for question in questions if question.id == "capital-PE")
    assert {
        lang: capital.prompts[lang] + capital.answers[lang][capital.gold] for lang in langs
    } == {
        "en": "The capital of Peru is Lima",
        "fr": "La capitale du Pérou est Lima",
        "es": "La capital de Perú es Lima",
        "sw": "Mji mkuu wa Peru ni Lima",
    }


# ------------------------------------------------------------------------------- split and sampling


def questions_with(n, langs=("en",), K=5):
    return [
        data.Question(
            str(i),
            "",
            0,
            dict.fromkeys(langs, "x"),
            {lang: tuple("abcdefghij"[:K]) for lang in langs},
        )
        for i in range(n)
    ]


@given(st.integers(1, 60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_split_depends_on_seed_and_ids_alone(n, seed, rng):
    questions = questions_with(n)
    train, test = data.split(questions, n // 2, None, seed)
    shuffled = rng.sample(questions_with(n, ("en", "sw")), n)
    again = data.split(shuffled, n // 2, None, seed)
    assert [[q.id for q in part] for part in again] == [
        [q.id for q in part] for part in (train, test)
    ]
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


# ------------------------------------------------------------------------------------ tokens


TEXT = "The capital of Peru is Lima . Quito Bogotá La capital de Perú es " * 3


def as_lm_evaluation_harness(tokenizer, context, continuation):
    """Their rule: trailing spaces move; what lies beyond the context's length is scored."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, start = (
        tokenizer(context + continuation)["input_ids"],
        len(tokenizer(context)["input_ids"]),
    )
    return whole, start


words = st.text("Peru Limabosá .", min_size=1, max_size=12)


@given(words.filter(str.strip), st.lists(words.filter(str.strip), min_size=2, max_size=4))
def test_trees_hold_the_tokens_and_scored_part_of_lm_evaluation_harness(prompt, answers):
    tokenizer = tiny_tokenizer(TEXT)
    question = data.Question("1", "", None, {"en": prompt}, {"en": tuple(answers)})
    expected = [as_lm_evaluation_harness(tokenizer, prompt, answer) for answer in answers]
    if min(len(whole) - start for whole, start in expected) < 1 or expected[0][1] < 1:
        return  # there the rule leaves an answer without a token; ours scores one
    ((tree,),) = data.encode(tokenizer, [question], ["en"])
    for k, (whole, start) in enumerate(expected):
        assert tree.prefix + tree.branches[k] == whole
        assert len(tree.prefix) + tree.lead == start


def test_an_answer_that_merges_with_the_prompt_still_scores_a_token():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3}, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    question = data.Question("1", "", None, {"en": "ab"}, {"en": ("c", "b")})
    ((tree,),) = data.encode(tokenizer, [question], ["en"])
    assert tree == data.Tree(
        [0], [[3], [1, 1]], 0
    )  # a|bc and a|bb: the answer c alone has no token of its own


@pytest.mark.parametrize("uses_it", [True, False])
def test_a_beginning_token_stands_once_where_the_tokenizer_uses_one(uses_it):
    from tokenizers import processors

    tokenizer = tiny_tokenizer(TEXT)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if uses_it:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    question = data.Question("1", "", None, {"en": "The capital"}, {"en": (" is", " of")})
    ((tree,),) = data.encode(tokenizer, [question], ["en"])
    assert tree.prefix.count(tokenizer.bos_token_id) == uses_it
    assert (tree.prefix[0] == tokenizer.bos_token_id) == uses_it


def test_a_question_longer_than_the_context_is_named():
    question = data.Question("long", "", None, {"en": "The capital " * 50}, {"en": (" is", " of")})
    with pytest.raises(data.InputError, match="question 'long', 'en': .* context is 64"):
        data.encode(tiny_tokenizer(TEXT), [question], ["en"], context=64)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_batches_hold_every_tree_once_within_the_budget(sizes, budget):
    trees = [data.Tree([0] * size, [[1], [2]]) for size in sizes]
    groups = data.batches(trees, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert all(len(group) == 1 or sum(sizes[i] for i in group) <= budget for group in groups)


# ------------------------------------------------------------------------------------ the real data


def test_bmlama_17_loads_whole_in_all_its_languages(real_data):
    folder = real_data / "bmlama17"
    langs = sorted(path.stem for path in folder.glob("*.tsv"))
    questions = data.load(f"bmlama:{folder}", langs)
    assert len(langs) == 17 and len(questions) == 6792
    assert sum(len(question.answers["en"]) != 10 for question in questions) == 574
    assert all(question.gold == len(question.answers["en"]) - 1 for question in questions)
