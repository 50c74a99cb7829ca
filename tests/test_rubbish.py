"""Bad input: a loader names the file and the place in it, or loads what is whole; never else."""

import csv
import gzip
import io
import json
import re
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from conftest import tiny_tokenizer

# ---------------------------------------------------------------------------------- what is whole

FACTS = [  # subject, index of the right answer, and the prompt with its answers in each language
    ("asia", 3, {"en": ("The capital of Japan is", "Seoul, Beijing, Hanoi, Tokyo"),
                 "es": ("La capital de Japón es", "Seúl, Pekín, Hanói, Tokio"),
                 "ar": ("عاصمة اليابان هي", "سيول, بكين, هانوي, طوكيو"),
                 "hi": ("जापान की राजधानी है", "सियोल, बीजिंग, हनोई, टोक्यो")}),
    ("asia", 1, {"en": ("The capital of Turkey is", "Tehran, Ankara, Baghdad, Muscat"),
                 "es": ("La capital de Turquía es", "Teherán, Ankara, Bagdad, Mascate"),
                 "ar": ("عاصمة تركيا هي", "طهران, أنقرة, بغداد, مسقط"),
                 "hi": ("तुर्की की राजधानी है", "तेहरान, अंकारा, बगदाद, मस्कट")}),
    ("south", 2, {"en": ("The capital of Peru is", "Quito, Bogota, Lima, Sucre"),
                  "es": ("La capital del Perú es", "Quito, Bogotá, Lima, Sucre"),
                  "ar": ("عاصمة بيرو هي", "كيتو, بوغوتا, ليما, سوكري"),
                  "hi": ("पेरू की राजधानी है", "क्विटो, बोगोटा, लीमा, सुक्रे")}),
    ("south", 0, {"en": ("The capital of Chile is", "Santiago, Caracas, Asuncion, La Paz"),
                  "es": ("La capital de Chile es", "Santiago, Caracas, Asunción, La Paz"),
                  "ar": ("عاصمة تشيلي هي", "سانتياغو, كاراكاس, أسونسيون, لاباز"),
                  "hi": ("चिली की राजधानी है", "सैंटियागो, काराकास, असुनसियोन, ला पाज़")}),
]  # fmt: skip
BMLAMA = "Prompt\tAns\tCandidate Ans\tSubject\n"
MMMLU = ",Question,A,B,C,D,Answer,Subject\n"
SPEC = {"bmlama": "bmlama:{}", "mmlu": "mmmlu:{}", "mmmlu": "mmmlu:{}",
        "xcsqa": "xcsqa:{}", "jsonl": "jsonl:{}/own.jsonl"}  # fmt: skip
DIRECTORY = "a directory"  # in place of a file's bytes


def files(kind, langs=("en", "es")):
    """The undamaged files of a layout, bytes by name."""
    made = {}
    for lang in langs:
        for i, (subject, gold, texts) in enumerate(FACTS):
            prompt, names = texts[lang][0], texts[lang][1].split(", ")
            row = [f'"{prompt}" what?', *names, "ABCD"[gold]]
            if kind == "bmlama":
                name, start = f"{lang}.tsv", BMLAMA
                line = "\t".join([f"{prompt} <mask>.", names[gold], texts[lang][1], subject])
            elif kind == "xcsqa":
                name, start = f"{lang}/dev.jsonl", ""
                choices = [{"label": label, "text": name} for label, name in zip("ABCD", names)]
                line = {"id": f"q{i}", "question": {"stem": row[0], "choices": choices},
                        "answerKey": "ABCD"[gold]}  # fmt: skip
            elif kind == "jsonl":
                name, start = "own.jsonl", ""
                line = {"id": str(i), "subject": subject, "gold": gold,
                        "prompts": {lang: texts[lang][0] for lang in langs},
                        "answers": {lang: [f" {name}" for name in texts[lang][1].split(", ")]
                                    for lang in langs}}  # fmt: skip
            else:
                name, start = f"{subject}_test{'' if lang == 'en' else f'_{lang}'}.csv", ""
                if kind == "mmmlu":
                    name, start = f"test/mmlu_{lang.upper()}-XX.csv", MMMLU
                    row = [i % 2, *row, subject]
                csv.writer(line := io.StringIO(), lineterminator="").writerow(row)
                line = line.getvalue()
            line = json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line
            if kind != "jsonl" or lang == langs[0]:  # which has a line for all languages
                made[name] = made.get(name, start) + line + "\n"
    return {name: text.encode() for name, text in made.items()}


