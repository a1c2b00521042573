"""What a benchmark says of the machine that it ran on."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor's model."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text() if listed.is_file() else ""
    named = re.search(r"model name\s*: (.+)", text)
    return named[1] if named else platform.processor() or platform.machine()
