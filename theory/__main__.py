"""`python -m theory` checks every claim, a line each; with claims' names it shows their working."""

import argparse
import inspect
import sys
import textwrap
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from theory import CHECKS, CLAIMS, TOLERANCE, Finding, run, worst

ROW = "{:<4} {:<18} {:<9} {:<79} {:>6} {:>5} {:>9}"


def verdict(holds: bool) -> str:
    return "PASS" if holds else "FAIL"


def verify(name: str, draws: int, seed: int) -> tuple[str, list[Finding]]:
    """A claim's proof, and what its checks find."""
    claim = import_module(f"theory.{name}")
    return inspect.getdoc(claim), [run(check, draws, seed) for check in CHECKS[name]]


def print_line(name: str, proof: str, findings: list[Finding]) -> None:
    source, _, words = proof.partition("\n")[0].partition(": ")
    holds = all(finding.holds for finding in findings)
    draws = max(finding.draws for finding in findings)
    gap = worst(*(finding.gap for finding in findings))
    print(
        ROW.format(verdict(holds), name, source, words, len(findings), draws, f"{gap:.1e}"),
        flush=True,
    )


def print_working(name: str, proof: str, findings: list[Finding]) -> None:
    print(f"{proof}\n")
    for finding in findings:
        begin = f"{verdict(finding.holds)}  "
        print(textwrap.fill(begin + finding.statement, width=100, subsequent_indent=" " * 6))
        drawn = "1 draw" if finding.draws == 1 else f"{finding.draws} draws"
        print(f"      {drawn}, worst gap {finding.gap:.1e}, allowed {TOLERANCE:.0e}")
        if finding.shown:
            print(f"      {finding.shown}")
    print(f"\n{name}: {verdict(all(finding.holds for finding in findings))}\n")


def main(arguments: list[str] | None = None) -> int:
    """0 if every claim asked for holds, 1 if one does not, 2 for arguments that cannot be."""
    parser = argparse.ArgumentParser("python -m theory", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--draws", type=int, default=200, help="toy models a check (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--plot", metavar="DIR", help="draw the three figures there instead")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.claims if name not in CLAIMS]
    if unknown:
        parser.error(f"no claim {', '.join(unknown)}; there are: {', '.join(CLAIMS)}")
    if args.draws < 1:
        parser.error(f"--draws {args.draws}: at least 1")
    if args.plot:
        if args.claims:
            parser.error("--plot draws all three figures: leave the claims out")
        if not find_spec("matplotlib"):
            parser.error("--plot needs matplotlib: pip install -e '.[plot]'")
        if Path(args.plot).is_file():
            parser.error(f"--plot {args.plot} is a file: name a folder")
        import_module("theory.figures").draw(args.plot, args.seed)
        return 0

    begun, failed = time.time(), []
    if not args.claims:
        print(ROW.format("", "claim", "paper", "in words", "checks", "draws", "worst gap"))
    names = args.claims or CLAIMS
    for name in names:
        proof, findings = verify(name, args.draws, args.seed)
        if args.claims:
            print_working(name, proof, findings)
        else:
            print_line(name, proof, findings)
        if not all(finding.holds for finding in findings):
            failed.append(name)
    summary = f"{len(names) - len(failed)} of {len(names)} claims hold"
    print(f"{summary}, {time.time() - begun:.0f} s")
    if failed:
        print(f"these do not: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
