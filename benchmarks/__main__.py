"""``python -m benchmarks [engine|migration|codec]...``"""

from __future__ import annotations

import sys

from benchmarks import codec, engine, migration

SUITES = {"engine": engine.main, "migration": migration.main, "codec": codec.main}


def main() -> int:
    names = sys.argv[1:] or list(SUITES)
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        print(f"there is {', '.join(SUITES)}, not {', '.join(unknown)}", file=sys.stderr)
        return 2
    for name in names:
        SUITES[name]()
    return 0


sys.exit(main())
