"""Check rules that no type checker covers: the import order of packages, pure losses, and complete docstrings."""

import ast
import importlib
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))

TOP_LEVEL = set(
    ".ci .github .gitignore .pre-commit-config.yaml CHANGELOG.md CITATION.cff CODE_OF_CONDUCT.md CONTRIBUTING.md "
    "LICENSE Makefile README.md SECURITY.md docs experiments mkdocs.yml pyproject.toml requirements.lock "
    "rlhf_lightning tests".split()
)

# The rooms that each room may import, in import order. Satellites come after `commands`: their own commands reuse its
# parsers, and the core imports no satellite.
GROUND = set(
    "errors quiet deprecation atomic_files working_directory workers compat similar_names loading types "
    "micro_batches functional".split()
)
MODELS = GROUND | {"tokenization", "models"}
SAMPLING = MODELS | {"sampling"}
SCORING = SAMPLING | {"scoring"}
TRAINING = SCORING | {"training"}
MODULES = TRAINING | {"modules"}
DATA = GROUND | {"tokenization", "environments", "data"}
WORLDS = DATA | SCORING | {"worlds"}
RUNS = MODULES | {"runs"}
CORE = RUNS | WORLDS | {"evaluation", "recipes", "commands"}
MAY_IMPORT = {
    "errors": set(),
    "quiet": set(),
    "deprecation": {"errors"},
    "compat": {"errors"},
    "types": {"errors"},
    "atomic_files": {"errors"},
    "working_directory": set(),
    "workers": {"errors", "working_directory"},
    "similar_names": set(),
    "loading": {"errors", "similar_names", "working_directory"},
    "micro_batches": {"errors", "types"},
    "recipes": {"errors"},
    "functional": {"errors", "types"},
    "tokenization": GROUND,
    "models": GROUND | {"tokenization"},
    "environments": GROUND,
    "data": GROUND | {"tokenization", "environments"},
    "sampling": MODELS,
    "scoring": SAMPLING,
    "worlds": DATA | SCORING,
    "training": SCORING,
    "modules": TRAINING,
    "runs": MODULES,
    "evaluation": RUNS | {"worlds"},
    "commands": RUNS | WORLDS | {"evaluation", "recipes"},
    "planning": CORE,
    "verification": CORE,
    "people": CORE,
    "constitution": CORE | {"people"},
    "cli": CORE,
    "__main__": {"cli"},
}
SATELLITES = {"planning", "verification", "people", "constitution"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """Return the first folder below the package, or the module itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> list[tuple[int, str]]:
    """Return line and dotted name of everything a file imports; ``from a import b`` counts as ``a.b``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the root, not relative"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def imports_at_module_level(tree: ast.AST) -> list[str]:
    """Return the imports that run when the file is imported: all except those in functions and ``if TYPE_CHECKING``."""
    found = []
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [name for _, name in imported_modules(node)]
        else:
            found += imports_at_module_level(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_rooms_import_only_allowed_rooms(path):
    room = room_of(path)
    if path == PACKAGE / "__init__.py":
        pytest.skip("the public names come from every room")
    assert room in MAY_IMPORT, f"{room} is a new room: say in this test what it may import"
    wrong = []
    for line, name in imported_modules(ast.parse(path.read_text())):
        first, _, rest = name.partition(".")
        if first == "experiments" or first == "tests":
            wrong.append(f"line {line} imports {name}: the package never leans on {first}")
        if first != "rlhf_lightning":
            continue
        target = rest.split(".")[0]
        assert (PACKAGE / target).exists() or (PACKAGE / f"{target}.py").exists(), (
            f"line {line}: import {target} from the room it lives in, not from the package's front door"
        )
        if target != room and target not in MAY_IMPORT[room]:
            wrong.append(f"line {line} imports {name}: {room} may import {sorted(MAY_IMPORT[room])}")
    assert not wrong, "\n".join(wrong)


def test_data_and_modules_share_only_types():
    above = {"models", "sampling", "scoring", "training", "modules", "runs"}
    assert not [room for room in above if "data" in MAY_IMPORT[room]]
    assert not above & MAY_IMPORT["data"]


def test_the_core_imports_no_satellite():
    assert not [room for room, allowed in MAY_IMPORT.items() if allowed & SATELLITES and room not in SATELLITES]


def test_rooms_have_no_import_cycle():
    order = list(MAY_IMPORT)
    for room, allowed in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in allowed), f"{room} imports a room above it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=relative)
def test_functional_is_pure(path):
    """Functions map tensors to tensors: no framework, no output, no device transfer or synchronisation."""
    tree = ast.parse(path.read_text())
    outside = {
        "lightning",
        "pytorch_lightning",
        "transformers",
        "peft",
        "datasets",
        "torchmetrics",
        "logging",
        "warnings",
    }
    assert not {name.split(".")[0] for _, name in imported_modules(tree)} & outside
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert name not in {"item", "tolist", "cpu", "cuda", "print"}, f"line {node.lineno} calls {name}"
            assert name != "to" or casts(node), f"line {node.lineno} moves a tensor: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute | ast.Name):
            assert not ast.unparse(node).endswith("nn.Module"), f"line {node.lineno} uses nn.Module"
        if isinstance(node, ast.ClassDef):
            assert node.name.startswith("_"), (
                f"line {node.lineno}: functions are the public face of this room, not classes"
            )


def casts(call: ast.Call) -> bool:
    """Return whether a ``.to(...)`` changes only the precision."""
    kind = re.compile(r"dtype|promote_types|torch\.(float|bfloat|double|half|int|long|bool)")
    return bool(call.args) and all(kind.search(ast.unparse(argument)) for argument in call.args) and not call.keywords


def test_types_do_no_tensor_computation():
    tree = ast.parse((PACKAGE / "types.py").read_text())
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [name for name in calls if name.startswith(("torch.", "F."))]


def test_the_repository_root_has_only_known_files():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: the project's files are not known")
    assert {path.split("/")[0] for path in tracked} <= TOP_LEVEL


def test_cli_entry_points_do_not_import_the_training_stack():
    """``rlhf --help`` and shell completion must not wait for the training stack."""
    heavy = {"torch", "lightning", "transformers", "datasets", "peft", "matplotlib"}
    for name in ("cli.py", "__main__.py", "__init__.py"):
        path = PACKAGE / name
        if path.exists():
            direct = {module.split(".")[0] for module in imports_at_module_level(ast.parse(path.read_text()))}
            assert not direct & heavy, f"{name} imports {sorted(direct & heavy)} at once"
    rooms = [m for m in imports_at_module_level(ast.parse((PACKAGE / "cli.py").read_text())) if "rlhf_lightning" in m]
    assert not [m for m in rooms if m.startswith("rlhf_lightning.commands.")], (
        "cli imports commands when they are called"
    )


@pytest.fixture(scope="module")
def inherited_docstrings():
    return described_above([path.read_text() for path in FILES])


def described_above(sources: list[str]) -> dict[str, set[str]]:
    """Return, by class, the methods documented in its bases: overrides of these need no docstring."""
    classes = [node for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    bases = {node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases] for node in classes}
    own = {node.name: {part.name for part in node.body if is_described(part)} for node in classes}

    def above(name: str) -> set[str]:
        known = [base for base in bases[name] if base in bases and base != name]
        return set().union(*(own[base] | above(base) for base in known))

    return {name: above(name) for name in bases}


def is_described(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_everything_public_has_a_docstring(path, inherited_docstrings):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the file does not say what it is for"
    missing = undescribed(tree.body, inherited_docstrings)
    assert not missing, "without a docstring: " + ", ".join(missing)


def undescribed(body: list[ast.stmt], inherited: dict[str, set[str]], owner: str = "") -> list[str]:
    """Return line and name of public classes, functions and methods without an own or inherited docstring."""
    missing = []
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and not needs_none(node) and node.name not in inherited.get(owner, set()):
            missing.append(f"line {node.lineno}: {owner}.{node.name}".replace(" .", " "))
        if isinstance(node, ast.ClassDef):
            missing += undescribed(node.body, inherited, node.name)
    return missing


def test_the_docstring_check_detects_a_missing_docstring():
    text = (
        "class A:\n    'A.'\n    def f(self):\n        'F.'\n    def g(self): ...\n"
        "class B(A):\n    'B.'\n    def f(self): ...\n    def h(self): ...\n"
        "def k(): ...\n"
    )
    found = undescribed(ast.parse(text).body, described_above([text]))
    assert found == ["line 5: A.g", "line 9: B.h", "line 10: k"]


def needs_none(node: ast.stmt) -> bool:
    """Overloads and setters are documented with the function itself."""
    return any(
        ast.unparse(decorator).endswith(("overload", ".setter")) for decorator in getattr(node, "decorator_list", [])
    )


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_there_are_no_todo_notes(path):
    notes = re.findall(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b.*", path.read_text())
    assert not notes, notes
    assert path.stem != "utils", "a helper stands in the file of its noun"


def test_inheritance_is_at_most_five_deep():
    """Own classes inherit at most five deep, so that a reader finds a method in four files or fewer.

    The deepest chain is module, rollout, on-policy, critic-free. The fifth is a preset, which sets defaults and has no
    methods.
    """
    bases: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
                bases.setdefault(node.name, names)

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases[name] if base in bases and base != name), default=0)

    deep = {name: depth(name) for name in bases if depth(name) > 5}
    assert not deep, f"classes inherit too deep: {deep}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_rlhf_"))


