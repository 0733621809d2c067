"""Licences follow from the origins of the weights."""

from pathlib import Path

import pytest

from m2f_trainer.hub.licences import AGREEMENT, legal_text, licence_chain, licence_fields
from tests.hub.folder import write_model

DINOV3 = {"backbone_config": {"model_type": "dinov3_vit"}}
COCO_HEAD = "facebook/mask2former-swin-small-coco-instance"


@pytest.mark.parametrize(
    ("config", "licence", "duty"),
    [
        ({"backbone_name": "dinov2-small"}, "apache-2.0", "Keep its licence notice"),
        ({"backbone_name": "dinov3-vits16plus"}, "dinov3-license", 'show "Built with DINOv3"'),
        ({**DINOV3, "backbone_name": "/models/mine"}, "dinov3-license", "distribute a copy of the agreement with them"),
        ({"backbone_name": "/home/a/my_DINOv3"}, "dinov3-license", 'show "Built with DINOv3"'),
        ({"backbone_name": "/home/a/dinov3/vit"}, "see-the-licences-below", "look it up where it was published"),
        ({"backbone_name": "someone/vit"}, "see-the-licences-below", "look it up where it was published"),
        ({"head_checkpoint": COCO_HEAD}, "cc-by-nc-4.0", "Not for commercial use"),
        ({"head_checkpoint": "/heads/mine"}, "see-the-licences-below", "that is CC BY-NC 4.0"),
        (
            {"backbone_name": "dinov3-vitl16", "head_checkpoint": COCO_HEAD},
            "dinov3-license-and-cc-by-nc-4.0",
            "Not for commercial use",
        ),
    ],
)
def test_the_licence_follows_from_what_the_weights_started_from(
    config: dict[str, object], licence: str, duty: str
) -> None:
    chain = licence_chain(config)
    fields = licence_fields(chain)
    assert fields.get("license_name", fields["license"]) == licence
    assert (fields["license"] == "other") == ("license_name" in fields)
    assert any(duty in origin.duty for origin in chain)


def test_random_weights_have_no_origin_and_our_own_licence() -> None:
    assert licence_chain({"backbone_name": "", **DINOV3}) == []
    assert licence_fields([]) == {"license": "apache-2.0"}


def test_the_licences_of_a_model_it_was_started_from_carry_over(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first", head_checkpoint=COCO_HEAD)
    second = write_model(tmp_path / "second", init_from=str(first))
    assert licence_fields(licence_chain({"init_from": str(second)})) == {"license": "cc-by-nc-4.0"}


def test_the_licence_notes_are_found_and_name_the_official_texts() -> None:
    note = legal_text("DINOV3_LICENSE.md")
    for part in ("ai.meta.com/resources/models-and-libraries/dinov3-license", "CC BY-NC 4.0", "HF_TOKEN", AGREEMENT):
        assert part in note
    assert legal_text("LICENSE").lstrip().startswith("Apache License")
    assert "Mask2Former" in legal_text("NOTICE")
