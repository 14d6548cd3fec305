"""The BUILD files are the floor plan of the package: here they are held against the imports."""

import ast
import pathlib
import re
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "keras_influence"
FOLDERS = (PACKAGE, "examples", "benchmarks", "tests")

# Where a module that is not part of the package is looked up: as a script run from its own folder
# would, and as `pythonpath` in pyproject.toml says.
SCRIPT_FOLDERS = ("tests", "examples")

# Each floor may use those before it. The last is `keras_influence/__init__.py`.
FLOORS = (
    "_backend",
    "linalg",
    "gradients",
    "batching",
    "data",
    "steps",
    "distribution",
    "replicas",
    "storage",
    "checkpoints",
    "workers",
    "callbacks",
    "trainers",
    "methods",
    "retrieval",
    "indexing",
    "scorer",
    "evaluation",
    "report",
    PACKAGE,
)
GROUND = ("linalg", "evaluation")
# What runs inside `model.fit` and what runs after it meet only in the checkpoints.
STRANGERS = ({"callbacks", "methods"},)

TF_DISTRIBUTE = re.compile(
    r"\b(tf|tensorflow)(\.python)?\.distribute\b|from tensorflow import .*\bdistribute\b"
)


class Target(NamedTuple):
    """A rule of a BUILD file. Paths are relative to the root, labels are written in full."""

    label: str
    sources: list[str]
    dependencies: list[str]


def full_label(label: str, package: str) -> str:
    """`:x` and `//a/x` as `//package:x` and `//a/x:x`."""
    if label.startswith(":"):
        return f"//{package}{label}"
    return label if ":" in label else f"{label}:{label.rpartition('/')[2]}"


def read_build_file(path: pathlib.Path, root: pathlib.Path) -> list[Target]:
    """The Python targets of one BUILD file, which must be calls with literal arguments."""
    package = path.parent.relative_to(root).as_posix().removeprefix(".")
    targets = []
    for statement in ast.parse(path.read_text(), str(path)).body:
        try:
            rule = statement.value.func.id
            arguments = {k.arg: ast.literal_eval(k.value) for k in statement.value.keywords}
        except (AttributeError, ValueError):
            raise ValueError(
                f"{path}:{statement.lineno}: expected a rule whose arguments are written out "
                f"(no glob, no variable). Received: {ast.unparse(statement)}"
            ) from None
        if rule.startswith("py_"):
            targets.append(
                Target(
                    label=f"//{package}:{arguments['name']}",
                    sources=[f"{package}/{s}".lstrip("/") for s in arguments.get("srcs", [])],
                    dependencies=[full_label(d, package) for d in arguments.get("deps", [])],
                )
            )
    return targets


