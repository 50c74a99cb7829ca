"""Hostile input: a payload in each place where data or weights come in, and none of them runs.

The payload, if anything evaluates, imports, unpickles or opens it, makes a file.
"""

import json
import pickle
import shutil

import pytest
import torch

import data
from conftest import LANGS, train, weights


class Payload:
    """Unpickled, it runs its code."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture
def trap(tmp_path):
    """The payload as Python, which would leave a mark; the test fails if it is there at the end."""
    code = f"__import__('pathlib').Path({str(tmp_path / 'mark')!r}).touch()"
    pickle.loads(pickle.dumps(Payload(code)))
    (tmp_path / "mark").unlink()  # so it works
    yield code
    assert not (tmp_path / "mark").exists(), "the payload ran"


def test_code_and_paths_in_a_data_set_are_text(tmp_path, trap):
    """As prompt, answer, id and subject; a path to a file is one too. Where a list is wanted (the
    authors' release keeps it as Python, and evaluates it), it is refused."""
    (tmp_path / "secret").write_text("not to be read")
    yaml, cell = "!!python/object/apply:os.system ['id']", "=cmd|'calc'!A0"
    for text in (trap, yaml, cell, f"file://{tmp_path / 'secret'}", "${jndi:x}", "../../secret"):
        prompts, answers = dict.fromkeys(LANGS, text), dict.fromkeys(LANGS, [text, " b"])
        line = {"id": text, "subject": text, "gold": 0, "prompts": prompts, "answers": answers}
        (tmp_path / "q.jsonl").write_text(json.dumps(line))
        [question] = data.load(f"jsonl:{tmp_path / 'q.jsonl'}", LANGS)
        assert question.prompts["es"] == text and question.answers["en"] == (text, " b")
        (tmp_path / "q.jsonl").write_text(json.dumps({**line, "answers": f"[{text}]"}))
        with pytest.raises(data.InputError, match="line 1"):
            data.load(f"jsonl:{tmp_path / 'q.jsonl'}", LANGS)


@pytest.mark.parametrize("kind", ["pickled", "zipped", "posing", "config", "tokenizer_config"])
def test_code_in_a_model_folder_does_not_run(world, tmp_path, trap, kind, monkeypatch):
    """Nor where someone, asked whether to trust it, would say yes."""
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    if kind == "posing":
        (model / "model.safetensors").write_bytes(pickle.dumps(Payload(trap)))
    elif kind in ("pickled", "zipped"):  # and no safetensors beside it
        tensors = {**weights(model), "model.norm.weight": Payload(trap)}
        (model / "model.safetensors").unlink()
        zipped = kind == "zipped"
        torch.save(tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    else:
        settings = json.loads((model / f"{kind}.json").read_text())
        settings.update(model_type="trap", tokenizer_class="Trap")
        classes = dict.fromkeys(["AutoConfig", "AutoModelForCausalLM"], "trap.Trap")
        settings["auto_map"] = {**classes, "AutoTokenizer": ["trap.Trap", None]}
        (model / f"{kind}.json").write_text(json.dumps(settings))
        (model / "trap.py").write_text(f"{trap}\nclass Trap: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    train(world, tmp_path / "out", "--model", model, "--eval_only", fails=True)


def test_code_in_a_checkpoint_does_not_run(world, tmp_path, trap):
    """Neither in a file of weights nor in the list of them that torch keeps elsewhere."""
    diverging = ("--save_every", 1, "--lr", "1e30", "--grad_clip", 0)
    train(world, tmp_path / "out", *diverging, fails=True)  # in step 2
    file = next((tmp_path / "out" / "checkpoint-1").glob("shard*"))
    sound = file.read_bytes()
    (file.parent / ".metadata").write_bytes(pickle.dumps(Payload(trap)))
    file.write_bytes(pickle.dumps(Payload(trap)))
    text = train(world, tmp_path / "out", *diverging, processes=1, fails=True)
    assert "CheckpointException" in text  # no Exception, so not for this process
    file.write_bytes(sound)
    assert "step 2: NaN" in train(world, tmp_path / "out", *diverging, fails=True)
