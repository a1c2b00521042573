"""`python -m vidfill.launch.start`: `accelerate launch`, which says in a line what signal ended it.

By itself it shows a traceback then, below what the training processes said when they had saved.
"""

from __future__ import annotations

import sys

from accelerate.commands import accelerate_cli
from torch.distributed.elastic.multiprocessing.api import SignalException

from ..errors import say


def main() -> int:
    """Start the processes that the words behind this module's name describe; their status."""
    sys.argv = ["accelerate", "launch", *sys.argv[1:]]
    try:
        accelerate_cli.main()
    except SignalException as ended:
        say(f"vidfill launch: the processes of this node were ended by {ended.sigval.name}")
        return 128 + ended.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
