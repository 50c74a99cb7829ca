"""What goes in: parallel questions, their split and sampling, and their tokens as prefix trees.

Covers the data sets of section 5 and App. H. Leaves out scores (rankc.py) and batches of training
(train.py). A question asks the same thing in every language and offers the same answers, in the
same order, in each; "languages" may be any views of a question, such as paraphrases of its prompt.
"""
import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class InputError(ValueError):
    """Input that cannot be used; the message names the file and line, or the question."""


@dataclass(frozen=True)
class Question:
    """A parallel question: answers[lang][k] is the same answer in every language.

    The text that a model sees is prompts[lang] + answers[lang][k], exactly as written.
    """

    id: str
    subject: str
    gold: int | None  # index of the right answer, None where it is not known
    prompts: dict[str, str]
    answers: dict[str, tuple[str, ...]]


# ------------------------------------------------------------------------------------ loaders


def load(spec: str, langs: list[str], say: Callable[[str], None] = print) -> list[Question]:
    """The questions of `spec` (`atlas`, `bmlama:DIR`, `jsonl:FILE`) in these languages.

    What a rule of the format drops is counted and told to `say`. Raises InputError on anything that
    cannot be a question in every language: nothing is dropped, cut or guessed in silence.
    """
    kind, _, place = spec.partition(":")
    if kind not in LOADERS:
        raise InputError(f"--data {spec}: unknown kind {kind!r}; there are {', '.join(LOADERS)}")
    if kind != "atlas" and not place:
        raise InputError(f"--data {spec}: say where it lies, as in {kind}:PATH")
    if not langs or len(set(langs)) < len(langs):
        raise InputError(f"--langs {' '.join(langs)}: name each language once, and at least one")
    questions, lines = [], {}
    for where, question in LOADERS[kind](place, list(langs), say):
        if question.id in lines:
            raise InputError(f"{where}: id {question.id!r} stands at {lines[question.id]} already")
        lines[question.id] = where
        check(question, langs, where)
        questions.append(question)
    if not questions:
        raise InputError(f"--data {spec}: no questions in it")
    return questions


def check(question: Question, langs: list[str], where: str) -> None:
    """Raise InputError, naming `where` and the question, unless it is whole in every language."""

    def refuse(what: str):
        raise InputError(f"{where}: question {question.id!r}: {what}")

    counts = {}
    for lang in langs:
        if not question.prompts[lang].strip():
            refuse(f"the prompt in {lang!r} is empty")
        for k, answer in enumerate(question.answers[lang]):
            if not answer.strip():
                refuse(f"answer {k} in {lang!r} is empty")
        counts[lang] = len(question.answers[lang])
    if len(set(counts.values())) > 1:
        refuse(f"answers are parallel, yet their number differs: {counts}")
    if (K := counts[langs[0]]) < 2:
        refuse(f"{K} answer; ranking needs two or more")
    if question.gold is not None and not 0 <= question.gold < K:
        refuse(f"gold {question.gold} is none of the answers 0 to {K - 1}")