def private_members(node: ast.ClassDef) -> set[str]:
    """Private methods and class attributes of a class."""
    found = set()
    for part in node.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(part.name)
        targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if private(name)}


def private_overrides(sources: dict[str, str]) -> list[str]:
    """Classes with the private names that they override of a class in another file."""
    classes = {
        node.name: (
            path,
            [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases],
            private_members(node),
        )
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
    }

    def ancestors(name: str) -> set[str]:
        bases = {base for base in classes[name][1] if base in classes and base != name}
        return bases.union(*(ancestors(base) for base in bases))

    return sorted(
        f"{path}: {name}.{member}"
        for name, (path, _, members) in classes.items()
        for member in members
        if any(classes[above][0] != path and member in classes[above][2] for above in ancestors(name))
    )


def test_no_private_name_is_overridden_across_files():
    """A method that a class in another file overrides is an override point: it needs a public name and a docstring."""
    found = private_overrides({relative(path): path.read_text() for path in FILES})
    assert not found, "\n".join(found)


def test_the_private_override_check_detects_an_override():
    sources = {
        "a.py": "class A:\n    _x = 1\n    def _y(self): ...",
        "b.py": "class B(A): ...\nclass C(B):\n    def _y(self): ...",
    }
    assert private_overrides(sources) == ["b.py: C._y"]


