"""``python -m vmrewind.ship``."""

import os
import sys

from vmrewind.ship.process import main

os.umask(0o077)
sys.exit(main())