def whole(kind, langs=("en", "es")):
    """The questions in the undamaged files."""
    found = []
    for i, (subject, gold, texts) in enumerate(FACTS):
        prompts = {lang: texts[lang][0] for lang in langs}
        answers = {lang: tuple(texts[lang][1].split(", ")) for lang in langs}
        if kind == "bmlama":
            id, prompts = str(i + 2), {lang: f"{prompt} " for lang, prompt in prompts.items()}
        elif kind == "jsonl":
            id, answers = str(i), {x: tuple(f" {a}" for a in answers[x]) for x in langs}
        else:
            id, subject = (f"q{i}", "") if kind == "xcsqa" else (f"{subject}/{i % 2}", subject)
            for lang in langs:
                lettered = [f"{letter}. {text}" for letter, text in zip("ABCD", answers[lang])]
                prompts[lang] = "\n".join([f'"{prompts[lang]}" what?', *lettered, "Answer:"])
            answers = dict.fromkeys(langs, (" A", " B", " C", " D"))
        found.append(data.Question(id, subject, gold, prompts, answers))
    return found


WHOLE = {kind: files(kind) for kind in SPEC}
ES = {"bmlama": "es.tsv", "mmlu": "asia_test_es.csv", "mmmlu": "test/mmlu_ES-XX.csv",
      "xcsqa": "es/dev.jsonl", "jsonl": "own.jsonl"}  # fmt: skip  # one that holds Spanish


def load(folder, kind, files, langs=("en", "es")):
    """The questions in such files, and what was said."""
    for name, content in files.items():
        (path := Path(folder, name)).parent.mkdir(parents=True, exist_ok=True)
        if content == DIRECTORY:
            path.mkdir()
        else:
            path.write_bytes(content)
    said = []
    return data.load(SPEC[kind].format(folder), list(langs), said.append), said


@pytest.mark.parametrize("kind", SPEC)
@pytest.mark.parametrize("langs", [("en", "es"), ("en", "ar", "hi")])
def test_whole_files_load_as_written_right_to_left_and_with_combining_marks_too(
    kind, langs, tmp_path
):
    assert load(tmp_path, kind, files(kind, langs), langs) == (whole(kind, langs), [])


SAME = [("crlf", lambda b: b.replace(b"\n", b"\r\n")), ("cr", lambda b: b.replace(b"\n", b"\r")),
        ("bom", lambda b: b"\xef\xbb\xbf" + b), ("no end", lambda b: b[:-1])]  # fmt: skip


@pytest.mark.parametrize("kind", ES)
@pytest.mark.parametrize("how", [how for _, how in SAME], ids=[name for name, _ in SAME])
def test_byte_order_marks_and_other_line_ends_change_nothing(kind, how, tmp_path):
    other = {name: how(content) for name, content in WHOLE[kind].items()}
    assert other != WHOLE[kind] and load(tmp_path, kind, other) == (whole(kind), [])


# ------------------------------------------------------------------------------ what is damaged


class Bad(NamedTuple):
    kind: str
    files: dict
    says: str  # part of the message; FOLDER stands for where the files lie
    ids: str = ""  # of the questions that are left


def bad(kind, how, says, ids="", name=None):
    """The undamaged files but for `name`, or all for "*": other bytes, none, or text changed."""
    harmed, name = dict(WHOLE[kind]), name or ES[kind]
    for each in harmed if name == "*" else [name]:
        if isinstance(how, tuple):
            before = harmed[each].decode()
            assert how[0] in before, how
            harmed[each] = before.replace(*how, 1).encode()
        elif callable(how):
            harmed[each] = how(harmed[each].decode()).encode()
        else:
            harmed[each] = how
    there = {name: content for name, content in harmed.items() if content is not None}
    if says.startswith(("line", ",", ":")):
        says = f"FOLDER/{name}{', ' * says.startswith('line')}{says}"
    return Bad(kind, there, says, ids)


def every(old, new):
    return lambda text: re.sub(old, new, text)


def second(line):
    """Another line 2."""
    return lambda text: "\n".join([text.split("\n")[0], line, *text.split("\n")[2:]])


def put(*way):
    """Put the last of `way` where the others lead in the JSON of line 2; Ellipsis takes it out."""
    *path, last, value = way

    def change(text):
        line = inner = json.loads(text.split("\n")[1])
        for step in path:
            inner = inner[step]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        return second(json.dumps(line))(text)

    return change


HARMS = []


def harm(kind, says, *hows, name=None):
    HARMS.extend(bad(kind, how, says, name=name) for how in hows)


