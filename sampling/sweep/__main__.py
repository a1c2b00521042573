"""`python -m vidfill.sampling.sweep`."""

import sys

from .run import main

sys.exit(main())
