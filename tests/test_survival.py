"""What a run lives through: SIGKILL at any call, signals, restarts, full disks, damage, lost links.

Runs are of the tiny model in conftest.py; `tests/kill_loop.py` kills the embedded default at random
moments.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train as train_program
from conftest import ROOT, assert_same, command, fork, launch, train, wait, weights

FALLING = ("--schedule", "cosine", "--warmup", 0.2)  # so that a step that is lost would show
LONG = ("--epochs", 12, "--save_every", 5, *FALLING)  # 36 steps
SHORT = ("--epochs", 3, "--save_every", 3, *FALLING)  # 9 steps, 3 checkpoints


@pytest.fixture(scope="module")
def undisturbed(world):
    """Runs that nothing happens to, made when asked for: (processes, shard) -> folder."""

    def of(processes=1, *more):
        out = world / f"undisturbed-{processes}{''.join(map(str, more))}"
        if not out.exists():
            train(world, out, *LONG, *more, processes=processes if processes > 1 else 0)
        return out

    return of


def assert_equal(out, other):
    """Bit for bit the same model, log and scores."""
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in ("log.jsonl", "answers.jsonl"):
        assert (out / file).read_text() == (other / file).read_text()
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (out, other))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert not (out / "checkpoint").exists()
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}


def steps(out):
    return train_program.saved_steps(out / "checkpoint")


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def lines(out):
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


def die_at(call, name="fsync"):
    """Die, as by SIGKILL, in the place of the n-th such call of the operating system."""
    real, left = getattr(os, name), [call]

    def dying(*arguments, **more):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    setattr(os, name, dying)


CALLS = [("fsync", n) for n in (0, 1, 2, 3, 5, 8, 11, 12)]
CALLS += [("replace", n) for n in range(7)]
CALLS += [("unlink", n) for n in (0, 1, 3)] + [("rmdir", n) for n in (0, 3)]


@pytest.mark.parametrize("name, call", CALLS)
def test_killed_wherever_it_touches_the_disk_it_ends_bit_for_bit_as_undisturbed(
    world, tmp_path, undisturbed, name, call
):
    arguments = command(world, tmp_path / "out", *SHORT, "--resume")
    before = functools.partial(die_at, call, name)
    (status,), text = wait(fork("train.py", arguments, before=before))
    assert status == -signal.SIGKILL, text  # or it proves nothing
    assert all(load_file(path) for path in tmp_path.rglob("checkpoint/step-*[0-9]/*.safetensors"))
    text = launch("train.py", *arguments)
    assert "resume: " in text
    assert_equal(tmp_path / "out", undisturbed(1, *SHORT))


@pytest.mark.parametrize("processes, more", [(1, ()), (2, ()), (3, ()), (2, ("--shard",))])
def test_killed_in_the_steps_it_goes_on_from_the_newest_checkpoint(
    world, tmp_path, undisturbed, processes, more
):
    """Bit for bit, with as many processes; one dies, the others end by themselves."""
    out, wanted = tmp_path / "out", undisturbed(processes, *more)
    arguments = command(world, out, *LONG, *more, "--resume")
    for kill in range(2):
        started = fork("train.py", arguments, processes)
        until(lambda: lines(out) >= 7 + 12 * kill)  # noqa: B023
        started[kill % processes][0].kill()
        statuses, text = wait(started)
        assert statuses[kill % processes] == -signal.SIGKILL and all(statuses), text
        assert "Traceback" not in text and ("lost the other processes" in text or processes == 1)
        assert len(steps(out)) == min(2, lines(out) // 5)
    statuses, text = wait(fork("train.py", arguments, processes))
    assert not any(statuses) and f"resume: {out}, from step " in text, text
    assert_equal(out, wanted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_one_process_lets_all_finish_the_step_save_and_leave(
    world, tmp_path, undisturbed, number, processes
):
    out = tmp_path / "out"
    arguments = command(world, out, *LONG, "--resume", "--save_every", 0)
    started = fork("train.py", arguments, processes)
    until(lambda: lines(out) >= 7)
    os.kill(started[-1][0].pid, number)
    statuses, text = wait(started)
    assert statuses == [128 + number] * processes, text
    (step,) = steps(out)
    assert lines(out) == step >= 7
    assert f"stopped by {number.name}: step {step} of 36 is saved; the same command" in text
    statuses, text = wait(fork("train.py", arguments, processes))
    assert f"from step {step} of 36" in text
    assert_equal(out, undisturbed(processes))


@pytest.mark.parametrize("before", ["slowly", "slowly_told"])
def test_a_signal_outside_the_steps_ends_the_run_at_once_with_a_message(world, tmp_path, before):
    """Also where more follow, as a terminal and torchrun both send one."""
    more = ("--max_tokens", 1, "--langs", "en", "es", "fr")
    started = fork("train.py", command(world, tmp_path / "out", *more), before=globals()[before])
    until(lambda: (tmp_path / "out" / "run.json").exists())
    os.kill(started[0][0].pid, signal.SIGTERM)
    (status,), text = wait(started)
    assert status == 130 and "stopped; the same command with --resume" in text
    assert "Traceback" not in text and not lines(tmp_path / "out")


def slowly_told():
    """Two more signals come while the last line is written."""
    import train

    slowly()
    train.CONTINUE = Twice("; the same command with --resume")


class Twice(str):
    def __format__(self, _):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return str(self)


def slowly():
    import dco

    real = dco.completion_logps

    def scored(*arguments, **more):
        time.sleep(0.2)
        return real(*arguments, **more)

    dco.completion_logps = scored


def die_when_all_is_done():
    """As by SIGKILL, in the place of the call that would make the run whole."""
    real = os.replace

    def dying(source, target):
        if Path(target).name == "metrics.json":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = dying


def test_what_is_kept_is_not_computed_twice_and_a_whole_run_is_left_alone(
    world, tmp_path, undisturbed, monkeypatch
):
    out, scored, score = tmp_path / "out", [], train_program.score

    def counted(model, trees, config, packed, desc, *more):
        scored.append(desc)
        return score(model, trees, config, packed, desc, *more)

    monkeypatch.setattr(train_program, "score", counted)
    arguments = command(world, out, *LONG, "--resume", "--score", "mean")
    wait(fork("train.py", arguments, before=functools.partial(die_at, 4, "replace")))
    wait(fork("train.py", arguments, before=die_when_all_is_done))
    assert steps(out)[-1] == 36
    launch("train.py", *arguments)
    assert scored == ["evaluate train", "evaluate test"]
    train(world, tmp_path / "other", "--score", "mean")
    first = ["reference train", "reference test"]
    assert scored[2:] == [*first, "evaluate train", "evaluate test"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "is finished, nothing is left to do" in launch("train.py", *arguments)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.fixture(scope="module")
def killed(world):
    """A run that was killed after it had kept a second checkpoint."""
    out = world / "killed"
    started = fork("train.py", command(world, out, *LONG))
    until(lambda: len(steps(out)) == 2)
    started[0][0].kill()
    wait(started)
    return out


@pytest.fixture
def stopped(world, tmp_path, killed):
    """A copy of such a run, and the arguments to go on with it."""
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    return out, command(world, out, *LONG, "--resume")


def test_another_number_of_processes_and_sharding_go_on_with_a_checkpoint(
    stopped, world, undisturbed
):
    out, arguments = stopped
    shutil.copytree(out, out.with_name("shard"))
    statuses, text = wait(fork("train.py", [*arguments, "--max_tokens", 50], 3))
    assert not any(statuses) and f"resume: {out}, from step" in text, text
    assert_same(out, undisturbed(), atol=2e-4)
    arguments = command(world, out.with_name("shard"), *LONG, "--resume", "--shard")
    statuses, text = wait(fork("train.py", arguments, 2))
    assert not any(statuses) and "shard, from step" in text, text
    assert_same(out.with_name("shard"), undisturbed(), atol=2e-4)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def renamed(path):
    """The same tensors under other names, as of another model."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    tensors = {f"{name}x": value for name, value in load_file(path).items()}
    places = json.dumps({f"{name}x": place for name, place in places.items()})
    save_file(tensors, path, {"DCP_SHARDING_INFO": places})
    state = json.loads((path.parent / "state.json").read_text())
    state["sizes"][path.name] = path.stat().st_size
    (path.parent / "state.json").write_text(json.dumps(state))


