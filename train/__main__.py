"""`python -m vidfill.train`, and what `accelerate launch -m vidfill.train` starts."""

import sys

from .loop import main

sys.exit(main())
