"""Model cards: figures in model-index form, harmless names, and the licence chain."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from m2f_trainer.config.recipe import load_recipe
from m2f_trainer.data.dataset import load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import SharingError
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.evaluation.gallery import draw_pictures, ground_truth
from m2f_trainer.hub.model_card import CardOptions, is_untouched, write_card
from m2f_trainer.run_folder import write_details
from tests.hub.folder import CONFIG, write_json, write_model


def card_of(folder: Path) -> ModelCard:
    return ModelCard(write_card(folder).read_text(encoding="utf-8"), ignore_metadata_errors=False)


def test_the_card_has_task_library_and_figures_in_model_index_form(tmp_path: Path) -> None:
    data = card_of(write_model(tmp_path / "run")).data
    assert data.pipeline_tag == "image-segmentation"
    assert {"image-segmentation", "instance-segmentation", "mask2former", "dinov2"} <= set(data.tags)
    assert data.library_name == "transformers"
    assert data.base_model == ["facebook/dinov2-small"]
    figures = {(one.dataset_split, one.metric_type): one.metric_value for one in data.eval_results}
    assert figures == {("valid", "map"): 0.5123, ("valid", "map_50"): 0.75, ("valid", "box_map"): 0.6}
    assert {one.dataset_name for one in data.eval_results} == {"pets"}


def test_the_card_shows_results_use_and_classes(tmp_path: Path) -> None:
    text = write_card(write_model(tmp_path / "run"), CardOptions("me/pets")).read_text(encoding="utf-8")
    assert "| valid | 51.2 | 75.0 | - | 60.0 |\n" in text
    assert "no limit" not in text
    assert "It finds at most 100 objects in an image" in text
    assert text.index("| dog | 75.0 |") < text.index("| cat | 25.0 |")
    assert "m2f predict me/pets photos/" in text
    assert 'pipeline("image-segmentation", model="me/pets", trust_remote_code=True)' in text
    assert 'segment("photo.jpg", subtask="instance", threshold=0.5)' in text
    assert "- Input: 518 x 518 (height x width); images are resized with their aspect ratio kept, then padded\n" in text
    assert "/home/someone" not in text


def test_a_model_of_dense_images_shows_ap_without_cocos_limit_and_the_limit_of_a_tile(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    write_json(folder / "metrics.json", {"eval_map": 0.5, "eval_unlimited_map": 0.6})
    write_json(folder / "config.json", {**CONFIG, "tile_size": 64, "num_queries": 20})
    text = write_card(folder).read_text(encoding="utf-8")
    assert "| split | mask AP | mask AP, no limit |\n|---|---|---|\n| valid | 50.0 | 60.0 |\n" in text
    assert '"no limit" counts all predictions' in text
    assert "tiles of 64 pixels, and finds at most 20 objects in a tile" in text


def test_the_card_of_a_model_of_tiles_describes_them_and_advises_against_the_pipeline(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run", tile_size=64, image_height=112, image_width=112)
    digests = {"train_data": "ab" * 32, "valid_data": "cd" * 32}
    write_json(folder / "fingerprint.json", {"train_images": 11351, "tile_size": 80, **digests})
    text = write_card(folder).read_text(encoding="utf-8")
    assert "- Input: tiles of 64 x 64 pixels of the image, which overlap, each resized to 112 x 112;" in text
    assert "aspect ratio" not in text
    assert "pets, 11,351 tiles of 80 x 80 pixels per epoch" in text
    assert "pipeline` is not suitable for this model" in text
    assert "pipeline(" not in text


def test_the_test_split_has_a_row_of_its_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    write_json(folder / "metrics.json", {"eval_map": 0.5, "test_map": 0.4, "test_map_class/cat": 0.4})
    text = write_card(folder).read_text(encoding="utf-8")
    assert "| valid | 50.0 |" in text
    assert "| test | 40.0 |" in text
    assert "| class | mask AP (test) |" in text


def test_a_card_without_figures_or_recipe_is_still_a_card(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    assert "## Results" not in card_of(tmp_path).content


@pytest.mark.parametrize(
    "name",
    [
        "---\nlicense: mit\n---",
        "<script>alert(1)</script>",
        "a|b\n\n# Title",
        "[x](javascript:1)",
        "`rm -rf`",
        "\x1b[31m",
    ],
)
def test_names_from_strangers_stay_text(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "run", categories=[{"id": 1, "name": name}])
    write_json(folder / "recipe.json", {"dataset_name": name.replace("/", "")})
    write_json(folder / "metrics.json", {"eval_map": 0.5, f"eval_map_class/{name}": 0.5})
    card = card_of(folder)
    assert card.data.license == "apache-2.0"
    assert "<script" not in card.text
    assert "](" not in card.text
    assert "\n# Title" not in card.text
    assert "\x1b" not in card.content
    assert card.text.count("\n| ") == card.text.count(" |\n")


def test_the_card_has_the_licence_and_a_row_for_each_origin_of_the_weights(tmp_path: Path) -> None:
    card = card_of(write_model(tmp_path / "run"))
    assert (card.data.license, card.data.license_name) == ("apache-2.0", None)
    assert "| facebook/dinov2\\-small | apache-2.0 |" in card.text
    config = {"backbone_name": "dinov3-vits16plus", "backbone_config": {"model_type": "dinov3_vit"}}
    card = card_of(write_model(tmp_path / "other", **config))
    assert (card.data.license, card.data.license_name) == ("other", "dinov3-license")
    assert "Built with DINOv3." in card.text


def test_the_card_names_the_normalisation_and_the_licence_of_satellite_weights(tmp_path: Path) -> None:
    text = card_of(write_model(tmp_path / "run")).text
    assert "mean 0.485, 0.456, 0.406; standard deviation 0.229, 0.224, 0.225" in text
    satellite = {"backbone_name": "dinov3-vitl16-sat493m", "image_mean": [0.43, 0.411, 0.296]}
    text = card_of(write_model(tmp_path / "sat", **satellite, image_std=[0.213, 0.156, 0.143])).text
    assert "mean 0.430, 0.411, 0.296; standard deviation 0.213, 0.156, 0.143" in text
    assert "Built with DINOv3." in text


def test_the_card_of_weights_for_research_says_so(tmp_path: Path) -> None:
    card = card_of(write_model(tmp_path / "run", backbone_name="eupe-vits16"))
    assert card.data.license == "fair-noncommercial-research-license"
    assert "for research, not for commercial use" in card.text


def test_the_card_of_a_random_backbone_says_so(tmp_path: Path) -> None:
    card = card_of(write_model(tmp_path / "run", backbone_name="", backbone_config={"model_type": "dinov3_vit"}))
    assert card.data.license == "apache-2.0"
    assert "initialised randomly" in card.text


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SharingError, match=r"holds no model: expected config\.json there"):
        write_card(tmp_path)


def scored(folder: Path) -> Path:
    """A model's folder with the details of an evaluation: perfect predictions of one image, none of the two others."""
    rows = load_coco(write_sample(folder / "data", images=(1, 3, 0)))["valid"]
    perfect = ground_truth(rows[0])
    evaluator = Evaluator(rows)
    evaluator([replace(perfect, scores=np.full(len(perfect), 0.9))])
    run = write_model(folder / "run")
    write_details(evaluator.details, run / "evaluation.json")
    draw_pictures(run, rows, evaluator.details)
    return run


