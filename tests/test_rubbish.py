"""Bad input: a loader names the file and the place in it, or loads what is whole; never else."""

import csv
import gzip
import io
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data

# ------------------------------------------------------------------------------ undamaged files

FACTS = [  # subject, index of the right answer, and the prompt with its answers in each language
    ("asia", 3, {"en": ("The capital of Japan is", "Seoul, Beijing, Hanoi, Tokyo"),
                 "es": ("La capital de Japón es", "Seúl, Pekín, Hanói, Tokio"),
                 "ar": ("عاصمة اليابان هي", "سيول, بكين, هانوي, طوكيو")}),
    ("asia", 1, {"en": ("The capital of Turkey is", "Tehran, Ankara, Baghdad, Muscat"),
                 "es": ("La capital de Turquía es", "Teherán, Ankara, Bagdad, Mascate"),
                 "ar": ("عاصمة تركيا هي", "طهران, أنقرة, بغداد, مسقط")}),
    ("south", 2, {"en": ("The capital of Peru is", "Quito, Bogota, Lima, Sucre"),
                  "es": ("La capital del Perú es", "Quito, Bogotá, Lima, Sucre"),
                  "ar": ("عاصمة بيرو هي", "كيتو, بوغوتا, ليما, سوكري")}),
    ("south", 0, {"en": ("The capital of Chile is", "Santiago, Caracas, Asuncion, La Paz"),
                  "es": ("La capital de Chile es", "Santiago, Caracas, Asunción, La Paz"),
                  "ar": ("عاصمة تشيلي هي", "سانتياغو, كاراكاس, أسونسيون, لاباز")}),
]  # fmt: skip
SPEC = {"bmlama": "bmlama:{}", "mmlu": "mmmlu:{}", "mmmlu": "mmmlu:{}",
        "xcsqa": "xcsqa:{}", "jsonl": "jsonl:{}/own.jsonl"}  # fmt: skip
SPANISH = {"bmlama": "es.tsv", "mmlu": "asia_test_es.csv", "mmmlu": "test/mmlu_ES-XX.csv",
           "xcsqa": "es/dev.jsonl", "jsonl": "own.jsonl"}  # fmt: skip  # the file that is damaged


def csv_line(row):
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(row)
    return line.getvalue()


def files(kind, langs=("en", "es")):
    """The undamaged files of a layout, {name: bytes}."""
    lines = {}
    for lang in langs:
        for i, (subject, gold, texts) in enumerate(FACTS):
            prompt, names = texts[lang][0], texts[lang][1].split(", ")
            row = [f'"{prompt}" what?', *names, "ABCD"[gold]]
            if kind == "bmlama":
                header = ["Prompt\tAns\tCandidate Ans\tSubject"]
                line = "\t".join([f"{prompt} <mask>.", names[gold], texts[lang][1], subject])
                lines.setdefault(f"{lang}.tsv", header).append(line)
            elif kind == "mmlu":
                name = f"{subject}_test.csv" if lang == "en" else f"{subject}_test_{lang}.csv"
                lines.setdefault(name, []).append(csv_line(row))
            elif kind == "mmmlu":
                header = [",Question,A,B,C,D,Answer,Subject"]
                name = f"test/mmlu_{lang.upper()}-XX.csv"
                lines.setdefault(name, header).append(csv_line([i % 2, *row, subject]))
            elif kind == "xcsqa":
                choices = [{"label": label, "text": name} for label, name in zip("ABCD", names)]
                line = {"id": f"q{i}", "question": {"stem": row[0], "choices": choices}}
                line["answerKey"] = "ABCD"[gold]
                line = json.dumps(line, ensure_ascii=False)
                lines.setdefault(f"{lang}/dev.jsonl", []).append(line)
            elif lang == langs[0]:  # a line of jsonl holds all languages
                prompts = {lang: texts[lang][0] for lang in langs}
                answers = {x: [f" {name}" for name in texts[x][1].split(", ")] for x in langs}
                line = {"id": str(i), "subject": subject, "gold": gold, "prompts": prompts}
                line = json.dumps({**line, "answers": answers}, ensure_ascii=False)
                lines.setdefault("own.jsonl", []).append(line)
    return {name: "".join(line + "\n" for line in lines[name]).encode() for name in lines}