# Any file.
HTML = b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
FOREIGN = {"cp1256": "بكين", "shift_jis": "ペキン", "gb18030": "北京", "koi8-r": "Пекин"}
for kind, name in ES.items():
    raw = WHOLE[kind][name]
    text = raw.decode()
    halves = [raw[: accent.end()] for accent in re.finditer(b"\xc3", raw)][:3]
    spelt = [text.encode(coding) for coding in ("latin-1", "utf-16", "utf-16-le", "utf-32")]
    for coding, word in FOREIGN.items():
        spelt.append(text.replace("Pekín", word).encode(coding, "replace"))
    spelt += [raw.replace(b"\xc3\xad", other) for other in (b"\xed\xa0\x80", b"\xc0\xad", b"\xff")]
    harm(kind, ": not UTF-8", *halves, *spelt, gzip.compress(raw, mtime=0))
    wide = text.encode("ascii", "replace").decode().encode("utf-16-le")
    harm(kind, ", line", HTML, POINTER, wide, b"  \n\t\n", b"\0" * 40 + b"\n" + b"\0" * 40)
    harm(kind, "line 1: not JSON" if b"{" in raw else "NUL", ("capital", "cap\0tal"))
    says = ": Is a directory"
    harm(kind, says, DIRECTORY)
for kind in ("bmlama", "mmmlu", "xcsqa"):
    harm(kind, "FOLDER has no language 'es'", None)
harm("jsonl", ": No such file", None)

# BMLAMA.
ALL, AS = "Teherán, Ankara, Bagdad, Mascate", "La capital de Turquía"
harm("bmlama", ": 0 rows, but en.tsv has 4", b"", BMLAMA.encode())
harm("bmlama", ": 3 rows, but en.tsv has 4", every(f"{AS}.*\n", ""))
harm("bmlama", "FOLDER/es.tsv", (BMLAMA, ""))
harm("bmlama", ": 5 rows, but en.tsv has 4", every(f"({AS}.*\n)", r"\1\1"))
harm("bmlama", "line 2: 0 fields, not 4: sentence, answer, candidates, subject", ("\n", "\n\n"))
harm("bmlama", "line 2: 1 fields", every("\t", ";"), every("\t", ","), (" es <", " es\n<"))
harm("bmlama", "line 2: 3 fields", ("Tokio\tSeúl", "Tokio Seúl"), ("\tasia", ""))
harm("bmlama", "line 2: 5 fields", ("\tasia", "\tasia\tmore"))
harm("bmlama", "line 2: 8 fields", ("\tasia\n", "\tasia\t"))
harm("bmlama", "line 3: field larger than field limit", ("Mascate", "x" * 200_000))
harm("bmlama", "line 3: unexpected end of data", (AS, f'"{AS}'), ("\tTeherán", '\t"Teherán'))
harm("bmlama", "line 3: '\t' expected after '\"'", (AS, f'"{AS}"'), ("\tTeherán", '\t"Te"herán'))
harm("bmlama", "line 2: 0 times", ("<mask>", ""), ("<mask>", "<MASK>"), ("<mask>", "[MASK]"))
harm("bmlama", "line 2: 2 times <mask>", ("<mask>", "<mask> <mask>"), ("La", "<mask>"))
for other in ("Éfeso", "ankara", "Ankara ", "", "Ankara, Bagdad"):
    harm("bmlama", f"line 3: the answer {other!r} is none of", ("\tAnkara\t", f"\t{other}\t"))
harm("bmlama", "line 3: the answer 'Ankara' is none", (ALL, ""), (ALL, ALL.replace(", ", "; ")))
for how in [("\tAnkara\t", "\tBagdad\t"), ("Teherán, Ankara", "Ankara, Teherán")]:
    harm("bmlama", "line 3: the answer is another candidate than in en", how)
for other in ("Bagdad", "Bagdad, Mascate, Doha", "Bagdad,Mascate", "Bagdad, Mascate; Doha, Adén"):
    harm("bmlama", "line 3: question '3': answers are para", ("Bagdad, Mascate", other))
harm("bmlama", "line 3: question '3': answer 2 in 'es' is", ("Bagdad", ""), ("Bagdad", " \u3000"))
harm("bmlama", "line 3: question '3': answer 4 in 'es' is", ("Mascate", "Mascate, "))
harm("bmlama", "line 2: the answer '' is none of", ("\tTokyo\t", "\t\t"), name="en.tsv")
harm("bmlama", "FOLDER: no questions in it", b"", BMLAMA.encode(), name="*")
harm("bmlama", "FOLDER/en.tsv", (BMLAMA, ""), name="*")  # or the first question is lost
harm("bmlama", "question '2': 1 answer;", every(r"\t(\w+)\t[^\t]+", r"\t\1\t\1"), name="*")

