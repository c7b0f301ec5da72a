"""Who may import whom, and what stays unloaded: the layering, enforced."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "vllm", "transformers", "trl", "datasets", "accelerate", "peft"}

# What the files of train/ may see of feedback/ without being listed below.
TRAIN_SEES = {"feedback.errors", "feedback.records", "feedback.shards", "feedback.config"}
PURE = ("losses", "losses_listwise", "logprobs", "advantages", "ppo_losses")
ALGORITHMS = {"sft", "reward", "dpo", "rrhf", "ppo"}


def modules(root: Path, package: str) -> list[Path]:
    return sorted((root / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_at_top(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_feedback_never_imports_train(root: Path) -> None:
    for path in modules(root, "feedback"):
        guilty = {name for name in imported(path) if name.split(".")[0] == "train"}
        assert not guilty, f"{path} imports {guilty}"


def test_feedback_loads_nothing_heavy_at_module_level(root: Path) -> None:
    for path in modules(root, "feedback"):
        assert not imported_at_top(path) & HEAVY, path


def test_nothing_imports_the_command_line(root: Path) -> None:
    for path in modules(root, "feedback") + modules(root, "train"):
        assert not {"train.cli", "feedback.cli"} & imported(path), path


def test_pure_modules_import_torch_and_nothing_of_ours(root: Path) -> None:
    for name in PURE:
        path = root / "train" / f"{name}.py"
        if path.exists():
            ours = {
                found for found in imported(path) if found.split(".")[0] in ("feedback", "train")
            }
            assert not ours, f"{path} imports {ours}"


def test_algorithms_never_import_each_other(root: Path) -> None:
    for name in ALGORITHMS:
        path = root / "train" / f"{name}.py"
        others = {f"train.{other}" for other in ALGORITHMS - {name}}
        assert not others & imported(path), path


def test_no_file_is_called_utils(root: Path) -> None:
    ours = ("benchmarks", "feedback", "recipes", "tests", "train")
    assert not [path for name in ours for path in (root / name).rglob("utils.py")]


@pytest.mark.parametrize("package", ["feedback", "train"])
def test_all_is_true(root: Path, package: str) -> None:
    for path in modules(root, package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        exported = next(
            (
                ast.literal_eval(node.value)
                for node in tree.body
                if isinstance(node, ast.Assign)
                and any(
                    isinstance(name, ast.Name) and name.id == "__all__" for name in node.targets
                )
            ),
            None,
        )
        if exported is None:
            assert path.name in ("__init__.py", "__main__.py"), f"{path} has no __all__"
            continue
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if imported_at_top(path) & {"vllm"}:
            continue
        module = importlib.import_module(name)
        missing = [entry for entry in exported if not hasattr(module, entry)]
        assert not missing, f"{path}: __all__ names {missing}, which it does not define"


@pytest.mark.parametrize(
    "code",
    [
        "import feedback",
        "import feedback.records, feedback.shards, feedback.templates, feedback.config",
        "import train.config",
        "from train.cli import main; main(['--help'])",
    ],
)
def test_light_imports_stay_light(code: str) -> None:
    check = f"import sys; {code}; heavy = {HEAVY} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_bitsandbytes_is_heard_but_for_what_concerns_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import logging

    import train

    assert train.__doc__
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "why")
    logger.warning("something else")
    assert caplog.messages == ["something else"]
