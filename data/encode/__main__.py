"""`python -m vidfill.data.encode`."""

import sys

from .run import main

sys.exit(main())
