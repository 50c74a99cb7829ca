"""`python -m theory` checks every claim, a line each; with claims' names it shows their working."""

import argparse
import inspect
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from theory import CLAIMS, Finding


def verdict(finding: Finding) -> str:
    return "PASS" if finding.gap <= finding.allowed else "FAIL"  # NaN fails


def verify(name: str, draws: int, seed: int, working: bool) -> bool:
    """Check one claim and print a line of it, or its proof and every finding."""
    claim = import_module(f"theory.{name}")
    source, _, words = inspect.getdoc(claim).partition("\n")[0].partition(": ")
    begun, findings = time.time(), list(claim.check(draws, seed))
    worst = max(findings, key=lambda f: (verdict(f) == "FAIL", f.gap / f.allowed))
    holds = verdict(worst) == "PASS"
    if working:
        print(f"{inspect.getdoc(claim)}\n")
        for f in findings:
            print(
                f"{verdict(f)}  {f.words}\n      {f.draws} draws, worst gap {abs(f.gap):.1e}, "
                f"allowed {f.allowed:.0e}" + f"\n      {f.shown}" * bool(f.shown)
            )
        print(f"\n{name}: {'PASS' if holds else 'FAIL'}, {time.time() - begun:.1f} s\n")
    else:
        most = max(f.draws for f in findings)
        print(
            f"{verdict(worst)} {name:<18} {source:<9} {words:<78} {most:>5} "
            f"{abs(worst.gap):9.1e} {worst.allowed:9.1e}",
            flush=True,
        )
    return holds


def main(arguments: list[str] | None = None) -> int:
    """0 if every claim asked for holds, 1 if one does not, 2 for arguments that cannot be."""
    parser = argparse.ArgumentParser("python -m theory", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--draws", type=int, default=200, help="toy models a finding (%(default)s)")
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
    begun, names = time.time(), args.claims or CLAIMS
    if not args.claims:
        print(
            f"     {'claim':<18} {'paper':<9} {'in words':<78} {'draws':>5} {'worst gap':>9} "
            f"{'allowed':>9}"
        )
    failed = [name for name in names if not verify(name, args.draws, args.seed, bool(args.claims))]
    print(
        f"{len(names) - len(failed)} of {len(names)} claims hold, {time.time() - begun:.0f} s"
        + f"; not: {', '.join(failed)}" * bool(failed)
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
