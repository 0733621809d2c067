"""The licence chain of a trained model: what its weights derive from, and the conditions for redistributing them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f_trainer.model.backbones import APACHE, DINOV3, EUPE, find_row, hub_id

NON_COMMERCIAL, MIT = "cc-by-nc-4.0", "mit"
DINOV3_LINK = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
EUPE_LINK = "https://huggingface.co/timm/vit_small_patch16_dinov3_qkvb.eupe_lvd1689m"
PUBLISHED_HEADS = {"facebook/mask2former": NON_COMMERCIAL, "shi-labs/oneformer": MIT}


@dataclass(frozen=True)
class Terms:
    """What a licence of weights asks for."""

    duty: str  # the conditions for using or redistributing derived weights
    link: str = ""  # to the text
    agreement: str = ""  # file name of the copy of the text that must accompany derived weights
    commercial: bool = True


TERMS: Mapping[str, Terms] = {
    DINOV3: Terms(
        f"Derivatives stay under the [DINOv3 License]({DINOV3_LINK}): distribute a copy of the agreement with them, "
        'show "Built with DINOv3", and respect its limits of use.',
        DINOV3_LINK,
        "DINOV3_AGREEMENT.md",
    ),
    EUPE: Terms(
        f"Derivatives stay under the FAIR Noncommercial Research License ([EUPE]({EUPE_LINK})): for research, not for "
        "commercial use; distribute a copy of the agreement with them.",
        EUPE_LINK,
        "EUPE_AGREEMENT.md",
        commercial=False,
    ),
    NON_COMMERCIAL: Terms("Not for commercial use, and neither are models trained from it.", commercial=False),
    APACHE: Terms("Keep its licence notice."),
    MIT: Terms("Keep its copyright and licence notice."),
}
"""Licences of weights, the strictest first."""


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
    """A configuration, then those of the models and heads it was initialised from, as long as their folders exist."""
    yield config
    for source in (config.get("init_from"), config.get("head_checkpoint")):
        parent = Path(str(source or ""), "config.json")
        if source and depth and parent.is_file():
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
    """The licence of a backbone's weights, from the table or as recorded when the model was built.

    Weights of DINOv3's architecture from an unknown folder count as DINOv3's.
    """
    architecture = str((config.get("backbone_config") or {}).get("model_type", ""))
    own = Path(name).name if Path(name).is_absolute() else name  # names of parent folders mean nothing
    row = find_row(name)
    licence = row.licence if row else str(config.get("backbone_licence") or "")
    if not licence and (architecture.startswith("dinov3") or "dinov3" in own.lower()):
        licence = DINOV3
    if not licence and name.startswith("facebook/dinov2"):
        licence = APACHE
    unknown = "The licence of this backbone carries over; look it up where it was published."
    return Origin(hub_id(name), licence, TERMS[licence].duty if licence in TERMS else unknown)


def head_origin(name: str) -> Origin:
    """The licence of a head checkpoint. Mask2Former's COCO heads do not allow commercial use, OneFormer's do."""
    for start, licence in PUBLISHED_HEADS.items():
        if name.startswith(start):
            return Origin(name, licence, TERMS[licence].duty)
    duty = "The licence of this head carries over. If it came from a published Mask2Former, that is CC BY-NC 4.0."
    return Origin(name, "", duty)


def licence_fields(chain: list[Origin]) -> dict[str, str]:
    """The licence fields of a model card, from the strictest licences among the origins."""
    licences = {origin.licence for origin in chain}
    strict = [one for one, terms in TERMS.items() if one in licences and (terms.agreement or not terms.commercial)]
    if strict in ([NON_COMMERCIAL], [EUPE]):  # names that the Hub knows
        return {"license": strict[0]}
    if strict:
        return {"license": "other", "license_name": "-and-".join(strict), "license_link": TERMS[strict[0]].link}
    if licences - TERMS.keys():
        return {"license": "other", "license_name": "see-the-licences-below"}
    return {"license": APACHE}


def agreements(chain: list[Origin]) -> dict[str, Origin]:
    """The agreements that must accompany derived weights: file name -> the first origin that asks for it."""
    asking = [(TERMS[origin.licence].agreement, origin) for origin in chain if origin.licence in TERMS]
    return {name: origin for name, origin in reversed(asking) if name}


def commercial_warning(chain: list[Origin]) -> str | None:
    """A sentence that names the origins whose licences rule out commercial use; None if there are none."""
    found = [one for one in chain if one.licence in TERMS and not TERMS[one.licence].commercial]
    names = ", ".join(f"{one.source} ({one.licence})" for one in found)
    return f"Not for commercial use: what is trained from {names} falls under the same licence." if found else None


def legal_text(name: str) -> str:
    """The text of LICENSE, NOTICE or DINOV3_LICENSE.md, from the installed package or the repository."""
    folders = (Path(__file__).parent / "legal", Path(__file__).parents[2])
    path = next(folder / name for folder in folders if (folder / name).is_file())
    return path.read_text(encoding="utf-8")
