"""`python -m multigraft.compat`: programs as they are, and the processes that they start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from multigraft.compat.launch import CHILD, in_child
from tests.compat.running import output, start

PYTHON = sys.executable
ALIASED = ("-m", "multigraft.compat")

CHILDREN = """
import multiprocessing, subprocess, sys
from tools_beside_me import HELPS

def whose(queue):
    import importlib.metadata, peft
    queue.put((peft.__spec__.origin, importlib.metadata.version("peft")))

def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

if __name__ == "__main__":
    assert HELPS and sys.argv[1:] == ["--flag", "x"] and sys.modules["__main__"].whose is whose
    import peft
    for method in ("spawn", "forkserver", "fork"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=whose, args=(queue,))
        process.start()
        print(method, *queue.get(timeout=100))
        process.join()
    code = "import peft; print(peft.LoraConfig.__module__)"
    print("child", run(sys.executable, "-u", "-c", code))
    code = "import peft; print(peft.__spec__.origin)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    print("grandchild", run(sys.executable, "-c", nested))
    print("light", run(sys.executable, "-c", "import sys; print('torch' in sys.modules)"))
    print("module", run(sys.executable, "-m", "tools_beside_me", "one"))
"""
BESIDE = """
import sys
HELPS = True
if __name__ == "__main__":
    import peft
    print(sys.argv[1:], peft.__spec__.origin, __spec__.name)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("programs")
    (root / "program.py").write_text(CHILDREN)
    (root / "tools_beside_me.py").write_text(BESIDE)
    return root


def test_a_script_and_all_its_children_find_multigraft(folder: Path) -> None:
    said = output(*ALIASED, str(folder / "program.py"), "--flag", "x", cwd=folder)
    assert said.splitlines() == [
        "spawn multigraft.compat 0.21.2",
        "forkserver multigraft.compat 0.21.2",
        "fork multigraft.compat 0.21.2",
        "child multigraft.methods.lora",
        "grandchild multigraft.compat",
        "light False",
        "module ['one'] multigraft.compat tools_beside_me",
    ]


def test_a_module_is_run_by_its_name(folder: Path) -> None:
    said = output(*ALIASED, "-m", "tools_beside_me", "a", "-b", cwd=folder)
    assert said.strip() == "['a', '-b'] multigraft.compat tools_beside_me"


def test_torchruns_workers_find_multigraft(folder: Path) -> None:
    (folder / "worker.py").write_text(
        "import os, peft; print(os.environ['RANK'], peft.__spec__.origin, flush=True)"
    )
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py")
    said = output(str(CHILD), *run, cwd=folder)
    assert sorted(said.splitlines()) == ["0 multigraft.compat", "1 multigraft.compat"]


def test_code_is_run_and_sees_its_arguments() -> None:
    code = "import peft, sys; print(sys.argv, peft.LoraConfig.__module__)"
    assert output(*ALIASED, "-c", code, "a").strip() == "['-c', 'a'] multigraft.methods.lora"


def test_an_exit_code_and_a_traceback_come_through() -> None:
    left = start(str(CHILD), "-c", "raise SystemExit(7)")
    assert left.wait(100) == 7
    failed = start(str(CHILD), "-c", "1 / 0")
    assert "ZeroDivisionError" in failed.communicate(timeout=100)[1] and failed.returncode == 1


@pytest.mark.parametrize("arguments", [[], ["-m"], ["-c"]])
def test_nothing_to_run_is_said_with_the_usage(arguments: list[str]) -> None:
    asked = start(str(CHILD), *arguments)
    assert "usage: python -m multigraft.compat SCRIPT" in asked.communicate(timeout=100)[1]
    assert asked.returncode == 2


def test_help_is_no_error() -> None:
    assert "Runs a Python program in which `import peft` finds" in output(str(CHILD), "--help")


COMMANDS = {
    "a script": (["train.py", "-c", "x"], 0),
    "a module": (["-m", "torch.distributed.run", "train.py"], 0),
    "code": (["-c", "pass"], 0),
    "flags": (["-u", "-OO", "train.py"], 2),
    "flags with values": (["-W", "ignore", "-Xdev", "-X", "utf8", "train.py"], 5),
    "a long flag": (["--check-hash-based-pycs", "never", "train.py"], 2),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_the_alias_stands_before_the_program(what: str) -> None:
    words, place = COMMANDS[what]
    assert in_child([PYTHON, *words]) == [PYTHON, *words[:place], str(CHILD), *words[place:]]


def test_a_flag_joined_with_the_program_is_parted_from_it() -> None:
    assert in_child([PYTHON, "-uc", "pass"]) == [PYTHON, "-u", str(CHILD), "-c", "pass"]


LEFT_ALONE: dict[str, list[object]] = {
    "another program": ["git", "status"],
    "nothing": [],
    "the interpreter alone": [PYTHON],
    "what comes from a pipe": [PYTHON, "-"],
    "the version": [PYTHON, "--version"],
    "the version, shortly": [PYTHON, "-V"],
    "no packages": [PYTHON, "-S", "x.py"],
    "code without code": [PYTHON, "-c"],
    "a child": [PYTHON, str(CHILD), "x.py"],
    "the alias itself": [PYTHON, "-m", "multigraft.compat", "x.py"],
    "no text": [object()],
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_any_other_command_stays_as_it_is(what: str) -> None:
    assert in_child(LEFT_ALONE[what]) == LEFT_ALONE[what]


def test_the_python_of_another_environment_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.symlink_to(Path(PYTHON).resolve())
    assert in_child([str(other), "x.py"]) == [str(other), "x.py"]


def test_this_python_is_known_by_any_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(PYTHON).parent))
    assert in_child(["python3", "x.py"]) == ["python3", str(CHILD), "x.py"]


def test_a_shells_command_and_another_executable_are_left_alone() -> None:
    code = "import subprocess, sys; print(subprocess.run({}, stdout=-1).stdout)"
    shell = "f'{sys.executable} -c \"import sys; print(sys.orig_argv[1])\"', shell=True"
    found = output(str(CHILD), "-c", code.format(shell))
    assert found.strip() == r"b'-c\n'"


def test_uninstalling_leaves_subprocess_as_it_was() -> None:
    code = (
        "import subprocess, multiprocessing.spawn as spawn\n"
        "before = subprocess.Popen.__init__, spawn.get_preparation_data\n"
        "from multigraft.compat import launch, uninstall\n"
        "launch.take_effect(); launch.take_effect()\n"
        "assert subprocess.Popen.__init__ is not before[0]\n"
        "uninstall()\n"
        "assert (subprocess.Popen.__init__, spawn.get_preparation_data) == before\n"
    )
    subprocess.run([PYTHON, "-c", code], check=True)
