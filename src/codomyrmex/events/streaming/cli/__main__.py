"""`python -m codomyrmex.events.streaming.cli`: the command `codomyrmex-streaming`."""

import sys

from . import main

sys.exit(main())
