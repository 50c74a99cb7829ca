"""Hostile input: a payload in each place where data or weights come in, and none of them runs.

The payload, if anything evaluates, imports, unpickles or opens it, makes a file.
"""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

import data
from conftest import command, launch, train

LANGS = ["en", "es"]


@pytest.fixture
def trap(tmp_path):
    """Where the payload would leave its mark, and the payload as Python."""
    mark = tmp_path / "mark"
    yield mark, f"__import__('pathlib').Path({str(mark)!r}).touch()"
    assert not mark.exists(), "the payload ran"


class Payload:
    """Unpickled, it runs its code."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def test_the_trap_works(tmp_path):
    code = f"__import__('pathlib').Path({str(tmp_path / 'mark')!r}).touch()"
    pickle.loads(pickle.dumps(Payload(code)))
    assert (tmp_path / "mark").exists()


def test_code_and_paths_in_a_data_set_are_text(tmp_path, trap):
    """As prompt, answer, id, subject and candidates of every kind; a path to a file is one too."""
    mark, code = trap
    secret = tmp_path / "secret"
    secret.write_text("not to be read")
    yaml, cell = f"!!python/object/apply:os.system ['touch {mark}']", f"=cmd|'touch {mark}'!A0"
    for text in (code, yaml, cell, str(secret), f"file://{secret}", "${jndi:x}", "../../secret"):
        line = {
            "id": text,
            "subject": text,
            "gold": 0,
            "prompts": dict.fromkeys(LANGS, text),
            "answers": dict.fromkeys(LANGS, [text, " b"]),
        }
        (tmp_path / "q.jsonl").write_text(json.dumps(line))
        (question,) = data.load(f"jsonl:{tmp_path / 'q.jsonl'}", LANGS)
        assert question.prompts["es"] == text and question.answers["en"] == (text, " b")
        folder = tmp_path / "bmlama"
        folder.mkdir(exist_ok=True)
        row = f"say {text} <mask>.", "b", f"{text}, b", text
        cells = "\t".join('"' + cell.replace('"', '""') + '"' for cell in row)
        for lang in LANGS:
            (folder / f"{lang}.tsv").write_text(f"P\tA\tC\tS\r\n{cells}\r\n")
        (question,) = data.load(f"bmlama:{folder}", LANGS)
        assert question.answers["en"][-1] == "b" and text in question.prompts["en"]


def test_a_candidate_list_written_as_python_is_not_evaluated(tmp_path, trap):
    """As the authors' release keeps it, and evaluates it."""
    _, code = trap
    answers = dict.fromkeys(LANGS, f"[{code}]")
    line = {"id": "1", "prompts": dict.fromkeys(LANGS, "x"), "answers": answers}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(data.InputError, match="answers a list of strings"):
        data.load(f"jsonl:{tmp_path / 'q.jsonl'}", LANGS)


def model_with(world, folder, code, file):
    """A copy of the tiny model with a payload in its `file`."""
    shutil.copytree(world / "model", folder)
    weights = load_file(folder / "model.safetensors")
    if file == "pickled":  # and no safetensors beside it
        (folder / "model.safetensors").unlink()
        with open(folder / "pytorch_model.bin", "wb") as out:
            pickle.dump(Payload(code), out)
    elif file == "zipped":
        (folder / "model.safetensors").unlink()
        torch.save({**weights, "model.norm.weight": Payload(code)}, folder / "pytorch_model.bin")
    elif file == "posing":
        (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(code)))
    else:
        settings = json.loads((folder / "config.json").read_text())
        settings["model_type"] = "trap"
        settings["auto_map"] = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap",
                                "AutoTokenizer": ["trap.Trap", None]}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "trap.py").write_text(f"{code}\nclass Trap: pass\n")


@pytest.mark.parametrize("file", ["pickled", "zipped", "posing", "remote code"])
@pytest.mark.parametrize("more", [(), ("--eval_only",)])
def test_code_in_a_model_folder_does_not_run(world, tmp_path, trap, file, more):
    model_with(world, tmp_path / "model", trap[1], file)
    arguments = ["--model", tmp_path / "model", "--data", f"jsonl:{world / 'q.jsonl'}", "--device",
                 "cpu", "--langs", "en", "es", "--train_questions", 7]  # fmt: skip
    text = launch("train.py", *arguments, *more, fails=True)
    assert "no causal language model can be loaded" in text and "Traceback" not in text


@pytest.mark.parametrize("file", ["shard-00001-model-00001-of-00001.safetensors", "state.json"])
def test_code_in_a_checkpoint_does_not_run(world, tmp_path, trap, file):
    out = tmp_path / "out"
    train(world, out, "--save_every", 1, "--lr", "1e30", "--grad_clip", 0, fails=True)
    (place,) = (out / "checkpoint").glob("step-*")
    (place / file).write_bytes(pickle.dumps(Payload(trap[1])))
    more = ("--save_every", 1, "--lr", "1e30", "--grad_clip", 0, "--resume")
    text = launch("train.py", *command(world, out, *more), fails=True)
    assert f"{place} is damaged" in text and "Traceback" not in text


def test_code_in_a_kept_table_does_not_run(tmp_path, trap):
    import train as program

    path = tmp_path / "reference.safetensors"
    path.write_bytes(pickle.dumps(Payload(trap[1])))
    with pytest.raises(data.InputError, match="is damaged"):
        program.load_or_compute(path, {}, dict)


def test_code_in_the_answers_of_a_run_does_not_run(tmp_path, trap):
    (tmp_path / "log.jsonl").write_text("")
    for name in ("run.json", "metrics.json", "answers.jsonl"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(trap[1])))
    assert "is not of a whole run" in launch("rankc.py", tmp_path, fails=True)


def test_no_file_of_ours_can_run_what_it_reads():
    """No eval, no exec, no pickle, no torch.load, no yaml, no shell."""
    from conftest import ROOT

    for path in [*ROOT.glob("*.py"), *ROOT.glob("theory/*.py")]:
        text = path.read_text()
        for name in ("eval(", "exec(", "pickle", "torch.load", "yaml", "shell=True", "os.system",
                     "torch.save", "marshal", "__import__"):  # fmt: skip
            found = text.replace(".eval()", "").replace("_eval(", "")
            assert name not in found, f"{name} in {path}"
