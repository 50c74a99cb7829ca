"""Loaders, split, sampling and tokens, on files written here; the real data where it is at hand."""

import csv
import dataclasses
import json
import tracemalloc
from dataclasses import replace

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


def test_a_word_of_the_prompt_that_runs_into_the_answer_is_warned_of(tmp_path):
    glued = {**OWN, "answers": {"en": [" Quito", "Bogotá", " Lima"], "es": OWN["answers"]["es"]}}
    japanese = {"id": "8", "prompts": {"en": "ペルーの首都は"}, "answers": {"en": ["リマ", "キト"]}}
    said = []
    data.load(jsonl(tmp_path, glued, japanese), ["en"], said.append)
    assert len(said) == 1 and "in 1 questions a word of the prompt runs into an answer" in said[0]


# ------------------------------------------------------------------------------- multiple choice

HEADER = ["", "Question", "A", "B", "C", "D", "Answer", "Subject"]
ROWS = [["2 + 2?", "3", "4", "5", "6", "B"], ['Which is "big", x or y?', "x", "y", "both", "", "A"]]


def published(folder, locale, rows=ROWS, header=HEADER, subject="maths"):
    """A file as openai/MMMLU has them."""
    (folder / "test").mkdir(exist_ok=True)
    with open(folder / "test" / f"mmlu_{locale}.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [header, *([i, *row, subject] for i, row in enumerate(rows))]
        )  # fmt: skip


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
    original(tmp_path, "maths_test.csv")
    original(tmp_path, "maths_test_zu.csv", [ROWS[0], [*ROWS[1][:5], "C"]])
    original(tmp_path, "music_test.csv")
    said = []
    questions = data.load(f"mmmlu:{tmp_path}", ["en", "zu"], said.append)
    assert [question.id for question in questions] == ["maths/0"]
    assert "dropped 2 questions that are not in every language" in said[0]
    assert "dropped 1 questions in all languages: their answer keys differ" in said[1]


