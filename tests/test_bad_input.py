"""Bad input: a loader names the file and the place in it, or loads sound questions; never else."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from test_data import bmlama, original, published, xcsqa

SPEC = {  # the files that are damaged, one at a time, and the data set that each is of
    "es.tsv": "bmlama:{}",
    "asia_test.csv": "mmmlu:{}",
    "test/mmlu_ES-LA.csv": "mmmlu:{}",
    "X-CSQA/es/dev.jsonl": "xcsqa:{}",
    "own.jsonl": "jsonl:{}/own.jsonl",
}
CITIES = {"en": ["Seoul", "Tokyo", "Hanoi", "Doha"], "es": ["Seúl", "Tokio", "Hanói", "Doha"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with sound files of each data set: 3 questions, of which the n-th has answer n."""
    folder = tmp_path_factory.mktemp("sound")
    sentences, rows = {}, {}
    for lang, cities in CITIES.items():
        candidates = ", ".join(cities)
        sentences[lang] = [
            [f"La {n}: <mask> hoy.", cities[n], candidates, "asia"] for n in range(3)
        ]
        rows[lang] = [[f'¿"La" {n}?', *cities, "ABC"[n]] for n in range(3)]
    bmlama(folder, **sentences)
    original(folder, "asia_test.csv", rows["en"])
    published(folder, "ES-LA", rows["es"], subject="asia")
    keys = {"q0": "A", "q1": "B", "q2": "C"}
    xcsqa(folder, en=keys, es=keys)
    with open(folder / "own.jsonl", "w", encoding="utf-8") as file:
        for n in range(3):
            prompts = {"en": f"The {n}:", "es": f"La {n}:"}
            line = {"id": f"q{n}", "subject": "asia", "gold": n, "prompts": prompts}
            print(json.dumps({**line, "answers": CITIES}, ensure_ascii=False), file=file)
    for name in SPEC:
        sound = (folder / name).read_bytes()
        (folder / name).write_bytes(sound.replace(b"\r\n", b"\n"))
    return folder


def load(folder, name, content, langs=("en", "es")):
    """The questions where a file has another content, and what is printed. It is put back then."""
    sound = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    printed = []
    try:
        return data.load(SPEC[name].format(folder), list(langs), printed.append), printed
    finally:
        (folder / name).write_bytes(sound)


@pytest.mark.parametrize("name", SPEC)
def test_a_byte_order_mark_and_other_line_ends_change_nothing(name, folder):
    content = (folder / name).read_bytes()
    questions, printed = load(folder, name, content)
    assert len(questions) == 3 and not printed
    with_mark = b"\xef\xbb\xbf" + content
    with_crlf = content.replace(b"\n", b"\r\n")
    without_end = content[:-1]
    for same in (with_mark, with_crlf, without_end):
        assert load(folder, name, same) == (questions, [])


# ------------------------------------------------------------------------------ damaged files
SOMETHING_ELSE = {  # {what stands in a file's place: (its bytes, what the message says)}
    "UTF-16": ("La capital".encode("utf-16"), "not a readable UTF-8 file"),
    "an HTML page": (b"<!DOCTYPE html>\n<html>404: Not Found</html>\n", "line"),
    "a Git LFS pointer": (b"version https://git-lfs.com/v1\noid sha256:4d7a21\n", "line"),
    "blank lines": (b"\n" * 9, "line"),
}


@pytest.mark.parametrize("name", SPEC)
@pytest.mark.parametrize("content, message", SOMETHING_ELSE.values(), ids=SOMETHING_ELSE)
def test_a_file_that_is_something_else_is_refused_by_its_name(name, content, message, folder):
    with pytest.raises(data.InputError, match=f"{folder / name}.*{message}"):
        load(folder, name, content)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("bmlama:{}", "sw.tsv: not a readable UTF-8 file .*No such file"),
        ("mmmlu:{}", r"'sw': expected one mmlu_SW-XX.csv, or \*_test_sw.csv; there are \[\]"),
        ("xcsqa:{}", "sw/dev.jsonl: not a readable UTF-8 file"),
    ],
)
def test_a_file_that_is_not_there_is_named(spec, message, folder):
    with pytest.raises(data.InputError, match=f"{folder}.*{message}"):
        data.load(spec.format(folder), ["en", "sw"])


