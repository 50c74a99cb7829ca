"""Two machines, as two network namespaces: a link that is cut in the steps, and what follows."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, command, train, weights

LONG = ("--epochs", 20, "--save_every", 5, "--timeout", 0.1)  # 60 steps; 6 seconds


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def machines():
    """Two namespaces joined by a link; skips where that takes rights this process lacks."""
    names, other = ("dco-a", "dco-b"), "dco-b-link"
    try:
        made = ip("netns", "add", names[0])
    except FileNotFoundError:
        pytest.skip("there is no `ip` command here to make network namespaces with")
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "dco-a-link", "netns", names[0], "type", "veth", "peer", "name", other,
           "netns", names[1])  # fmt: skip
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", f"{name}-link")
            for device in ("lo", f"{name}-link"):
                done = ip("-n", name, "link", "set", device, "up")
        if done.returncode:
            pytest.skip(f"a link between namespaces cannot be made here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def torchruns(machines, arguments):
    """A torchrun of one process on each machine."""
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
             "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1",
             "--master_addr", "10.77.0.1", "--master_port", "29500", ROOT / "train.py",
             *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"{name}-link"},
        )
        for rank, name in enumerate(machines)
    ]  # fmt: skip


def test_a_cut_link_ends_both_machines_in_time_and_the_run_resumes(machines, world, tmp_path):
    out = tmp_path / "out"
    arguments = command(world, out, *LONG, "--resume")
    running = torchruns(machines, arguments)
    log = out / "log.jsonl"
    end = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 6):
        assert time.monotonic() < end and all(node.poll() is None for node in running)
        time.sleep(0.01)
    ip("-n", machines[0], "link", "set", "dco-a-link", "down")
    cut = time.monotonic()
    texts = [node.communicate(timeout=120)[0] for node in running]
    waited = time.monotonic() - cut
    assert all(node.returncode for node in running)
    for rank, text in enumerate(texts):
        assert f"{'process 1: ' * rank}error: lost the other processes" in text, text
        assert "; the same command with --resume continues" in text
    assert 5 < waited < 60  # the time-out is 6 seconds; torchrun looks after its own
    ip("-n", machines[0], "link", "set", "dco-a-link", "up")
    running = torchruns(machines, arguments)
    texts = [node.communicate(timeout=240)[0] for node in running]
    assert not any(node.returncode for node in running), texts
    assert f"resume: {out}, from step" in texts[0]
    train(world, tmp_path / "alone", *LONG, processes=2)
    ours, theirs = weights(out), weights(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").open()]
        for folder in (out, tmp_path / "alone")
    ]
    assert logs[0] == logs[1]
