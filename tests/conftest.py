"""Shapes in signatures are checked while the tests run, and nothing asks a hub for anything."""

import os

from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"

install_import_hook(
    ["vidfill.modeling", "vidfill.data", "vidfill.sampling", "vidfill.train"], "beartype.beartype"
)
