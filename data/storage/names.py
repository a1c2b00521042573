"""How the files of a split are called; everything else about a shard follows from its number."""

from __future__ import annotations

MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
INDEX_SUFFIX = ".index.json"  # for a shard's .tar


def shard_name(number: int) -> str:
    return f"shard-{number:06}.tar"


def index_name(number: int) -> str:
    return f"shard-{number:06}{INDEX_SUFFIX}"
