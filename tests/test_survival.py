"""What a run lives through: SIGKILL anywhere, restarts, other settings, NaN."""

import functools
import os
import pkgutil
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoTokenizer

import data
import dco
import train as program
from conftest import LANGS, assert_same, command, fork, launch, read, train, wait, weights

RUN = ("--epochs", 6, "--save_every", 4)  # 18 steps, checkpoints after 4, 8, 12 and 16


@pytest.fixture(scope="module")
def undisturbed(world):
    """Runs that nothing happens to: by one process, and by two that share the weights."""
    folders = {1: world / "undisturbed-1", 2: world / "undisturbed-2"}
    train(world, folders[1], *RUN, processes=1)
    train(world, folders[2], *RUN, "--shard", processes=2)
    return folders


def assert_equal(out, other):
    """Bit for bit the same model, log and answers; the same numbers, and nothing left over."""
    assert weights(out).keys() == weights(other).keys()
    for name, weight in weights(out).items():
        assert torch.equal(weight, weights(other)[name]), name
    for file in ("log.jsonl", "answers.jsonl"):
        assert (out / file).read_text() == (other / file).read_text()
    metrics, other_metrics = read(out, "metrics.json"), read(other, "metrics.json")
    assert {**metrics, "seconds": 0} == {**other_metrics, "seconds": 0}
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}


def checkpoints(out):
    return sorted(program.checkpoints(program.Config(out=str(out))))


# ---------------------------------------------------------------------------------------- SIGKILL
def die_at(function, argument, call, rank):
    """On process `rank`: be killed in place of the n-th such call with such an argument."""
    if os.environ["RANK"] != str(rank):
        return
    owner, _, name = function.rpartition(".")
    real, calls = getattr(pkgutil.resolve_name(owner), name), []

    def dying(*arguments, **more):
        if argument in str(arguments):
            calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    setattr(pkgutil.resolve_name(owner), name, dying)


def killed(arguments, processes, function, argument="", call=1, rank=0):
    """A life of a run in which one process is killed; the others end by themselves."""
    before = functools.partial(die_at, function, argument, call, rank)
    statuses, text = wait(fork("train.py", arguments, processes, before))
    assert statuses[rank] == -signal.SIGKILL and all(statuses), text


LIVES = [  # function, argument, call and process (of two) that ends it; the checkpoints left
    ("pathlib.Path.replace", "run.json", 1, 0, []),  # before its settings are in place
    ("os.fsync", "", 30, 1, []),  # while the first checkpoint is written
    ("pathlib.Path.rename", "checkpoint-4", 1, 0, []),  # it is written, but not yet in place
    ("train.step_metrics", "", 6, 1, [4]),  # in a step, past the line of step 5
    ("os.unlink", "shard", 5, 0, [4, 8]),  # the newer one is in place, the older half removed
]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_the_same_command_ends_bit_for_bit_as_undisturbed(
    world, tmp_path, undisturbed, processes
):
    """Two processes share the weights."""
    arguments = command(world, tmp_path / "out", *RUN)
    if processes == 2:
        arguments.append("--shard")
    for function, argument, call, rank, left in LIVES:
        killed(arguments, processes, function, argument, call, min(rank, processes - 1))
        assert checkpoints(tmp_path / "out") == left, function
    launch("train.py", *arguments, processes=processes)
    assert_equal(tmp_path / "out", undisturbed[processes])


def test_another_number_of_processes_and_sharding_go_on_with_a_checkpoint(
    world, tmp_path, undisturbed
):
    """One process, then two sharded with other micro-batches, then one again."""
    arguments = command(world, tmp_path, *RUN)
    killed(arguments, 1, "train.step_metrics", call=6)
    sharded = ("--shard", "--max_tokens", "50")
    killed([*arguments, *sharded], 2, "train.step_metrics", call=6, rank=1)
    assert checkpoints(tmp_path) == [8]
    launch("train.py", *arguments, "--save_every", 0, "--gradient_checkpointing")
    assert_same(tmp_path, undisturbed[1], atol=2e-4)
    assert not checkpoints(tmp_path)


