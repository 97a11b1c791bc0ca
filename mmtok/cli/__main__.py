"""`python -m mmtok.cli`: the same as the command `mmtok`."""

import sys

from mmtok.cli import main

sys.exit(main())
