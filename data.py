"""What goes in: parallel questions, their split and sampling, and their tokens as prefix trees.

Covers the data sets of section 5 and App. H. Leaves out scores (rankc.py) and batches of training
(train.py). A question asks the same thing in every language and offers the same answers, in the
same order, in each; "languages" may be any views of a question, such as paraphrases of its prompt.
"""

import csv
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple, TextIO


class InputError(ValueError):
    """Input that cannot be used; the message names the file and line, or the question."""


@dataclass(frozen=True, slots=True)
class Question:
    """A parallel question: answers[lang][k] is the same answer in every language.

    The text that a model sees is prompts[lang] + answers[lang][k], exactly as written.
    """

    id: str
    subject: str
    gold: int | None  # index of the right answer, None where it is not known
    prompts: dict[str, str]
    answers: dict[str, tuple[str, ...]]

    @property
    def K(self) -> int:
        """How many answers it offers."""
        return len(next(iter(self.answers.values())))


# ---------------------------------------------------------------------- split and sampling (App. H)
def split(
    questions: list[Question],
    train: int | None,
    test: int | None,
    seed: int,
    train_subjects: Collection[str] = (),
    test_subjects: Collection[str] = (),
) -> tuple[list[Question], list[Question]]:
    """The first `train` and the next `test` questions (None: all) in an order drawn by seed.

    Where subjects are named (section 6.3), each part takes its own; where they are named for one
    part only, the other takes the other subjects. Adding a language or a process changes neither
    part, unless a loader drops questions for it (MMMLU's answer keys differ in a few): what stands
    behind them moves up. Raises InputError for a subject that is not there or too few questions.
    """
    there, named = {q.subject for q in questions}, [set(train_subjects), set(test_subjects)]
    if unknown := set.union(*named) - there:
        some = ", ".join(sorted(there)[:60]) + ", ..." * (len(there) > 60)
        raise InputError(f"there is no subject {min(unknown)!r}; there are {some}")
    ours, theirs = named[0] or there - named[1], named[1] or there - named[0]
    order = sorted(questions, key=lambda q: hashlib.sha256(f"{seed}/{q.id}".encode()).digest())
    pool = [q for q in order if q.subject in ours]
    chosen = pool[:train]
    taken = {q.id for q in chosen}
    rest = [q for q in order if q.subject in theirs and q.id not in taken]
    held_out = rest[:test]
    if (train or 0) > len(pool) or (test or 0) > len(rest) or min(train or 0, test or 0) < 0:
        found = f"there are {len(pool)} to train on and then {len(rest)} others"
        train, test = ("all" if number is None else number for number in (train, test))
        raise InputError(f"{train} training and {test} held-out questions asked for, but {found}")
    if missing := named[1] - {q.subject for q in held_out}:
        why = "all are trained on, or --test_questions is too small"
        raise InputError(f"no question of {min(missing)!r} is left to report on: {why}")
    return chosen, held_out


def sample(question: Question, candidates: int, number: int, seed: int) -> list[int]:
    """The `number`-th draw of so many candidates, or all there are, by seed and id alone."""
    rng = random.Random(f"{seed}/{question.id}/{number}")
    return rng.sample(range(question.K), min(candidates, question.K))


# ------------------------------------------------------------------------------------------- tokens
class Tree(NamedTuple):
    """A question in one language as token ids: prefix + branches[k] is the prompt with answer k."""

    prefix: list[int]  # what all answers share, never empty
    branches: list[list[int]]
    prompt_len: int = 0  # ids at a branch's start that are still the prompt's, and score nothing

    def tokens(self, packed: bool = True) -> int:
        """How many tokens dco.completion_logps feeds for it."""
        own = sum(len(branch) - 1 for branch in self.branches)
        return own + len(self.prefix) * (1 if packed else len(self.branches))

    def scored(self) -> list[int]:
        """How many tokens of each answer are scored."""
        return [len(branch) - self.prompt_len for branch in self.branches]