def come_late(rank):
    if os.environ["RANK"] == str(rank):
        time.sleep(0.5)


def test_a_restart_does_not_wait_for_the_workers_of_before(world, undisturbed):
    """torchrun's store, which a restart finds, holds where they listened; who asks is chance."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": store.port}
    arguments = command(world, undisturbed[1], *RUN)
    for life in range(2):
        agent["TORCHELASTIC_RESTART_COUNT"] = life
        late = functools.partial(come_late, life)
        statuses, text = wait(fork("train.py", arguments, 2, late, **agent), timeout=60)
        assert statuses == [0, 0] and "finished" in text, text


# ------------------------------------------------------------------------------------- the folder
def contents(folder):
    """Each file's time and bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_stays_as_it_is_and_only_settings_of_the_machine_may_differ(
    world, undisturbed
):
    out = undisturbed[1]
    before, settings = contents(out), read(out, "run.json")
    del settings["sha256"]
    machine = "max_tokens device gradient_checkpointing shard save_every eval_every".split()
    for name in settings.keys() - {"out"}:
        config = program.Config(**{**settings, name: "another value"})
        if name in machine:
            assert program.find_run(config) == (str(out), True, "")
        else:
            assert f"--{name} was " in program.find_run(config)[2]
    assert "holds this run, finished" in train(world, out, *RUN, "--max_tokens", 64)
    text = train(world, out, *RUN, "--lr", 2e-3, fails=True, processes=2)
    assert f"error: --out {out}" in text and "--lr was 0.001, now 0.002; name another" in text
    assert contents(out) == before


def test_a_folder_of_something_else_is_refused_and_untouched(world, tmp_path):
    """The model itself, another program's run, whose checkpoint is not ours to remove; a file."""
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "other" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-500" / "model.safetensors").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = contents(tmp_path)
    for name in ("model", "other"):
        text = train(world, tmp_path / name, "--save_every", 1, fails=True)
        assert f"error: --out {tmp_path / name} is not empty, and holds no run" in text
    assert contents(tmp_path) == before


def test_a_new_folder_is_made_at_once_and_is_one_runs_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [program.find_run(program.Config())[0] for _ in (1, 2)] == ["runs/1", "runs/2"]
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as another run makes it just now
    assert "cannot be used ([Errno 17] File exists" in program.find_run(program.Config())[2]
    monkeypatch.setenv("HOME", str(tmp_path))
    program.find_run(program.Config(out="~/x"))
    assert sorted(os.listdir(tmp_path)) == ["runs", "x"]


