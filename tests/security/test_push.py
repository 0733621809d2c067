"""`m2f push` sends no code but the package's own."""

from pathlib import Path

import pytest

from m2f_trainer.hub.upload import MODEL_CODE
from tests.hub.loopback import hub_of_this_process
from tests.security.conftest import Command, change


def test_changed_code_in_a_model_folder_is_refused(m2f: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model / "mask2former.py"
    path.write_text(path.read_text() + "\nprint('owned')\n")
    with hub_of_this_process(monkeypatch) as hub:
        ran = m2f("push", model, "me/pets")
    assert ran.status == 1
    assert f"{path} differs from the code of m2f_trainer" in ran.err
    assert not hub.files


def test_code_elsewhere_that_a_configuration_refers_to_is_refused(
    m2f: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(model / "config.json", auto_map={"AutoConfig": "someone/repo--evil.Evil"})
    with hub_of_this_process(monkeypatch) as hub:
        ran = m2f("push", model, "me/pets")
    assert ran.status == 1
    assert "refers to other code than m2f_trainer's: someone/repo--evil.Evil" in ran.err
    assert not hub.files


def test_other_code_stays_and_the_packages_own_is_sent(
    m2f: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "mask2former.py").unlink(missing_ok=True)
    (model / "evil.py").write_text("print('owned')\n")
    with hub_of_this_process(monkeypatch) as hub:
        ran = m2f("push", model, "me/pets")
    assert ran.status == 0, ran.err
    assert {name for name in hub.files if name.endswith(".py")} == set(MODEL_CODE)


@pytest.mark.parametrize("name", ["README.md", "DINOV3_AGREEMENT.md", "pictures/worst_1.jpg"])
def test_a_link_in_a_model_folder_is_neither_followed_nor_sent(
    name: str, m2f: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("not to be touched\n")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(precious)
    with hub_of_this_process(monkeypatch) as hub:
        ran = m2f("push", model, "me/pets", *(["--pictures"] if name.startswith("pictures") else []))
    assert ran.status == 0, ran.err
    assert "model.safetensors" in hub.files
    assert b"not to be touched" not in b"".join([*hub.files.values(), *hub.bodies])
    assert precious.read_text() == "not to be touched\n"