def test_the_card_shows_the_best_and_the_worst_images_only_where_asked_for(tmp_path: Path) -> None:
    run = scored(tmp_path)
    plain = write_card(run).read_text(encoding="utf-8")
    assert "pictures/" not in plain
    card = write_card(run, CardOptions("me/pets", pictures=True)).read_text(encoding="utf-8")
    shown = re.findall(r"!\[(.+?)\]\((pictures/\w+\.jpg)\)", card)
    assert [file for _, file in shown] == ["pictures/worst_1.jpg", "pictures/worst_2.jpg", "pictures/best_1.jpg"]
    assert re.fullmatch(r"Best 1: [1-9]\d* found, 0 wrong, 0 missed", shown[-1][0])
    assert "0 found, 0 wrong" in shown[0][0]
    for _, file in shown:
        with Image.open(run / file) as picture:
            assert picture.width > 2 * picture.height * 0.5
            assert not picture.getexif()


def test_pictures_of_an_earlier_evaluation_are_removed_and_other_files_kept(tmp_path: Path) -> None:
    run = scored(tmp_path)
    rows = load_coco(tmp_path / "data")["valid"]
    evaluator = Evaluator(rows.select([0]))
    evaluator([])
    (run / "pictures" / "notes.jpg").write_bytes(b"mine")
    draw_pictures(run, rows, evaluator.details)
    assert {path.name for path in (run / "pictures").iterdir()} == {"worst_1.jpg", "notes.jpg"}