@pytest.mark.parametrize("out", ["", "file", "file/x", "/proc"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(
    world, tmp_path, monkeypatch, out
):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "runs"):
        Path(name).write_text("precious")
    text = train(world, out, "--model", "no/such/model", fails=True)
    assert f"error: --out {out or 'runs/1'} cannot be used ([Errno " in text


def test_a_run_does_not_go_on_with_data_or_a_model_that_changed(world, tmp_path, undisturbed):
    """An answer, what is right, one weight; put back, all is as if nothing had happened."""
    own, out = tmp_path / "world", tmp_path / "out"
    shutil.copytree(world / "model", own / "model")
    shutil.copy(world / "q.jsonl", own)
    killed(command(own, out, *RUN), 1, "train.step_metrics", call=6)
    questions, settings = own / "q.jsonl", own / "model" / "config.json"
    model = own / "model" / "model.safetensors"
    tensors = load_file(model)
    tensors["model.norm.weight"][0] += 1e-3
    changes = [
        (questions, questions.read_bytes().replace(b'" four"', b'" forty"', 1)),
        (questions, questions.read_bytes().replace(b'"gold": 0', b'"gold": 3', 1)),
        (model, save(tensors, {"format": "pt"})),
        (settings, settings.read_bytes().replace(b"1e-06", b"1e-05")),  # of its layer norms
    ]
    for file, changed in changes:
        sound = file.read_bytes()
        file.write_bytes(changed)
        text = train(own, out, *RUN, fails=True, processes=2)
        assert f"error: --out {out} holds a run of other data or model; name another" in text
        file.write_bytes(sound)
    train(own, out, *RUN)
    assert_equal(out, undisturbed[1])


def enter(folder):
    """Go into a folder of this process's own, as on another machine."""
    own = folder / os.environ["RANK"]
    own.mkdir()
    os.chdir(own)


def test_a_folder_that_not_all_processes_see_ends_the_run_before_it_begins(world, tmp_path):
    """Without the check the second would save its shards where the first does not find them."""
    before = functools.partial(enter, tmp_path)
    statuses, text = wait(fork("train.py", command(world, "out"), 2, before), timeout=60)
    assert statuses == [2, 2] and "reference" not in text
    assert "error: --out out: not all processes see it: machines must share it\n" in text


# -------------------------------------------------------------------------------- NaN and infinity
def training_questions(world):
    return data.split(data.load(f"jsonl:{world / 'q.jsonl'}", LANGS), 7, None, 0)[0]


def message_of_step(world, step):
    """What a run of the defaults says, by its questions, where that step is not finite."""
    config = program.with_defaults(program.Config(model="m", batch_questions=3))
    draws = program.training_order(7, config)[step - 1]
    ids = ", ".join(training_questions(world)[q].id for q, _ in draws)
    return f"FloatingPointError: step {step}: NaN or infinite for questions {ids}\n"


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_questions(world, tmp_path):
    """The last checkpoint stays, with weights that are numbers; all processes stop alike."""
    diverging = ("--lr", "1e30", "--grad_clip", 0, "--save_every", 1)
    text = train(world, tmp_path, *diverging, processes=2, fails=True)
    assert text.count(message_of_step(world, 2)) == 2, text
    assert checkpoints(tmp_path) == [1] and len(read(tmp_path, "log.jsonl")) == 1
    for file in tmp_path.rglob("shard*"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


@pytest.mark.parametrize(
    "owner, name, harm",
    [(program, "language_loss", torch.inf), (torch.nn.utils, "clip_grad_norm_", torch.nan)],
)
def test_a_loss_or_a_gradient_alone_that_is_no_number_stops_it_too(
    world, tmp_path, monkeypatch, owner, name, harm
):
    """An infinite loss may have a sound gradient; a gradient may overflow by itself."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: real(*arguments) + harm)
    text = train(world, tmp_path, fails=True)
    assert message_of_step(world, 1) in text and not read(tmp_path, "log.jsonl")


def spoil_scores(bad):
    """Have these trees' last answers score these numbers."""
    completion_logps = dco.completion_logps

    def spoilt(model, trees):
        logps = completion_logps(model, trees)
        for tree, number in bad:
            if trees == [tree]:
                logps[0, -1] = number
        return logps

    dco.completion_logps = spoilt


def test_scores_that_are_no_numbers_end_it_with_their_questions_named(world, tmp_path):
    """NaN, on either process, and minus infinity, which does not pass for a missing answer."""
    questions = training_questions(world)
    trees = data.encode(AutoTokenizer.from_pretrained(world / "model"), questions, LANGS)
    numbers = [torch.nan, torch.nan, torch.nan, torch.nan, -torch.inf]
    bad = [(trees[q][1], number) for q, number in enumerate(numbers)]
    before = functools.partial(spoil_scores, bad)
    statuses, text = wait(fork("train.py", command(world, tmp_path, "--max_tokens", 1), 2, before))
    ids = ", ".join(question.id for question in questions[:5])
    message = f"FloatingPointError: 5 questions score NaN or infinite: {ids}\n"
    assert statuses == [1, 1] and text.count(message) == 2, text