# MMLU, as first published and as MMMLU has it.
JAPAN = '"""La capital de Japón.*?",'
DOUBLE = every('(.*"La capital de Turquía.*\n)', r"\1\1")
for kind, at, n, end in [("mmlu", 1, 6, "\n"), ("mmmlu", 2, 8, ",asia\n")]:
    keys = [(f",D{end}", f",{key}{end}") for key in ("E", "d", "", "DA", "3", "Tokio", "\uff24")]
    harm(kind, f"line {at}: row '0' with answer ", *keys)
    harm(kind, f"line {at}: {n + 1} fields, not {n}: ", (f",D{end}", f",D,{end}"))
    harm(kind, f"line {at}: {n - 1} fields", (f",D{end}", end), ("l,Pe", "l;Pe"), (",Tokio", ""))
    harm(kind, f"line {at}: {at + 3} fields", ("Hanói,", "Hanói\n"))
    quotes = ("what?", 'what?"'), (",Seúl", ',"S"eúl'), (",Hanói", ',"Hanói')
    harm(kind, f"line {at}: ',' expected after '\"'", *quotes)
    harm(kind, f"line {at + 1}: field larger than field limit", ("Teherán", "x" * 200_000))
    harm(kind, f"line {at + 2}: 0 fields", (f",B{end}", f",B{end}\n"))
    emptied = every(JAPAN, ","), every(JAPAN, '" \n",')
    harm(kind, f"line {at}: the question 'asia/0' is empty", *emptied)
    harm(kind, "line 1", every(",", ";"), every(",", "\t"))
    harm(kind, "FOLDER: asia has 1 rows in es, 2 in en", every(f".*{JAPAN}.*\n", ""))
harm("mmlu", "FOLDER: asia has 3 rows in es, 2 in en", DOUBLE)
harm("mmlu", "asia has 2 rows in es, 1 in en", every(".*Japan.*\n", ""), name="asia_test.csv")
harm("mmlu", "line 1: row '0' with answer 'answer'", lambda text: f"Q,A,B,C,D,answer\n{text}")
harm("mmlu", "line 2: unexpected end of data", (",Mascate", ',"Mascate'), (",B\n", ',"B'))
harm("mmlu", "line 1: 7 fields, not 6", every('"""La', '0,"""La'))
harm("mmlu", "FOLDER has 'es' more than once: FOLDER/<subj", b"", name="test/asia_test_es.csv")
harm("mmmlu", "FOLDER has 'es' more than once: FOLDER/mmlu_ES-YY.csv", b"", name="mmlu_ES-YY.csv")
for number in ("x", "", "-1", "0.0", "1e0", "0 "):
    harm("mmmlu", f"line 2: row '{number}' with answer", ("\n0,", f"\n{number},"))
for other in ("", MMMLU.lower(), MMMLU.replace("A,B", "B,A"), MMMLU.replace("Answer,", "Key,")):
    harm("mmmlu", "line 1: the header is not row of the subject, Question, A", (MMMLU, other))
harm("mmmlu", "line 1: the header is not row of the subject, Question, A", b"")
harm("mmmlu", "line 1: 7 fields, not 8", (",Subject", ""))
harm("mmmlu", "line 2: row '' with answer 'Answer'", (MMMLU, MMMLU * 2))
harm("mmmlu", "line 5: unexpected end of data", (",Asunción", ',"Asunción'))
harm("mmmlu", "no questions in it", MMMLU.encode())
harm("mmmlu", "line 3: question 'asia/0' stands at FOLDER/test/mmlu_ES-XX.csv, l", ("\n1,", "\n0,"))
harm("mmmlu", "FOLDER: asia has 3 rows in es, 2 in en", DOUBLE)
harm("mmmlu", "FOLDER: asia has 1 rows in es, 2 in en", (",asia\n", ",Asia\n"))
turned = every(",([A-D])(?=,[as])", lambda found: "," + "BCDA"["ABCD".index(found[1])])
harm("mmmlu", "FOLDER: the right letter of 4 of 4 questions differs between langu", turned)

