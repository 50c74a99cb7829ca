"""The README is true: its flags, equations, names and files exist, its commands run."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data
import rankc
import theory.__main__
import train
from conftest import ROOT, launch

README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / ".github" / "measured.md").read_text()
SOURCES = {path: path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("theory/*.py")]}
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))


def test_each_flag_that_the_readme_names_exists(capsys, monkeypatch):
    from torch.distributed.run import get_args_parser

    import bench
    import peers

    known = {field.name for field in dataclasses.fields(train.Config)}
    texts = [get_args_parser().format_help()]
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    for main in (bench.main, peers.main, rankc.main, theory.__main__.main):
        with pytest.raises(SystemExit):
            main()
        texts.append(capsys.readouterr().out)
    known |= {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", "".join(texts))}
    ours = re.sub(r"`hf download.*?`", "", README + MEASURED, flags=re.S)
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", ours))
    assert len(named) > 20
    assert {flag.replace("-", "_") for flag in named} <= known


def test_each_equation_lemma_section_and_appendix_cited_exists_in_the_paper(real_data):
    paper = (real_data.parent / "paper.md").read_text()
    there = {  # {how it is cited: (form of its number, where the paper has it)}
        "Eqs?": (r"\d+", r"\\tag\{(\d+)\}|^\((\d+)[ab]?\)|(?:quad |\$\$)\((\d+)[ab]?\)"),
        "Lemmas?": (r"\d", r"\*\*Lemma (\d)"),
        "Remarks?": (r"\d", r"\*\*Remark (\d)"),
        "Apps?": ("[A-N]", r"^#+ ([A-N]) [A-Z]"),
        "[Ss]ec(?:tion|tions|s)?": (r"\d(?:\.\d)?", r"^#+ (\d(?:\.\d)?) [A-Z]"),
    }
    for kind, (number, heading) in there.items():
        known = {match[match.lastindex] for match in re.finditer(heading, paper, re.M)}
        listed = rf"\b{kind}\.? ({number}(?:(?:, | and | to | or |-){number})*)(?!\w)"
        for name, text in {"README": README, "measured": MEASURED, **SOURCES}.items():
            cited = {one for many in re.findall(listed, text) for one in re.findall(number, many)}
            assert cited <= known and (cited or name != "README"), (name, cited - known)


def test_each_name_in_the_equation_table_can_be_imported_and_takes_what_it_says():
    rows = re.findall(r"^\|.*`(\w+)\.(\w+)\((.*?)\)` \|", README, re.M)
    assert len(rows) == 13
    for module, name, arguments in rows:
        function = getattr(importlib.import_module(module), name)
        taken = list(inspect.signature(function).parameters)
        assert taken[: arguments.count(",") + 1] == arguments.split(", "), name


def test_each_name_test_and_file_that_the_readme_names_is_there():
    both = README + MEASURED
    assert len(re.findall(r"^.*-m pytest$", README, re.M)) == 1  # .ci/run looks for it
    for name in set(re.findall(r"`(test_\w+)`", both)):
        assert f"def {name}(" in TESTS, name
    for module, name in set(re.findall(r"`(train|data|rankc|dco)\.(?!py)(\w+)`", both)):
        assert hasattr(importlib.import_module(module), name), name
    for name in re.findall(r"`((?:theory|tests)/\w+\.py)`", both):
        assert (ROOT / name).is_file(), name
    for folder, text in ((ROOT, README), (ROOT / ".github", MEASURED)):
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (folder / link).is_file(), link
    headings = re.findall(r"^#+ (.*)$", MEASURED, re.M)
    sections = {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings}
    assert set(re.findall(r"measured\.md#([\w-]+)", README)) <= sections


def test_the_three_ground_modules_import_nothing_of_ours_and_two_are_installed():
    for name in ("dco", "data", "rankc"):
        imported = set()
        for node in ast.walk(ast.parse(SOURCES[ROOT / f"{name}.py"])):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        assert not imported & {"dco", "data", "rankc", "train", "theory"}, name
    assert 'py-modules = ["dco", "rankc"]\n' in (ROOT / "pyproject.toml").read_text()


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
    "python -m pytest -m cuda": "what it collects is skipped without a GPU",
    "python train.py --device cuda": "test_cuda.py runs it",
    "python tests/peers.py --model DIR --data bmlama:DIR": "needs lm_eval and trl",
}


def commands(text):
    """The programs that are run, in code blocks and in code spans, in order."""
    lines = re.findall(r"^    (?! )(.*)", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    parts = [part.strip().removeprefix(".venv/bin/") for line in lines for part in line.split("&&")]
    return dict.fromkeys(part for part in parts if part.startswith(("torchrun ", "python ")))


def test_every_command_in_the_readme_runs(world, tmp_path, monkeypatch):
    """A few questions and a tiny model stand in; rankc.py comes last: it reads what is there."""
    monkeypatch.chdir(tmp_path)
    ran = set()
    for command in sorted(commands(README), key=lambda line: "rankc.py" in line):
        if command in ELSEWHERE:
            continue
        command = re.sub("--langs( [a-z]{2})+", "--langs en es", command)  # all that is there
        program, *arguments = shlex.split(command.replace("bmlama:DIR", f"jsonl:{world}/q.jsonl"))
        script = next(part for part in arguments if part.endswith(".py") or part == "theory")
        arguments = arguments[arguments.index(script) + 1 :]  # what stands before is torchrun's
        if script == "theory":
            assert theory.__main__.main(["lemma1", "--draws", "5"]) == 0
        elif script == "tests/bench.py":
            more = ["--model", f"{world}/model", "--data", f"jsonl:{world}/q.jsonl"]
            run = [sys.executable, ROOT / script, *more, "--repeat", "1", "--stages", "step"]
            subprocess.run(run, check=True)
        else:
            if "--model" in arguments:
                model = arguments.index("--model") + 1
                if not Path(arguments[model]).is_dir():  # DIR, or a name of the hub
                    arguments[model] = f"{world}/model"
                arguments += ["--train_questions", "3", "--test_questions", "2", "--device", "cpu"]
            launch(script, *arguments, torchrun=2 * (program == "torchrun"), cwd=tmp_path)
        ran.add((program, script))
    scripts = ("train.py", "rankc.py", "theory", "tests/bench.py")
    assert ran == {("python", name) for name in scripts} | {("torchrun", "train.py")}