def test_mmmlu_refuses_broken_rows_by_file_and_line(tmp_path):
    original(tmp_path, "maths_test.csv")
    for rows, message in [
        ([ROWS[0], ROWS[1][:4]], "maths_test_zu.csv, line 2: 4 fields, not 6: question, A, B"),
        ([ROWS[0], [*ROWS[1][:5], "E"]], "maths_test_zu.csv, line 2: row '1' with answer 'E'"),
        ([["two\nlines", *ROWS[0][1:]], ["x"]], "maths_test_zu.csv, line 3: 1 fields"),
        ([ROWS[0], ["two\nlines", "x"]], "maths_test_zu.csv, line 2: 2 fields"),
        ([[" ", *ROWS[0][1:]], ROWS[1]], "maths_test_zu.csv, line 1: the question 'maths/0' is em"),
        ([ROWS[0]], "maths has 1 rows in zu, 2 in en"),
        ([[*row[:5], "D"] for row in ROWS], "right letter of 2 of 2 questions differs"),
    ]:
        original(tmp_path, "maths_test_zu.csv", rows)
        with pytest.raises(data.InputError, match=message):
            data.load(f"mmmlu:{tmp_path}", ["en", "zu"])
    (tmp_path / "maths_test_zu.csv").write_text('2?,1,2,3,4,A\n2?,1,2,3,4,"A')
    with pytest.raises(data.InputError, match="maths_test_zu.csv, line 2: unexpected end of data"):
        data.load(f"mmmlu:{tmp_path}", ["en", "zu"])
    (tmp_path / "maths_test_zu.csv").write_text(f'2?,1,2,3,4,A\n"open,1,2,3,4,A\n{"x" * 200_000}')
    with pytest.raises(data.InputError, match="maths_test_zu.csv, line 2: field larger"):
        data.load(f"mmmlu:{tmp_path}", ["en", "zu"])
    published(tmp_path, "SW-KE", header=HEADER[:-1] + ["Topic"])
    with pytest.raises(data.InputError, match="mmlu_SW-KE.csv, line 1: the header is not"):
        data.load(f"mmmlu:{tmp_path}", ["en", "sw"])
    with open(tmp_path / "test" / "mmlu_SW-KE.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEADER, [0, *ROWS[0], "maths"], [0, *ROWS[1], "maths"]])
    with pytest.raises(data.InputError, match="line 3: question 'maths/0' stands at .*line 2"):
        data.load(f"mmmlu:{tmp_path}", ["en", "sw"])


def test_mmmlu_names_the_locales_that_are_there_and_asks_which_is_meant(tmp_path):
    original(tmp_path, "maths_test.csv")
    published(tmp_path, "ES-LA")
    with pytest.raises(
        data.InputError, match="no language 'sw' .mmlu_sw-XX.csv.; it has en, es, e"
    ):
        data.load(f"mmmlu:{tmp_path}", ["en", "sw"])
    with pytest.raises(data.InputError, match="es and ES-LA are both .*mmlu_ES-LA.csv"):
        data.load(f"mmmlu:{tmp_path}", ["es", "ES-LA"])
    published(tmp_path, "ES-ES")
    with pytest.raises(data.InputError, match="has 'es' more than once: .*mmlu_ES-ES.csv and .*LA"):
        data.load(f"mmmlu:{tmp_path}", ["en", "es"])
    assert len(data.load(f"mmmlu:{tmp_path}", ["en", "es-es"])) == 2
    (tmp_path / "maths_test.csv").unlink()
    with pytest.raises(
        data.InputError, match="no language 'en' .<subject>_test.csv of MMLU.; it has es, "
    ):
        data.load(f"mmmlu:{tmp_path}", ["en", "es-es"])


def test_mmmlu_reads_a_subject_named_like_the_published_files_and_codes_with_a_region(tmp_path):
    original(tmp_path, "mmlu_virology_test.csv")
    original(tmp_path, "mmlu_virology_test_zh-CN.csv")
    for code in ("zh", "zh-CN"):
        assert data.load(f"mmmlu:{tmp_path}", ["en", code])[0].subject == "mmlu_virology"


def xcsqa(folder, part="dev", **langs):
    """X-CSQA files: of each language, (id, gold letter or None) of the lines."""
    for lang, lines in langs.items():
        path = folder / "X-CSQA" / lang / f"{part}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(choice(id, lang, key) + "\n" for id, key in lines))


def choice(id, lang, key, labels="ABCDE", **more):
    options = [{"label": letter, "text": f"{letter.lower()} {lang}"} for letter in labels]
    line = {"id": id, "lang": lang, "question": {"stem": f"{id} in {lang}?", "choices": options}}
    return json.dumps({**line, **({"answerKey": key} if key else {}), **more})


def test_xcsqa_is_joined_on_id_and_finds_japanese_as_jap(tmp_path):
    xcsqa(tmp_path, en=[("a", "A"), ("b", "E")], jap=[("b", "E"), ("a", "A")])
    for place in (tmp_path, tmp_path / "X-CSQA"):
        first, second = data.load(f"xcsqa:{place}", ["en", "ja"])
        assert (first.id, first.gold, second.gold) == ("a", 0, 4)
        assert first.prompts["ja"].startswith("a in jap?\nA. a jap\n")
        assert second.prompts["ja"].startswith("b in jap?") and second.answers["ja"][4] == " E"


def test_xcsqa_with_permuted_options_is_refused_with_count_and_example(tmp_path):
    many = [(str(i), "A") for i in range(200)]
    xcsqa(tmp_path, en=many, zh=[*many[3:], ("0", "B"), ("1", "C"), ("2", "D")])
    message = "right letter of 3 of 200 .*as of '0': en A .*en/dev.jsonl, line 1.; zh B .*line 198"
    with pytest.raises(data.InputError, match=message):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])
    xcsqa(tmp_path, zh=[*many[2:], ("0", "B"), ("1", "C")])  # one in a hundred: slips of the pen
    said = []
    assert len(data.load(f"xcsqa:{tmp_path}", ["en", "zh"], said.append)) == 198
    assert "dropped 2 questions in all languages: their answer keys differ" in said[0]


def test_xcsqa_without_keys_has_no_gold_and_says_so(tmp_path):
    for keys in (None, "A"):  # keys in one language are no key to the other's letters
        xcsqa(tmp_path, part="test", en=[("a", keys), ("b", "")], zh=[("b", None), ("a", None)])
        said = []
        questions = data.load(f"xcsqa:{tmp_path}", ["en", "zh"], said.append)
        assert [question.gold for question in questions] == [None, None]
        assert "2 questions lack an answer key: they count for consistency" in said[0]
    xcsqa(tmp_path, en=[("a", "A")])
    with pytest.raises(data.InputError, match="no language 'zh' .X-CSQA/zh/dev.jsonl.; it has en"):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])  # the blind split is no stand-in for a gap


def test_blind_rows_do_not_hide_permuted_ones(tmp_path):
    blind = [(str(i), None) for i in range(500)]
    xcsqa(tmp_path, en=[*blind, ("a", "A"), ("b", "B")], zh=[*blind, ("a", "C"), ("b", "B")])
    with pytest.raises(data.InputError, match="right letter of 1 of 2 questions differs"):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])


