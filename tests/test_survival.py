"""What a run lives through: SIGKILL anywhere, restarts, other machines, full disks, NaN."""

import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import train as program
from conftest import ROOT, assert_same, command, fork, launch, train, wait, weights

RUN = ("--epochs", 6, "--save_every", 4)  # 18 steps, checkpoints after 4, 8, 12, 16 and 18


@pytest.fixture(scope="module")
def undisturbed(world):
    """Runs that nothing happens to, made when asked for: (processes, more settings) -> folder."""

    def of(processes, *more):
        out = world / f"undisturbed-{processes}{''.join(more)}"
        if not out.exists():
            train(world, out, *RUN, *more, processes=processes)
        return out

    return of


def assert_equal(out, other):
    """Bit for bit the same model, log and answers; the same numbers, and nothing left over."""
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in ("log.jsonl", "answers.jsonl"):
        assert (out / file).read_text() == (other / file).read_text()
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (out, other))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}


def saved(out):
    return sorted(program.checkpoints(program.Config(out=str(out))))


def lines(out):
    return (out / "log.jsonl").read_text().count("\n")


# ---------------------------------------------------------------------------------------- SIGKILL
def die_at(name, argument="", call=1, rank=0):
    """On one process: be killed in place of the n-th such call with such an argument."""
    if os.environ["RANK"] != str(rank):
        return
    module, _, function = name.rpartition(".")
    module, left = importlib.import_module(module), call
    real = getattr(module, function)

    def dying(*arguments, **more):
        nonlocal left
        left -= argument in str(arguments)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    setattr(module, function, dying)


def killed(arguments, moment, processes=1):
    """A life of a run that ends at that moment; what it printed."""
    before = functools.partial(die_at, *moment)
    statuses, text = wait(fork("train.py", arguments, processes, before=before))
    victim = moment[3] if len(moment) > 3 else 0
    assert statuses[victim] == -signal.SIGKILL and all(statuses), text  # the others do not hang
    return text


# Where each life of a run is killed, and the checkpoints that are there then.
LIVES = [
    (("os.fsync", "", 30), []),  # while the first is written
    (("os.rename", "checkpoint-4"), []),  # written, but not yet in place
    (("train.step_metrics", "", 6), [4]),  # in a step, past the line of step 5
    (("os.unlink", "shard"), [4, 8]),  # the newer one is in place, the older not yet removed
    (("os.replace", "log.jsonl"), [4, 8]),  # while lines 9 and on are taken from the log
    (("os.unlink", "shard", 30), [4, 8, 12]),  # an older one is removed by half
    (("transformers.modeling_utils.safe_save_file",), [18]),  # all steps done, no model yet
    (("os.replace", "metrics.json"), [18]),  # all is there but what says so
]
LIVES_OF_TWO = [
    (("train.step_metrics", "", 6, 1), [4]),  # one dies, the other ends by itself
    (("os.unlink", "shard", 5, 0), [4, 8]),
    (("os.fsync", "", 10, 1), [4, 8]),  # while both write the next
]


@pytest.mark.parametrize(
    "processes, more, lives",
    [(1, (), LIVES), (2, (), LIVES_OF_TWO), (2, ("--shard",), LIVES_OF_TWO[1:])],
    ids=["one process", "two", "sharded"],
)
def test_killed_at_any_moment_the_same_command_ends_bit_for_bit_as_undisturbed(
    world, tmp_path, undisturbed, processes, more, lives
):
    out = tmp_path / "out"
    arguments = command(world, out, *RUN, *more)
    for moment, left in lives:
        killed(arguments, moment, processes)
        assert saved(out) == left, moment
    statuses, text = wait(fork("train.py", arguments, processes))
    assert not any(statuses), text
    assert_equal(out, undisturbed(processes, *more))


def test_killed_before_its_settings_are_in_place_a_run_begins_again(world, tmp_path):
    arguments = command(world, tmp_path / "out", "--eval_only")
    killed(arguments, ("os.replace", "run.json"))
    launch("train.py", *arguments)
    assert (tmp_path / "out" / "metrics.json").exists()


def test_another_number_of_processes_and_sharding_go_on_with_a_checkpoint(
    world, tmp_path, undisturbed
):
    """One process, then three with other micro-batches, then two sharded, then one again."""
    out = tmp_path / "out"
    arguments = command(world, out, *RUN)
    killed(arguments, ("train.step_metrics", "", 6))
    killed([*arguments, "--max_tokens", "50"], ("train.step_metrics", "", 6, 2), 3)
    killed([*arguments, "--shard"], ("train.step_metrics", "", 6, 1), 2)
    assert saved(out) == [12]
    launch("train.py", *arguments, "--save_every", 0, "--gradient_checkpointing")
    assert_same(out, undisturbed(1), atol=2e-4)
    assert not saved(out)


# A program whose second worker is killed in step 6 of its first life.
RESTARTED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train

real, calls = train.step_metrics, []

def step_metrics(*given):
    calls.append(given)
    if len(calls) == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    train.step_metrics = step_metrics