def encode(
    tokenizer: Any, questions: list[Question], langs: list[str], context: int | None = None
) -> list[list[Tree]]:
    """Trees, [question][language], split into prompt and answer as lm-evaluation-harness does.

    Spaces that end the prompt go to the answer. encode(prompt + answer) is what is fed; what lies
    beyond the length of encode(prompt) is scored, and never less than a token. Where answers change
    how the prompt's end is tokenised, they share only their common beginning, and the score stays
    exact. Raises InputError for a text longer than `context` tokens or without a token to predict
    the answer from.
    """
    some = 256
    if len(questions) > some:  # a tokenizer's own lists are ten times what is kept
        parts = (questions[first : first + some] for first in range(0, len(questions), some))
        return [row for part in parts for row in encode(tokenizer, part, langs, context)]
    bos = [i for i in tokenizer("a")["input_ids"][:1] if i == tokenizer.bos_token_id]
    texts, asked = [], []
    for question, lang in product(questions, langs):
        prompt = question.prompts[lang].rstrip()
        spaces = question.prompts[lang][len(prompt) :]
        answers = [spaces + answer for answer in question.answers[lang]]
        blanks = sorted({"", *(answer[: -len(answer.lstrip())] for answer in answers)})
        texts += [prompt + more for more in (*blanks, *answers)]
        asked.append((f"question {question.id!r}, {lang!r}", len(blanks), len(answers)))
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # a chat template may have begun the prompt with BOS already
    ids = (text if text[:1] == bos else bos + text for text in encoded)
    trees = []
    for where, blanks, K in asked:
        empty = [next(ids) for _ in range(blanks)]  # the prompt, also with spaces after it
        texts = [next(ids) for _ in range(K)]
        if dropped := [k for k, text in enumerate(texts) if text in empty]:
            lost = "has no token of its own: the tokenizer drops its characters"
            raise InputError(f"{where}: answer {dropped[0]} {lost}")
        if context and (longest := max(map(len, texts))) > context:
            limit = f"the model's context is {context}; leave the question out"
            raise InputError(f"{where}: {longest} tokens, but {limit}")
        start = min(len(empty[0]), *(len(text) - 1 for text in texts))
        shared = next((i for i in range(start) if len({text[i] for text in texts}) > 1), start)
        if not shared:
            raise InputError(f"{where}: no token stands before the answers; make the prompt longer")
        branches = [text[shared:] for text in texts]
        trees.append(Tree(texts[0][:shared], branches, start - shared))
    return [trees[q : q + len(langs)] for q in range(0, len(trees), len(langs))]


def batches(trees: list[Tree], max_tokens: int, packed: bool = True) -> list[list[int]]:
    """Indices of trees, longest first, in groups that feed at most `max_tokens` or are one tree."""
    groups, room = [], 0
    for i in sorted(range(len(trees)), key=lambda i: -trees[i].tokens(packed)):
        if (size := trees[i].tokens(packed)) > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(i)
        room -= size
    return groups


# ------------------------------------------------------------------------------------------ loaders
Loaded = Iterator[tuple[str, Question]]  # where it stands, for messages, and the question


def load(spec: str, langs: list[str], print0: Callable[[str], None] = print) -> list[Question]:
    """The questions of `spec` in these languages: atlas, or bmlama, mmmlu, xcsqa or jsonl:PATH.

    What a rule of the format drops is counted and printed. Raises InputError on anything that
    cannot be a question in every language: nothing is dropped, cut or guessed in silence.
    """
    kind, _, place = spec.partition(":")
    place = str(Path(place).expanduser()) if place else ""  # the shell leaves jsonl:~/x as it is
    if kind not in LOADERS or (kind != "atlas" and not place):
        raise InputError(f"--data {spec}: wanted is one of {', '.join(LOADERS)}, as in bmlama:DIR")
    if not langs or len(set(langs)) < len(langs):
        raise InputError(f"--langs {' '.join(langs)}: name each language once, and at least one")
    questions = []
    try:
        for where, question in LOADERS[kind](place, list(langs), print0):
            check(question, langs, where)
            questions.append(question)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise InputError(f"{error.filename or spec}: {error.strerror}") from error
    if not questions:
        raise InputError(f"--data {spec}: no questions in it")
    return questions


def check(question: Question, langs: list[str], where: str) -> None:
    """Raise InputError, naming `where` and the question, unless it is whole in every language."""
    wrong, K = [], {lang: len(question.answers[lang]) for lang in langs}
    for lang in langs:
        texts = [question.prompts[lang], *question.answers[lang]]
        if re.search("[\0\ud800-\udfff]", "".join([question.id, question.subject, *texts])):
            wrong += [f"its text in {lang!r} holds NUL or half a surrogate pair: a damaged file"]
        names = ["the prompt", *(f"answer {k}" for k in range(K[lang]))]
        wrong += [f"{x} in {lang!r} is empty" for x, text in zip(names, texts) if not text.strip()]
    if len(set(K.values())) > 1:
        wrong += [f"answers are parallel, yet their number differs: {K}"]
    if question.K < 2:
        wrong += [f"{question.K} answer; ranking needs two or more"]
    if question.gold is not None and not 0 <= question.gold < question.K:
        wrong += [f"gold {question.gold} is none of the answers 0 to {question.K - 1}"]
    if wrong:
        raise InputError(f"{where}: question {question.id!r}: {wrong[0]}")


