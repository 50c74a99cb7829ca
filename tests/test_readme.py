"""The README is true: its flags, names, tests and files exist, its commands run."""

import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys

import pytest

import bench
import data
import rankc
import theory.__main__
import train
from conftest import ROOT, launch

README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / ".github" / "measured.md").read_text()
DEPARTURES = (ROOT / ".github" / "departures.md").read_text()
TEXTS = README + MEASURED + DEPARTURES
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))


def test_each_flag_that_is_named_exists(capsys, monkeypatch):
    from torch.distributed.run import get_args_parser

    known = {field.name for field in dataclasses.fields(train.Config)}
    helps = [get_args_parser().format_help()]
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    for main in (bench.main, rankc.main, theory.__main__.main):
        with pytest.raises(SystemExit):
            main()
        helps.append(capsys.readouterr().out)
    for flag in re.findall(r"--([a-z][\w-]*)", "".join(helps)):
        known.add(flag.replace("-", "_"))
    ours = re.sub(r"\bhf download[^`\n]*", "", TEXTS)
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", ours))
    assert len(named) > 20
    assert {flag.replace("-", "_") for flag in named} <= known


def test_each_name_in_the_table_of_symbols_can_be_imported_and_takes_what_it_says():
    rows = re.findall(r"^\|.*`(\w+)\.(\w+)\((.*?)\)` \|", README, re.M)
    assert len(rows) == 9
    for module, name, arguments in rows:
        function = getattr(importlib.import_module(module), name)
        taken = list(inspect.signature(function).parameters)
        assert taken[: arguments.count(",") + 1] == arguments.split(", "), name


def test_each_name_test_and_file_that_is_named_is_there():
    assert len(re.findall(r"^.*-m pytest$", README, re.M)) == 1  # .ci/run looks for it
    for name in set(re.findall(r"`(test_\w+)`", TEXTS)):
        assert f"def {name}(" in TESTS, name
    for module, name in set(re.findall(r"`(train|data|rankc|dco)\.(?!py)(\w+)`", TEXTS)):
        assert hasattr(importlib.import_module(module), name), name
    for name in re.findall(r"`((?:theory|tests)/\w+\.py)`", TEXTS):
        assert (ROOT / name).is_file(), name
    for folder, text in ((ROOT, README), (ROOT / ".github", MEASURED + DEPARTURES)):
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (folder / link).is_file(), link
    sections = set()
    for heading in re.findall(r"^#+ (.*)$", MEASURED, re.M):
        sections.add(re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-"))
    assert set(re.findall(r"measured\.md#([\w-]+)", README)) <= sections


def test_the_line_of_data_that_the_readme_shows_is_a_question(tmp_path):
    (shown,) = re.findall(r'^ *(\{"id".*\n.*\}\})$', README, re.M)
    (tmp_path / "own.jsonl").write_text(shown.replace("\n", " "))
    (question,) = data.load(f"jsonl:{tmp_path / 'own.jsonl'}", ["en", "es"])
    assert question.answers["es"][question.gold] == " Lima"


def test_the_worked_example_prints_what_the_readme_says():
    code, printed = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", README, re.S).groups()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == re.sub("^    ", "", printed, flags=re.M)


ELSEWHERE = {  # where it is run, or why not here
    "python train.py": "test_train.py runs it",
    "python -m pytest": "this is it",
    "python -m theory": "test_theory.py runs it",
    "python tests/bench.py --peers": "it needs lm_eval and trl",
}


def commands(text):
    """The programs that are run, in code blocks and in code spans, in order."""
    lines = re.findall(r"^    (?! )(.*)", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    parts = [part.strip().removeprefix(".venv/bin/") for line in lines for part in line.split("&&")]
    return dict.fromkeys(part for part in parts if part.startswith(("torchrun ", "python ")))


def test_every_command_in_the_readme_runs(world, tmp_path, monkeypatch):
    """A few questions and a tiny model stand in for the real ones; runs/nl is read in the end."""
    monkeypatch.chdir(tmp_path)
    scripts = set()
    for command in sorted(commands(README), key=lambda line: "rankc.py" in line):
        if command in ELSEWHERE:
            continue
        command = re.sub(r"--langs( [a-z]{2})+", "--langs en es", command)  # all that is there
        command = re.sub(r"(train|test)_questions \S+", r"\1_questions 3", command)
        command = re.sub(r"(bmlama|jsonl):\S+", f"jsonl:{world}/q.jsonl", command)
        command = re.sub(r"--model \S+", f"--model {world}/model --device cpu", command)
        program, *arguments = shlex.split(command)
        at = next(i for i, part in enumerate(arguments) if part.endswith(".py"))
        if "--train_questions" not in arguments and arguments[at] == "train.py":
            arguments += ["--train_questions", "3"]
        processes = 2 if program == "torchrun" else 0  # what stands before the script is torchrun's
        launch(arguments[at], *arguments[at + 1 :], processes=processes)
        scripts.add(f"{program} {arguments[at]}")
    assert scripts == {"python train.py", "torchrun train.py", "python rankc.py"}