def questions_of(kind, langs=("en", "es")):
    """The questions in the undamaged files."""
    questions = []
    for i, (subject, gold, texts) in enumerate(FACTS):
        prompts = {lang: texts[lang][0] for lang in langs}
        answers = {lang: tuple(texts[lang][1].split(", ")) for lang in langs}
        if kind == "bmlama":
            id, prompts = str(i + 2), {lang: f"{prompt} " for lang, prompt in prompts.items()}
        elif kind == "jsonl":
            id, answers = str(i), {x: tuple(f" {name}" for name in answers[x]) for x in langs}
        else:
            id, subject = (f"q{i}", "") if kind == "xcsqa" else (f"{subject}/{i % 2}", subject)
            for lang in langs:
                options = [f"{letter}. {name}" for letter, name in zip("ABCD", answers[lang])]
                prompts[lang] = "\n".join([f'"{prompts[lang]}" what?', *options, "Answer:"])
            answers = dict.fromkeys(langs, (" A", " B", " C", " D"))
        questions.append(data.Question(id, subject, gold, prompts, answers))
    return questions


def load(folder, kind, contents, langs=("en", "es")):
    """The questions in such files, and what was printed."""
    for name, content in contents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    printed = []
    return data.load(SPEC[kind].format(folder), list(langs), printed.append), printed


@pytest.mark.parametrize("kind", SPEC)
@pytest.mark.parametrize("langs", [("en", "es"), ("en", "ar", "es")])
def test_undamaged_files_load_as_written_right_to_left_too(kind, langs, tmp_path):
    assert load(tmp_path, kind, files(kind, langs), langs) == (questions_of(kind, langs), [])


@pytest.mark.parametrize("kind", SPEC)
def test_a_byte_order_mark_and_other_line_ends_change_nothing(kind, tmp_path):
    for change in (
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content[:-1],
    ):
        changed = {name: change(content) for name, content in files(kind).items()}
        assert load(tmp_path, kind, changed) == (questions_of(kind), [])


# ------------------------------------------------------------------------------ damaged files

NO_UTF_8 = "UTF-8 file"
DAMAGES = {  # what becomes of the bytes of the Spanish file, and what is said beside its name
    "latin-1": (lambda content: content.decode().encode("latin-1"), NO_UTF_8),
    "utf-16": (lambda content: content.decode().encode("utf-16"), NO_UTF_8),
    "gzip": (gzip.compress, NO_UTF_8),
    "cut in a letter": (lambda content: content[: content.index(b"\xc3") + 1], NO_UTF_8),
    "a page": (lambda content: b"<!DOCTYPE html>\n<html>404: Not Found</html>\n", "line"),
    "a pointer": (lambda content: b"version https://git-lfs.com/v1\noid sha256:4d7a21\n", "line"),
    "blank lines": (lambda content: b"\n" * 9, "line"),
    "zeros": (lambda content: b"\0" * 40 + b"\n" + b"\0" * 40, "line"),
}


@pytest.mark.parametrize("kind", SPEC)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_something_else_is_refused_by_its_name(kind, damage, tmp_path):
    change, says = DAMAGES[damage]
    contents = files(kind)
    contents[SPANISH[kind]] = change(contents[SPANISH[kind]])
    with pytest.raises(data.InputError, match=says) as raised:
        load(tmp_path, kind, contents)
    assert str(tmp_path / SPANISH[kind]) in str(raised.value)


@pytest.mark.parametrize("kind", ["bmlama", "mmmlu", "xcsqa", "jsonl"])
def test_a_file_that_is_not_there_or_is_a_folder_is_refused_by_its_name(kind, tmp_path):
    contents = files(kind)
    contents.pop(SPANISH[kind])
    wanted = {"mmmlu": "mmlu_ES-XX.csv", "xcsqa": "es/dev.jsonl"}.get(kind, SPANISH[kind])
    for make in (lambda path: None, lambda path: path.mkdir(parents=True)):
        make(tmp_path / SPANISH[kind])
        with pytest.raises(data.InputError, match=f"{tmp_path}.*{wanted}"):
            load(tmp_path, kind, contents)


