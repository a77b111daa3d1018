"""The provisioned images: what a name in the spec stands for on this site.

An Apptainer image is pinned by its manifest `<image_dir>/<name>.json`, which the image's build
writes beside the SIF; a program on the host is pinned by its path.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from reconciler.adapters.ports import ImagePin
from reconciler.spec import Fleet, Image


class ImageFolder:
    """The adapter for manifests on a path that the login host can read."""

    def pins(self, fleet: Fleet) -> tuple[Mapping[str, ImagePin], Mapping[str, str]]:
        pins: dict[str, ImagePin] = {}
        errors: dict[str, str] = {}
        for key, image in fleet.images.items():
            try:
                pins[key] = _pin(fleet, image)
            except (OSError, ValueError, KeyError, TypeError) as error:
                manifest = f"{fleet.image_dir}/{image.name}.json"
                errors[key] = f"{manifest} can't be used ({error}); provision the image first"
        return pins, errors


def _pin(fleet: Fleet, image: Image) -> ImagePin:
    if image.runtime == "none" or fleet.image_dir is None:
        return ImagePin(program=str(image.path), digest=f"path:{image.path}")
    folder = Path(fleet.image_dir)
    manifest = json.loads((folder / f"{image.name}.json").read_text(encoding="utf-8"))
    sif, digest = str(manifest["sif"]), str(manifest["sha256"])
    if "/" in sif or not sif.isprintable():
        raise ValueError("its sif is not a file name")
    return ImagePin(program=str(folder / sif), digest=digest)
