"""What goes in: parallel questions, their split and sampling, and their tokens as prefix trees.

Covers the data sets of section 5 and App. H. Leaves out scores (rankc.py) and batches of training
(train.py). A question asks the same thing in every language and offers the same answers, in the
same order, in each; "languages" may be any views of a question, such as paraphrases of its prompt.
"""

import csv
import hashlib
import io
import json
import math
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


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

    Where subjects are named (section 6.3), each part takes its own; named for one part alone, the
    other takes the others. Raises InputError for an unknown subject and for too few questions.
    """
    subjects = {question.subject for question in questions}
    unknown = {*train_subjects, *test_subjects} - subjects
    if unknown:
        raise InputError(f"no subject {min(unknown)!r}; there are {', '.join(sorted(subjects))}")
    to_train = set(train_subjects) or subjects - set(test_subjects) or subjects
    to_test = set(test_subjects) or subjects - set(train_subjects) or subjects
    # By seed and id alone, so that another language, or another machine, changes neither part.
    order = sorted(questions, key=lambda q: hashlib.sha256(f"{seed}/{q.id}".encode()).digest())
    pool = [question for question in order if question.subject in to_train]
    chosen = pool[:train]
    taken = {question.id for question in chosen}
    rest = [q for q in order if q.subject in to_test and q.id not in taken]
    least = 1 if test is None else test  # without a held-out question there is nothing to report
    if not (0 <= (train or 0) <= len(pool) and 0 <= least <= len(rest)):
        asked = f"--train_questions {train} and --test_questions {test}"
        raise InputError(f"{asked}: there are {len(pool)} to train on, then {len(rest)} others")
    return chosen, rest[:test]


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

    def tokens(self) -> int:
        """How many tokens dco.completion_logps feeds for it: all but the last of each answer."""
        return len(self.prefix) + sum(len(branch) - 1 for branch in self.branches)


def encode(
    tokenizer: Any, questions: list[Question], langs: list[str], context=math.inf, vocab=math.inf
) -> list[list[Tree]]:
    """Trees, [question][language], split into prompt and answer as lm-evaluation-harness does.

    Raises InputError, naming the question, for a text longer than `context` tokens, a token that is
    not below `vocab`, an answer that becomes no token, and a prompt without one before it.
    """
    text = questions[0].prompts[langs[0]] + questions[0].answers[langs[0]][0]
    bare, ids = (tokenizer(text, add_special_tokens=x)["input_ids"] for x in (False, True))
    starts = [n for n in range(len(ids) + 1) if ids[n : n + len(bare)] == bare]
    how = (ids[: starts[0]], context, vocab)  # first: BOS, or </s> with XGLM, nothing with Qwen
    return [[encode_one(tokenizer, q, lang, *how) for lang in langs] for q in questions]


def encode_one(
    tokenizer: Any, question: Question, lang: str, first: list, context: float, vocab: float
) -> Tree:
    """The tree of a question in one language, by lm-evaluation-harness's rule.

    Spaces that end the prompt go to the answer. What is fed is encode(prompt + answer), and what
    lies beyond the length of encode(prompt) is scored, at least a token. Where answers change how
    the prompt's end is tokenised, they share only their common beginning: the score stays exact.
    """
    prompt = question.prompts[lang].rstrip()
    spaces = question.prompts[lang][len(prompt) :]
    answers = [spaces + answer for answer in question.answers[lang]]
    blanks = sorted({answer[: -len(answer.lstrip())] for answer in answers})
    texts = [prompt + more for more in ("", *blanks, *answers)]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # Not twice, where a chat template has put it before the prompt already.
    encoded = [ids if ids[: len(first)] == first else first + ids for ids in encoded]
    empty, answered = encoded[: 1 + len(blanks)], encoded[1 + len(blanks) :]

    where = f"question {question.id!r}, {lang!r}"
    for k, ids in enumerate(answered):
        if ids in empty:
            raise InputError(f"{where}: answer {k} has no token: the tokenizer drops its text")
    longest = max(len(ids) for ids in answered)
    if longest > context:
        raise InputError(f"{where}: {longest} tokens, but the model's context is {context}")
    largest = max(max(ids) for ids in answered)
    if largest >= vocab:
        raise InputError(f"{where}: token {largest}, but the model's vocabulary is {vocab}")
    # What is scored begins here, in all answers: a token earlier where one merges with the prompt.
    start = min(len(empty[0]), *(len(ids) - 1 for ids in answered))
    shared = 0
    while shared < start and len({ids[shared] for ids in answered}) == 1:
        shared += 1
    if shared == 0:
        raise InputError(f"{where}: no token stands before the answers; make the prompt longer")
    return Tree(answered[0][:shared], [ids[shared:] for ids in answered], start - shared)


# ------------------------------------------------------------------------------------------ loaders
Questions = Iterator[tuple[str, Question]]  # where it stands, for messages, and the question
Rows = Iterator[tuple[str, list[str]]]  # the same of a file's row
# App. H, Table 4; atlas is ours.
TRAIN_QUESTIONS = {"atlas": 435, "bmlama": 5000, "mmmlu": 5000, "xcsqa": 800}


def load(spec: str, langs: list[str], print0: Callable[[str], None] = print) -> list[Question]:
    """The questions of `spec` in these languages: atlas, or bmlama, mmmlu, xcsqa or jsonl:PATH.

    What a rule of the format drops is counted and printed. Raises InputError on anything else that
    is no question in every language.
    """
    loaders = {"atlas": load_atlas, "bmlama": load_bmlama, "mmmlu": load_mmmlu}
    loaders |= {"xcsqa": load_xcsqa, "jsonl": load_jsonl}
    kind, _, place = spec.partition(":")
    if kind not in loaders or (kind != "atlas" and not place):
        raise InputError(f"--data {spec}: expected one of {', '.join(loaders)}, as in bmlama:DIR")
    if not langs or len(set(langs)) < len(langs):
        raise InputError(f"--langs {' '.join(langs)}: name each language once, and at least one")
    questions, ids = [], set()
    for where, question in loaders[kind](Path(place).expanduser(), langs, print0):
        check(question, langs, where)
        if question.id in ids:
            raise InputError(f"{where}: the id {question.id!r} comes twice")
        ids.add(question.id)
        questions.append(question)
    if not questions:
        raise InputError(f"--data {spec}: no questions in it")
    return questions


def check(question: Question, langs: list[str], where: str) -> None:
    """Raise InputError, naming `where` and the question, unless it is whole in every language."""
    counts = {lang: len(question.answers[lang]) for lang in langs}
    texts = [text for lang in langs for text in (question.prompts[lang], *question.answers[lang])]
    if len(set(counts.values())) > 1 or question.K < 2:
        wrong = f"answers must be parallel, two or more; there are {counts}"
    elif question.gold is not None and not 0 <= question.gold < question.K:
        wrong = f"gold {question.gold} is none of the answers 0 to {question.K - 1}"
    elif not all(isinstance(text, str) and text.strip() for text in texts):
        wrong = "a prompt or an answer is empty, or no text"
    else:
        return
    raise InputError(f"{where}: question {question.id!r}: {wrong}")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark, line ends as they are."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable UTF-8 file ({error})") from error


def csv_rows(path: Path, columns: int, delimiter: str, header: bool) -> Rows:
    """Where each row of a file begins (it may take several lines), and its fields, so many.

    What a header says is not looked at: that of BMLAMA-17's zh.tsv has a stray tab.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for number, row in enumerate(reader):
            where = f"{path}, line {line}"
            line = reader.line_num + 1
            if number == 0 and header:
                continue
            if len(row) != columns:
                raise InputError(f"{where}: {len(row)} fields, not {columns}: {row}")
            yield where, row
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a JSON Lines file, and where it stands."""
    for number, line in enumerate(io.StringIO(read_text(path)), start=1):
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # raises for half of a character
            yield f"{path}, line {number}", value
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error


def field(where: str, line: Any, name: str, kind: Any, default: Any = None) -> Any:
    """What a JSON object has under a name. Raises InputError unless it is there, of this type."""
    value = line.get(name, default) if isinstance(line, dict) else default
    if not isinstance(value, kind) or isinstance(value, bool):  # to Python, True is an int
        raise InputError(f"{where}: {name!r} is missing or of another type")
    return value


def load_atlas(place: Path, langs: list[str], print0: Callable) -> Questions:
    """The embedded facts: 193 countries, five relations, en fr es sw, six candidates each."""
    unknown = set(langs) - {"en", "fr", "es", "sw"}
    if unknown:
        raise InputError(f"atlas has no language {min(unknown)!r}; it has en, fr, es, sw")
    relations = {}  # {relation: {country: row}}
    text = read_text(Path(__file__).with_name("atlas.tsv"))
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        relations.setdefault(row["relation"], {})[row["country"]] = row
    names = relations.pop("of")  # the countries' own
    templates = relations.pop("template")  # a sentence a relation, {} for the country
    for relation, template in templates.items():
        facts = relations[relation]
        values = list({row["en"]: row for row in facts.values()}.values())  # each answer once
        for country, fact in facts.items():
            id = f"{relation}-{country}"
            rng = random.Random(id)
            candidates = [fact, *rng.sample([row for row in values if row["en"] != fact["en"]], 5)]
            rng.shuffle(candidates)
            prompts, answers = {}, {}
            for lang in langs:
                prompts[lang] = template[lang].replace("{}", names[country][lang])
                answers[lang] = tuple(" " + row[lang] for row in candidates)
            gold = candidates.index(fact)
            yield f"atlas.tsv, {country}", Question(id, relation, gold, prompts, answers)


def load_bmlama(place: Path, langs: list[str], print0: Callable) -> Questions:
    """BMLAMA-17, -53: LANG.tsv; sentence, answer, candidates, subject; row n is parallel.

    The prompt is the sentence up to its mask. An answer is a candidate and what follows the mask,
    if that has a letter: a bare full stop is left out, as in the paper's prefixes and words. The id
    is the number of the row. Candidates are parallel by position, also where translations repeat.
    """
    files = [list(csv_rows(place / f"{lang}.tsv", 4, "\t", header=True)) for lang in langs]
    sizes = [len(rows) for rows in files]
    if len(set(sizes)) > 1:
        raise InputError(f"{place}: row n must be one question, but {langs} have {sizes} rows")
    opening, alone = 0, 0  # rows that are dropped
    for line, rows in enumerate(zip(*files, strict=True), start=2):
        prompts, answers = {}, {}
        gold = set(range(len(rows[0][1][2].split(", "))))  # by all languages so far
        for lang, (where, (sentence, answer, candidates, _)) in zip(langs, rows, strict=True):
            names = candidates.split(", ")
            if sentence.count("<mask>") != 1 or answer not in names:
                wanted = "a sentence with one <mask>, then one of the candidates, then these"
                raise InputError(f"{where}: not {wanted}: {sentence!r}, {answer!r}, {candidates!r}")
            prompts[lang], after = sentence.split("<mask>")
            if not any(character.isalnum() for character in after):
                after = ""
            # An empty candidate stays empty, for `check` to see.
            answers[lang] = tuple(name + after if name.strip() else "" for name in names)
            gold = {k for k in gold if names[k : k + 1] == [answer]}  # translations may repeat
            if not gold:
                raise InputError(f"{where}: the answer is another candidate than in {langs[0]}")
        if not all(prompt.strip() for prompt in prompts.values()):
            opening += 1  # nothing stands before the mask to predict an answer from
        elif all(len(names) == 1 for names in answers.values()):
            alone += 1  # as in 34 rows of BMLAMA-53
        else:
            yield where, Question(str(line), rows[0][1][3], min(gold), prompts, answers)
    if opening + alone:
        why = f"{opening} open with <mask>, {alone} have one candidate"
        print0(f"{place}: dropped {opening + alone} questions in all languages: {why}")


LETTERS = "ABCDEFGHIJ"


class Row(NamedTuple):
    """A multiple-choice question in one language."""

    where: str
    id: str
    subject: str
    question: str
    options: list[str]
    key: str  # the letter of the right option


def align(place: Path, rows: dict[str, list[Row]], print0: Callable) -> Questions:
    """Join the languages' rows on their ids, under lm-evaluation-harness's prompt.

    Questions that are not in every language, or whose keys differ, are dropped and counted. Raises
    InputError where more than a tenth of the keys differ: then options stand in another order, and
    letters are not parallel. (MMMLU's differ in a few of a thousand, X-CSQA's in most.)
    """
    joined = {}  # {id: {lang: row}}
    for lang in rows:
        for row in rows[lang]:
            if row.key not in list(LETTERS[: len(row.options)]) or not row.question.strip():
                raise InputError(f"{row.where}: no question with {row.key!r} among its answers")
            twin = joined.setdefault(row.id, {}).setdefault(lang, row)
            if twin is not row:
                raise InputError(f"{row.where}: question {row.id!r} stands at {twin.where} already")
    shared = [by_lang for by_lang in joined.values() if len(by_lang) == len(rows)]
    aligned, differing = [], []
    for by_lang in shared:
        same = len({row.key for row in by_lang.values()}) == 1
        (aligned if same else differing).append(by_lang)
    if len(differing) > len(shared) / 10:
        letters = {row.where: row.key for row in differing[0].values()}
        raise InputError(
            f"{place}: the right letter of {len(differing)} of {len(shared)} questions differs "
            f"between languages, as {letters}: options or rows stand in another order"
        )
    if len(aligned) < len(joined):
        why = f"{len(joined) - len(shared)} not in every language, {len(differing)} of other keys"
        print0(f"{place}: dropped {len(joined) - len(aligned)} questions in all languages: {why}")
    for by_lang in aligned:
        prompts, answers = {}, {}
        for lang, row in by_lang.items():
            letters = LETTERS[: len(row.options)]
            options = [f"{letter}. {text}" for letter, text in zip(letters, row.options)]
            prompts[lang] = "\n".join([row.question.strip(), *options, "Answer:"])
            answers[lang] = tuple(f" {letter}" for letter in letters)
        gold = LETTERS.index(row.key)
        yield row.where, Question(row.id, row.subject, gold, prompts, answers)


def load_mmmlu(place: Path, langs: list[str], print0: Callable) -> Questions:
    """MMMLU, [test/]mmlu_XX-YY.csv, and, for English, MMLU as first published, <subject>_test.csv.

    Translations of MMLU as <subject>_test_<lang>.csv do as well. A plain code stands for its
    locale. Row n of a subject is the same question in every language.
    """
    rows = {lang: [] for lang in langs}
    for lang in langs:
        ending = "_test.csv" if lang == "en" else f"_test_{lang}.csv"
        published, originals = [], []
        for folder in (place, place / "test", place / "data" / "test"):
            for name in (f"mmlu_{lang.upper()}.csv", f"mmlu_{lang.upper()}-*.csv"):
                published += folder.glob(name)
            originals += sorted(folder.glob(f"*{ending}"))
        if len(published) + bool(originals) != 1:
            there = [path.name for path in (*published, *originals)]
            wanted = f"one mmlu_{lang.upper()}-XX.csv, or *{ending}"
            raise InputError(f"{place}, {lang!r}: expected {wanted}; there are {there}")
        lines = []  # where, number, question, options, key, subject
        for path in published:
            lines += [(where, *fields) for where, fields in csv_rows(path, 8, ",", header=True)]
        for path in originals:
            subject = path.name.removesuffix(ending)
            for n, (where, fields) in enumerate(csv_rows(path, 6, ",", header=False)):
                lines.append((where, n, *fields, subject))
        for where, n, question, *options, key, subject in lines:
            rows[lang].append(Row(where, f"{subject}/{n}", subject, question, options, key.strip()))
    for subject in sorted({row.subject for row in rows[langs[0]]}):
        sizes = [sum(row.subject == subject for row in rows[lang]) for lang in langs]
        if len(set(sizes) - {0}) > 1:  # one row missing would pair all after it wrongly
            raise InputError(f"{place}: {subject} has {sizes} rows in {langs}: not parallel")
    yield from align(place, rows, print0)


def load_xcsqa(place: Path, langs: list[str], print0: Callable) -> Questions:
    """X-CSQA, [X-CSQA/]<lang>/dev.jsonl, joined on id. (test.jsonl has no keys to align by.)

    The published files permute the options of each language, which `align` refuses. An aligned copy
    comes as jsonl:FILE, under the prompt that `align` writes, with the settings of Apps. G and H,
    `--train_questions 800 --pairs_per_question 7` and for Gemma `--lr 1e-6`.
    """
    rows = {lang: [] for lang in langs}
    for lang in langs:
        folder = "jap" if lang == "ja" else lang  # as it is called on disk
        root = place / "X-CSQA" if (place / "X-CSQA").is_dir() else place
        for where, line in json_lines(root / folder / "dev.jsonl"):
            question = field(where, line, "question", dict)
            choices = field(where, question, "choices", list)
            labels = [field(where, choice, "label", str) for choice in choices]
            options = [field(where, choice, "text", str) for choice in choices]
            if labels != list(LETTERS[: len(labels)]):
                raise InputError(f"{where}: the choices are {labels}, not A, B and so on")
            id, stem = field(where, line, "id", str), field(where, question, "stem", str)
            key = field(where, line, "answerKey", str)
            rows[lang].append(Row(where, id, "", stem, options, key))
    yield from align(place, rows, print0)


def load_jsonl(place: Path, langs: list[str], print0: Callable) -> Questions:
    """A user's own: a question a line, the fields of Question; subject and gold may be missing."""
    for where, line in json_lines(place):
        id = str(field(where, line, "id", str | int))
        subject = field(where, line, "subject", str, default="")
        gold = field(where, line, "gold", int | None)
        prompts, answers = {}, {}
        for lang in langs:
            prompts[lang] = field(f"{where}, prompts", line.get("prompts"), lang, str)
            answers[lang] = tuple(field(f"{where}, answers", line.get("answers"), lang, list))
        yield where, Question(id, subject, gold, prompts, answers)
