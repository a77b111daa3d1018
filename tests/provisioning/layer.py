"""A registry, as a layer over the lab's base that is built once and cached."""

import hashlib
import shutil
from pathlib import Path

from tests.lab.base import Say, base, cache, enter, locked
from tests.lab.wait import run_aloud

HERE = Path(__file__).parent


def lower(say: Say = print) -> Path:
    """Return what `enter` takes as its root: the layer and the base, as overlayfs lists folders."""
    root = base(say=say)
    digest = hashlib.sha256(str(root).encode() + (HERE / "layer.sh").read_bytes())
    folder = cache() / f"provisioning-{digest.hexdigest()[:12]}"
    with locked(cache() / "provisioning.lock", say):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            recipe = ["sh", "/mnt/layer/layer.sh"]
            argv = enter(root, recipe, upper=part, binds={HERE: "/mnt/layer"})
            run_aloud("the registry", argv, cache() / "provisioning.log", say)
            part.rename(folder)
    return Path(f"{folder / 'upper'}:{root}")
