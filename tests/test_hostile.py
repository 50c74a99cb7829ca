"""Hostile input: a payload in each place where data or weights come in, and none of them runs.

The payload, if anything evaluates, imports, unpickles or opens it, makes a file.
"""

import json
import pickle
import re
import shutil

import pytest
import torch

import data
from conftest import ROOT, command, fork, launch, train, wait, weights

LANGS = ["en", "es"]


class Payload:
    """Unpickled, it runs its code."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture
def trap(tmp_path):
    """The payload as Python, which would leave a mark; the test fails if it is there at the end."""
    mark = tmp_path / "mark"
    yield f"__import__('pathlib').Path({str(mark)!r}).touch()"
    assert not mark.exists(), "the payload ran"


def test_the_trap_works(tmp_path):
    code = f"__import__('pathlib').Path({str(tmp_path / 'mark')!r}).touch()"
    pickle.loads(pickle.dumps(Payload(code)))
    assert (tmp_path / "mark").exists()


def test_code_and_paths_in_a_data_set_are_text(tmp_path, trap):
    """As prompt, answer, id, subject and candidates; a path to a file is one too."""
    secret = tmp_path / "secret"
    secret.write_text("not to be read")
    yaml, cell = "!!python/object/apply:os.system ['id']", "=cmd|'calc'!A0"
    for text in (trap, yaml, cell, str(secret), f"file://{secret}", "${jndi:x}", "../../secret"):
        prompts, answers = dict.fromkeys(LANGS, text), dict.fromkeys(LANGS, [text, " b"])
        line = {"id": text, "subject": text, "gold": 0, "prompts": prompts, "answers": answers}
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
    answers = dict.fromkeys(LANGS, f"[{trap}]")
    line = {"id": "1", "prompts": dict.fromkeys(LANGS, "x"), "answers": answers}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(data.InputError, match="line 1"):
        data.load(f"jsonl:{tmp_path / 'q.jsonl'}", LANGS)


@pytest.mark.parametrize("kind", ["pickled", "zipped", "posing", "remote code", "tokenizer"])
def test_code_in_a_model_folder_does_not_run(world, tmp_path, trap, kind, monkeypatch):
    """Nor where someone, asked whether to trust it, would say yes."""
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    tensors = {**weights(model), "model.norm.weight": Payload(trap)}
    if kind == "pickled":  # and no safetensors beside it
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trap)))
    elif kind == "zipped":
        (model / "model.safetensors").unlink()
        torch.save(tensors, model / "pytorch_model.bin")
    elif kind == "posing":
        (model / "model.safetensors").write_bytes(pickle.dumps(Payload(trap)))
    else:
        path = model / ("config.json" if kind == "remote code" else "tokenizer_config.json")
        settings = json.loads(path.read_text())
        settings |= {"model_type": "trap", "tokenizer_class": "Trap"}
        settings["auto_map"] = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap",
                                "AutoTokenizer": ["trap.Trap", None]}  # fmt: skip
        path.write_text(json.dumps(settings))
        (model / "trap.py").write_text(f"{trap}\nclass Trap: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    train(world, tmp_path / "out", "--model", model, "--eval_only", fails=True)


def test_code_in_a_checkpoint_does_not_run(world, tmp_path, trap):
    """Neither in a file of weights nor in the list of them that torch keeps elsewhere."""
    arguments = command(
        world, tmp_path / "out", "--save_every", 1, "--lr", "1e30", "--grad_clip", 0
    )
    launch("train.py", *arguments, fails=True)  # in step 2
    file, *_ = (tmp_path / "out" / "checkpoint-1").glob("shard*")
    sound = file.read_bytes()
    (file.parent / ".metadata").write_bytes(pickle.dumps(Payload(trap)))
    file.write_bytes(pickle.dumps(Payload(trap)))
    statuses, text = wait(fork("train.py", arguments))
    assert any(statuses) and "CheckpointException" in text, text
    file.write_bytes(sound)
    assert "step 2: NaN" in launch("train.py", *arguments, fails=True)


def test_code_in_what_a_run_wrote_does_not_run(tmp_path, trap):
    for name in ("run.json", "log.jsonl", "metrics.json", "answers.jsonl"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(trap)))
    launch("rankc.py", tmp_path, fails=True)


def test_no_file_of_ours_can_run_what_it_reads():
    forbidden = (
        r"\b(?<!\.)(eval|exec|compile|__import__)\(|pickle|marshal|yaml|torch\.(load|save)\b"
    )
    forbidden += r"|os\.system|shell=True"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("theory/*.py")]:
        assert not re.search(forbidden, path.read_text()), path