PARALLEL = "answers must be parallel, two or more"
EMPTY = "a prompt or an answer is empty"
NO_SENTENCE = "line 2: not a sentence with one <mask>, then one of the candidates"
BMLAMA, MMLU, MMMLU, XCSQA, JSONL = SPEC
BAD = [  # the file, what is replaced in it, once, by what, and what the message says
    (BMLAMA, "\tasia", "", "line 2: 3 fields, not 4"),
    (BMLAMA, "\tSeúl\t", "\tKioto\t", NO_SENTENCE),
    (BMLAMA, "\tSeúl\t", "\tTokio\t", "line 2: the answer is another candidate than in en"),
    (BMLAMA, ", Doha", "", f"line 2: question '2': {PARALLEL}"),
    (BMLAMA, "Tokio", " \u3000", f"line 2: question '2': {EMPTY}"),
    (BMLAMA, "La .*\n", "", r"row n must be one question, but .* have \[3, 2\] rows"),
    (BMLAMA, "La 1", '"La 1', "line 3: unexpected end of data"),
    (MMLU, "La(.*\n.*),B", "L\na\\1", "line 3: 5 fields, not 6"),
    (MMLU, ",A\n", ",E\n", "line 1: no question with 'E' among its answers"),
    (MMLU, ",A\n", ",C\n", "the right letter of 1 of 3 questions differs"),
    (MMLU, ".*\n", "", r"asia has \[2, 3\] rows in .*: not parallel"),
    (MMMLU, "\n1,", "\n0,", "line 3: question 'asia/0' stands at .*, line 2 already"),
    (XCSQA, '"label": "B"', '"label": "C"', "line 1: the choices are .*, not A, B and so on"),
    (JSONL, r"(?s)\A.*", "", "no questions in it"),
    (JSONL, r"\A.*", "[" * 100_000, "line 1: not JSON"),
    (JSONL, '"id": "q1"', '"id": "q0"', "line 2: the id 'q0' comes twice"),
    (JSONL, '"gold": 0', '"gold": "0"', "line 1: 'gold' is missing or of another type"),
    (JSONL, '"gold": 0', '"gold": 4', "line 1: question 'q0': gold 4 is none of the answers"),
    (JSONL, '"es": "La 0:"', '"fr": "x"', "line 1, prompts: 'es' is missing"),
    (JSONL, '"La 0:"', '" "', f"line 1: question 'q0': {EMPTY}"),
    (JSONL, '"La 0:"', r'"\\ud83d"', "line 1: not JSON .*surrogates not allowed"),
    (JSONL, r'\["Seúl.*?\]', '"Seúl"', "line 1, answers: 'es' is missing or of another type"),
    (JSONL, '"Seúl"', "7", f"line 1: question 'q0': {EMPTY}, or no text"),
    (JSONL, r"\[.*\]", '["x"], "es": ["y"]', f"line 1: question 'q0': {PARALLEL}"),
]


@pytest.mark.parametrize("name, old, new, message", BAD, ids=[f"{row[0]}, {row[3]}" for row in BAD])
def test_what_is_no_question_is_refused_by_file_and_line(name, old, new, message, folder):
    text, changes = re.subn(old, new, (folder / name).read_text(), count=1)
    assert changes == 1
    place = f"{folder / name}, {message}" if message[:4] == "line" else f"{folder}.*{message}"
    with pytest.raises(data.InputError, match=place):
        load(folder, name, text.encode())


# ------------------------------------------------------------------------------ drawn damage
def check_damage(folder, name, content, edits):
    """Refused with a place; or no more questions change than there are edits, and none in silence.

    A JSON Lines file that ends early, after a line, is a sound one.
    """
    sound, _ = load(folder, name, (folder / name).read_bytes())
    try:
        questions, printed = load(folder, name, content)
    except data.InputError as error:
        place = r"line \d+|question '|UTF-8 file|no questions|\brows?\b|the right letter of"
        assert str(folder) in str(error) and re.search(place, str(error)), error
    else:
        assert sum(question not in sound for question in questions) <= edits
        assert len(questions) == 3 or printed or name == JSONL


edits = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "cut"]),
    st.integers(0, 999),  # where, modulo the size of the file
    st.integers(0, 255) | st.sampled_from(b'"\n\r\t,;{}[]\\<> '),
)


@given(st.sampled_from(list(SPEC)), st.lists(edits, min_size=1, max_size=2))
def test_bytes_that_change_are_refused_or_change_no_other_question(folder, name, edits):
    content = (folder / name).read_bytes()
    for edit, place, byte in edits:
        place = place % len(content) if content else 0
        before, after = content[:place], content[place:]
        if edit == "replace":
            content = before + bytes([byte]) + after[1:]
        elif edit == "insert":
            content = before + bytes([byte]) + after
        elif edit == "delete":
            content = before + after[1:]
        else:
            content = before
    check_damage(folder, name, content, len(edits))
