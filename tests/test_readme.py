"""The README is true: its flags, equations, names, counts and files exist, its commands run."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import data
import dco
import rankc
import reading
import theory.__main__
import train
from conftest import ROOT, launch

README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / ".github" / "measured.md").read_text()
SOURCES = {path: path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("theory/*.py")]}
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))

# ------------------------------------------------------------------------------------ what it names


def helped(main, capsys, monkeypatch):
    """The text of a script's --help."""
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().out


@pytest.fixture
def flags(capsys, monkeypatch):
    """Every flag of every program that the README may run."""
    from torch.distributed.run import get_args_parser

    import bench
    import kill_loop
    import peers

    fields = dataclasses.fields(train.Config)
    mains = bench.main, kill_loop.main, peers.main, rankc.main
    texts = [helped(main, capsys, monkeypatch) for main in mains]
    texts += [helped(theory.__main__.main, capsys, monkeypatch), get_args_parser().format_help()]
    found = {flag for text in texts for flag in re.findall(r"--([a-z][\w-]*)", text)}
    return {flag.replace("-", "_") for flag in found} | {field.name for field in fields}


def test_each_flag_that_the_readme_names_exists(flags):
    ours = re.sub(r"`hf download.*?`", "", README + MEASURED, flags=re.S)
    named = re.findall(r"(?<![\w-])--([a-z][\w-]*)", ours)
    assert len(set(named)) > 20
    assert {flag.replace("-", "_") for flag in named} <= flags


def test_each_setting_says_what_it_is_for():
    for setting in dataclasses.fields(train.Config):
        assert len(setting.metadata["help"]) > 5, setting.name


def cited(text):
    """What is cited of the paper, as (kind, number or letter)."""
    kinds = {"Eqs?": r"\d+", "Lemmas?": r"\d", "Remarks?": r"\d", "Def": r"\d", "Apps?": "[A-N]"}
    kinds["[Ss]ec(?:tion|tions|s)?"] = r"\d(?:\.\d)?"
    for kind, number in kinds.items():
        listed = rf"\b{kind}\.? ({number}(?:(?:, | and | to | or |-){number})*)(?!\w)"
        for numbers in re.findall(listed, text):
            for each in re.findall(number, numbers):
                yield kind.rstrip("s?"), each


def test_each_equation_lemma_section_and_appendix_cited_exists_in_the_paper(real_data):
    paper = (real_data.parent / "paper.md").read_text()
    tags = {
        a or b for a, b in re.findall(r"\\tag\{(\d+)\}|(?:^|quad |\$\$)\((\d+)[ab]?\)", paper, re.M)
    }
    there = {("Eq", tag) for tag in tags}
    there |= {("Lemma", n) for n in re.findall(r"\*\*Lemma (\d)", paper)}
    there |= {("Remark", n) for n in re.findall(r"\*\*Remark (\d)", paper)}
    there |= {("Def", n) for n in re.findall(r"\*\*Definition (\d)", paper)}
    there |= {("App", letter) for letter in re.findall(r"^#+ ([A-N]) [A-Z]", paper, re.M)}
    sections = re.findall(r"^#+ (\d(?:\.\d)?) [A-Z]", paper, re.M)
    there |= {("[Ss]ec(?:tion|tions|s)", number) for number in sections}
    assert {("Eq", str(n)) for n in range(1, 19)} <= there
    for name, text in {"README": README, "measured": MEASURED, **SOURCES}.items():
        assert set(cited(text)) <= there, (name, set(cited(text)) - there)
    assert len(set(cited(README))) > 20


def test_each_name_in_the_equation_table_can_be_imported_and_takes_what_it_says():
    rows = re.findall(r"^\|.*`(\w+)\.(\w+)\((.*?)\)` \|", README, re.M)
    assert len(rows) == 13
    for module, name, arguments in rows:
        function = getattr(importlib.import_module(module), name)
        taken = list(inspect.signature(function).parameters)
        assert taken[: arguments.count(",") + 1] == arguments.split(", "), name
        assert inspect.getdoc(function), name


def test_each_test_and_file_that_the_readme_names_is_there():
    for name in set(re.findall(r"`(test_\w+)`", README + MEASURED)):
        assert f"def {name}(" in TESTS, name
    for name in re.findall(r"`((?:theory|tests)/\w+\.py)`", README + MEASURED):
        assert (ROOT / name).is_file(), name
    for folder, text in ((ROOT, README), (ROOT / ".github", MEASURED)):
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (folder / link).is_file(), link


def test_the_counts_in_the_readme_are_those_of_reading_py():
    """Within two per cent, so that a small change need not be told."""
    stretches = reading.executed()
    text = " ".join(README.split())
    counted = [r"loss (\d+) lines are executed", r"; (\d+) more deal and pack", r"(\d+) lead from"]
    found = [int(re.search(words, text)[1]) for words in counted]
    assert found == [pytest.approx(sum(n.values()), rel=0.02) for n in stretches.values()]
    assert {name for _, name in stretches["from a micro-batch to its loss"]} == {
        "train", "language_loss", "completion_logps", "attention_masks", "float32_logits",
        "dco_loss", "implicit_reward",
    }  # fmt: skip


def test_public_functions_say_what_they_take_and_give():
    for module in (importlib.import_module(name) for name in reading.MODULES):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__ or name.startswith("_") or name == "main":
                continue
            assert inspect.getdoc(function), name
            parts = inspect.signature(function)
            kinds = [parts.return_annotation, *(p.annotation for p in parts.parameters.values())]
            assert inspect.Signature.empty not in kinds, name