@contextmanager
def reading(path: Path):
    """Open a UTF-8 file, byte-order mark or not, and turn what may go wrong into InputError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except csv.Error as error:
        raise InputError(f"{path}: {error}") from error


def atlas() -> list[dict[str, str]]:
    """The rows of atlas.tsv: relation, country, and the words in each language."""
    with reading(Path(__file__).with_name("atlas.tsv")) as file:
        return list(csv.DictReader(file, delimiter="\t"))


Loaded = Iterator[tuple[str, Question]]  # where it stands, for messages, and the question


def load_atlas(place: str, langs: list[str], say) -> Loaded:
    """The embedded facts: 40 countries x 6 relations in en fr es sw, six candidates each."""
    rows = atlas()
    there = list(rows[0])[2:]
    for lang in langs:
        if lang not in there:
            raise InputError(f"atlas has no language {lang!r}; it has {', '.join(there)}")
    of = {row["country"]: row for row in rows if row["relation"] == "of"}  # "of Egypt"
    for template in (row for row in rows if row["relation"] == "template"):
        relation = template["country"]
        facts = {row["country"]: row for row in rows if row["relation"] == relation}
        values = list({row["en"]: row for row in facts.values()}.values())  # each answer once
        for country, fact in facts.items():
            rng = random.Random(f"{relation}-{country}")
            chosen = [fact, *rng.sample([row for row in values if row["en"] != fact["en"]], 5)]
            rng.shuffle(chosen)
            yield f"atlas.tsv, {country}", Question(
                id=f"{relation}-{country}",
                subject=relation,
                gold=chosen.index(fact),
                prompts={lang: template[lang].replace("{}", of[country][lang]) for lang in langs},
                answers={lang: tuple(" " + row[lang] for row in chosen) for lang in langs},
            )


def load_bmlama(place: str, langs: list[str], say) -> Loaded:
    """BMLAMA-17 and -53: LANG.tsv; sentence, answer, candidates, subject; line n is parallel.

    The prompt is the sentence up to its mask. An answer is a candidate and what follows the mask,
    if that has a letter: a bare full stop is left out, as in the paper's prefixes and words. The id
    is the line. Candidates are parallel by position, also where translations repeat.
    """
    tables = {}
    for lang in langs:
        path = Path(place, f"{lang}.tsv")
        if not path.is_file():
            there = ", ".join(sorted(p.stem for p in Path(place).glob("*.tsv"))) or "no .tsv file"
            raise InputError(f"{place} has no language {lang!r} ({lang}.tsv); it has {there}")
        with reading(path) as file:
            reader = csv.reader(file, delimiter="\t")
            next(reader, None)  # the header; in zh.tsv it has a stray tab
            tables[lang] = [(f"{path}, line {reader.line_num}", row) for row in reader]
        if len(tables[lang]) != len(tables[langs[0]]):
            raise InputError(f"{path}: {len(tables[lang])} rows, but {langs[0]}.tsv has "
                             f"{len(tables[langs[0]])}; line n must be the same question in both")
    opening = 0
    for line, aligned in enumerate(zip(*tables.values()), 2):
        prompts, answers, golds = {}, {}, {}
        for lang, (where, row) in zip(langs, aligned):
            if len(row) != 4:
                raise InputError(f"{where}: {len(row)} fields, not 4: sentence, answer, "
                                 "candidates, subject")
            sentence, gold, names = row[0], row[1], row[2].split(", ")
            if (times := sentence.count("<mask>")) != 1:
                raise InputError(f"{where}: {times} times <mask> in {sentence!r}, not once")
            if gold not in names:
                raise InputError(f"{where}: the answer {gold!r} is none of {row[2]!r}")
            prompts[lang], after = sentence.split("<mask>")
            after = after if any(map(str.isalnum, after)) else ""
            answers[lang] = tuple(name + after if name.strip() else "" for name in names)
            golds[lang] = {k for k, name in enumerate(names) if name == gold}
        if not all(prompt.strip() for prompt in prompts.values()):
            opening += 1
            continue
        same = set.intersection(*golds.values())
        if not same and len({len(a) for a in answers.values()}) == 1:
            raise InputError(f"{where}: the answer is another candidate than in {langs[0]}: "
                             "they are not parallel")
        subject, gold = aligned[0][1][3], min(same, default=None)
        yield aligned[-1][0], Question(str(line), subject, gold, prompts, answers)
    if opening:
        say(f"{place}: dropped {opening} questions in all languages: <mask> opens the sentence")


def load_jsonl(place: str, langs: list[str], say) -> Loaded:
    """A user's own: a question a line, the fields of Question; subject and gold may be missing."""
    with reading(Path(place)) as file:
        for number, line in enumerate(file, 1):
            where = f"{place}, line {number}"
            try:
                fields = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{where}: not JSON ({error})") from error
            wanted = {"id": (str, int), "subject": str, "gold": (int, type(None)), "prompts": dict,
                      "answers": dict}
            given = {"subject": "", "gold": None, **fields} if isinstance(fields, dict) else {}
            for name, kind in wanted.items():
                value = given.get(name, False)
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise InputError(f"{where}: field {name!r} is missing or of another type; "
                                     "the README shows a line")
            for lang in langs:
                if lang not in given["prompts"] or lang not in given["answers"]:
                    raise InputError(f"{where}: question {given['id']!r} has nothing in language "
                                     f"{lang!r}; it has {', '.join(given['prompts']) or 'none'}")
            prompts = {lang: given["prompts"][lang] for lang in langs}
            answers = {lang: given["answers"][lang] for lang in langs}
            if not all(isinstance(prompt, str) for prompt in prompts.values()):
                raise InputError(f"{where}: prompts must hold a string for each language")
            if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts)
                       for texts in answers.values()):
                raise InputError(f"{where}: answers must hold a list of strings for each language")
            answers = {lang: tuple(texts) for lang, texts in answers.items()}
            yield where, Question(str(given["id"]), given["subject"], given["gold"], prompts,
                                  answers)


