"""`import peft` finds Multigraft while that is asked for, and PEFT before and after."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

import multigraft
from multigraft.compat import install_as_peft, is_installed, uninstall
from multigraft.errors import StateError
from tests.compat.running import output

NAMES = """
import importlib, importlib.metadata, importlib.util, sys
import multigraft
assert "multigraft.compat" not in sys.modules, "importing the package installs nothing"
from multigraft.compat import install_as_peft, is_installed
assert not is_installed()
alias = install_as_peft()
assert is_installed() and install_as_peft() is alias
assert "peft" not in sys.modules, "nothing is imported before it is asked for"

assert importlib.util.find_spec("peft").name == "peft"
assert importlib.metadata.version("peft") == importlib.metadata.metadata("peft")["Version"]
assert importlib.metadata.version("PEFT").split(".") >= ["0", "20", "0"]
assert "peft" in importlib.metadata.packages_distributions()["peft"]
assert importlib.metadata.version("torch") == importlib.metadata.metadata("torch")["Version"]
assert importlib.metadata.metadata("torch")["Name"] == "torch"

import peft
assert peft.__version__ == importlib.metadata.version("peft")
assert peft.LoraConfig is multigraft.LoraConfig
assert peft.tuners.lora.layer.LoraLayer is multigraft.LoraLayer
from peft import *
assert LoraModel is multigraft.LoraModel
from peft import helpers, utils
from peft.utils.other import ModulesToSaveWrapper
assert utils.ModulesToSaveWrapper is ModulesToSaveWrapper
assert "rescale_adapter_scale" in dir(helpers) and "get_peft_model" in dir(peft)
from multigraft.compat.tables import MODULES
for module in MODULES:
    names = importlib.import_module(module).__all__
    assert all(hasattr(sys.modules[module], name) for name in names), module
"""

ABSENT = """
from multigraft.compat import install_as_peft
install_as_peft()
import peft
for line in (
    "from peft import BOFTConfig",
    "from peft.helpers import rescale_adapter_scal",
    "import peft.tuners.boft",
    "peft.LoraConfg",
    "peft.utils.__file__",
):
    try:
        exec(line)
    except (ImportError, AttributeError) as error:
        print(f"{type(error).__name__}: {error}")
assert not hasattr(peft, "BOFTConfig") and getattr(peft, "BOFTModel", None) is None
try:
    from peft import VBLoRAConfig
except ImportError:
    print("as if PEFT were older")
"""

COMES_AND_GOES = """
import importlib.util, sys
from multigraft import LoraConfig
from multigraft.compat import install_as_peft, is_installed, uninstall
finders = list(sys.meta_path)
with install_as_peft():
    import peft, peft.utils
    assert peft.LoraConfig is LoraConfig
    assert importlib.util.find_spec("peft").origin == "multigraft.compat"
    held = peft
assert not is_installed() and sys.meta_path == finders
assert not [name for name in sys.modules if name.split(".")[0] == "peft"]
assert held.PeftModel.__module__.startswith("multigraft"), "what was imported keeps its names"
uninstall()
print(importlib.util.find_spec("peft").origin)
"""

WITHOUT_PEFT = """
import importlib.metadata, importlib.util
try:
    import peft
except ModuleNotFoundError:
    print("PEFT is not installed")
from multigraft.compat import install_as_peft
install_as_peft()
import peft
from accelerate.utils import is_peft_available, is_peft_model
from multigraft import get_peft_model
from torch import nn
model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
assert is_peft_available() and is_peft_model(model)
print(importlib.metadata.version("peft"))
"""


def test_modules_names_and_metadata_are_found() -> None:
    output("-c", NAMES)


def test_what_is_missing_is_said_with_the_nearest_name() -> None:
    boft, helper, module, attribute, file, older = output("-c", ABSENT).splitlines()
    assert boft.startswith("AliasError: `peft.BOFTConfig` is not in Multigraft")
    assert "Nearest: `OFTConfig`" in boft and "run without the alias" in boft
    assert "Nearest: `rescale_adapter_scale`" in helper
    assert module.startswith("AliasError: `peft.tuners.boft`") and "Nearest: `oft`" in module
    assert attribute.startswith("AttributeError") and "Nearest: `LoraConfig`" in attribute
    assert file.startswith("AttributeError: module `peft.utils` has no attribute")
    assert older == "as if PEFT were older"


def test_it_comes_and_goes() -> None:
    assert "peft" in Path(output("-c", COMES_AND_GOES).strip()).parts


def test_it_works_where_peft_is_not_installed(tmp_path: Path) -> None:
    packages = next(Path(p) for p in sys.path if (Path(p) / "peft").is_dir())
    for entry in packages.iterdir():
        if not entry.name.startswith("peft"):
            (tmp_path / entry.name).symlink_to(entry)
    source = Path(multigraft.__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(source)!r}, {str(tmp_path)!r}]\n{WITHOUT_PEFT}"
    assert output("-S", "-c", code).split("\n")[0] == "PEFT is not installed"


@pytest.mark.parametrize("package", ["peft", "transformers", "accelerate", "trl", "diffusers"])
def test_it_is_refused_once_somebody_has_looked_for_peft(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in DECIDED]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    finders = list(sys.meta_path)
    with pytest.raises(StateError, match=f"`{package}` is imported already.*python -m multigraft"):
        install_as_peft()
    assert sys.meta_path == finders and not is_installed()
    uninstall()  # and there is nothing to undo


DECIDED = ("peft", "transformers", "accelerate", "trl", "diffusers")