PARALLEL, EMPTY = "answers must be parallel, two or more", "a prompt or an answer is empty"
PROMPT, ANSWERS = '"es": "La.*?"', r'"es": \[.*?\]'
BAD = [  # what of the Spanish file is replaced by what, once, and what is said of it, and where
    ("bmlama", "\tasia", "", "line 2: 3 fields, not 4"),
    ("bmlama", "<mask>", "[MASK]", "line 2: not a sentence with one <mask>"),
    ("bmlama", "La", "<mask>", "line 2: not a sentence with one <mask>"),
    ("bmlama", "\tTokio\t", "\tKioto\t", "line 2: not a sentence with one <mask>, then one of"),
    ("bmlama", "\tTokio\t", "\tSeúl\t", "line 2: the answer is another candidate than in en"),
    ("bmlama", ", Mascate", "", f"line 3: question '3': {PARALLEL}"),
    ("bmlama", "Pekín", " \u3000", f"line 2: question '2': {EMPTY}"),
    ("bmlama", "La capital de Chile.*\n", "", "row n must be one question, but"),
    ("bmlama", "La capital de T", '"La capital de T', "line 3: unexpected end of data"),
    ("bmlama", "Mascate", "x" * 200_000, "line 3: field larger than field limit"),
    ("mmlu", ",D\n", "\n", "line 1: 5 fields, not 6"),
    ("mmlu", "Tokio,", "Tokio,Kioto,", "line 1: 7 fields, not 6"),
    ("mmlu", "Japón(.*\n.*),B", "Ja\npón\\1", "line 3: 5 fields, not 6"),
    ("mmlu", "\n", "\n\n", "line 2: 0 fields, not 6"),
    ("mmlu", ",D\n", ",answer\n", "line 1: no question with 'answer' among"),
    ("mmlu", '".*",', '" ",', "line 1: no question"),
    ("mmlu", ",D\n", ",C\n", "the right letter of 1 of 4 questions differs"),
    ("mmmlu", ",D,asia", ",3,asia", "line 2: no question with '3' among its answers"),
    ("mmmlu", "\n0,", "\n", "line 2: 7 fields, not 8"),
    ("mmmlu", "\n1,", "\n0,", "line 3: question 'asia/0' stands at "),
    ("mmmlu", ",D,asia", ",C,asia", "the right letter of 1 of 4 questions differs"),
    ("xcsqa", "}\n", "},\n", "line 1: not JSON"),
    ("xcsqa", '"id": "q0"', '"id": 0', "line 1: 'id' is missing or of another type"),
    ("xcsqa", '"stem": ', '"steam": ', "line 1: 'stem' is missing"),
    ("xcsqa", '"text": "Pekín"', '"text": 5', "line 1: 'text' is missing or of another type"),
    ("xcsqa", r'\{"label": "A"', r'{"label": "A", "text": "x"}, \g<0>', "line 1: the choices are "),
    ("xcsqa", '"label": "B"', '"label": "C"', "line 1: the choices are "),
    ("xcsqa", '"answerKey": "D"', '"answerKey": "E"', "line 1: no question with 'E' among"),
    ("xcsqa", '"Tokio"}', '"Tokio"}, {"label": "E", "text": ""}', f"question 'q0': {PARALLEL}"),
    ("xcsqa", '"id": "q1"', '"id": "q0"', "line 2: question 'q0' stands at "),
    ("jsonl", "\\A", "\n", "line 1: not JSON"),
    ("jsonl", ".*", "[" * 100_000, "line 1: not JSON"),
    ("jsonl", ".*", "[]", "line 1: 'id' is missing"),
    ("jsonl", '"id": "0"', '"id": true', "line 1: 'id' is missing or of another type"),
    ("jsonl", '"id": "1"', '"id": 0', "line 2: the id '0' comes twice"),
    ("jsonl", '"subject": "asia"', '"subject": null', "line 1: 'subject' is missing or of another"),
    ("jsonl", '"gold": 3', '"gold": "3"', "line 1: 'gold' is missing or of another type"),
    ("jsonl", '"gold": 3', '"gold": true', "line 1: 'gold' is missing or of another type"),
    ("jsonl", '"gold": 3', '"gold": 4', "line 1: question '0': gold 4 is none of the answers"),
    ("jsonl", '"gold": 3', '"gold": -1', "line 1: question '0': gold -1 is none of the answers"),
    ("jsonl", PROMPT, '"fr": "x"', "line 1.*prompts.*'es' is missing"),
    ("jsonl", PROMPT, '"es": "\\\\t"', f"line 1: question '0': {EMPTY}"),
    ("jsonl", ANSWERS, '"es": "Paris"', "line 1.*answers.*'es' is missing or of another type"),
    ("jsonl", '" Pekín"', "7", f"line 1: question '0': {EMPTY}, or no text"),
    ("jsonl", '" Pekín", ', "", f"line 1: question '0': {PARALLEL}"),
    ("jsonl", r"\[.*\]", '["x"], "es": ["y"]', f"line 1: question '0': {PARALLEL}"),
]  # fmt: skip