# JSON Lines.
INF, NAN = float("inf"), float("nan")
BROKEN = [
    "", " \t", "{", "}", "[" * 100_000, '{"a":' * 100_000, "{'id': '1'}", '{"id": "1",}',
    '{"id": "1"} {"id": "2"}', '{"id": 01}', '{"id": +1}', '{"id": 0x1}', '{"id": .5}',
    '{"id": "\1"}', r'{"id": "\x41"}', r'{"id": "\ud8"}', '{"id": "1}', '{"id" "1"}', "nul", "True",
    "# note", "\ufeff{}", '{"id": ' + "9" * 5000 + "}", '{"id": "1", "id": "1"}', "1.", "1,2",
]  # fmt: skip
OTHERS = 'null true 0 NaN -Infinity 1e999 "x" [] [{}] {} {"Id":"1"} {"id":[]}'.split()
for kind, says in [("jsonl", "line 2: field 'id' is missing"), ("xcsqa", "line 2: not a question")]:
    harm(kind, "line 2: not JSON", *map(second, BROKEN))
    harm(kind, says, *map(second, OTHERS))
    harm(kind, "no questions in it", b"")
    harm(kind, "line 1: not JSON", b"\n", every("\n", ",\n"), every("}, ", "},\n"), every("\n", ""))
    harm(kind, "line 1: not JSON", lambda text: f"[{text}]", ("{", '{"id": -, '))
OWN = [  # where in a line, what is put there, and what is said of it
    ("id", [..., None, True, 1.5, NAN, [], ["1"], {}], "field 'id' is missing or of another type"),
    ("id", ["0", 0], "id '0' stands at FOLDER/own.jsonl, line 1 already"),
    ("id", ["\ud800"], r"question '\ud800': its text in 'en' holds NUL or half a surrogate pair"),
    ("id", ["\0"], r"question '\x00': its text in 'en' holds NUL or half a surrogate pair"),
    ("subject", [None, False, 5, [], {}], "field 'subject'"),
    ("subject", ["\udfff", "a\0"], "question '1': its text in 'en' holds NUL"),
    ("gold", [True, False, 1.0, "1", [1], {}, NAN, INF, -INF], "field 'gold'"),
    ("gold", [-1, 4, 10**30], "question '1': gold "),
    ("prompts", [..., None, [], ["x"], "x", 5], "field 'prompts'"),
    ("prompts", [{}, {"es": "x"}, {"EN": "x", "es": "x"}], "question '1' has nothing in langu"),
    ("prompts es", [...], "question '1' has nothing in language 'es'; it has en"),
    ("prompts es", [None, 5, True, ["x"], {}], "in 'es', prompts must hold a string"),
    ("prompts es", ["", " ", "\t\r\n", "\u3000\u2003"], "question '1': the prompt in 'es' is emp"),
    ("prompts es", ["a\0", "\ud800", "a\udfff"], "question '1': its text in 'es' holds NUL or"),
    ("answers", [..., None, [], [" a", " b"], " a", 5], "field 'answers'"),
    ("answers", [{}, {"es": ["x", "y"]}], "question '1' has nothing in language 'en'"),
    ("answers", [{"en": ["x"], "es": ["y"]}], "question '1': 1 answer; ranking needs two or more"),
    ("answers", [{"en": [], "es": []}], "question '1': 0 answer; ranking needs two or more"),
    ("answers es", [...], "question '1' has nothing in language 'es'"),
    ("answers es", [None, 5, "abcd", {"A": "a"}, [1, 2, 3, 4]], "in 'es', prompts must hold"),
    ("answers es", [[], ["a"], ["a", "b", "c"], list("abcde")], "question '1': answers are paral"),
    ("answers es 2", [None, 5, True, ["a"], {}], "in 'es', prompts must hold a string"),
    ("answers es 2", ["", " ", "\n"], "question '1': answer 2 in 'es' is empty"),
    ("answers es 2", ["a\0", "\udc80"], "question '1': its text in 'es' holds NUL"),
]  # fmt: skip
options = lambda labels: [{"label": label, "text": "x"} for label in labels]  # noqa: E731
STRINGS = "not a question of X-CSQA"
XCSQA = [
    ("id", [...], "not a question of X-CSQA"),
    ("id", [None, True, 5, 1.5, [], {}], STRINGS),
    ("id", ["q0"], "question 'q0' stands at FOLDER/es/dev.jsonl, line 1 already"),
    ("question", [..., None, "x", 5, [], {}], "not a question of X-CSQA"),
    ("question stem", [...], "not a question of X-CSQA"),
    ("question stem", [None, 5, ["x"], {}], STRINGS),
    ("question stem", ["", " \n", "\u3000"], "the question 'q1' is empty"),
    ("question stem", ["\0", "\ud800"], "question 'q1': its text in 'es' holds NUL"),
    ("question choices", [..., None, 5, "ABCD", [], [5], [[]], [{"label": "A"}]], "not a que"),
    ("question choices", [options(labels) for labels in ("A", "BACD", "AABC", "abcd", "1234", "ABD",
                          "BCDE", "ABCDEFGHIJK", ["A", "B", ""])], "question 'q1': choices "),
    ("question choices", [*map(options, ["AB", "ABC", "ABCDE"])], "question 'q1': answers are par"),
    ("question choices 2", [None, "C", 5, []], "not a question of X-CSQA"),
    ("question choices 2 label", [None, 5, True, ["C"]], STRINGS),
    ("question choices 2 text", [None, 5, False, ["x"], {}], STRINGS),
    ("question choices 2 text", ["\0", "x\udfff"], "question 'q1': its text in 'es' holds NUL"),
    ("answerKey", ["E", "b", "AB", " B", "2"], "question 'q1': choices A, B, C, D with answer"),
    ("answerKey", [True, 1, 1.5, ["B"], {"A": "B"}, False, 0, [], {}], STRINGS),
]  # fmt: skip
for kind, table in (("jsonl", OWN), ("xcsqa", XCSQA)):
    for way, values, says in table:
        steps = [int(step) if step.isdigit() else step for step in way.split()]
        harm(kind, f"line 2: {says}", *(put(*steps, value) for value in values))