def doubts(questions: list[Question], langs: list[str]) -> Iterator[str]:
    """What of questions that are whole would make a number mislead; no reason to stop."""
    equal = "offer two equal answers: no ranking tells them apart"
    permuted = "have the same answers in another order in another language; are they parallel?"
    spaced = "have a space at the prompt's end and another before an answer"
    counts = Counter()
    for question in questions:
        answers = [question.answers[lang] for lang in langs]
        pairs = combinations(answers, 2)
        spaces = [question.answers[x] for x in langs if question.prompts[x][-1:].isspace()]
        counts[equal] += any(len(set(each)) < len(each) for each in answers)
        counts[permuted] += any(a != b and sorted(a) == sorted(b) for a, b in pairs)
        counts[spaced] += any(text[0].isspace() for each in spaces for text in each)
    for what, number in counts.items():
        if number:
            yield f"{number} of {len(questions)} questions {what}"
    for a, b in combinations(langs, 2):
        if all((q.prompts[a], q.answers[a]) == (q.prompts[b], q.answers[b]) for q in questions):
            yield f"{a} and {b} are the same texts: their CLC is 100 whatever the model"


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file, byte-order mark or not; raises InputError if it is something else."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from error


def csv_rows(
    path: Path, names: list[str], skip: int = 0, delimiter: str = ","
) -> Iterator[tuple[str, list[str]]]:
    """Each row of a CSV file after the first `skip` and where it begins; a field for each name."""
    with open_text(path) as file:
        reader, line = csv.reader(file, delimiter=delimiter, strict=True), 1
        try:
            for number, row in enumerate(reader):
                where, line = f"{path}, line {line}", reader.line_num + 1
                if number >= skip and len(row) != len(names):
                    wanted = f"{len(names)}: {', '.join(names)}"
                    raise InputError(f"{where}: {len(row)} fields, not {wanted}")
                if number >= skip:
                    yield where, row
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Each line of a JSON Lines file, and where it stands."""

    def fields_once(pairs):  # json takes the last of two
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"field {max(names, key=names.count)!r} comes twice")
        return dict(pairs)

    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield f"{path}, line {number}", json.loads(line, object_pairs_hook=fields_once)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error


def file_for(place: str, lang: str, files: dict[str, Any], file: str) -> Any:
    """The one of a data set's files that is for a language; `file` is how it would be called."""
    if lang in files:
        return files[lang]
    if Path(place).is_file():
        raise InputError(f"{place} is a file; give the folder that it is in: {Path(place).parent}")
    if not Path(place).is_dir():
        fetch = "hf download NAME --repo-type dataset --local-dir DIR"
        raise InputError(f"{place}: no such folder; one of the hub comes by: {fetch}")
    there = ", ".join(sorted(files)) or "none"
    raise InputError(f"{place} has no language {lang!r} ({file}); it has {there}")


def atlas() -> list[dict[str, str]]:
    """The rows of atlas.tsv: relation, country, and the words in each language."""
    with open_text(Path(__file__).with_name("atlas.tsv")) as file:
        return list(csv.DictReader(file, delimiter="\t"))


def load_atlas(place: str, langs: list[str], print0: Callable) -> Loaded:
    """The embedded facts: 193 countries, five relations, en fr es sw, six candidates each."""
    rows = atlas()
    if absent := [lang for lang in langs if lang not in list(rows[0])[2:]]:
        raise InputError(f"atlas has no language {absent[0]!r}; it has {', '.join([*rows[0]][2:])}")
    of = {row["country"]: row for row in rows if row["relation"] == "of"}  # the country's name
    for template in (row for row in rows if row["relation"] == "template"):
        relation = template["country"]
        facts = {row["country"]: row for row in rows if row["relation"] == relation}
        values = list({row["en"]: row for row in facts.values()}.values())  # each answer once
        for country, fact in facts.items():
            id = f"{relation}-{country}"
            rng = random.Random(id)
            chosen = [fact, *rng.sample([row for row in values if row["en"] != fact["en"]], 5)]
            rng.shuffle(chosen)
            prompts = {lang: template[lang].replace("{}", of[country][lang]) for lang in langs}
            answers = {lang: tuple(" " + row[lang] for row in chosen) for lang in langs}
            question = Question(id, relation, chosen.index(fact), prompts, answers)
            yield f"atlas.tsv, {country}", question