def test_the_card_shows_error_types_and_how_uncertain_its_figures_are(tmp_path: Path) -> None:
    text = write_card(scored(tmp_path)).read_text(encoding="utf-8")
    assert re.search(r"^\| missed \| [1-9]\d* \| \d", text, flags=re.MULTILINE)
    assert "| background |" not in text
    assert "are of 3 images and one training run" in text
    assert "so these figures are uncertain: " in text
    assert "| class | mask AP (valid) | objects (valid) | AP50 | best threshold |" in text


def test_the_card_names_data_time_hardware_and_software(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    cost = {"seconds": 7384.2, "peak_memory": 3 * 2**29, "processes": 2, "hardware": "a GPU", "software": "torch 2"}
    state = {"global_step": 1800, "epoch": 15.5, "stateful_callbacks": {"Cost": {"args": {}, "attributes": cost}}}
    write_json(folder / "trainer_state.json", state)
    write_json(folder / "fingerprint.json", {"train_images": 1464, "train_data": "ab" * 32, "valid_data": "cd" * 32})
    text = write_card(folder).read_text(encoding="utf-8")
    for expected in (
        "pets, 1,464 images per epoch", f"valid annotations (SHA-256): `{'cd' * 32}`", "1,800 steps, 15.5 epochs",
        "2 h 03 min, evaluations", "2 x a GPU; peak memory of a process 1.5 GiB", "Software: torch 2",
    ):  # fmt: skip
        assert expected in text


def test_the_recipe_in_the_card_is_a_recipe_without_local_folders(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "run")
    given = {"max_steps": 77, "tune": "lora", "seed": 7, "optim": "sgd", "backbone": "/home/someone/vit `"}
    write_json(
        folder / "recipe.json", {**given, "dataset_name": "/home/a/pets", "output_dir": "/b", "logging_steps": 3}
    )
    (block,) = re.findall(r"```json\n(.*?)\n```", write_card(folder).read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = json.loads(block)
    assert shown == {**given, "dataset_name": "pets", "backbone": "vit `"}
    (tmp_path / "again.json").write_text(
        json.dumps({**shown, "backbone": "dinov2-small", "image_height": 28, "image_width": 28})
    )
    assert load_recipe([str(tmp_path / "again.json")]).train.max_steps == 77


def test_a_randomly_initialised_backbone_is_not_called_by_the_default_name(tmp_path: Path) -> None:
    config = {"model_type": "dinov3_vit", "hidden_size": 32}
    folder = write_model(tmp_path / "run", backbone_name="", backbone_config=config)
    write_json(folder / "recipe.json", {"backbone": "dinov3-vits16plus", "backbone_config": config})
    text = write_card(folder).read_text(encoding="utf-8")
    assert "# Mask2Former on a randomly initialised dinov3\\_vit\n" in text
    assert "vits16plus" not in text
    assert '"hidden_size": 32' in text


def test_the_card_of_an_adapter_alone_shows_how_to_load_it_on_its_backbone(tmp_path: Path) -> None:
    text = write_card(write_model(tmp_path / "run"), CardOptions("me/pets", adapter_only=True)).read_text(
        encoding="utf-8"
    )
    assert 'load_adapter(Path(snapshot_download("me/pets")))' in text
    assert "m2f predict me/pets" not in text


def test_a_card_knows_whether_someone_has_changed_it(tmp_path: Path) -> None:
    card = write_card(write_model(tmp_path / "run")).read_text(encoding="utf-8")
    assert is_untouched(card)
    for changed in (card.replace("cat", "dog"), card + "more", "mine", ""):
        assert not is_untouched(changed)


def test_the_folder_of_a_backbone_is_not_published(tmp_path: Path) -> None:
    text = write_card(write_model(tmp_path / "run", backbone_name="/home/someone/vit")).read_text(encoding="utf-8")
    assert "| vit |" in text
    assert "someone" not in text
