"""The bench's own packages, as a layer over the lab's base that is built once and cached."""

import hashlib
import shutil
from pathlib import Path

from tests.lab.base import Say, base, cache, download, enter, locked, python_of
from tests.lab.wait import run_aloud

HERE = Path(__file__).parent
_LOCK = HERE / "requirements.lock"


def lower(say: Say = print) -> Path:
    """Return what `enter` takes as its root: the layer and the base, as overlayfs lists folders."""
    root = base(say=say)
    digest = hashlib.sha256(str(root).encode())
    for recipe in (HERE / "layer.sh", _LOCK):
        digest.update(recipe.read_bytes())
    folder = cache() / f"bench-gateway-{digest.hexdigest()[:12]}"
    with locked(cache() / "bench-gateway.lock", say):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            _build(root, part, say)
            part.rename(folder)
    return Path(f"{folder / 'upper'}:{root}")


def _build(root: Path, part: Path, say: Say) -> None:
    wheels, log = cache() / "wheels-bench", cache() / "bench-gateway.log"
    for folder in (wheels, part):
        folder.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    run_aloud("wheels of the other routers", download(_LOCK, python_of(root), wheels), log, say)
    binds = {wheels: "/mnt/wheels", HERE: "/mnt/bench"}
    argv = enter(root, ["sh", "/mnt/bench/layer.sh"], upper=part, binds=binds)
    run_aloud("packages of the bench", argv, log, say)