def of_other_questions(path):
    save_file({name: table[:, 1:].clone() for name, table in load_file(path).items()}, path)


def emptied(path):
    path.write_text("")


def text_of(change):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


HARM = [
    ("step-*/*.safetensors", cut, "is damaged"),
    ("step-*/*.safetensors", emptied, "is damaged"),
    ("step-*/*.safetensors", Path.unlink, "is damaged"),
    ("step-*/*.safetensors", renamed, "of another model (RuntimeError('Missing key"),
    ("step-*/state.json", cut, "is damaged"),
    ("step-*/state.json", emptied, "is damaged"),
    ("step-*/state.json", text_of({"step": 3}), "another size or step"),
    ("step-*/state.json", text_of({"tokens": None}), "is damaged"),
    ("step-*/state.json", text_of({"scheduler": {}}), "is damaged"),
    ("reference.safetensors", cut, "reference.safetensors is damaged"),
    ("reference.safetensors", of_other_questions, "scores of other questions"),
    ("../run.json", cut, "run.json was not written by this train.py"),
    ("../run.json", Path.unlink, "run.json was not written by this train.py"),
]


@pytest.mark.parametrize("file, harm, message", HARM)
def test_a_damaged_or_foreign_file_is_refused_by_name(stopped, undisturbed, file, harm, message):
    """And where a checkpoint is removed as the message says, the one before it goes on."""
    out, arguments = stopped
    path = sorted((out / "checkpoint").glob(file), key=lambda path: path.stat().st_mtime)[-1]
    harm(path)
    text = launch("train.py", *arguments, fails=True)
    assert message in text and "Traceback" not in text and str(out) in text
    if harm is cut and "step" in file:
        shutil.rmtree(path.parent)
        launch("train.py", *arguments)
        assert_equal(out, undisturbed())


