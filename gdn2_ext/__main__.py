"""`python -m gdn2_ext`: the demo."""

import sys

from .demo import main

sys.exit(main())