@pytest.mark.parametrize("kind, old, new, says", BAD, ids=[f"{r[0]}-{r[2][:20]}" for r in BAD])
def test_what_is_no_question_is_refused_by_file_and_line(kind, old, new, says, tmp_path):
    contents = files(kind)
    text = contents[SPANISH[kind]].decode()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    contents[SPANISH[kind]] = changed.encode()
    with pytest.raises(data.InputError, match=says) as raised:
        load(tmp_path, kind, contents)
    of_a_line = says.startswith(("line 1", "line 2", "line 3"))
    assert str(tmp_path / SPANISH[kind] if of_a_line else tmp_path) in str(raised.value)


def test_the_file_of_the_language_that_differs_is_named_among_three(tmp_path):
    contents = files("bmlama", ("en", "es", "ar"))
    contents["es.tsv"] = contents["es.tsv"].replace(b"\tAnkara\t", b"\tBagdad\t")
    with pytest.raises(data.InputError, match="es.tsv, line 3: the answer is another candidate"):
        load(tmp_path, "bmlama", contents, ("en", "es", "ar"))


def test_a_row_that_is_missing_within_a_subject_is_refused_as_it_moves_all_that_follow(tmp_path):
    rows = [csv_line([f"Question {n}?", "a", "b", "c", "d", "A"]) + "\n" for n in range(9)]
    whole, short = "".join(rows).encode(), "".join(rows[:3] + rows[4:]).encode()
    contents = {"asia_test.csv": whole, "asia_test_es.csv": short}
    with pytest.raises(data.InputError, match=f"{tmp_path}.*asia"):
        load(tmp_path, "mmlu", contents)


# ------------------------------------------------------------------------------ what is drawn

PLACE = r"line \d+|question '|UTF-8 file|no questions|\brows?\b|the right letter of"


def attempt(kind, changed):
    """The questions where the Spanish file is changed, and what was printed; None if refused."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            questions, printed = load(folder, kind, files(kind) | {SPANISH[kind]: changed})
        except data.InputError as error:
            assert folder in str(error) and re.search(PLACE, str(error)), error
            return None, []
    for question in questions:
        data.check(question, ["en", "es"], folder)
    return questions, printed


@pytest.mark.parametrize("kind", SPEC)
def test_a_cut_file_is_refused_or_what_is_left_is_whole_and_counted(kind):
    content, original = files(kind)[SPANISH[kind]], questions_of(kind)
    for length in range(1, len(content), 17):
        questions, printed = attempt(kind, content[:length])
        if questions is not None:
            assert questions == [question for question in original if question in questions]
            assert len(questions) == len(original) or printed or kind == "jsonl"


edits = st.tuples(
    st.sampled_from(["flip", "insert", "delete"]),
    st.integers(0, 10_000),
    st.integers(1, 255) | st.sampled_from(b'"\n\r\t,;{}[]\\<> '),
)


@given(st.sampled_from(list(SPEC)), st.lists(edits, min_size=1, max_size=3))
def test_bytes_that_change_are_refused_or_change_no_other_question(kind, edits):
    content = bytearray(files(kind)[SPANISH[kind]])
    for how, at, byte in edits:
        at %= len(content)
        new = {"flip": [content[at] ^ byte], "insert": [byte], "delete": []}[how]
        content[at : at + (how != "insert")] = new
    questions, printed = attempt(kind, bytes(content))
    if questions is not None and not printed:
        changes = [a != b for a, b in zip(questions, questions_of(kind), strict=True)]
        assert sum(changes) <= len(edits)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text("aB \0é\n", max_size=4)
keys = st.sampled_from(["en", "es", "id", "label", "text", "stem"])
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner), max_leaves=8
)


def containers(value):
    """Every object and list of a JSON value that holds something."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


@given(st.sampled_from(["jsonl", "xcsqa"]), st.data(), anything)
def test_any_json_anywhere_in_a_line_is_refused_or_changes_no_other_question(kind, draw, value):
    lines = files(kind)[SPANISH[kind]].splitlines()
    changed = json.loads(lines[1])
    place = draw.draw(st.sampled_from(list(containers(changed))))
    steps = list(place) if isinstance(place, dict) else range(len(place))
    place[draw.draw(st.sampled_from(steps))] = value
    lines[1] = json.dumps(changed).encode()
    questions, printed = attempt(kind, b"\n".join(lines))
    if questions is not None:
        others = [question for i, question in enumerate(questions_of(kind)) if i != 1]
        assert [question for question in questions if question in others] == others
        assert len(questions) == len(FACTS) or printed
