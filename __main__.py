"""`python -m vidfill` is `vidfill`."""

import sys

from .cli import main

sys.exit(main())