for kind, name in [("jsonl", "id"), ("jsonl", "es"), ("xcsqa", "id"), ("xcsqa", "text")]:
    says = f"line 1: not JSON (field {name!r} comes twice)"
    harm(kind, says, (f'"{name}": ', f'"{name}": "x", "{name}": '))
harm("jsonl", "line 1: not JSON", ('"gold": 3', '"gold": 3' + "0" * 5000))
harm("jsonl", "line 1: field 'id'", lambda text: f"[{text.strip().replace(chr(10), ', ')}]")
harm("jsonl", "line 5: id '0' stands at FOLDER/own.jsonl, line 1 already", lambda text: text * 2)
harm("xcsqa", "line 5: question 'q0' stands at FOLDER/es/dev.jsonl, line 1", lambda text: text * 2)
harm("xcsqa", "FOLDER: the right letter of 1 of 4 questions differs", put("answerKey", "A"))
harm("xcsqa", "FOLDER has 'es' twice: FOLDER/es/d", b"", name="X-CSQA/es/dev.jsonl")

KEYS, GONE = "questions in all languages: their answer keys", "that are not in every language"
OPENS, BLIND = "1 questions in all languages: <mask> opens the", "1 questions lack an answer key"
TOLD = [  # what a rule of the format drops, or keeps without a right answer; the ids that are left
    bad("bmlama", ("La capital de Japón es <mask>", "<mask>"), f"dropped {OPENS}", "3 4 5"),
    bad("bmlama", ("La capital de Chile es", " "), f"dropped {OPENS}", "2 3 4"),
    bad("mmlu", b"", f"dropped 2 questions {GONE}", "south/0 south/1"),
    bad("mmlu", None, f"dropped 2 questions {GONE}", "south/0 south/1"),
    bad("mmlu", (",D\n", ",C\n"), f"dropped 1 {KEYS}", "asia/1 south/0 south/1"),
    bad("mmmlu", (",D,asia", ",C,asia"), f"dropped 1 {KEYS}", "asia/1 south/0 south/1"),
    bad("mmmlu", ("\n1,", "\n2,"), f"dropped 2 questions {GONE}", "asia/0 south/0 south/1"),
    bad("mmmlu", every("asia", "Asien"), f"dropped 4 questions {GONE}", "south/0 south/1"),
    bad("mmmlu", every(".*south\n", ""), f"dropped 2 questions {GONE}", "asia/0 asia/1"),
    bad("xcsqa", every('.*"q1".*\n', ""), f"dropped 1 questions {GONE}", "q0 q2 q3"),
    bad("xcsqa", put("id", "q4"), f"dropped 2 questions {GONE}", "q0 q2 q3"),
    *(bad("xcsqa", put("answerKey", gone), BLIND, "q0 q1 q2 q3") for gone in (None, "", ...)),
]
CUTS = [  # the file for Spanish after so many bytes
    bad(kind, WHOLE[kind][name][: len(WHOLE[kind][name]) * k // 22], f"{kind} {k}")
    for kind, name in ES.items()
    for k in range(1, 22)
]


PLACE = r"line \d+|question '|not UTF-8|no questions|\d rows|no language|right letter of"


def attempt(kind, files, langs=("en", "es")):
    """The questions in such files, each whole, and what was said; None if they are refused."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            questions, said = load(folder, kind, files, langs)
        except data.InputError as error:
            assert folder in str(error) and re.search(PLACE, str(error)), error
            return None, []
    for question in questions:
        data.check(question, langs, folder)
        assert "\\x00" not in repr(question) and [*question.answers] == [*langs]
    return questions, said


@pytest.mark.parametrize("bad", HARMS, ids=[f"{bad.kind}-{n}" for n, bad in enumerate(HARMS)])
def test_what_is_no_question_is_refused_by_file_and_place(bad, tmp_path):
    with pytest.raises(data.InputError) as raised:
        load(tmp_path, bad.kind, bad.files)
    message = str(raised.value)
    assert str(tmp_path) in message
    assert bad.says.replace("FOLDER", str(tmp_path)) in message


@pytest.mark.parametrize("bad", TOLD, ids=[f"{bad.kind}-{n}" for n, bad in enumerate(TOLD)])
def test_what_a_rule_drops_is_counted_and_the_rest_is_whole(bad, tmp_path):
    questions, said = load(tmp_path, bad.kind, bad.files)
    kept = [question for question in whole(bad.kind) if question.id in bad.ids.split()]
    if bad.says == BLIND:
        kept[1] = replace(kept[1], gold=None)
    assert questions == kept and len(said) == 1 and bad.says in said[0]


@pytest.mark.parametrize("bad", CUTS, ids=[bad.says.replace(" ", "-") for bad in CUTS])
def test_a_cut_file_is_refused_or_what_is_left_is_whole_and_counted(bad):
    """In one language a cut at a line's end passes, and one in a subject that ends its line."""
    questions, said = attempt(bad.kind, bad.files)
    if questions is not None:
        there = whole(bad.kind)
        assert questions == [question for question in there if question in questions]
        assert len(questions) == len(there) or said or bad.kind == "jsonl"
    questions, said = attempt(bad.kind, bad.files, ["es"])
    if questions is not None:
        there = {question.prompts["es"]: question for question in whole(bad.kind, ["es"])}
        found = [there[question.prompts["es"]] for question in questions]
        if bad.kind in ("bmlama", "mmmlu"):
            kept, short = found[-1], questions[-1].subject
            assert kept.subject.startswith(short)
            found[-1] = replace(kept, subject=short, id=kept.id.replace(kept.subject, short))
        assert questions == found and not said


def test_more_than_two_hundred_different_bad_inputs_are_tried():
    tried = [frozenset(bad.files.items()) for bad in (*HARMS, *TOLD, *CUTS)]
    assert max(Counter(tried).values()) == 1 and len(tried) >= 200
    assert not set(tried) & {frozenset(files.items()) for files in WHOLE.values()}


def test_the_file_of_the_language_that_differs_is_named_among_three(tmp_path):
    three = files("bmlama", ("en", "es", "hi"))
    three["es.tsv"] = three["es.tsv"].replace(b"\tAnkara\t", b"\tBagdad\t")
    with pytest.raises(data.InputError, match="es.tsv, line 3: the answer is another candidate"):
        load(tmp_path, "bmlama", three, ("en", "es", "hi"))


@pytest.mark.parametrize("kind", ["bmlama", "mmlu", "xcsqa", "jsonl"])
def test_a_name_too_long_for_a_file_is_refused(kind):
    with pytest.raises(data.InputError, match="xxx"):
        data.load(f"{SPEC[kind].split(':')[0]}:{'x' * 300}", ["en"])


# ------------------------------------------------------------------------------ what is drawn


@given(
    kind=st.sampled_from(list(SPEC)),
    which=st.integers(0, 3),
    edits=st.lists(
        st.tuples(
            st.sampled_from(["flip", "insert", "delete"]),
            st.integers(0, 10_000),
            st.integers(1, 255) | st.sampled_from(b'"\n\r\t,;{}[]\\<> '),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_bytes_that_change_are_refused_or_change_no_other_question(kind, which, edits):
    changed = dict(WHOLE[kind])
    name = sorted(changed)[which % len(changed)]
    content = bytearray(changed[name])
    for how, at, byte in edits:
        at %= len(content)
        new = {"flip": [content[at] ^ byte], "insert": [byte], "delete": []}[how]
        content[at : at + (how != "insert")] = new
    questions, said = attempt(kind, {**changed, name: bytes(content)})
    if questions is None or said:
        return
    assert len(questions) == len(FACTS)
    assert sum(a != b for a, b in zip(questions, whole(kind))) <= len(edits)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.sampled_from("aB \0\ud800é\u200f\n"), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["en", "es", "id", "label", "text", "stem"]), inner)
    ),
    max_leaves=8,
)


def ways(value, way=()):
    """Every way into a JSON value."""
    inner = enumerate(value) if isinstance(value, list) else getattr(value, "items", tuple)()
    for step, each in inner:
        yield way + (step,)
        yield from ways(each, way + (step,))


@given(st.sampled_from(["jsonl", "xcsqa"]), st.integers(0, 10_000), anything)
def test_any_json_anywhere_in_a_line_is_refused_or_changes_no_other_question(kind, which, value):
    line = json.loads(WHOLE[kind][ES[kind]].split(b"\n")[1])
    there = list(ways(line))
    questions, said = attempt(kind, bad(kind, put(*there[which % len(there)], value), "").files)
    if questions is not None:
        kept = [question for i, question in enumerate(whole(kind)) if i != 1]
        assert [question for question in questions if question in kept] == kept
        assert len(questions) == len(FACTS) or "dropped" in said[0]


@given(st.sampled_from(["bmlama", "mmlu", "mmmlu"]), st.integers(0, 3), st.data())
def test_rows_in_another_order_or_number_are_refused_told_or_found_by_their_ids(kind, which, draw):
    name = sorted(WHOLE[kind])[which % len(WHOLE[kind])]
    rows = WHOLE[kind][name].splitlines(keepends=True)
    some = st.lists(st.sampled_from(rows), max_size=len(rows) + 2)
    first = st.integers(0, len(rows)).map(lambda n: rows[:n])
    picked = draw.draw(st.permutations(rows) | some | first)
    questions, said = attempt(kind, {**WHOLE[kind], name: b"".join(picked)})
    if questions is None:
        return
    assert all(question in whole(kind) for question in questions)
    assert len(questions) == len(FACTS) or said
    if kind != "mmmlu":
        assert picked == rows or said


# ------------------------------------------------------------------------------ tokens


def dropping(drop):
    """A tokenizer that deletes these characters before it looks at a text."""
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer("The capital of Peru is Lima . La capital del Perú es Quito " * 3)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(character, "") for character in drop]
    )
    return tokenizer