def test_a_shard_that_is_missing_between_two_others_is_refused(world, tmp_path):
    """What is left of its weights would else be read without it, in silence."""
    out = tmp_path / "out"
    arguments = command(world, out, *LONG, "--shard", "--resume")
    started = fork("train.py", arguments, 3)
    until(lambda: steps(out))
    started[0][0].kill()
    wait(started)
    (newest,) = (out / "checkpoint").glob(f"step-{steps(out)[-1]}")
    shards = [
        *newest.glob("shard-00002-*.safetensors")
    ]  # one tensor each: less room while it saves
    assert all(len(load_file(path)) == 1 for path in shards) and len(shards) > 20
    shards[0].unlink()
    statuses, text = wait(fork("train.py", arguments, 3))
    assert statuses == [2] * 3 and f"{newest} is damaged" in text and "are missing" in text, text


def test_a_folder_of_someone_elses_is_neither_taken_for_a_run_nor_removed(world, tmp_path):
    precious = tmp_path / "out" / "checkpoint" / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("weights")
    text = train(world, tmp_path / "out", "--resume", fails=True)
    assert "run.json was not written by this train.py" in text and precious.read_text() == "weights"


def test_what_a_life_left_half_removed_or_half_written_is_no_hindrance(stopped, undisturbed):
    out, arguments = stopped
    for number in range(max(steps(out)) + 5, 40, 5):
        for name in (f"step-{number}", f"step-{number}.part"):
            (out / "checkpoint" / name).mkdir()
            (out / "checkpoint" / name / "model.safetensors").write_text("half")
    (out / "checkpoint" / "reference.safetensors.part").write_text("half")
    launch("train.py", *arguments)
    assert_equal(out, undisturbed())


def test_other_settings_are_refused_with_what_differs(stopped):
    out, arguments = stopped
    more = ("--lr", "2e-3", "--candidates", "3", "--save_every", "7", "--max_tokens", "99")
    text = launch("train.py", *arguments, *more, fails=True)
    assert "begun with other settings: candidates 2, now 3; lr 0.001, now 0.002. Give" in text
    text = launch("train.py", *arguments[:-1], fails=True)
    assert "not empty" in text and "--resume continues it" in text