def load_bmlama(place: str, langs: list[str], print0: Callable) -> Loaded:
    """BMLAMA-17 and -53: LANG.tsv; sentence, answer, candidates, subject; line n is parallel.

    The prompt is the sentence up to its mask. An answer is a candidate and what follows the mask,
    if that has a letter: a bare full stop is left out, as in the paper's prefixes and words. The id
    is the line. Candidates are parallel by position, also where translations repeat.
    """
    tables, first = {}, langs[0]
    files = {path.stem: path for path in Path(place).glob("*.tsv")}
    for lang in langs:
        path = file_for(place, lang, files, f"{lang}.tsv")
        with open_text(path) as file:
            if "<mask>" in file.readline():
                raise InputError(f"{path}, line 1: a question stands where the header should")
        fields = ["sentence", "answer", "candidates", "subject"]  # header of zh.tsv: a stray tab
        tables[lang] = list(csv_rows(path, fields, skip=1, delimiter="\t"))
        if (n := len(tables[lang])) != (there := len(tables[first])):
            raise InputError(f"{path}: {n} rows, but {first}.tsv has {there}; line n must be one")
    opening = 0
    for line, aligned in enumerate(zip(*tables.values()), 2):
        prompts, answers, golds = {}, {}, []
        for lang, (where, (sentence, gold, names, _)) in zip(langs, aligned):
            if (times := sentence.count("<mask>")) != 1:
                raise InputError(f"{where}: {times} times <mask> in {sentence!r}, not once")
            if gold not in (each := names.split(", ")):
                raise InputError(f"{where}: the answer {gold!r} is none of {names!r}")
            prompts[lang], after = sentence.split("<mask>")
            after = after if any(map(str.isalnum, after)) else ""
            answers[lang] = tuple(name + after if name.strip() else "" for name in each)
            golds.append({k for k, name in enumerate(each) if name == gold})
        if not all(prompt.strip() for prompt in prompts.values()):
            opening += 1
            continue
        same = set.intersection(*golds)
        if not same and len({len(a) for a in answers.values()}) == 1:
            others = (at for (at, _), indices in zip(aligned, golds) if not indices & golds[0])
            why = f"the answer is another candidate than in {first}: they are not parallel"
            raise InputError(f"{next(others, where)}: {why}")
        subject = aligned[0][1][3]  # in the first language
        yield where, Question(str(line), subject, min(same, default=None), prompts, answers)
    if opening:
        print0(f"{place}: dropped {opening} questions in all languages: <mask> opens the sentence")


LETTERS = "ABCDEFGHIJ"


class Row(NamedTuple):
    """A multiple-choice question in one language."""

    where: str
    id: str
    subject: str
    question: str
    options: list[str]
    key: str  # the letter of the right option; empty where the file does not tell


def align(place: str, rows: dict[str, list[Row]], print0: Callable, most: float) -> Loaded:
    """Join the languages' rows on their ids, with lm-evaluation-harness's prompt; answers: letters.

    Questions that are not in every language, or whose key is not the same in all, are dropped and
    counted; gold is None where a language has no key. Raises InputError where keys differ in more
    than the share `most` of the others: then letters are no parallel answers.
    """
    joined = {}  # {id: {language: row}}
    for lang in rows:
        for row in rows[lang]:
            if (twin := joined.setdefault(row.id, {}).setdefault(lang, row)) is not row:
                raise InputError(f"{row.where}: question {row.id!r} stands at {twin.where} already")
    shared = {i: found for i, found in joined.items() if len(found) == len(rows)}
    keys = {i: {row.key for row in found.values()} for i, found in shared.items()}
    known = [i for i in shared if "" not in keys[i]]
    conflicting = [i for i in known if len(keys[i]) > 1]
    if len(conflicting) > most * len(known):
        example, found = conflicting[0], shared[conflicting[0]]
        letters = "; ".join(f"{lang} {row.key} ({row.where})" for lang, row in found.items())
        count = f"the right letter of {len(conflicting)} of {len(known)} questions differs between"
        why = "Options or rows stand in another order; give an aligned copy"
        raise InputError(f"{place}: {count} languages, as of {example!r}: {letters}. {why}")
    keyless = len(shared) - len(known)
    for number, what in (
        (len(joined) - len(shared), "dropped {} questions that are not in every language"),
        (keyless, "{} questions lack an answer key: they count for consistency alone, if parallel"),
        (len(conflicting), "dropped {} questions in all languages: their answer keys differ"),
    ):
        if number:
            print0(f"{place}: {what.format(number)}")
    for i in conflicting:
        del shared[i]
    for i, found in shared.items():
        prompts, answers = {}, {}
        for lang, row in found.items():
            if not row.question.strip():
                raise InputError(f"{row.where}: the question {i!r} is empty")
            lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, row.options)]
            prompts[lang] = "\n".join([row.question.strip(), *lettered, "Answer:"])
            answers[lang] = tuple(f" {letter}" for letter in LETTERS[: len(row.options)])
        gold = None if "" in keys[i] else LETTERS.index(*keys[i])
        yield row.where, Question(i, row.subject, gold, prompts, answers)


