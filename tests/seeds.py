"""The first run, `python train.py`, for several seeds: what each shows, and the median.

python tests/seeds.py [--seeds 0 1 2 ...] [any setting of train.py]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rankc import format_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(10)])
    parser.add_argument("--at_once", type=int, default=2, help="runs, of one thread each")
    given, more = parser.parse_known_args()
    rows, moved = [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.at_once) as pool:

        def run(seed):
            out = Path(folder, str(seed))
            command = [sys.executable, ROOT / "train.py", "--seed", str(seed), "--out", out, *more]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=env, capture_output=True)
            return json.loads((out / "metrics.json").read_text())

        for seed, found in zip(given.seeds, pool.map(run, given.seeds), strict=True):
            langs, row = found["languages"], [str(seed)]
            for part in (found["test"], found["train"]):
                mean, error = part["with_error"]["change"]["clc"]
                right, wrong, _ = map(sum, zip(*part["answers"].values(), strict=True))
                row += [f"{100 * mean:+.1f} ± {100 * error:.1f}", f"{right} / {wrong}"]
            moved.append(
                [
                    100 * found["test"]["with_error"]["change"][f"accuracy {lang}"][0]
                    for lang in langs
                ]
            )
            rows.append([*row, *(f"{x:+.1f}" for x in moved[-1])])
            rows[-1].append(f"{sum(found['seconds'].values()):.0f}")
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    turned = "to right / wrong"
    head = ["seed", "test CLC", turned, "train CLC", turned, *(f"test {x}" for x in langs)]
    medians = [f"{statistics.median(values):+.1f}" for values in zip(*moved, strict=True)]
    print(format_table([[*head, "seconds"], *rows, ["median", *[""] * 4, *medians, ""]]))


if __name__ == "__main__":
    main()
