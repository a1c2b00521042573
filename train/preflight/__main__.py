"""`python -m vidfill.train.preflight`: the doctor."""

import sys

from .doctor import main

sys.exit(main())
