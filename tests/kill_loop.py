"""Kills one run over and over, and sees that it ends bit for bit as if nothing had happened.

    python tests/kill_loop.py [--processes 2] [--kills 30] [-- settings of train.py]

The run is the embedded default, with a checkpoint every 5 steps. Each life ends by SIGKILL after a
random time, whatever the run is at then, or once it has taken a random number of steps, if that is
sooner. With more processes one of them is killed, at random, under a torchrun that restarts all;
now and then the torchrun with them. After the last kill the run is left alone to end, and compared
with one that was never disturbed.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def launch(processes: int, out: Path, settings: list[str], output) -> subprocess.Popen:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1000"]
        start += ["--nproc_per_node", str(processes)]
    command = [*start, str(TRAIN), "--out", str(out), "--save_every", "5", "--resume", *settings]
    # a session of its own: Ctrl-C is for this script, which then leaves the run to itself
    return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def workers(pid: int) -> list[int]:
    """The process itself, or the workers of a torchrun."""
    try:
        there = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(p) for p in there if b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
    except FileNotFoundError:
        return []


def lines(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def stage(out: Path, total: int) -> str:
    """What the run was at, by what it has kept."""
    kept = out / "checkpoint"
    if (out / "metrics.json").exists():
        return "clearing up"
    if not (kept / "reference.safetensors").exists():
        return "making the model and its scores"
    return "evaluation" if lines(out) == total else "steps"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", help="of train.py, after --")
    arguments = parser.parse_args()
    rng, folder = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="kill-loop-"))
    alone, out = folder / "alone", folder / "killed"
    with open(folder / "output.txt", "w+") as output:
        begun = time.monotonic()
        calm = launch(arguments.processes, alone, arguments.settings, output)
        assert calm.wait() == 0, f"the undisturbed run failed: {output.name}"
        whole = time.monotonic() - begun
        total, at = lines(alone), collections.Counter()
        print(f"undisturbed: {whole:.0f} s, {total} steps; {folder}", flush=True)
        wait, kills, launches, running = whole / 4, 0, 0, None
        while kills < arguments.kills:
            if running is None:
                running = launch(arguments.processes, out, arguments.settings, output)
                launches += 1
            before, begun = (lines(out), stage(out, total)), time.monotonic()
            moment = rng.uniform(0, wait)
            goal = before[0] + rng.randint(1, max(2, 2 * total // arguments.kills))
            while time.monotonic() - begun < moment and (lines(out) < goal or goal > total):
                if running.poll() is not None:
                    break
                time.sleep(0.005)
            if running.poll() is not None:
                assert running.returncode == 0, f"status {running.returncode}: {output.name}"
                break  # it ended before it could be killed
            at[stage(out, total)] += 1
            kills += 1
            victims = workers(running.pid) if arguments.processes > 1 else [running.pid]
            if arguments.processes > 1 and victims and rng.random() < 0.8:
                os.kill(rng.choice(victims), signal.SIGKILL)  # torchrun sees to the rest
            else:
                for pid in {running.pid, *victims}:
                    os.kill(pid, signal.SIGKILL)
                running.wait()
                running = None
            # where nothing was gained, the next life is longer
            wait = 2 * wait if (lines(out), stage(out, total)) == before else whole / 4
        if running is None:
            running = launch(arguments.processes, out, arguments.settings, output)
            launches += 1
        assert running.wait() == 0, f"status {running.returncode}: {output.name}"
    files = "model.safetensors", "log.jsonl", "answers.jsonl"
    differ = [name for name in files if (out / name).read_bytes() != (alone / name).read_bytes()]
    where = ", ".join(f"{count} in {name}" for name, count in at.items())
    print(
        f"{arguments.processes} process(es), {kills} kills ({where}), {launches} launches: model, "
        f"log and scores: {' and '.join(differ) + ' DIFFER' if differ else 'bit for bit the same'}"
    )
    sys.exit(0 if not differ and kills >= arguments.kills else 1)


if __name__ == "__main__":
    main()
