"""Files of a dataset: hidden ones are skipped, gzip is unpacked up to a limit, JSON is recognised by its keys."""

import gzip
import json

import pytest

from m2f_trainer.data.files import file_parts, json_files, kind_of_json, stem, visible
from m2f_trainer.errors import DataError
from tests.data.folders import content


def test_hidden_files_and_folders_are_not_listed(tmp_path):
    for name in ("b.json", "A.JSON.GZ", ".a.json", "._b.json", "notes.txt", ".DS_Store"):
        (tmp_path / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    assert [path.name for path in visible(tmp_path)] == ["A.JSON.GZ", "b.json", "notes.txt"]
    assert [stem(path) for path in json_files(tmp_path)] == ["A", "b"]
    assert visible(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (content(), "COCO"),
        ({"info": {}, **content(), "licenses": []}, "COCO"),
        ({"images": [], "annotations": [{"segments_info": []}], "categories": []}, "COCO panoptic"),
        ({"version": "5.5.0", "flags": {}, "shapes": [], "imagePath": "a.png", "imageData": None}, "labelme"),
        ({"image": {"image_id": 1}, "annotations": [{"segmentation": {}}]}, "SA-1B"),
        ({"info": {}, "categories": {}, "items": [], "infos": {}}, "Datumaro"),
        ({"a": {"regions": [{"shape_attributes": {}}]}}, "VGG Image Annotator project"),
        ({"objects": [{"classTitle": "cell"}], "size": {}}, "Supervisely"),
        ({"images": [], "annotations": [{"caption": "images"}]}, "COCO captions"),
        ([], ""),
        ({"note": "the words images, annotations and categories"}, ""),
    ],
)
def test_json_is_recognised_by_its_keys(value, kind, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=1))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(value).encode()))
    assert kind_of_json(tmp_path / "a.json") == kind_of_json(tmp_path / "a.json.gz") == kind


def test_a_key_across_two_parts_of_a_large_file_is_found(tmp_path):
    filler = "x" * ((1 << 22) - len('{"images": [], "a": "", "annot'))
    text = json.dumps({"images": [], "a": filler, "annotations": [], "categories": []})
    (tmp_path / "a.json").write_text(text)
    assert kind_of_json(tmp_path / "a.json") == "COCO"


def test_a_file_that_changes_is_recognised_anew(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{}")
    assert kind_of_json(path) == ""
    path.write_text(json.dumps(content()))
    assert kind_of_json(path) == "COCO"


def test_gzip_that_is_damaged_or_a_bomb_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"[]" * 1000)[:-12])
    with pytest.raises(OSError, match="gzip"):
        list(file_parts(path))
    path.write_bytes(b"[]")
    with pytest.raises(OSError, match="gzip"):
        list(file_parts(path))
    monkeypatch.setattr("m2f_trainer.data.files._SMALL", 1000)
    path.write_bytes(gzip.compress(b" " * 5_000_000))
    with pytest.raises(DataError, match="unpacks to more than"):
        list(file_parts(path))
    assert kind_of_json(path) == ""
