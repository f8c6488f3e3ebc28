"""`python -m codomyrmex.events.streaming.cli`: the command `codomyrmex-streaming`."""

import sys

from codomyrmex.events.streaming.cli import main

sys.exit(main())