def test_the_three_ground_modules_import_nothing_of_ours_and_two_are_installed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    ours = {*reading.MODULES, "theory"}
    for name in ("dco", "data", "rankc"):
        nodes = [*ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))]
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        for node in nodes:
            imported |= (
                {each.name for each in node.names} if isinstance(node, ast.Import) else set()
            )
        assert not imported & ours, name
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert installed == {"py-modules": ["dco", "rankc"], "packages": []}


def test_the_line_of_data_that_the_readme_shows_is_a_question(tmp_path):
    (shown,) = re.findall(r'^ *(\{"id".*\n.*\}\})$', README, re.M)
    (tmp_path / "own.jsonl").write_text(shown.replace("\n", " "))
    said = []
    (question,) = data.load(f"jsonl:{tmp_path / 'own.jsonl'}", ["en", "es"], said.append)
    assert question.answers["es"][question.gold] == " Lima" and not said


def test_the_worked_example_prints_what_the_readme_says():
    code, printed = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", README, re.S).groups()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == re.sub("^    ", "", printed, flags=re.M)


def test_the_example_with_a_model_scores_its_question(world, monkeypatch):
    """On a tiny model of random weights, whose vocabulary lacks most of the words."""
    (code,) = re.findall(r"```python\n(from transformers.*?)```", README, re.S)
    found = {"torch": torch, "dco": dco, "rankc": rankc, "print": lambda _: None}
    exec(code.replace('"DIR"', repr(str(world / "model"))), found)
    assert found["ref_logps"].shape == (1, 2, 3) and (found["ref_logps"] < 0).all()


def test_rows_with_candidates_as_python_lists_become_jsonl_as_the_readme_shows(tmp_path):
    (code,) = re.findall(r"  ```python\n(  # copies.*?)  ```", README, re.S)
    row = {"Prompt": "Q?", "Ans": "B", "Candidate Ans": "['A', 'B', \"C'\"]"}
    copies = {"en": [row] * 2, "es": [{**row, "Prompt": "¿Q?"}] * 2}
    with open(tmp_path / "q.jsonl", "w") as out:
        exec(textwrap.dedent(code), {"ast": ast, "json": json, "copies": copies, "out": out})
    first, second = data.load(f"jsonl:{tmp_path / 'q.jsonl'}", ["en", "es"])
    assert (second.id, second.gold, first.prompts["es"]) == ("1", 1, "¿Q?")
    assert first.answers["en"] == (" A", " B", " C'")


# -------------------------------------------------------------------------------- what it runs

SMALL = ["--train_questions", "3", "--test_questions", "2", "--device", "cpu"]
SMALL += ["--validation_questions", "1"]
ELSEWHERE = {  # where it is run, or why not here
    "python train.py": "test_the_default_run_makes_the_embedded_model_consistent",
    "python -m pytest": "this is it",
    "python -m pytest -m cuda": "what it collects is skipped without a GPU",
    "python train.py --device cuda": "test_the_embedded_facts_become_consistent_on_a_gpu",
    "python tests/reading.py": "test_the_counts_in_the_readme_are_those_of_reading_py",
    "python tests/seeds.py": "takes six minutes",
    "python tests/peers.py --model DIR --data bmlama:DIR": "needs lm_eval and trl",
    "python tests/bench.py --scale": "takes minutes; its flag is known to exist",
    "python tests/kill_loop.py": "takes an hour; its flags are known to exist",
}


def commands(text):
    """The programs that are run, in code blocks and in code spans, in order."""
    blocks = re.findall(r"^    (?! )(.*(?:\\\n.*)*)", text, re.M)
    for block in blocks + re.findall(r"`([^`\n]+)`", text):
        for command in block.replace("\\\n", " ").split(" && "):
            command = command.replace(".venv/bin/", "").strip()
            if re.match(r"(torchrun|python) ", command):
                yield " ".join(command.split())


def test_every_command_in_the_readme_runs(tmp_path, monkeypatch):
    """Six questions, a tiny model, two processes; in order, rankc.py last: it reads what is there.

    Those of measured.md, which take hours, are only looked through for flags.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    reading.questions(tmp_path / "data")
    ran = set()
    for command in sorted(dict.fromkeys(commands(README)), key=lambda each: "rankc.py" in each):
        if command in ELSEWHERE:
            assert f"def {ELSEWHERE[command]}(" in TESTS or "test_" not in ELSEWHERE[command]
            continue
        command = re.sub("--langs( [a-z]{2})+", "--langs en es", command)  # all that is there
        program, *arguments = shlex.split(command.replace("bmlama:DIR", "bmlama:data"))
        if "theory" in arguments:
            script = "theory"
            names = [name for name in arguments[2:] if name != "NAME"]
            assert theory.__main__.main([*names, "lemma1", "--draws", "5"]) == 0
        elif arguments[0] == "tests/bench.py":
            script = arguments[0]
            more = ["--model", "data/model", "--data", "atlas", "--repeat", "1", "--stages", "step"]
            run = [sys.executable, str(ROOT / arguments[0]), *arguments[1:], *more]
            done = subprocess.run(run, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            at = next(n for n, part in enumerate(arguments) if part.endswith(".py"))
            script, *arguments = arguments[at:]
            if script == "rankc.py":
                names = Path("runs").glob(Path(arguments[0]).name)
                # those of a loop, which is not run here, are stood for by all others
                arguments = sorted(map(str, names)) or sorted(map(str, Path("runs").iterdir()))
            elif not Path(arguments[arguments.index("--model") + 1]).is_dir():
                arguments += ["--model", "data/model", *SMALL]  # not DIR, nor a name of the hub
            else:
                arguments += SMALL
            launch(script, *arguments, torchrun=2 * (program == "torchrun"), cwd=tmp_path)
        ran.add((program, script))
    assert ran == {
        ("python", name) for name in ("train.py", "rankc.py", "theory", "tests/bench.py")
    } | {("torchrun", "train.py")}