def private_definitions(tree: ast.AST) -> set[str]:
    """Return the functions, classes, variables and attributes of ``self`` that a file defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def foreign_private_names(tree: ast.AST, own: set[str]) -> list[str]:
    """Return the private names of other packages that a file uses, in attributes and in strings.

    ``own`` are the names that this package defines. Only ``self`` may have one that another file defines, in a base
    class: another object's may be another package's.
    """
    here = private_definitions(tree) | {"_replace", "_asdict", "_fields", "_make"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in here:
            if ast.unparse(node.value) == "self" and node.attr in own:
                continue
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if private(str(name)) and name not in here:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_private_names_of_other_packages_are_used_only_in_compat():
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    own = set().union(*map(private_definitions, trees.values()))
    wrong = [
        f"{relative(path)} {found}"
        for path, tree in trees.items()
        if path != PACKAGE / "compat.py"
        for found in foreign_private_names(tree, own)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_private_name_check_detects_a_name_of_another_package():
    tree = ast.parse("class A:\n    def f(self, x):\n        self._a = self._b\n        x._a, x._b, getattr(x, '_b')")
    assert foreign_private_names(tree, {"_b"}) == ["line 4: x._b", "line 4: getattr(x, '_b')"]


CONVERTED = {path.stem for path in PACKAGE.iterdir()} - {"__init__", "__main__", "cli"}
"""Rooms in which every raised error has a code."""

CONTROL_FLOW = {
    ("tokenization/sandbox.py", "OutOfBounds"),
    ("tokenization/sandbox.py", "SecurityError"),
    ("tokenization/sandbox.py", "TemplateError"),
    ("data/files.py", "_DuplicateKey"),
    ("environments/calls.py", "CallError"),
    ("environments/tool_use.py", "ValueError"),
    ("scoring/judges/remote.py", "TypeError"),
    ("scoring/judges/remote.py", "ValueError"),
    ("scoring/remote_scorer.py", "ValueError"),
    ("sampling/json_server.py", "TimeoutError"),
    ("sampling/json_server.py", "IncompleteRead"),
    ("sampling/json_server.py", "ValueError"),
    ("sampling/remote_engine.py", "ValueError"),
    ("sampling/text_server.py", "ValueError"),
    ("commands/parsing.py", "SystemExit"),
    ("commands/completion_api.py", "HTTPException"),
    ("commands/web_server.py", "HTTPException"),
    ("commands/train_settings.py", "SystemExit"),
    ("constitution/principles.py", "YAMLError"),
    ("people/server.py", "HTTPException"),
    ("people/candidates.py", "_Stopped"),
    ("runs/checkpoint.py", "PreemptedError"),
    ("runs/checkpoint_metadata.py", "UnpicklingError"),
}
"""Exceptions that are caught in the same room and never reach a user."""


def coded_names(trees: Iterable[ast.AST]) -> set[str]:
    """Names of the classes derived from RlhfError, and of the functions that return one of them."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    bases = {node.name: {ast.unparse(base) for base in node.bases} for node in nodes if isinstance(node, ast.ClassDef)}
    coded = {"RlhfError"}
    while more := {name for name, above in bases.items() if above & coded} - coded:
        coded |= more
    makers = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) in coded
    }
    return coded | makers