LOADERS = {"atlas": load_atlas, "bmlama": load_bmlama, "jsonl": load_jsonl}
TRAIN_QUESTIONS = {"atlas": 160, "bmlama": 5000}  # App. H, Table 4; the rest is the test

# ---------------------------------------------------------------------- split and sampling (App. H)


def split(questions: list[Question], train: int, test: int | None, seed: int
          ) -> tuple[list[Question], list[Question]]:
    """The first `train` and the next `test` questions (None: all others) in an order drawn by seed.

    Adding a language or a process changes neither part. Raises InputError if there are too few
    questions.
    """
    order = sorted(questions, key=lambda q: hashlib.sha256(f"{seed}/{q.id}".encode()).digest())
    test = len(questions) - train if test is None else test
    if min(train, test) < 0 or train + test > len(questions):
        raise InputError(f"{train} training and {test} held-out questions asked for, but there are "
                         f"{len(questions)}")
    return order[:train], order[train:train + test]


def sample(question: Question, candidates: int, number: int, seed: int) -> list[int]:
    """The `number`-th draw of so many candidates, or all there are, by seed and id alone."""
    K = len(next(iter(question.answers.values())))
    return random.Random(f"{seed}/{question.id}/{number}").sample(range(K), min(candidates, K))


# ------------------------------------------------------------------------------------ tokens


class Tree(NamedTuple):
    """A question in one language as token ids: prefix + branches[k] is the prompt with answer k."""

    prefix: list[int]  # what all answers share, never empty
    branches: list[list[int]]
    lead: int = 0  # how many ids at the start of a branch are still the prompt's, and score nothing

    def tokens(self, packed: bool = True) -> int:
        """How many tokens dco.completion_logps feeds for it."""
        own = sum(len(branch) - 1 for branch in self.branches)
        return own + len(self.prefix) * (1 if packed else len(self.branches))


def encode(tokenizer, questions: list[Question], langs: list[str], context: int | None = None,
           whole: bool = False) -> list[list[Tree]]:
    """Trees, [question][language], split into prompt and answer as lm-evaluation-harness does.

    Spaces that end the prompt go to the answer. encode(prompt + answer) is what is fed; what lies
    beyond the length of encode(prompt) is scored, and never less than a token. Where answers change
    how the prompt's end is tokenised, they share only their common beginning, and the score stays
    exact. `whole` scores the prompt too. Raises InputError for a text longer than `context` tokens
    or without a token to predict the answer from.
    """
    bos = tokenizer.bos_token_id
    bos = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    texts = []
    for question in questions:
        for lang in langs:
            prompt = question.prompts[lang].rstrip()
            spaces = question.prompts[lang][len(prompt):]
            texts += [prompt, *(prompt + spaces + answer for answer in question.answers[lang])]
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    trees = []
    for question in questions:
        trees.append([])
        for lang in langs:
            prompt = bos + next(ids)
            texts = [bos + next(ids) for _ in question.answers[lang]]
            start = 1 if whole else min(len(prompt), *(len(text) - 1 for text in texts))
            if start < 1:
                raise InputError(f"question {question.id!r}, {lang!r}: no token stands before the "
                                 "answer to predict it; make the prompt longer")
            if context and (longest := max(map(len, texts))) > context:
                raise InputError(f"question {question.id!r}, {lang!r}: {longest} tokens, but the "
                                 f"model's context is {context}; leave the question out")
            shared = next((i for i in range(start) if len({text[i] for text in texts}) > 1), start)
            if not shared:
                raise InputError(f"question {question.id!r}, {lang!r}: the answers change the "
                                 "prompt's first token; make the prompt longer")
            branches = [text[shared:] for text in texts]
            trees[-1].append(Tree(texts[0][:shared], branches, start - shared))
    return trees


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