def load_mmmlu(place: str, langs: list[str], print0: Callable) -> Loaded:
    """MMMLU, `[test/]mmlu_XX-YY.csv`, and MMLU as first published, in English or translated.

    The latter is `<subject>_test[_<lang>].csv`, a file a subject, without header. A plain code
    stands for its locale. Row n of a subject is the same question in every language.
    """
    files, rows, sizes, taken = {}, {}, {}, {}  # files: [language or locale][source]
    for root in ("", "test", "data/test"):
        for path in sorted(Path(place, root).glob("*.csv")):
            if name := re.fullmatch(r"mmlu_([A-Za-z]+-[A-Za-z]+)\.csv", path.name):
                locale, subject, source = name[1].lower(), "", path
            elif name := re.fullmatch(r"(.+?)_test(?:_([\w-]+))?\.csv", path.name):
                subject, locale = name[1], (name[2] or "en").lower()
                source = path.with_name(path.name.replace(subject, "<subject>", 1))
            else:
                continue
            for code in {locale, locale.partition("-")[0]}:
                files.setdefault(code, {}).setdefault(source, []).append((path, subject))
    for lang in langs:
        name = "<subject>_test.csv of MMLU" if lang == "en" else f"mmlu_{lang}-XX.csv"
        sources = file_for(place, lang.lower(), files, name)
        source, *others = sources
        if others:
            paths = " and ".join(map(str, sources))
            raise InputError(f"{place} has {lang!r} more than once: {paths}; name or keep one")
        if (twin := taken.setdefault(source, lang)) != lang:
            raise InputError(f"--langs: {twin} and {lang} are both {source}")
        rows[lang] = [row for part in sources[source] for row in mmlu_rows(*part)]
        for subject, n in Counter(row.subject for row in rows[lang]).items():
            if n != (there := sizes.setdefault(subject, (n, lang)))[0]:
                counts = f"{subject} has {n} rows in {lang}, {there[0]} in {there[1]}"
                raise InputError(f"{place}: {counts}; row n must be one question")
    yield from align(place, rows, print0, most=0.5)  # of unrelated rows three in four differ


def mmlu_rows(path: Path, subject: str) -> Iterator[Row]:
    """The rows of a file of either layout, whose ids are subject/row."""
    letters = ["A", "B", "C", "D"]
    if subject:
        rows = enumerate(csv_rows(path, ["question", *letters, "letter of the answer"]))
        numbered = [(where, str(n), *row, subject) for n, (where, row) in rows]
    else:
        names = ["row of the subject", "Question", *letters, "Answer", "Subject"]
        numbered = [(where, *row) for where, row in csv_rows(path, names)]
        if not numbered or list(numbered.pop(0)[2:]) != names[1:]:
            raise InputError(f"{path}, line 1: the header is not {', '.join(names)}")
    for where, n, question, *options, key, subject in numbered:
        if not n.isdigit() or key.strip() not in letters:
            wanted = "wanted are a number and one of A, B, C, D"
            raise InputError(f"{where}: row {n!r} with answer {key!r}: {wanted}")
        yield Row(where, f"{subject}/{n}", subject, question, options, key.strip())