def uncoded_raises(tree: ast.AST, coded: set[str]) -> list[tuple[int, str]]:
    """Return line and name of errors that a file raises without a code; re-raising a caught exception is allowed."""
    caught = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        choices = [raised.body, raised.orelse] if isinstance(raised, ast.IfExp) else [raised]
        names = [ast.unparse(choice).rpartition(".")[2] for choice in choices]
        again = not isinstance(node.exc, ast.Call) and names[0] in caught
        found += [(node.lineno, name) for name in names if name not in coded and not again]
    return found


@pytest.fixture(scope="module")
def coded():
    return coded_names([ast.parse(file.read_text()) for file in FILES])


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in CONVERTED], ids=relative)
def test_raised_errors_have_a_code(path, coded):
    inside = path.relative_to(PACKAGE).as_posix()
    wrong = [
        found for found in uncoded_raises(ast.parse(path.read_text()), coded) if (inside, found[1]) not in CONTROL_FLOW
    ]
    assert not wrong, f"raise a class of errors.py with a code, or one derived from it: {wrong}"


def test_the_error_code_check_detects_a_missing_code():
    tree = ast.parse(
        "class Own(DataError): ...\n"
        "def made() -> Own: ...\n"
        "try:\n    raise Own('a', 'b')\nexcept Own as error:\n    raise error\n"
        "raise made()\n"
        "raise (Own if x else KeyError)('a')\n"
        "raise ValueError('x')\n"
        "raise NotImplementedError\n"
    )
    coded = coded_names([tree, ast.parse((PACKAGE / "errors.py").read_text())])
    assert {"Own", "made", "SettingError", "undefined"} <= coded
    assert uncoded_raises(tree, coded) == [(8, "KeyError"), (9, "ValueError"), (10, "NotImplementedError")]


def test_the_import_check_detects_every_form_of_import():
    """The check finds imports in functions, under conditions and in every form."""
    tree = ast.parse(
        "def f():\n    from rlhf_lightning import modules\nif True:\n    import rlhf_lightning.data.prompts as d\n"
    )
    assert {name for _, name in imported_modules(tree)} == {
        "rlhf_lightning.data.prompts",
        "rlhf_lightning.modules",
    }
    assert imports_at_module_level(tree) == ["rlhf_lightning.data.prompts"]


def test_every_function_is_used():
    """Uses in tests do not count: a formula that only its test calls is unused."""
    used: set[str] = set()
    for path in [*FILES, *(ROOT / "experiments").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        names = {name for _, name in imported_modules(tree) if name.startswith("rlhf_lightning.functional.")}
        used |= {name.rpartition(".")[2] for name in names}
        for owner in tree.body if path.parent.name == "functional" else []:
            used |= {node.id for node in ast.walk(owner) if isinstance(node, ast.Name)} - {getattr(owner, "name", "")}
    public = {
        node.name
        for path in (PACKAGE / "functional").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    assert not public - used, f"nothing uses {sorted(public - used)}: delete them"


# Nouns of the field that stand in several layers: the formula, the batch, the module, the check of one objective or
# one thing. Any other file name is unique.
NOUNS = {"audit", "distillation", "export", "loading", "offline"}


def repeated(names: list[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}


def test_class_names_are_unique():
    trees = [ast.parse(path.read_text()) for path in FILES]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert not repeated(names)


def test_file_names_are_unique_except_listed_nouns():
    assert repeated([path.stem for path in FILES]) - {"__init__"} == NOUNS


# Files that import modules by a name of this package's own; `loading` alone imports what a user names.
IMPORTS_BY_OWN_NAME = {
    f"rlhf_lightning/{file}.py"
    for file in ("cli", "__init__", "commands/__init__", "commands/objectives", "runs/loggers")
}


def imports_by_name(tree: ast.AST) -> bool:
    """Return whether a file imports a module by a computed name."""
    names = ("import_module", "__import__")
    return any(
        getattr(node.func, "id", getattr(node.func, "attr", "")) in names
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    )


def test_only_loading_imports_user_modules():
    found = {str(path.relative_to(ROOT)) for path in FILES if imports_by_name(ast.parse(path.read_text()))}
    assert found == IMPORTS_BY_OWN_NAME | {"rlhf_lightning/loading.py"}
    assert imports_by_name(ast.parse("from importlib import import_module\ndef f(x):\n    return import_module(x)"))


def test_experiments_import_existing_names():
    missing = []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_lightning"):
                module, place = importlib.import_module(node.module), node.module.replace(".", "/")
                for name in (alias.name for alias in node.names):
                    if not (hasattr(module, name) or list(ROOT.glob(f"{place}/{name}.py"))):
                        missing.append(f"{path.name}: {node.module}.{name}")
    assert not missing
