"""The licence chain of a trained model: what its weights derive from, and the conditions for redistributing them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f_trainer.model.backbones import BACKBONES, hub_id

DINOV3, NON_COMMERCIAL, APACHE = "dinov3-license", "cc-by-nc-4.0", "apache-2.0"
DINOV3_LINK = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
AGREEMENT = "DINOV3_AGREEMENT.md"
PUBLISHED_HEADS = "facebook/mask2former"


@dataclass(frozen=True)
class Origin:
    """A backbone, head or model that the weights derive from."""

    source: str  # Hub id or folder
    licence: str  # "" where it is not known
    duty: str  # the conditions for using or redistributing derived weights


def licence_chain(config: Mapping[str, Any]) -> list[Origin]:
    """The origins of a model's weights, from its configuration and those of the local models it derives from."""
    found = [origin for one in with_ancestors(config) for origin in own_origins(one)]
    return list(dict.fromkeys(found))


def with_ancestors(config: Mapping[str, Any], depth: int = 10) -> Iterator[Mapping[str, Any]]:
    """A configuration, then those of the models it was initialised from, as long as their folders exist."""
    yield config
    parent = Path(config.get("init_from") or "", "config.json")
    if config.get("init_from") and depth and parent.is_file():
        yield from with_ancestors(json.loads(parent.read_text(encoding="utf-8")), depth - 1)


def own_origins(config: Mapping[str, Any]) -> Iterator[Origin]:
    """The backbone, head and initial model that one configuration names."""
    if config.get("backbone_name"):
        yield backbone_origin(str(config["backbone_name"]), config)
    if config.get("head_checkpoint"):
        yield head_origin(str(config["head_checkpoint"]))
    if config.get("init_from"):
        yield Origin(str(config["init_from"]), "", "Its own licence chain carries over; see its model card.")


def backbone_origin(name: str, config: Mapping[str, Any]) -> Origin:
    """The licence of a backbone, from the table or, for a folder, from its architecture."""
    architecture = str((config.get("backbone_config") or {}).get("model_type", ""))
    own = Path(name).name if Path(name).is_absolute() else name  # names of parent folders mean nothing
    if architecture.startswith("dinov3") or "dinov3" in own.lower():
        duty = (
            f"Derivatives stay under the [DINOv3 License]({DINOV3_LINK}): distribute a copy of the agreement with "
            'them, show "Built with DINOv3", and respect its limits of use.'
        )
        return Origin(hub_id(name), DINOV3, duty)
    if name in BACKBONES or name.startswith("facebook/dinov2"):
        return Origin(hub_id(name), APACHE, "Keep its licence notice.")
    return Origin(name, "", "The licence of this backbone carries over; look it up where it was published.")


def head_origin(name: str) -> Origin:
    """The licence of a head checkpoint; the published COCO heads do not allow commercial use."""
    if name.startswith(PUBLISHED_HEADS):
        return Origin(name, NON_COMMERCIAL, "Not for commercial use, and neither are models trained from it.")
    duty = "The licence of this head carries over. If it came from a published Mask2Former, that is CC BY-NC 4.0."
    return Origin(name, "", duty)


def licence_fields(chain: list[Origin]) -> dict[str, str]:
    """The licence fields of a model card, from the strictest licence among the origins."""
    licences = {origin.licence for origin in chain}
    if DINOV3 in licences:
        also = f"-and-{NON_COMMERCIAL}" if NON_COMMERCIAL in licences else ""
        return {"license": "other", "license_name": DINOV3 + also, "license_link": DINOV3_LINK}
    if NON_COMMERCIAL in licences:
        return {"license": NON_COMMERCIAL}
    if "" in licences:
        return {"license": "other", "license_name": "see-the-licences-below"}
    return {"license": APACHE}


def legal_text(name: str) -> str:
    """The text of LICENSE, NOTICE or DINOV3_LICENSE.md, from the installed package or the repository."""
    folders = (Path(__file__).parent / "legal", Path(__file__).parents[2])
    path = next(folder / name for folder in folders if (folder / name).is_file())
    return path.read_text(encoding="utf-8")
