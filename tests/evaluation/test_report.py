"""`m2f report`: one self-contained page for one run and for several, with every name escaped."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from m2f_trainer.cli import main as cli
from m2f_trainer.data.dataset import categories_of, load_coco
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.errors import ModelFolderError
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.evaluation.report import write_report
from m2f_trainer.run_folder import curves_of, load_runs, write_details, write_metrics
from tests.evaluation.truth import perfect

EVIL = '<script>alert("1")</script>'


class Reader(HTMLParser):
    """Collects tags, addresses, text, and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if data.strip():
            tag = next((tag for tag in reversed(self.tags) if tag in ("th", "td", "h1", "h2", "h3", "p")), None)
            if tag in ("th", "td"):
                self.tables[-1][-1][-1] += data

    def table(self, column: str) -> dict[str, dict[str, str]]:
        """The first table with this column, its first: row -> column -> cell."""
        head, *rows = next(table for table in self.tables if table[0][0] == column)
        return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample whose first class and first image have names with HTML tags."""
    root = write_sample(tmp_path_factory.mktemp("report") / "set", images=(2, 4, 0))
    path = root / "valid" / "_annotations.coco.json"
    coco = json.loads(path.read_text())
    for file in (path, root / "train" / "_annotations.coco.json"):
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = EVIL
        if file == path:
            content["images"][0]["file_name"] = "<b>.jpg"
        file.write_text(json.dumps(content))
    (root / "valid" / coco["images"][0]["file_name"]).rename(root / "valid" / "<b>.jpg")
    return root


def write_run(folder: Path, data: Path, share: float = 1.0, split: str = "valid") -> Path:
    """A run's folder with the files that a report reads; with a `share` below 1 the first image has no predictions."""
    rows = load_coco(data)[split]
    evaluator = Evaluator(rows)
    found = [one.above(0) for one in perfect(rows)]
    kept = [one if share == 1 else one.above(2) for one in found[:1]] + found[1:]
    figures = evaluator(kept)
    folder.mkdir(parents=True)
    write_details(evaluator.details, folder / "evaluation.json")
    write_metrics({"step": 4, **{f"eval_{key}": value for key, value in figures.items()}}, folder / "metrics.json")
    recipe = {"dataset_name": str(data), "backbone": EVIL, "tune": "full", "image_width": 64, "image_height": 64}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    history = [
        {"step": 2, "loss": 9.0},
        {"step": 2, "eval_map": 0.2},
        {"step": 4, "loss": 8.0},
        {"step": 4, "eval_map": 0.4},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def test_the_page_of_a_run_needs_nothing_else_and_escapes_every_name(data: Path, tmp_path: Path) -> None:
    text = write_report(
        [write_run(tmp_path / EVIL.replace("/", ""), data, 0.5)], tmp_path / "out" / "page.html", load_images=True
    ).read_text()
    reader = Reader(text)
    assert reader.tags.count("script") == 1, "only the script that sorts tables"
    assert "b" not in reader.tags
    assert not {"link", "iframe"} & set(reader.tags)
    assert all(address.startswith("data:image/jpeg;base64,") for address in reader.addresses)
    assert len(reader.addresses) == 4
    assert EVIL in reader.words
    assert "<b>.jpg" in reader.words
    assert text.index("<b>.jpg".replace("<", "&lt;").replace(">", "&gt;")) < text.index("The best"), (
        "an image with missed objects is among the worst"
    )
    for heading in ("Training", "Classes", "Errors"):
        assert heading in reader.words
    assert reader.tags.count("button") == 10
    chart = reader.words[reader.words.index("Mask AP") : reader.words.index("Training loss")]
    assert "40" in chart, "in percent, as the tables"


def test_the_dataset_is_opened_only_when_asked(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", data)
    opened: list[object] = []
    monkeypatch.setattr("m2f_trainer.evaluation.gallery.load_recipe_dataset", lambda *given: opened.append(given))
    words = Reader(write_report([folder], tmp_path / "page.html").read_text()).words
    assert any("m2f report --images draws them from the dataset" in word for word in words)
    assert not opened


def test_the_pictures_in_a_runs_folder_are_shown(data: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", data)
    (folder / "pictures").mkdir()
    Image.new("RGB", (40, 20)).save(folder / "pictures" / "worst_1.jpg")
    Image.new("RGB", (40, 20)).save(tmp_path / "private.jpg")
    (folder / "pictures" / "best_1.jpg").symlink_to(tmp_path / "private.jpg")
    reader = Reader(write_report([folder], tmp_path / "page.html").read_text())
    assert len(reader.addresses) == 1
    assert "worst 1" in reader.words


def test_several_runs_are_shown_side_by_side(data: Path, tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a" / "run", data), write_run(tmp_path / "b" / "run", data, 0.5)
    assert cli.main(["report", str(first), str(second), "--output", str(tmp_path / "page.html")]) == 0
    reader = Reader((tmp_path / "page.html").read_text())
    assert {"2 runs compared", "a/run", "b/run", "AP, a/run", "AP, b/run"} <= set(reader.words)
    assert "a/run: count" in reader.words


def test_a_run_on_dense_images_shows_ap_without_cocos_limit(data: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", data)
    figures = json.loads((folder / "metrics.json").read_text())
    assert "AP, no limit" not in write_report([folder], tmp_path / "page.html").read_text()
    write_metrics({**figures, "eval_unlimited_map": 0.625}, folder / "metrics.json")
    words = Reader(write_report([folder], tmp_path / "page.html").read_text()).words
    assert {"AP, no limit", "62.5"} <= set(words)
    assert any("count the 100 best predictions of an image" in word for word in words)


def test_the_settings_that_differ_between_runs_are_listed_and_no_others(data: Path, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, data) for name in ("a", "b")]
    changes: list[dict[str, object]] = [
        {"learning_rate": 1e-3, "output_dir": "a"},
        {"head_config": {"hidden_dim": 64}, "output_dir": "b", "backbone": "/home/me/dinov2", "copy_paste": 0.5},
    ]
    for folder, change in zip(folders, changes, strict=True):
        recipe = json.loads((folder / "recipe.json").read_text())
        (folder / "recipe.json").write_text(json.dumps({**recipe, "copy_paste": 0.25, **change}))
    words = Reader(write_report(folders, tmp_path / "page.html").read_text()).words
    cells = [word for word in words[words.index("Settings that differ") + 1 : words.index("Training")] if word.strip()]
    table = [cells[start : start + 3] for start in range(0, len(cells), 3)]
    assert table[0] == ["setting", "a", "b"]
    assert {name: values for name, *values in table[1:]} == {
        "learning_rate": ["0.001", "-"],
        "head_config": ["-", '{"hidden_dim": 64}'],
        "backbone": [EVIL, "dinov2"],
        "copy_paste": ["0.25", "0.5"],
    }
    alone = Reader(write_report(folders[:1], tmp_path / "page.html").read_text()).words
    assert "Settings that differ" not in alone


def write_scores(folder: Path, data: Path, split: str, **evaluated: str) -> Path:
    """The output of `m2f evaluate`, which has no recipe; without `evaluated`, as earlier versions wrote it."""
    write_run(folder, data, split=split)
    for name in ("recipe.json", "trainer_state.json"):
        (folder / name).unlink()
    if evaluated:
        details = json.loads((folder / "evaluation.json").read_text())
        write_details({"evaluated": {**evaluated, "split": split}, **details}, folder / "evaluation.json")
    return folder


def test_figures_of_another_split_or_dataset_are_named_as_such(data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", data)
    scores = write_scores(tmp_path / "b", data, "train", model="runs/<i>", dataset="/home/me/<u>/")
    page = Reader(write_report([run, scores], tmp_path / "page.html").read_text())
    rows = page.table("run")
    on = [{name: row[name] for name in ("model", "split", "dataset", "images")} for row in (rows["a"], rows["b"])]
    assert on == [
        {"model": "-", "split": "valid", "dataset": data.name, "images": "4"},
        {"model": "runs/<i>", "split": "train", "dataset": "<u>", "images": "2"},
    ]
    assert not {"i", "u"} & set(page.tags), "names are escaped"
    expected = {
        split: Counter(
            one["category_id"] for row in load_coco(data)[split] for one in row["objects"] if not one["iscrowd"]
        )
        for split in ("valid", "train")
    }
    assert expected["valid"] != expected["train"]
    names = {one.name: one.id for one in categories_of(load_coco(data)["train"])}
    for name, row in page.table("class").items():
        assert row["objects, a"] == str(expected["valid"][names[name]]), name
        assert row["objects, b"] == str(expected["train"][names[name]]), name
    alone = Reader(write_report([scores], tmp_path / "page.html").read_text()).table("run")
    assert (alone["b"]["split"], alone["b"]["dataset"]) == ("train", "<u>")


def test_what_was_evaluated_is_not_repeated_where_it_is_the_same(data: Path, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, data) for name in ("a", "b")]
    page = Reader(write_report(runs, tmp_path / "page.html").read_text())
    assert not {"model", "split", "dataset", "images"} & set(page.table("run")["a"])
    assert all(list(row) == ["objects", "AP, a", "AP, b"] for row in page.table("class").values())


def test_scores_of_an_earlier_version_are_not_taken_for_those_of_a_runs_split(data: Path, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", data), write_scores(tmp_path / "b", data, "train")]
    rows = Reader(write_report(folders, tmp_path / "page.html").read_text()).table("run")
    assert [(row["split"], row["dataset"], row["images"]) for row in rows.values()] == [
        ("valid", data.name, "4"),
        ("-", "-", "2"),
    ]


def test_scores_without_a_recipe_have_no_settings(data: Path, tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "a", data), write_run(tmp_path / "c", data)
    scores = write_scores(tmp_path / "b", data, "valid", model="a", dataset=str(data))
    page = Reader(write_report([run, scores], tmp_path / "page.html").read_text())
    assert "Settings that differ" not in page.words
    settings = next(table for table in page.tables if table[0][:2] == ["run", "backbone"])
    assert [row[0] for row in settings[1:]] == ["a"]
    assert "Settings" not in Reader(write_report([scores], tmp_path / "page.html").read_text()).words
    recipe = json.loads((other / "recipe.json").read_text())
    (other / "recipe.json").write_text(json.dumps({**recipe, "learning_rate": 1e-3}))
    page = Reader(write_report([run, scores, other], tmp_path / "page.html").read_text())
    assert page.table("setting") == {"learning_rate": {"a": "-", "c": "0.001"}}


def test_a_page_without_the_dataset_reports_that_it_is_missing(data: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", data)
    (folder / "recipe.json").write_text(json.dumps({"dataset_name": str(tmp_path / "gone")}))
    reader = Reader(write_report([folder], tmp_path / "page.html", load_images=True).read_text())
    assert "img" not in reader.tags
    assert any("is not on this machine" in word for word in reader.words)


def test_a_randomly_initialised_backbone_is_not_called_by_the_default_name(data: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", data)
    recipe = {"backbone": "dinov3-vits16plus", "backbone_config": {"model_type": "dinov3_vit"}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    text = write_report([folder], tmp_path / "page.html", load_images=True).read_text()
    assert "dinov3_vit, randomly initialised" in text
    assert "vits16plus" not in text


def test_an_unfinished_run_is_reported_from_its_newest_checkpoint(data: Path, tmp_path: Path) -> None:
    for step in (9, 10):
        write_run(tmp_path / "run" / f"checkpoint-{step}", data)
    (tmp_path / "run" / "checkpoint-11").mkdir()
    write_metrics({"step": 10}, tmp_path / "run" / "checkpoint-10" / "metrics.json")
    (run,) = load_runs([tmp_path / "run"])
    assert (run.name, run.figures["step"]) == ("run", 10)
    with pytest.raises(
        ModelFolderError, match=r"expected evaluation\.json in it or in one of its checkpoints, found none"
    ):
        load_runs([tmp_path])


def test_pictures_of_an_earlier_evaluation_are_not_shown(data: Path, tmp_path: Path) -> None:
    """A finished run has pictures; it was resumed, and has a newer checkpoint."""
    folder = write_run(tmp_path / "run", data)
    (folder / "pictures").mkdir()
    Image.new("RGB", (40, 20)).save(folder / "pictures" / "worst_1.jpg")
    newer = write_run(folder / "checkpoint-9", data)
    assert len(Reader(write_report([folder], tmp_path / "page.html").read_text()).addresses) == 1
    (newer / "trainer_state.json").write_text(json.dumps({"global_step": 9}))
    reader = Reader(write_report([folder], tmp_path / "page.html").read_text())
    assert not reader.addresses
    assert any("has none of this evaluation. m2f report --images draws them" in word for word in reader.words)


def test_a_class_without_objects_has_no_figures(data: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", data)
    details = json.loads((folder / "evaluation.json").read_text())
    row = {"id": 99, "name": "absent", "ap": -1, "ap50": -1, "ap75": -1, "threshold": 1.0, "kept": 0, "objects": 0}
    details["classes"].append({**row, "precision": 0.0, "recall": 0.0, "f1": 0.0})
    details["precision_recall"]["classes"].append(None)
    write_details(details, folder / "evaluation.json")
    words = Reader(write_report([folder], tmp_path / "page.html").read_text()).words
    start = words.index("absent")
    assert words[start : start + 10] == ["absent", "0", *["-"] * 8]


def test_curves_keep_the_last_logged_value_of_a_step() -> None:
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "epoch": 1}, {"step": 1, "loss": 1.0, "note": "x"}]
    assert curves_of({"log_history": history}) == {"loss": [(1, 1.0), (2, 2.0)]}


@pytest.mark.parametrize("name", ["evaluation.json", "metrics.json", "recipe.json", "trainer_state.json"])
@pytest.mark.parametrize("content", [b'{"step": 4, ', b"[]", b"\xff\xfe{}"])
def test_a_damaged_file_of_a_run_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"figures": {}}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=rf"{name}: .*Copy the folder again"):
        load_runs([tmp_path])


def test_curves_leave_out_unscored_and_non_finite_values(data: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", data)
    history = [{"step": 2, "eval_map": -1.0, "loss": float("nan")}, {"step": 4, "eval_map": -1.0, "loss": 8.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    words = Reader(write_report([folder], tmp_path / "page.html", load_images=True).read_text()).words
    assert "Training loss" in words
    assert "Mask AP" not in words


def test_a_dataset_that_has_changed_since_gives_no_pictures(data: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    folder = write_run(tmp_path / "run", changed)
    for image in (changed / "valid").glob("*.jpg"):
        Image.open(image).resize((50, 40)).save(image)
    text = " ".join(Reader(write_report([folder], tmp_path / "page.html", load_images=True).read_text()).words)
    assert "No pictures: image" in text
    coco = json.loads((changed / "valid/_annotations.coco.json").read_text())
    coco["images"] = [{**one, "width": 50, "height": 40} for one in coco["images"]]
    coco["annotations"] = [
        {**one, "segmentation": {"size": [40, 50], "counts": [900, 1100]}} for one in coco["annotations"]
    ]
    (changed / "valid/_annotations.coco.json").write_text(json.dumps(coco))
    text = " ".join(Reader(write_report([folder], tmp_path / "page.html", load_images=True).read_text()).words)
    assert "and now has 50x40: the dataset has changed since" in text