@pytest.mark.parametrize(
    "lang, prompt, answers, says",
    [
        ("en", "The capital is", ("Ω", " Lima"), "answer 0 has no token of its own"),
        ("es", "La capital es", (" Lima", " Quito", "ΩΩ"), "answer 2 has no token of its own"),
        ("es", "La capital es", (" Lima", " Ω"), "answer 1 "),  # a space alone is no answer
        ("es", "La capital es ", ("Lima", "Ω"), "answer 1 "),
    ],
)
def test_answers_that_the_tokenizer_drops_are_refused(lang, prompt, answers, says):
    prompts = {"en": "The capital is", "es": "La capital es", lang: prompt}
    given = dict.fromkeys(["en", "es"], (" a", " b", " c")[: len(answers)]) | {lang: answers}
    question = data.Question("q7", "", 0, prompts, given)
    with pytest.raises(data.InputError, match=f"question 'q7', '{lang}': {says}"):
        data.encode(dropping("Ω"), [question], ["en", "es"])
    data.encode(dropping("ж"), [question], ["en", "es"])


def test_a_prompt_that_the_tokenizer_drops_is_refused():
    question = data.Question("q7", "", 0, {"en": "Ω"}, {"en": ("Lima", "Quito")})
    with pytest.raises(data.InputError, match="question 'q7', 'en': no token stands before the"):
        data.encode(dropping("Ω"), [question], ["en"])


def test_letters_that_the_vocabulary_lacks_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))  # it drops all others
    question = data.Question("q7", "", 0, {"en": "ab"}, {"en": ("b", "é")})
    with pytest.raises(data.InputError, match="question 'q7', 'en': answer 1 has no token"):
        data.encode(PreTrainedTokenizerFast(tokenizer_object=core), [question], ["en"])


def test_the_longest_text_that_fits_the_context_passes_and_one_token_more_is_refused():
    tokenizer = dropping("Ω")
    question = data.Question("q7", "", 0, {"en": "The", "es": "La capital " * 20}, {
        "en": (" a", " b"), "es": (" Lima", " Quito Quito")})  # fmt: skip
    longest = len(tokenizer(question.prompts["es"] + " Quito Quito")["input_ids"])
    data.encode(tokenizer, [question], ["en", "es"], context=longest)
    with pytest.raises(data.InputError, match=f"question 'q7', 'es': {longest} tokens"):
        data.encode(tokenizer, [question], ["en", "es"], context=longest - 1)
