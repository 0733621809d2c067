"""Licences follow from the origins of the weights."""

from pathlib import Path

import pytest

from m2f_trainer.hub.licences import TERMS, agreements, commercial_warning, legal_text, licence_chain, licence_fields
from m2f_trainer.model.backbones import BACKBONES
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
        ({"head_checkpoint": "shi-labs/oneformer_coco_swin_large"}, "apache-2.0", "Keep its copyright"),
        ({"head_checkpoint": "/heads/mine"}, "see-the-licences-below", "that is CC BY-NC 4.0"),
        ({"backbone_name": "dinov3-vitl16-sat493m"}, "dinov3-license", 'show "Built with DINOv3"'),
        ({"backbone_name": "timm/vit_small_plus_patch16_dinov3.lvd1689m"}, "dinov3-license", "copy of the agreement"),
        ({"backbone_name": "/a/dinov3_vits16_pretrain_lvd1689m-08c60483.pth"}, "dinov3-license", "limits of use"),
        ({**DINOV3, "backbone_name": "lingbot-vitb16"}, "apache-2.0", "Keep its licence notice"),
        ({**DINOV3, "backbone_name": "/models/vit_base_patch16_lingbot.robbyant"}, "apache-2.0", "Keep its licence"),
        ({**DINOV3, "backbone_name": "/m/x", "backbone_licence": "apache-2.0"}, "apache-2.0", "Keep its licence"),
        ({**DINOV3, "backbone_name": "/m/x", "backbone_licence": "gpl"}, "see-the-licences-below", "look it up"),
        (
            {**DINOV3, "backbone_name": "eupe-vits16"},
            "fair-noncommercial-research-license",
            "for research, not for commercial use",
        ),
        (
            {"backbone_name": "eupe-convnext-tiny", "head_checkpoint": COCO_HEAD},
            "fair-noncommercial-research-license-and-cc-by-nc-4.0",
            "copy of the agreement",
        ),
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


@pytest.mark.parametrize("name", BACKBONES)
def test_each_backbone_of_the_table_has_the_licence_of_its_weights(name: str) -> None:
    """By the first word of its name: those who trained the weights decide, not the architecture."""
    expected = {
        "dinov3": ("dinov3-license", {"DINOV3_AGREEMENT.md"}, True),
        "dinov2": ("apache-2.0", set(), True),
        "lingbot": ("apache-2.0", set(), True),
        "swin": ("apache-2.0", set(), True),
        "eupe": ("fair-noncommercial-research-license", {"EUPE_AGREEMENT.md"}, False),
    }
    licence, copies, commercial = expected[name.partition("-")[0]]
    for alias in {name, BACKBONES[name].hub_id, BACKBONES[name].ungated} - {""}:
        chain = licence_chain({"backbone_name": alias, **DINOV3})
        assert [origin.licence for origin in chain] == [licence]
        assert agreements(chain).keys() == copies
        assert (commercial_warning(chain) is None) == commercial
        assert TERMS[licence].commercial == commercial


def test_a_run_on_weights_without_commercial_use_warns_which_they_are() -> None:
    chain = licence_chain({"backbone_name": "eupe-vits16", "head_checkpoint": COCO_HEAD})
    assert commercial_warning(chain) == (
        "Not for commercial use: what is trained from timm/vit_small_patch16_dinov3_qkvb.eupe_lvd1689m "
        f"(fair-noncommercial-research-license), {COCO_HEAD} (cc-by-nc-4.0) falls under the same licence."
    )


def test_random_weights_have_no_origin_and_our_own_licence() -> None:
    assert licence_chain({"backbone_name": "", **DINOV3}) == []
    assert licence_fields([]) == {"license": "apache-2.0"}


def test_the_licences_of_a_model_it_was_started_from_carry_over(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first", head_checkpoint=COCO_HEAD)
    second = write_model(tmp_path / "second", init_from=str(first))
    assert licence_fields(licence_chain({"init_from": str(second)})) == {"license": "cc-by-nc-4.0"}


def test_the_licences_of_a_head_it_was_started_from_carry_over(tmp_path: Path) -> None:
    head = write_model(tmp_path / "head", backbone_name="eupe-vits16", head_checkpoint=COCO_HEAD)
    chain = licence_chain({"backbone_name": "dinov2-small", "head_checkpoint": str(head)})
    names = licence_fields(chain)["license_name"]
    assert names == "fair-noncommercial-research-license-and-cc-by-nc-4.0"


def test_the_licence_notes_are_found_and_name_the_official_texts() -> None:
    note = legal_text("DINOV3_LICENSE.md")
    for part in (
        "ai.meta.com/resources/models-and-libraries/dinov3-license",
        "CC BY-NC 4.0",
        "HF_TOKEN",
        "DINOV3_AGREEMENT.md",
    ):
        assert part in note
    assert legal_text("LICENSE").lstrip().startswith("Apache License")
    assert "Mask2Former" in legal_text("NOTICE")