train.main()
"""


def test_torchrun_restarts_a_killed_worker_and_the_run_goes_on_by_itself(
    world, tmp_path, undisturbed
):
    out, script = tmp_path / "out", tmp_path / "restarted.py"
    script.write_text(RESTARTED.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", "--max_restarts", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen([*torchrun, script, *command(world, out, *RUN)], **pipes)
    try:
        text = running.communicate(timeout=120)[0]
    finally:
        running.terminate()  # and its workers with it
    assert running.returncode == 0 and "exitcode: -9" in text and "| 4/18 [" in text, text
    assert_equal(out, undisturbed(2))


def late(rank):
    time.sleep(0.5 * (os.environ["RANK"] == str(rank)))


def test_a_restart_does_not_wait_for_the_workers_of_before(world, undisturbed):
    """torchrun's store, which a restart finds, holds where they listened; who asks is chance."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    kept = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": store.port}
    arguments = command(world, undisturbed(2), *RUN)
    for life in range(5):
        kept["TORCHELASTIC_RESTART_COUNT"] = life
        before = functools.partial(late, life % 2)
        statuses, text = wait(fork("train.py", arguments, 2, before, **kept), 60)
        assert statuses == [0, 0] and "finished" in text, text


# ------------------------------------------------------------------------------------- the folder
def contents(folder):
    """Each file's time and bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_says_so_or_what_differs_and_is_left_alone(world, undisturbed):
    out = undisturbed(1)
    before = contents(out)
    assert "holds this run, finished" in train(world, out, *RUN, "--max_tokens", 99)
    text = train(world, out, *RUN, "--lr", "2e-3", fails=True)
    assert re.fullmatch(f"error: --out {out} .*--lr was 0.001, now 0.002; name another\n", text)
    assert contents(out) == before


def test_a_folder_of_something_else_is_refused_and_untouched(world, tmp_path):
    """The model itself, and another program's run, whose checkpoint is not ours to remove."""
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "other" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-500" / "model.safetensors").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = contents(tmp_path)
    for name in ("model", "other", "file"):
        text = train(world, tmp_path / name, "--save_every", 1, fails=True)
        assert (
            text == f"error: --out {tmp_path / name} is not empty, and holds no run; name another\n"
        )
    assert contents(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], text=True, capture_output=True
    )
    if made.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(world, small_disk, undisturbed):
    """What was written of the next one goes, also where no more are wanted."""
    out = small_disk / "out"
    arguments = command(world, out, *RUN)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_100_000))  # the room is enough for one, not for a second
    statuses, text = wait(fork("train.py", arguments, 2))
    assert all(statuses) and ("No space left" in text or "os error 28" in text), text
    assert saved(out) == [4]
    filler.unlink()
    statuses, text = wait(fork("train.py", [*arguments, "--save_every", "0"], 2))
    assert not any(statuses), text
    assert_equal(out, undisturbed(2))


# -------------------------------------------------------------------------------- NaN and infinity
def ids_of_step(world, step):
    """The ids of the questions that a run of the defaults draws in it."""
    questions = data.load(f"jsonl:{world / 'q.jsonl'}", ["en"])
    part = data.split(questions, 7, None, 0)[0]
    config = program.with_defaults(program.Config(model="m", batch_questions=3))
    draws = program.training_order(len(part), config)[step - 1]
    return ", ".join(part[q].id for q, _ in draws)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_questions(
    world, tmp_path, processes
):
    """The last checkpoint stays, with weights that are numbers; all processes stop alike."""
    out = tmp_path / "out"
    more = ("--lr", "1e30", "--grad_clip", 0, "--save_every", 1)
    statuses, text = wait(fork("train.py", command(world, out, *more), processes))
    assert statuses == [1] * processes
    message = f"FloatingPointError: step 2: NaN.* questions {ids_of_step(world, 2)}"
    assert len(re.findall(message, text)) == processes, text
    assert saved(out) == [1] and lines(out) == 1
    assert all(x.isfinite().all() for file in out.rglob("shard*") for x in load_file(file).values())


def test_a_loss_or_a_gradient_alone_that_is_no_number_stops_it_too(world, tmp_path, monkeypatch):
    """The derivative of |x| hides the one; the other may overflow by itself."""
    message = f"FloatingPointError: step 1: NaN.* questions {ids_of_step(world, 1)}"
    for module, name, harm in (
        (program, "language_loss", lambda loss: loss * 0 + torch.inf),
        (torch.nn.utils, "clip_grad_norm_", lambda norm: norm * torch.nan),
    ):
        real = getattr(module, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *given: harm(real(*given)))  # noqa: B023
            text = train(world, tmp_path / name, fails=True)
        assert re.search(message, text) and not lines(tmp_path / name)


def test_scores_that_are_no_numbers_are_told_with_their_questions(world, tmp_path):
    """A token that one question alone has is broken; two processes, micro-batches of one row."""
    model, questions = tmp_path / "model", tmp_path / "q.jsonl"
    shutil.copytree(world / "model", model)
    text = (world / "q.jsonl").read_text()
    questions.write_text(text.replace("after four is", "after four, is"))  # the only comma
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    broken = weights(model)
    broken["model.embed_tokens.weight"][tokenizer["model"]["vocab"][","]] = torch.nan
    save_file(broken, model / "model.safetensors", {"format": "pt"})
    more = ("--model", model, "--data", f"jsonl:{questions}", "--max_tokens", 1)
    arguments = command(world, tmp_path / "out", *more)
    statuses, text = wait(fork("train.py", arguments, 2))
    assert statuses == [1, 1]
    message = r"FloatingPointError: 1 questions .*NaN.* 3\b"
    assert len(re.findall(message, text)) == 2, text


def test_a_model_all_of_whose_scores_are_no_numbers_is_told_so(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    broken = weights(world / "model")
    broken["model.norm.weight"][0] = torch.nan
    save_file(broken, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    text = train(world, tmp_path / "out", "--model", tmp_path / "model", fails=True)
    assert "FloatingPointError: 7 questions" in text and "NaN" in text, text