def test_xcsqa_drops_and_counts_what_is_not_in_every_language(tmp_path):
    xcsqa(tmp_path, en=[("a", "A"), ("b", "B")], zh=[("b", "B"), ("c", "C")])
    said = []
    assert [q.id for q in data.load(f"xcsqa:{tmp_path}", ["en", "zh"], said.append)] == ["b"]
    assert "dropped 2 questions that are not in every language" in said[0]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "zh/dev.jsonl, line 2: not JSON"),
        ("[]", "zh/dev.jsonl, line 2: not a question of X-CSQA"),
        ('{"id": "b", "question": {"stem": "x"}}', "line 2: not a question of X-CSQA"),
        (choice("a", "zh", "A"), "line 2: question 'a' stands at .*line 1 already"),
        (choice("b", "zh", "F"), "line 2: question 'b': choices A, B, C, D, E with answer 'F'"),
        (choice("b", "zh", "A", "ACB"), "line 2: question 'b': choices A, C, B"),
        (choice(7, "zh", "A"), "line 2: not a question of X-CSQA"),
    ],
)
def test_xcsqa_refuses_broken_lines_by_file_and_line(tmp_path, line, message):
    xcsqa(tmp_path, en=[("a", "A"), ("b", "B")], zh=[("a", "A")])
    with open(tmp_path / "X-CSQA" / "zh" / "dev.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(data.InputError, match=message):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])


def test_xcsqa_names_the_languages_that_are_there(tmp_path):
    xcsqa(tmp_path, en=[("a", "A")], jap=[("a", "A")])
    with pytest.raises(data.InputError, match="no language 'zh'.*it has en, ja"):
        data.load(f"xcsqa:{tmp_path}", ["en", "zh"])


@pytest.mark.parametrize("kind", ["mmmlu", "xcsqa"])
def test_a_name_of_the_hub_is_no_folder_and_the_message_says_how_to_fetch_one(kind):
    with pytest.raises(data.InputError, match="org/name: no such folder.*hf download NAME"):
        data.load(f"{kind}:org/name", ["en"])


# ------------------------------------------------------------------------------------ own data


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
        ({**OWN, "prompts": {"en": "x", "es": 5}}, "line 2: in 'es', prompts must hold"),
        ({**OWN, "answers": {"en": "abc", "es": ["a"]}}, "line 2: in 'en', prompts must hold"),
        (
            {**OWN, "answers": {"en": ["a", 5], "es": ["a", "b"]}},
            "line 2: in 'en', prompts must hold",
        ),
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
        ("nosuch:x", "nosuch:x: wanted is one of atlas"),
        ("bmlama", "--data bmlama: wanted is one of"),
        ("jsonl:/no/such/file", "No such file"),
        ("jsonl:/", "directory"),
        ("bmlama:/no/such", "/no/such: no such folder"),
        ("mmmlu", "--data mmmlu: wanted is one of"),
        ("mmmlu:/no/such", "/no/such: no such folder"),
        ("mmmlu:/etc/passwd", "/etc/passwd is a file; give the folder that it is in: /etc"),
        ("xcsqa:../no/such", "no/such: no such folder"),
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
    assert len(questions) == 735 and len({question.subject for question in questions}) == 5
    for question in questions:
        for lang in langs:
            assert len(set(question.answers[lang])) == 6, (question.id, lang)
            assert "{" not in question.prompts[lang] and "  " not in question.prompts[lang]
    golds = [question.gold for question in questions]
    assert all(90 < golds.count(k) < 160 for k in range(6))
    capital = next(question for question in questions if question.id == "capital-PE")
    assert {
        lang: capital.prompts[lang] + capital.answers[lang][capital.gold] for lang in langs
    } == {
        "en": "Peru: the capital is Lima",
        "fr": "Pérou: la capitale est Lima",
        "es": "Perú: la capital es Lima",
        "sw": "Peru: mji mkuu ni Lima",
    }
    assert not list(data.doubts(questions, langs))


def test_what_would_make_a_number_mislead_is_told():
    def question(id, **changed):
        answers = {"en": (" a", " b"), "es": (" c", " d"), "fr": (" a", " b")}
        prompts = {"en": "Q", "es": "P", "fr": "Q"}
        return data.Question(id, "", 0, prompts, answers | changed)

    plain = question("1")
    assert [*data.doubts([plain], ["en", "es"])] == []
    (same,) = data.doubts([plain], ["en", "es", "fr"])
    assert same.startswith("en and fr are the same texts")
    (equal,) = data.doubts([plain, question("2", es=(" c", " c"))], ["en", "es"])
    assert equal.startswith("1 of 2 questions offer two equal answers")
    (permuted,) = data.doubts([plain, question("2", fr=(" b", " a"))], ["en", "fr"])
    assert permuted.startswith("1 of 2 questions have the same answers in another order")
    spaced = dataclasses.replace(plain, prompts={"en": "Q ", "es": "P"})
    (space,) = data.doubts([spaced], ["en", "es"])
    assert space.startswith("1 of 1 questions have a space at the prompt's end")


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


def test_memory_is_a_bounded_part_for_each_question_and_splitting_copies_none(tmp_path):
    alphabets = {"en": "abcdef", "es": "áéíóúñ", "ru": "абвгде", "ja": "アイウエオカ"}

    def line(n):
        each = alphabets.items()
        prompts = {lang: f"{(letters * 8)[:45]} {n:04}" for lang, letters in each}
        answers = {lang: [f" {text} {n * k % 97}" for k in range(1, 5)] for lang, text in each}
        return {"id": f"q{n}", "subject": f"{n % 7}", "prompts": prompts, "answers": answers}

    def bytes_each(n):
        spec = jsonl(tmp_path, *map(line, range(n)))
        tracemalloc.start()
        try:
            questions = data.load(spec, list(alphabets))
            loaded, _ = tracemalloc.get_traced_memory()
            parts = data.split(questions, n // 2, n // 4, 0)
            both, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert {id(q) for part in parts for q in part} < {id(q) for q in questions}
        assert not hasattr(questions[0], "__dict__")
        return loaded / n, (both - loaded) / n, (peak - loaded) / n

    bytes_each(10)  # what is made once, such as compiled expressions
    few, many = bytes_each(2000), bytes_each(4000)
    assert many == pytest.approx(few, rel=0.1)
    held, by_split, at_most = many
    assert held < 1500 and by_split < 16 and at_most < 120


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
    assert part([], []) == [sorted("aaaabbbccc"), []]
    train, test = data.split(questions, 2, 3, 0, ["a"], ["a", "b"])  # what is left of a is held out
    assert [q.subject for q in train] == ["a", "a"] and len(test) == 3
    assert not {q.id for q in train} & {q.id for q in test}


@given(st.lists(st.sampled_from("ab"), min_size=6, max_size=30), st.integers(0, 5))
def test_naming_all_subjects_names_none(subjects, seed):
    questions, every = of_subjects(*subjects), sorted(set(subjects))
    plain = data.split(questions, 3, 2, seed)
    if {q.subject for q in plain[1]} == set(every):
        assert data.split(questions, 3, 2, seed, every, every) == plain
    else:
        with pytest.raises(data.InputError, match="is left to report on"):
            data.split(questions, 3, 2, seed, every, every)


@pytest.mark.parametrize(
    "train, test, train_subjects, test_subjects, message",
    [
        (None, None, ["d"], [], "there is no subject 'd'; there are a, b, c"),
        (None, None, ["a"], ["d"], "there is no subject 'd'"),
        (5, None, ["a"], [], "there are 4 to train on"),
        (None, 4, ["a"], ["b"], "all training and 4 held-out .* and then 3 others"),
        (None, None, ["a", "b"], ["b", "c"], "no question of 'b' is left to report on"),
        (None, 1, ["a"], ["b", "c"], "is left to report on: .* or --test_questions is too small"),
    ],
)
def test_subjects_that_cannot_be_are_refused(train, test, train_subjects, test_subjects, message):
    with pytest.raises(data.InputError, match=message):
        data.split(of_subjects(*"aaaabbbccc"), train, test, 0, train_subjects, test_subjects)


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
    if len({whole[0] for whole, _ in expected}) > 1:
        with pytest.raises(data.InputError, match="'1', 'en': no token stands before the answers"):
            data.encode(tokenizer, [question], ["en"])
        return  # no token is common to all
    ((tree,),) = data.encode(tokenizer, [question], ["en"])
    for k, (whole, start) in enumerate(expected):
        assert tree.prefix + tree.branches[k] == whole
        assert len(tree.prefix) + tree.prompt_len == start


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


def test_many_questions_are_tokenised_as_each_alone_and_the_last_is_checked_too():
    questions = [
        replace(question, prompts={"en": f"The number after {n} is"})
        for n, question in enumerate(questions_with(300))
    ]
    tokenizer = tiny_tokenizer("The number after 1 is 2. The number after 3 is 4.")
    together = data.encode(tokenizer, questions, ["en"])
    assert together == [data.encode(tokenizer, [q], ["en"])[0] for q in questions]
    longer = replace(questions[-1], prompts={"en": "a long prompt " * 50})
    with pytest.raises(data.InputError, match=repr(longer.id)):
        data.encode(tokenizer, [*questions[:-1], longer], ["en"], context=100)