def imported_files(source: str, root: pathlib.Path) -> set[str]:
    """The files of this tree that the file `source` imports, wherever in it the import stands."""
    folders = [root]
    if not source.startswith(f"{PACKAGE}/"):
        folders += [(root / source).parent, *(root / folder for folder in SCRIPT_FOLDERS)]

    def locate(module: str) -> str | None:
        for folder in folders:
            stem = folder / module.replace(".", "/")
            for path in (stem.parent / f"{stem.name}.py", stem / "__init__.py"):
                if path.is_file():
                    return path.relative_to(root).as_posix()
        return None

    found = set()
    for node in ast.walk(ast.parse((root / source).read_text(), source)):
        if isinstance(node, ast.Import):
            found |= {locate(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = list(pathlib.PurePosixPath(source).parts[: -node.level or None])
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            # `from a import b` is the module a.b where there is one, and a name inside a otherwise.
            found |= {locate(f"{base}.{alias.name}") or locate(base) for alias in node.names}
    return found - {None}


def floor_of(label: str) -> str:
    """`methods` for `//keras_influence/methods:arnoldi`, `data` for `//keras_influence:data`."""
    package, _, name = label.removeprefix("//").partition(":")
    return name if package == PACKAGE else package.split("/")[1]


def in_package(label: str) -> bool:
    return re.match(rf"//{PACKAGE}[/:]", label) is not None


def floor_problems(target: Target) -> list[str]:
    """What is wrong with the floors that a target stands on, judged by its imports."""
    if not in_package(target.label):
        return []
    floor = floor_of(target.label)
    if floor not in FLOORS:
        return [f"{target.label}: `{floor}` has no place among the floors {FLOORS}."]
    problems = []
    for dependency in target.dependencies:
        if not in_package(dependency):
            problems.append(
                f"{target.label} is in the package and uses {dependency}, which is not."
            )
            continue
        below = floor_of(dependency)
        if below == floor:
            continue
        if floor in GROUND:
            problems.append(f"{target.label} may use nothing of ours and uses {dependency}.")
        elif {floor, below} in STRANGERS:
            problems.append(f"{target.label} may not know {dependency}.")
        elif below not in FLOORS[: FLOORS.index(floor)]:
            problems.append(f"{target.label} uses {dependency}, which is not a floor below it.")
    return problems


def read_targets(root: pathlib.Path) -> list[Target]:
    build_files = [root / "BUILD", *(b for f in FOLDERS for b in (root / f).rglob("BUILD"))]
    return [target for path in sorted(build_files) for target in read_build_file(path, root)]


def find_problems(root: pathlib.Path) -> list[str]:
    """Every difference between the BUILD files under `root` and the code, one sentence each."""
    targets = read_targets(root)
    sources = [path.relative_to(root).as_posix() for path in root.glob("*.py")]
    for folder in FOLDERS:
        sources += [path.relative_to(root).as_posix() for path in (root / folder).rglob("*.py")]

    problems = []
    owners: dict[str, str] = {}
    for target in targets:
        for source in target.sources:
            if source not in sources:
                problems.append(f"{target.label} names {source}, which does not exist.")
            elif source in owners:
                problems.append(f"{source} is in {owners[source]} and in {target.label}.")
            owners.setdefault(source, target.label)
    problems += [f"{source} is in no target." for source in sorted(set(sources) - set(owners))]

    labels = {target.label for target in targets}
    for target in targets:
        used = {
            owners[file]
            for source in target.sources
            if source in sources
            for file in imported_files(source, root)
            if file in owners
        } - {target.label}
        listed = set(target.dependencies)
        for label in sorted(used - listed):
            problems.append(f"{target.label} imports {label}, which is missing from its deps.")
        for label in sorted(listed - used):
            why = "it does not import" if label in labels else "does not exist"
            problems.append(f"{target.label} lists {label} in its deps, which {why}.")
        problems += floor_problems(target._replace(dependencies=sorted(used)))
    return problems


def files_naming_tf_distribute(root: pathlib.Path) -> list[str]:
    return [
        path.relative_to(root).as_posix()
        for path in sorted((root / PACKAGE).rglob("*.py"))
        if TF_DISTRIBUTE.search(path.read_text())
    ]


def test_build_files_agree_with_the_imports():
    assert find_problems(ROOT) == []


def test_every_floor_stands():
    labels = [target.label for target in read_targets(ROOT)]
    assert {floor_of(label) for label in labels if in_package(label)} == set(FLOORS)


def test_setup_and_the_package_state_one_version():
    packaged = re.findall(r'\bversion="(.+)"', (ROOT / "setup.py").read_text())
    imported = re.findall(
        r'^__version__ = "(.+)"', (ROOT / PACKAGE / "__init__.py").read_text(), re.M
    )
    assert packaged == imported
    assert len(packaged) == 1


def test_only_one_file_names_tf_distribute():
    assert files_naming_tf_distribute(ROOT) == ["keras_influence/distribution.py"]


# From here on: a tree that is right, and one change at a time that each guard must notice.

SMALL_TREE = {
    "BUILD": 'py_library(name = "setup", srcs = ["setup.py"])',
    "setup.py": "import setuptools",
    "keras_influence/BUILD": """
package(default_visibility = ["//visibility:public"])
py_library(name = "keras_influence", srcs = ["__init__.py"], deps = [":data", ":scorer"])
py_library(name = "data", srcs = ["data.py"], deps = ["//keras_influence/linalg"])
py_library(name = "scorer", srcs = ["scorer.py"], deps = [":data", "//keras_influence/methods"])
""",
    "keras_influence/__init__.py": "from keras_influence import data\n"
    "from keras_influence.scorer import Scorer",
    "keras_influence/data.py": "from keras_influence.linalg import krylov",
    "keras_influence/scorer.py": "def Scorer():\n"
    "    import keras_influence.data\n"
    "    from .methods import Arnoldi",
    "keras_influence/linalg/BUILD": 'py_library(name = "linalg", '
    'srcs = ["__init__.py", "krylov.py"])',
    "keras_influence/linalg/__init__.py": "from keras_influence.linalg.krylov import arnoldi",
    "keras_influence/linalg/krylov.py": "import numpy",
    "keras_influence/methods/BUILD": 'py_library(name = "methods", srcs = ["__init__.py"])',
    "keras_influence/methods/__init__.py": "Arnoldi = None",
    "keras_influence/callbacks/BUILD": 'py_library(name = "callbacks", srcs = ["__init__.py"])',
    "keras_influence/callbacks/__init__.py": "",
    "examples/BUILD": 'py_binary(name = "show", srcs = ["show.py"], '
    'deps = [":pictures", "//keras_influence"])\n'
    'py_library(name = "pictures", srcs = ["pictures.py"])',
    "examples/show.py": "import pictures\nimport keras_influence as ki",
    "examples/pictures.py": "",
    "tests/BUILD": 'py_library(name = "cases", srcs = ["cases.py"])\n'
    'py_library(name = "show_test", srcs = ["show_test.py"], '
    'deps = [":cases", "//examples:show"])',
    "tests/cases.py": "",
    "tests/show_test.py": "import cases\nfrom examples import show",
}


def write_tree(root: pathlib.Path, changes: dict[str, str]) -> pathlib.Path:
    for name, text in {**SMALL_TREE, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def library(name: str, *deps: str) -> str:
    return f'py_library(name = "{name}", srcs = ["__init__.py"], deps = {list(deps)})'


def test_the_small_tree_is_right(tmp_path):
    assert find_problems(write_tree(tmp_path, {})) == []


LINALG, METHODS = "//keras_influence/linalg:linalg", "//keras_influence/methods:methods"
CALLBACKS, DATA = "//keras_influence/callbacks:callbacks", "//keras_influence:data"
SCORER, ROOF = "//keras_influence:scorer", "//keras_influence:keras_influence"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"keras_influence/methods/__init__.py": "from keras_influence import data"},
            [f"{METHODS} imports {DATA}, which is missing from its deps."],
        ),
        (
            {"keras_influence/data.py": "import numpy"},
            [f"{DATA} lists {LINALG} in its deps, which it does not import."],
        ),
        (
            {"keras_influence/methods/BUILD": library("methods", "//keras_influence:gone")},
            [f"{METHODS} lists //keras_influence:gone in its deps, which does not exist."],
        ),
        (
            {"keras_influence/linalg/stray.py": ""},
            ["keras_influence/linalg/stray.py is in no target."],
        ),
        ({"stray.py": ""}, ["stray.py is in no target."]),
        (
            {"BUILD": 'py_library(name = "setup", srcs = ["setup.py", "gone.py"])'},
            ["//:setup names gone.py, which does not exist."],
        ),
        (
            {"BUILD": SMALL_TREE["BUILD"] + '\npy_library(name = "two", srcs = ["setup.py"])'},
            ["setup.py is in //:setup and in //:two."],
        ),
        # Upwards, with the deps in order, so that only the floors object.
        (
            {
                "keras_influence/methods/__init__.py": "from keras_influence import scorer",
                "keras_influence/methods/BUILD": library("methods", SCORER),
            },
            [f"{METHODS} uses {SCORER}, which is not a floor below it."],
        ),
        (
            {
                "keras_influence/methods/__init__.py": "import keras_influence",
                "keras_influence/methods/BUILD": library("methods", "//keras_influence"),
            },
            [f"{METHODS} uses {ROOF}, which is not a floor below it."],
        ),
        (
            {
                "keras_influence/methods/__init__.py": "from keras_influence import callbacks",
                "keras_influence/methods/BUILD": library("methods", CALLBACKS),
            },
            [f"{METHODS} may not know {CALLBACKS}."],
        ),
        (
            {
                "keras_influence/callbacks/__init__.py": "from ..methods import Arnoldi",
                "keras_influence/callbacks/BUILD": library("callbacks", METHODS),
            },
            [f"{CALLBACKS} may not know {METHODS}."],
        ),
        (
            {
                "keras_influence/evaluation/__init__.py": "import keras_influence.data",
                "keras_influence/evaluation/BUILD": library("evaluation", DATA),
            },
            [f"//keras_influence/evaluation:evaluation may use nothing of ours and uses {DATA}."],
        ),
        (
            {
                "keras_influence/attic/__init__.py": "",
                "keras_influence/attic/BUILD": library("attic"),
            },
            [f"//keras_influence/attic:attic: `attic` has no place among the floors {FLOORS}."],
        ),
        (
            {
                "keras_influence/methods/__init__.py": "from examples import pictures",
                "keras_influence/methods/BUILD": library("methods", "//examples:pictures"),
            },
            [f"{METHODS} is in the package and uses //examples:pictures, which is not."],
        ),
    ],
)
def test_each_guard_fires(tmp_path, changes, expected):
    assert find_problems(write_tree(tmp_path, changes)) == expected


@pytest.mark.parametrize(
    "text", ['SRCS = ["setup.py"]', 'py_library(name = "setup", srcs = glob(["*.py"]))']
)
def test_a_build_file_that_is_not_written_out_is_refused(tmp_path, text):
    with pytest.raises(
        ValueError, match="BUILD:1: expected a rule whose arguments are written out"
    ):
        find_problems(write_tree(tmp_path, {"BUILD": text}))


@pytest.mark.parametrize(
    "text",
    [
        "strategy = tf.distribute.get_strategy()",
        "import tensorflow.distribute",
        "from tensorflow.python.distribute import values",
        "from tensorflow import data, distribute",
    ],
)
def test_naming_tf_distribute_is_noticed(tmp_path, text):
    root = write_tree(tmp_path, {"keras_influence/data.py": text})
    assert files_naming_tf_distribute(root) == ["keras_influence/data.py"]


def test_other_names_are_not_tf_distribute(tmp_path):
    root = write_tree(tmp_path, {"keras_influence/data.py": "tf.distributed = keras.distribution"})
    assert files_naming_tf_distribute(root) == []
