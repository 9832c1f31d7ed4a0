"""``python -m pyvcpu``."""

import sys

from pyvcpu.cli import main

sys.exit(main())
