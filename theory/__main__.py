"""`python -m theory` checks every claim, a line each; with claims' names it shows their working."""

import argparse
import inspect
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from theory import CLAIMS, Finding

ROW = "{:<4} {:<18} {:<9} {:<78} {:>5} {:>9} {:>9}"


def verdict(finding: Finding) -> str:
    return "PASS" if finding.gap <= finding.allowed else "FAIL"  # NaN fails


def verify(name: str, draws: int, seed: int, working: bool) -> bool:
    """Check one claim and print a line of it, or its proof and every finding."""
    claim, begun = import_module(f"theory.{name}"), time.time()
    proof, findings = inspect.getdoc(claim), list(claim.check(draws, seed))
    worst = max(findings, key=lambda f: (verdict(f) == "FAIL", f.gap / f.allowed))
    if working:
        print(f"{proof}\n")
        for f in findings:
            print(f"{verdict(f)}  {f.words}")
            print(f"      {f.draws} draws, worst gap {abs(f.gap):.1e}, allowed {f.allowed:.0e}")
            if f.shown:
                print(f"      {f.shown}")
        print(f"\n{name}: {verdict(worst)}, {time.time() - begun:.1f} s\n")
    else:
        source, _, words = proof.partition("\n")[0].partition(": ")
        gap, allowed = f"{abs(worst.gap):.1e}", f"{worst.allowed:.1e}"
        most = max(f.draws for f in findings)
        print(ROW.format(verdict(worst), name, source, words, most, gap, allowed), flush=True)
    return verdict(worst) == "PASS"


def main(arguments: list[str] | None = None) -> int:
    """0 if every claim asked for holds, 1 if one does not, 2 for arguments that cannot be."""
    parser = argparse.ArgumentParser("python -m theory", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--draws", type=int, default=200, help="toy models a finding (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--plot", metavar="DIR", help="draw the three figures there instead")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.claims if name not in CLAIMS]:
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
    if not args.claims:
        print(ROW.format("", "claim", "paper", "in words", "draws", "worst gap", "allowed"))
    names, begun = args.claims or CLAIMS, time.time()
    failed = [name for name in names if not verify(name, args.draws, args.seed, bool(args.claims))]
    holding, which = len(names) - len(failed), f"; not: {', '.join(failed)}" if failed else ""
    print(f"{holding} of {len(names)} claims hold, {time.time() - begun:.0f} s{which}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
