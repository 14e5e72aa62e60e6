"""Folders appear only when they are complete."""

from pathlib import Path

import pytest

from rlhf_lightning.atomic_files import complete_folder


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with complete_folder(folder) as partial:
        (partial / "first").touch()
        assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), complete_folder(folder) as partial:
        (partial / "second").touch()
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["first"], "an interrupted write changes nothing"
    with complete_folder(folder) as partial:
        (partial / "third").touch()
    assert [path.name for path in folder.iterdir()] == ["third"]
    assert list(folder.parent.iterdir()) == [folder], "no temporary folder stays"
