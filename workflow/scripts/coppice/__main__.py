"""`python -m coppice`, the same as the command `coppice`."""

import sys

from .cli import main

sys.exit(main())
