"""What `m2f check` shows: text, JSON and one page that needs nothing else, with every name escaped."""

import io
import json
from html.parser import HTMLParser

import pytest

from m2f_trainer.cli import main as cli
from m2f_trainer.data.synthetic import write_sample
from m2f_trainer.doctor.examine import examine
from m2f_trainer.doctor.page import render
from m2f_trainer.doctor.summary import summary_text, to_json
from tests.data.folders import annotation, content, write

EVIL = '<script>alert("1")</script>'


@pytest.fixture
def root(tmp_path):
    return write_sample(tmp_path / "set", images=(12, 4, 0))


class Reader(HTMLParser):
    """Counts tags and notes every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]


def test_the_page_needs_nothing_else_and_shows_the_worst_first(root):
    coco = json.loads((root / "train/_annotations.coco.json").read_text())
    coco["annotations"][-1]["bbox"] = [0, 0, 1, 1]
    blamed = next(one for one in coco["images"] if one["id"] == coco["annotations"][-1]["image_id"])
    (root / "train/_annotations.coco.json").write_text(json.dumps(coco))
    page = render(examine(root))
    reader = Reader(page)
    assert reader.tags.count("img") == 16
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert all(address.startswith("data:image/jpeg;base64,") for address in reader.addresses)
    assert page.index("match the mask") < page.index("<h2>Pictures")
    assert blamed["file_name"] in page[page.index("<h2>Pictures") :][: page.index("</figure>")].split("</figure>")[0]


def test_names_of_classes_files_and_folders_are_escaped(tmp_path):
    names = [{"id": 5, "name": EVIL}, {"id": 6, "name": f"unused {EVIL}"}]
    root = tmp_path / 'a"><b>'
    for split in ("train", "valid"):
        write(root, content(annotation(bbox=[0, 0, 99, 99]), categories=names), split=split)
    examination = examine(root)
    assert any(EVIL in one.message for one in examination.findings)
    reader = Reader(render(examination))
    assert "script" not in reader.tags
    assert reader.tags.count("b") == 2 * len(examination.findings)


def test_control_characters_of_a_name_never_reach_the_terminal(tmp_path):
    names = [{"id": 5, "name": "cell\x1b[31m"}, {"id": 6, "name": "\x1b]0;title\x07"}]
    for split in ("train", "valid"):
        write(tmp_path, content(categories=names), split=split)
    text = summary_text(examine(tmp_path))
    assert "\x1b" not in text
    assert "\x07" not in text


def test_json_holds_summary_and_findings(root):
    (root / "train/shapes_0001.jpg").unlink()
    parsed = json.loads(to_json(examine(root)))
    assert parsed["status"] == 1
    assert parsed["summary"]["splits"]["train"]["images"] == 11
    (finding,) = [one for one in parsed["findings"] if one["severity"] == "error"]
    assert finding["kind"] == "missing-image"
    assert finding["file"] == "train/_annotations.coco.json"
    assert (finding["ids"], finding["count"]) == ([1], 1)
    assert all(finding[key] for key in ("title", "message", "why", "remedy", "fix"))


def test_the_command_writes_its_outputs_and_its_exit_status_shows_errors(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--image_height", "64", "--image_width", "64", "--num_queries", "20"]
    page, fixed = tmp_path / "page.html", tmp_path / "fixed"
    assert (
        cli.main(["check", str(root), *small, "--html", str(page), "--preview", "14", "--augmentation", "strong"]) == 0
    )
    assert "no errors" in capsys.readouterr().out
    assert "<h2>Histograms" in page.read_text()
    assert len(list((tmp_path / "preview").glob("*.jpg"))) == 14
    (root / "train/shapes_0001.jpg").write_bytes(b"")
    assert cli.main(["check", str(root), *small, "--fix", str(fixed)]) == 1
    out = capsys.readouterr().out
    assert "error: image file unreadable: 1 in train/_annotations.coco.json, ids 1" in out
    assert "the file is empty" in out
    assert cli.main(["check", str(fixed), *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == 0
    assert cli.main(["check", str(tmp_path / "nowhere")]) == 2
    assert "there is no such file or folder. Expected a dataset folder" in capsys.readouterr().out


def test_check_writes_its_page_into_a_new_folder_or_says_why_not(root, tmp_path, capsys):
    page = tmp_path / "new" / "folder" / "page.html"
    assert cli.main(["check", str(root), "--html", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert cli.main(["check", str(root), "--html", str(tmp_path)]) == 1
    assert f"Is a directory: '{tmp_path}'" in capsys.readouterr().err


def test_what_cannot_be_read_is_not_corrected(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path / "nowhere"), "--fix", str(tmp_path / "fixed")]) == 2
    assert not (tmp_path / "fixed").exists()
    assert "Next:" not in capsys.readouterr().out


def test_json_is_sound_whatever_the_terminal_can_show(root, monkeypatch):
    for split in ("train", "valid"):
        path = root / split / "_annotations.coco.json"
        coco = json.loads(path.read_text())
        coco["categories"] = [{**one, "name": f"雲😀{one['id']}"} for one in coco["categories"]]
        path.write_text(json.dumps(coco))
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert cli.main(["check", str(root), "--json"]) == 0
    assert any(name.startswith("雲😀") for name in json.loads(written.getvalue())["summary"]["classes"])
