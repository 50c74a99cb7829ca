"""How much there is to read: `python tests/reading.py` (pytest does not collect it).

By sys.settrace over a real run of train.py on a tiny model: how many lines are executed from a
micro-batch to its loss, to pack that micro-batch, and from the command line to the first loss. A
line counts once; docstrings, comments and blank lines do not run.
"""

import io
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from conftest import ROOT, tiny_llama, tiny_tokenizer

MODULES = ("dco", "rankc", "data", "train")
PACKING = ("pack", "assign_rows", "local_microbatches", "assign_microbatches")


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
    loop = train.train.__code__.co_firstlineno
    first, last = (
        next(n for n, line in enumerate(source, 1) if n > loop and part in line)
        for part in ("with mixed:", "loss.sum()).backward()")
    )
    seen, step, state = set(), set(), "before"

    def line(frame, event, _):
        nonlocal state
        code = frame.f_code
        if event == "line" and state != "done":
            key = (code.co_filename, frame.f_lineno, code.co_qualname.partition(".<locals>")[0])
            in_loop = code is train.train.__code__
            state = "step" if in_loop and frame.f_lineno == first else state
            seen.add(key)
            step.add(key) if state == "step" else None
            state = "done" if in_loop and frame.f_lineno == last else state
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
            train.run(train.main)
        finally:
            sys.settrace(None)

    def by_function(lines: set) -> Counter:
        assert lines, f"nothing of {ROOT} was run: is another copy installed?"
        return Counter((Path(file).name, name) for file, _, name in lines)

    return {
        "from a micro-batch to its loss": by_function(step),
        "dealing and packing a micro-batch": by_function(
            {key for key in seen if key[2] in PACKING}
        ),
        "from the command line to the first loss": by_function(seen),
    }


def main() -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        stretches = executed()
    for name in MODULES:
        print(f"{name}.py: {len((ROOT / f'{name}.py').read_text().splitlines())} lines")
    for stretch, functions in stretches.items():
        files, total = {file for file, _ in functions}, sum(functions.values())
        print(f"{stretch}: {total} lines, {len(functions)} functions, {len(files)} files")


if __name__ == "__main__":
    main()
