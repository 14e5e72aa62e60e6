"""Test loading of objects from user-given specs: accepted forms, and errors."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import refused
from jsonargparse import Namespace

from rlhf_lightning.loading import (
    import_path,
    import_user_module,
    is_too_deep,
    load,
    load_class,
    read_records,
    refuse_repeated_keys,
    shipped_classes,
)

MADE: list[str] = []


class Base:
    def __init__(self, size: int = 1) -> None:
        MADE.append(type(self).__name__)
        self.size = size


class Child(Base):
    pass


class Stranger:
    def __init__(self, *args: object) -> None:
        MADE.append("Stranger")


ready = Child(7)
SHIPPED = {"Child": Child}


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("Child", 1),
        (Child, 1),
        (f"{__name__}.Child", 1),
        (f"{__name__}.ready", 7),
        (ready, 7),
        ({"class_path": "Child", "init_args": {"size": 3}}, 3),
        ({"class_path": "Child"}, 1),
        (Namespace(class_path="Child", init_args=Namespace(size=4)), 4),
    ],
)
def test_every_kind_of_object_spec_loads(spec: object, size: int) -> None:
    made = load(spec, Base, SHIPPED, "child")
    assert type(made) is Child and made.size == size


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("Chld", "unknown-name", ["there is no child 'Chld'; did you mean Child?"]),
        ("Zebra", "unknown-name", ["there are Child"]),
        ("nowhere.Child", "not-importable", ["No module named 'nowhere'"]),
        (f"{__name__}.Chidl", "not-importable", [f"did you mean {__name__}.Child?"]),
        (f"{__name__}.Stranger", "wrong-kind", ["is a class", "Base"]),
        (Stranger, "wrong-kind", ["'Stranger' is a class"]),
        ({"class_path": f"{__name__}.Stranger", "init_args": {"args": 1}}, "wrong-kind", ["Stranger"]),
        (f"{__name__}.MADE", "wrong-kind", ["is a list"]),
        (3, "wrong-kind", ["is a int"]),
        (None, "wrong-kind", ["NoneType"]),
        ({"class_path": "Child", "init_args": {"width": 3}}, "wrong-arguments", ["'width'", "it takes size"]),
        ({"class_path": "Child", "init_args": [3]}, "wrong-arguments", ["{class_path: NAME, init_args: {...}}"]),
        ({"class_path": f"{__name__}.ready", "init_args": {"size": 3}}, "wrong-arguments", ["remove init_args"]),
        ({"name": "Child"}, "wrong-arguments", ["{class_path: NAME"]),
    ],
)
def test_invalid_specs_are_refused_before_any_call(spec: object, code: str, words: list[str]) -> None:
    MADE.clear()
    with refused(code, *words):
        load(spec, Base, SHIPPED, "child")
    assert not MADE


def test_an_abstract_class_is_refused_with_its_missing_methods() -> None:
    with refused("wrong-kind", "it must define __getitem__, __len__"):
        load(f"{__name__}.Sequence", Sequence, {}, "sequence")


def test_only_callables_are_accepted_as_functions() -> None:
    assert load("math.sqrt", Callable, {}, "function")(4.0) == 2.0
    with refused("wrong-kind", "a function, or a class whose objects can be called"):
        load("pathlib.Path", Callable, {}, "function")


def test_load_class_returns_a_class_without_instantiating_it() -> None:
    MADE.clear()
    assert load_class("Child", Base, SHIPPED, "child") is Child and not MADE
    with refused("wrong-kind", "a subclass of"):
        load_class(f"{__name__}.ready", Base, SHIPPED, "child")


def test_import_path_finds_any_object() -> None:
    assert import_path("pathlib.Path") is Path
    with refused("not-importable", "Pathh"):
        import_path("pathlib.Pathh")
    with refused("not-importable"):
        import_path("Path")


def test_shipped_classes_are_found_in_the_packages_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my_room"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "kinds.py").write_text("class Kind(dict): ...\nclass _Hidden(dict): ...\nclass Other: ...\n")
    (folder / "more.py").write_text("from my_room.kinds import Kind\nclass More(Kind): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = shipped_classes("my_room", dict)
    assert {name: kind.__module__ for name, kind in found.items()} == {"Kind": "my_room.kinds", "More": "my_room.more"}


def test_a_users_module_is_imported_by_name_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "module_of_mine.py").write_text("VALUE = 3\n")
    assert import_user_module(str(tmp_path / "module_of_mine.py")) == "module_of_mine"
    assert sys.modules.pop("module_of_mine").VALUE == 3
    assert import_user_module("json") == "json"
    with refused("no-file", "there is no file"):
        import_user_module(str(tmp_path / "absent.py"))
    with refused("not-importable", "absent_module"):
        import_user_module("absent_module")
    (tmp_path / "half_of_mine.py").write_text("x = 1\ndef f(: pass\n")
    with refused("not-importable", "half_of_mine.py, line 2"):
        import_user_module(str(tmp_path / "half_of_mine.py"))
    with refused("not-importable", "half_of_mine.py, line 2"):
        import_path("half_of_mine.f")


def test_json_records_keep_line_ends_and_must_be_objects(tmp_path: Path) -> None:
    rows = [{"a": f"x{end}y"} for end in ("\u2028", "\x85", "\x0b", "\x1c", "\r", "")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n")
    assert read_records(path) == rows
    for text in ("[1]", "7", "{", "[" * 5000):
        path.write_text('{"a": 1}\n' + text)
        with refused("invalid-json", "line 2"):
            read_records(path)
    path.unlink()
    path.mkdir()
    with refused("not-a-file"):
        read_records(path)


def test_json_depth_counts_lists_and_objects() -> None:
    assert not any(map(is_too_deep, (5, "x", None, [], {"a": [{"b": (1,)}]}, json.loads("[" * 64 + "]" * 64))))
    assert is_too_deep(json.loads("[" * 65 + "]" * 65)) and is_too_deep([{"a": json.loads("[" * 900 + "]" * 900)}])


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b: [{a: 1, a: 1}]", "b: &x {a: 1, 'a': 2}\nc: *x"])
def test_a_duplicate_key_is_refused(text: str) -> None:
    with refused("repeated-key", "'a'", "twice"):
        refuse_repeated_keys(text)


def test_a_key_may_occur_in_several_mappings() -> None:
    refuse_repeated_keys("a: {a: 1}\nb: &x {a: 1}\nc: [*x, *x, a, a]\nd: {<<: *x, a: 2}")


@pytest.mark.parametrize("text", ["1 / 0", "sys.exit()", "int('x')"])
def test_a_failing_user_module_is_named_with_its_line(text, tmp_path):
    (tmp_path / "failing_of_mine.py").write_text(f"x = 1\n{text}\n")
    with refused("not-importable", "failing_of_mine.py, line 2"):
        import_user_module(str(tmp_path / "failing_of_mine.py"))
