"""``python -m vmrewind.ship``."""

import sys

from vmrewind.ship.process import main

sys.exit(main())
