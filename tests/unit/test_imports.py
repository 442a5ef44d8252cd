"""What each folder may import (docs/development.md), and that text commands do not wait for torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import intra_distillation_fairseq

PACKAGE = Path(intra_distillation_fairseq.__file__).parent
NAME = PACKAGE.name

# What the files of a folder (or a single file) must not import, directly.
FORBIDDEN = {
    "files.py": {"torch", "fairseq", "numpy", f"{NAME}.corpus", f"{NAME}.experiments", f"{NAME}.cli"},
    "schedule.py": {"torch", "fairseq", f"{NAME}.losses", f"{NAME}.passes", f"{NAME}.criterions", f"{NAME}.tasks"},
    "losses": {"fairseq", f"{NAME}.passes", f"{NAME}.criterions", f"{NAME}.tasks", f"{NAME}.cli"},
    "passes.py": {"fairseq", f"{NAME}.criterions", f"{NAME}.tasks", f"{NAME}.cli"},
    "corpus": {"torch", "fairseq", f"{NAME}.criterions", f"{NAME}.tasks", f"{NAME}.cli", f"{NAME}.plugin"},
    "criterions": {f"{NAME}.cli"},
    "tasks": {f"{NAME}.cli", f"{NAME}.criterions"},
    "teacher.py": {f"{NAME}.cli", f"{NAME}.criterions"},
    "loading.py": {f"{NAME}.cli", f"{NAME}.criterions"},
    "analysis": {f"{NAME}.cli", f"{NAME}.criterions"},
    "experiments": {f"{NAME}.cli", f"{NAME}.criterions", f"{NAME}.tasks"},
    "models": {f"{NAME}.cli", f"{NAME}.criterions"},
    "optim": {f"{NAME}.cli", f"{NAME}.criterions", f"{NAME}.tasks", f"{NAME}.models"},
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_go_one_way(place):
    files = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).rglob("*.py"))
    assert files
    for file in files:
        wrong = {n for n in imported(file) for f in FORBIDDEN[place] if starts_with(n, f)}
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {wrong}"


def test_only_one_file_needs_triton():
    """A machine without it uses every other back end."""
    files = {file.name for file in PACKAGE.rglob("*.py") if any(starts_with(n, "triton") for n in imported(file))}
    assert files == {"triton_kernels.py"}


def test_commands_do_not_wait_for_torch():
    """Importing it takes seconds, and a command with nothing to do is to be over at once."""
    code = (
        "import importlib, sys; sys.argv = ['/x/bin/intra-distillation', 'user-dir']\n"
        "from intra_distillation_fairseq.cli.main import COMMANDS, main\n"
        "for module, _ in COMMANDS.values():\n"
        "    importlib.import_module(f'intra_distillation_fairseq.cli.{module}')\n"
        "assert main() == 0\n"
        "assert not {'torch', 'fairseq', 'sacremoses', 'sacrebleu', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(PACKAGE)


@pytest.mark.parametrize("set_up", ["", "logging.basicConfig(level=logging.INFO, stream=sys.stdout)"])
def test_importing_the_package_leaves_the_log_alone(set_up):
    """One of fairseq's models sets it to DEBUG; what fairseq's commands set up before is to stay as well."""
    code = (
        f"import logging, sys\n{set_up}\nbefore = logging.root.level, logging.root.handlers[:]\n"
        "import intra_distillation_fairseq\n"
        "assert (logging.root.level, logging.root.handlers) == before, logging.root.handlers\n"
        "assert 'fairseq.models.wav2vec.wav2vec2_classification' in sys.modules\n"
        "logging.getLogger('x').info('written')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, "written" in done.stderr) == ("INFO:x:written\n" if set_up else "", False)


def test_commands_that_use_fairseq_are_quiet():
    code = (
        "import sys; sys.argv = ['/x/bin/intra-distillation']\n"
        "import logging\nfrom intra_distillation_fairseq.cli.quiet import quiet\nquiet()\n"
        "from intra_distillation_fairseq import loading\n"
        "logging.getLogger('matplotlib').debug('chatter'); logging.getLogger('fairseq.x').info('chatter')\n"
        "logging.getLogger('fairseq.x').warning('wanted')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "chatter" not in done.stderr and "wanted" in done.stderr


def test_importing_the_package_registers_the_plugin():
    code = (
        "import intra_distillation_fairseq\n"
        "from fairseq import tasks, models, criterions, optim\n"
        "assert 'translation_intra_distillation' in tasks.TASK_REGISTRY\n"
        "assert 'intra_distillation' in criterions.CRITERION_REGISTRY\n"
        "assert 'sage_adam' in optim.OPTIMIZER_REGISTRY\n"
        "archs = {'transformer_small', 'transformer_big', 'switch_transformer_small', 'switch_transformer_big'}\n"
        "assert archs <= set(models.ARCH_MODEL_REGISTRY)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
