"""How much there is to read: `python tests/reading.py` (pytest does not collect it).

Lines of each module and of each of its sections; and, by sys.settrace over a real run of train.py
on a tiny model, how many of them are executed from a micro-batch to its loss, to pack that
micro-batch, and from the command line to the first loss. A line counts once; docstrings, comments
and blank lines do not run.
"""

import ast
import io
import sys
import tempfile
import tokenize
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rankc
import train
from conftest import ROOT, tiny_llama, tiny_tokenizer

MODULES = ("dco", "rankc", "data", "train")
FIRST = {  # the sections to read first; of dco.py all
    "rankc": ("opening", "the measures"),
    "data": ("opening", "split and sampling (App. H)", "tokens"),
    "train": ("opening", "the step"),
}


class Size(NamedTuple):
    """Lines of a file: all, those with code, those with a docstring or a comment."""

    lines: int
    code: int
    words: int

    @classmethod
    def of(cls, path: Path) -> "Size":
        text = path.read_text()
        words = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                ast.get_docstring(node) is not None
            ):
                words.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        code, trailing = set(), 0
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                words.add(token.start[0])
            elif token.string.strip() and token.type != tokenize.COMMENT:
                code.update(range(token.start[0], token.end[0] + 1))
            trailing += token.type == tokenize.COMMENT and not token.line.lstrip().startswith("#")
        return cls(text.count("\n"), len(code - words), len(words) + trailing)


def sections(path: Path) -> dict[str, int]:
    """Lines under each `# ---- name`; what stands above the first is its "opening"."""
    found, name = Counter(), "opening"
    for line in path.read_text().splitlines():
        name = line.rpartition("- ")[2] if line.startswith("# ----") else name
        found[name] += 1
    return dict(found)


def evening() -> dict[str, int]:
    """Lines of each module's sections to read first."""
    found = {}
    for name in MODULES:
        parts = sections(ROOT / f"{name}.py")
        found[name] = sum(parts[part] for part in FIRST.get(name, parts))
    return found


def questions(folder: Path) -> None:
    """A BMLAMA folder of six questions, and a tiny model beside it."""
    words = "one two three four five six".split()
    rows = [f"after {word} comes <mask>.\t{words[0]}\t{', '.join(words)}\tx\n" for word in words]
    for lang in ("en", "es"):
        (folder / f"{lang}.tsv").write_text("Prompt\tAns\tCandidate Ans\tSubject\n" + "".join(rows))
    tokenizer = tiny_tokenizer("".join(rows))
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")


def executed() -> dict[str, Counter]:
    """Of each stretch of a run the lines executed, by (file, function)."""
    paths = {str(ROOT / f"{name}.py") for name in MODULES}
    source = (ROOT / "train.py").read_text().splitlines()
    first, last = (
        next(n for n, line in enumerate(source, 1) if part in line)
        for part in ("with nullcontext() if last else apart()", "loss.sum()).backward()")
    )
    seen, step, state = set(), set(), "before"

    def line(frame, event, _):
        nonlocal state
        code = frame.f_code
        if event == "line" and state != "done":
            key = (code.co_filename, frame.f_lineno, code.co_qualname.partition(".<locals>")[0])
            in_step = code is train.optimise.__code__
            state = "step" if in_step and frame.f_lineno == first else state
            seen.add(key)
            step.add(key) if state == "step" else None
            state = "done" if in_step and frame.f_lineno == last else state
        return line

    def call(frame, event, _):
        return line if frame.f_code.co_filename in paths else None

    with tempfile.TemporaryDirectory() as place:
        questions(Path(place))
        settings = {"model": f"{place}/model", "data": f"bmlama:{place}", "out": f"{place}/out"}
        sys.argv = ["train.py", "--langs", "en", "es", "--train_questions", "4", "--device", "cpu"]
        sys.argv += [part for name, value in settings.items() for part in (f"--{name}", value)]
        sys.settrace(call)
        try:
            rankc.run(train.main)
        finally:
            sys.settrace(None)

    def by_function(lines: set) -> Counter:
        assert lines, f"nothing of {ROOT} was run: is another copy installed?"
        return Counter((Path(file).name, name) for file, _, name in lines)

    packing = {key for key in seen if key[2] in ("pack", "spread", "turns", "micro_batches")}
    return {
        "from a micro-batch to its loss": by_function(step),
        "dealing and packing a micro-batch": by_function(packing),
        "from the command line to the first loss": by_function(seen),
    }


def report() -> str:
    lines = []
    for name in MODULES:
        path = ROOT / f"{name}.py"
        size = Size.of(path)
        lines.append(f"{path.name}: {size.lines} lines, {size.code} of code, {size.words} of words")
        lines += [f"    {n:4} {section}" for section, n in sections(path).items()]
    parts = " + ".join(f"{n} of {name}.py" for name, n in evening().items())
    lines.append(f"an evening's reading: {sum(evening().values())} lines, {parts}")
    for stretch, functions in executed().items():
        files, total = {file for file, _ in functions}, sum(functions.values())
        lines.append(f"{stretch}: {total} lines, {len(functions)} functions, {len(files)} files")
        lines += [f"    {n:4} {file} {name}" for (file, name), n in functions.most_common(12)]
    return "\n".join(lines)


if __name__ == "__main__":
    with redirect_stdout(io.StringIO()):
        text = report()
    print(text)