def test_torchrun_restarts_a_killed_worker_and_the_run_resumes_by_itself(
    world, tmp_path, undisturbed
):
    out = tmp_path / "out"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    running = subprocess.Popen(
        [*start, "--nproc_per_node", "2", ROOT / "train.py", *command(world, out, *LONG)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until(lambda: lines(out) >= 7)
    workers = children(running.pid)
    os.kill(workers[1], signal.SIGKILL)
    text = running.communicate(timeout=240)[0]
    assert running.returncode == 0 and f"resume: {out}, from step" in text, text
    assert_equal(out, undisturbed(2))
    assert not any(alive(pid) for pid in workers)


def children(pid):
    """The workers of a torchrun, first rank first."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in found}
    return sorted(child for child, name in names.items() if b"train.py" in name)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fail_on_the_last(step=4):
    """On the last process alone, raise an error in a step."""
    import train

    if os.environ["RANK"] == "1":
        real, left = train.language_loss, [step]

        def failing(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise KeyError("a bug on one process")
            return real(*arguments)

        train.language_loss = failing


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_one_process_that_fails_ends_the_others_without_a_hang(world, tmp_path, more):
    started = fork(
        "train.py", command(world, tmp_path / "out", *LONG, *more), 2, before=fail_on_the_last
    )
    statuses, text = wait(started, 60)
    assert all(status not in (None, 0) for status in statuses), text
    assert "a bug on one process" in text and "error: lost the other processes" in text


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_questions(
    world, tmp_path, processes
):
    out = tmp_path / "out"
    more = ("--lr", "1e30", "--grad_clip", 0, "--save_every", 1)
    statuses, text = wait(fork("train.py", command(world, out, *more), processes))
    assert statuses == [1] * processes and "Traceback" not in text
    assert "step 2: the loss of questions '" in text and "is NaN or infinite" in text
    assert steps(out) == [1] and lines(out) == 1
    named = text.split("the loss of questions ")[1].split(" is NaN")[0]
    draws = list(range(7))
    import random

    import data

    random.Random("order/0/0").shuffle(draws)
    order = data.split(data.load(f"jsonl:{world / 'q.jsonl'}", ["en"]), 7, None, 0)[0]
    assert set(named.split(", ")) <= {repr(order[q].id) for q in draws[3:6]}


def test_an_infinite_loss_with_a_finite_gradient_is_found_too(world, tmp_path, monkeypatch):
    """The derivative of |x| hides it: that of NaN is 0."""
    real = train_program.language_loss
    monkeypatch.setattr(
        train_program, "language_loss", lambda *tables: real(*tables) * 0 + torch.inf
    )
    text = train(world, tmp_path / "out", fails=True)
    assert "step 1: the loss of question" in text


def test_a_gradient_that_is_no_number_is_found_where_the_losses_are_finite(
    world, tmp_path, monkeypatch
):
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: real(*given) * torch.nan)
    text = train(world, tmp_path / "out", fails=True)
    assert "step 1: the gradient of questions '" in text and "with a lower --lr" in text
    assert "--resume" not in text  # the same command would end the same way


def test_a_model_whose_scores_are_no_numbers_is_told_with_the_questions(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    broken = weights(world / "model")
    broken["model.norm.weight"][0] = torch.nan
    save_file(broken, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    text = train(world, tmp_path / "out", "--model", tmp_path / "model", fails=True)
    assert "reference train: log-probs are NaN or infinite in 7 of 7 questions: '" in text


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], text=True,
                          capture_output=True)  # fmt: skip
    if made.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("processes, free", [(1, 700_000), (2, 350_000), (1, 100_000)])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(
    world, small_disk, undisturbed, processes, free
):
    """In the model, in the optimizer, in what is written of the second checkpoint."""
    out = small_disk / "out"
    arguments = command(world, out, *SHORT, "--resume")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2 * 2**20 - 600_000 - free))
    statuses, text = wait(fork("train.py", arguments, processes))
    assert statuses == [1] * processes and "Traceback" not in text, text
    assert "could not be read or saved: " in text and (
        "No space left" in text or "os error 28" in text
    )
    assert not [*out.rglob("*.part")]
    if done := steps(out):
        assert f"steps {done} are whole; the same command with" in text
    filler.unlink()
    (statuses, text) = wait(fork("train.py", arguments, processes))
    assert not any(statuses), text
    assert_equal(out, undisturbed(processes, *SHORT))


def test_out_of_gpu_memory_says_which_setting_to_lower(world, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train_program.dco, "completion_logps", full)
    text = train(world, tmp_path / "out", fails=True)
    assert "lower --max_tokens" in text and "2.00 GiB" in text and "--resume continues" in text