def load_xcsqa(place: str, langs: list[str], print0: Callable) -> Loaded:
    """X-CSQA, `[X-CSQA/]<lang>/dev.jsonl`, joined on id; without any, the keyless `test.jsonl`.

    The published files permute the options of each language, which is refused (see `align`).
    """
    files, rows = {"dev": {}, "test": {}}, {}
    for root, part in product(("", "X-CSQA", "X-CSR_datasets/X-CSQA"), files):
        for path in Path(place, root).glob(f"*/{part}.jsonl"):
            lang = "ja" if path.parent.name == "jap" else path.parent.name
            if (twin := files[part].setdefault(lang, path)) != path:
                raise InputError(f"{place} has {lang!r} twice: {twin} and {path}; keep one")
    part = "dev" if files["dev"].keys() & set(langs) else "test"
    for lang in langs:
        path = file_for(place, lang, files[part], f"X-CSQA/{lang}/dev.jsonl")
        rows[lang] = list(xcsqa_rows(path))
    yield from align(place, rows, print0, most=0.01)


def xcsqa_rows(path: Path) -> Iterator[Row]:
    """The rows of a dev.jsonl or test.jsonl."""
    for where, line in json_lines(path):
        try:
            id, question, key = line["id"], line["question"], line.get("answerKey")
            key = "" if key is None else key
            labels, options = zip(*((c["label"], c["text"]) for c in question["choices"]))
            row = Row(where, id, "", question["stem"], list(options), key)
            "".join([id, row.question, key, *labels, *options])  # all are strings
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            form = "id, question with stem and choices with label and text, answerKey: all strings"
            raise InputError(f"{where}: not a question of X-CSQA ({error!r}): {form}") from error
        if labels != tuple(LETTERS[: len(labels)]) or key and key not in labels:
            given = f"choices {', '.join(labels)} with answer {key!r}"
            raise InputError(f"{where}: question {id!r}: {given}, not A, B, ... and one of them")
        yield row


def load_jsonl(place: str, langs: list[str], print0: Callable) -> Loaded:
    """A user's own: a question a line, the fields of Question; subject and gold may be missing."""
    lines, unread, run_together = {}, Counter(), 0
    wanted = {"id": str | int, "subject": str, "gold": int | None, "prompts": dict, "answers": dict}
    for number, (where, fields) in enumerate(json_lines(Path(place)), 1):
        given = {"subject": "", "gold": None, **fields} if isinstance(fields, dict) else {}
        unread.update(given.keys() - wanted.keys())
        for name, kind in wanted.items():
            value = given.get(name, False)
            if not isinstance(value, kind) or isinstance(value, bool):
                wrong = f"field {name!r} is missing or of another type"
                wrong += " (a JSON array; wanted is an object a line)" * isinstance(fields, list)
                raise InputError(f"{where}: {wrong}; the README shows a line")
        id, prompts, answers = str(given["id"]), given["prompts"], given["answers"]
        for lang in langs:
            if lang not in prompts or lang not in answers:
                nothing = f"question {id!r} has nothing in language {lang!r}"
                raise InputError(f"{where}: {nothing}; it has {', '.join(prompts) or 'none'}")
            texts = answers[lang] if isinstance(answers[lang], list) else [None]
            if not all(isinstance(text, str) for text in (prompts[lang], *texts)):
                wrong = f"in {lang!r}, prompts must hold a string, answers a list of strings"
                raise InputError(f"{where}: {wrong}")
        if (first := lines.setdefault(id, number)) != number:
            raise InputError(f"{where}: id {id!r} stands at {place}, line {first} already")
        prompts = {lang: prompts[lang] for lang in langs}
        answers = {lang: tuple(map(sys.intern, answers[lang])) for lang in langs}  # kept once
        seams = [f"{prompts[lang][-1:]}{text[:1]}" for lang in langs for text in answers[lang]]
        run_together += any(re.fullmatch("[A-Za-z]{2}", seam) for seam in seams)
        yield where, Question(id, sys.intern(given["subject"]), given["gold"], prompts, answers)
    for name, times in unread.items():
        for near in get_close_matches(name, wanted, 1):
            print0(f"{place}: {times} lines have a field {name!r}, which is not read; {near!r}?")
    if run_together:
        found = f"in {run_together} questions a word of the prompt runs into an answer"
        print0(f"{place}: {found}, which is appended as written; begin it with a space?")


LOADERS = {"atlas": load_atlas, "bmlama": load_bmlama, "mmmlu": load_mmmlu, "xcsqa": load_xcsqa}
LOADERS["jsonl"] = load_jsonl
TRAIN_QUESTIONS = {"atlas": 435, "bmlama": 5000, "mmmlu": 5000, "xcsqa": 800}  # App. H, Table 4
