"""The registration with transformers' trainer: when, whom it leaves alone, undoing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from transformers import trainer as trainer_module
from transformers import trainer_utils

import multigraft
from multigraft import get_peft_model, inject_adapter_in_model
from multigraft.integrations import transformers as registration
from tests.integrations.small_trainer import base, config, trainer

ROOT = Path(__file__).resolve().parents[2]
WATCHED = "any(type(f).__name__ == 'ImportWatch' for f in sys.meta_path)"
WITHOUT_PEFT = "import sys\nsys.modules['peft'] = None\n"


def run(code: str) -> str:
    """What a fresh interpreter prints; ``WATCHED`` is whether a finder of ours is waiting."""
    code = textwrap.dedent(code).replace("WATCHED", WATCHED)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def afresh() -> Iterator[None]:
    """The trainer knows nothing of us at first, and all of us afterwards."""
    registration.unregister()
    yield
    registration.unregister()
    registration.register()


def seen() -> dict[str, object]:
    modules = (trainer_module, trainer_utils)
    names = ("is_peft_available", "PeftModel", "PeftMixedModel")
    found: dict[str, object] = {f"{m.__name__}.{n}": vars(m).get(n) for m in modules for n in names}
    kind = vars(transformers.Trainer)
    return {**found, **{n: kind[n] for n in ("_load_from_checkpoint", "_load_best_model")}}


def test_undoing_leaves_the_trainer_as_it_was(afresh: None):
    before = seen()
    registration.register()
    changed = {name for name, value in seen().items() if value is not before[name]}
    assert len(changed) == 8
    registration.unregister()
    assert seen() == before
    assert (
        "PeftMixedModel" not in vars(trainer_module)
        or before["transformers.trainer.PeftMixedModel"]
    )


def test_registering_twice_is_registering_once(afresh: None):
    before = seen()
    registration.register()
    after = seen()
    registration.register()
    assert seen() == after
    registration.unregister()
    assert seen() == before


def test_adapting_registers_unless_that_was_undone(afresh: None):
    model = get_peft_model(base(), config())
    assert not registration.is_registered()
    assert not trainer_utils._is_peft_model(model)
    registration.register()
    assert trainer_utils._is_peft_model(model)


def test_without_it_the_trainer_sees_no_adapters(afresh: None, tmp_path: Path):
    subject = trainer(get_peft_model(base(), config()), tmp_path)
    assert subject.label_names == []


def test_what_others_have_put_there_since_stays(afresh: None):
    registration.register()
    own = object()
    ours, trainer_utils.PeftModel = trainer_utils.PeftModel, own
    try:
        registration.unregister()
        assert trainer_utils.PeftModel is own
    finally:
        trainer_utils.PeftModel = ours[0]


def test_pefts_own_models_are_known_beside_ours():
    peft = pytest.importorskip("peft")
    ours = get_peft_model(base(), config())
    theirs = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"]))
    assert trainer_utils._is_peft_model(ours)
    assert trainer_utils._is_peft_model(theirs)
    assert not trainer_utils._is_peft_model(base())
    assert trainer_utils.unwrap_peft_model(ours) is ours.get_base_model()


def test_pefts_own_models_are_restored_by_the_trainer_itself(tmp_path: Path):
    peft = pytest.importorskip("peft")
    get_peft_model(base(), config())
    theirs = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"]))
    subject = trainer(theirs, tmp_path, load_best_model_at_end=True)
    subject.train()
    assert type(theirs).__module__.startswith("peft.")


def test_importing_multigraft_changes_nothing():
    assert run("""
        import sys
        import transformers.trainer as t, transformers.trainer_utils as u
        before = dict(vars(t)), dict(vars(u)), dict(vars(t.Trainer))
        import multigraft
        same = (dict(vars(t)), dict(vars(u)), dict(vars(t.Trainer))) == before
        print(same, WATCHED)
    """).split() == ["True", "False"]


@pytest.mark.parametrize("prologue", ["", WITHOUT_PEFT], ids=["peft", "no-peft"])
def test_a_trainer_that_is_imported_later_knows_as_well(prologue: str):
    code = """
        import sys, torch, multigraft
        from torch import nn
        kind = type("Net", (nn.Module,), {"forward": lambda self, x: self.lin(x)})
        net = kind(); net.lin = nn.Linear(4, 4)
        model = multigraft.get_peft_model(net, multigraft.LoraConfig(target_modules=["lin"]))
        early = "transformers" in sys.modules
        from transformers.trainer_utils import _is_peft_model
        import transformers.trainer as t
        spec = t.__spec__
        print(early, _is_peft_model(model), _is_peft_model(net), t.is_peft_available())
        print(WATCHED, "exec_module" in vars(spec.loader))
    """
    out = run(prologue + textwrap.dedent(code)).split()
    assert out == ["False", "True", "False", "True", "False", "False"]


def test_undoing_before_the_trainer_is_imported_leaves_no_trace():
    assert run("""
        import sys
        from multigraft.integrations import transformers as registration
        registration.register()
        waiting = WATCHED
        registration.unregister()
        from transformers import trainer
        print(waiting, WATCHED, "PeftMixedModel" in vars(trainer))
    """).split() == ["True", "False", "False"]


@pytest.mark.slow
def test_the_trainer_works_where_peft_is_not_installed():
    out = run(
        WITHOUT_PEFT
        + "import pytest\nfrom transformers.utils import is_peft_available\n"
        + "assert not is_peft_available()\n"
        + "assert not pytest.main(['-q', '-p', 'no:cacheprovider', "
        + "'tests/integrations/test_trainer.py'])\n"
    )
    assert " passed" in out
    assert "skipped" not in out


def test_the_base_carries_no_mark_once_the_adapters_are_gone():
    model = base()
    before = dict(vars(model))
    inject_adapter_in_model(config(), model)
    assert model._hf_peft_config_loaded
    model.delete_adapter("default")
    assert vars(model).keys() == before.keys()
    assert model._hf_peft_config_loaded is False
    multigraft.get_peft_model(model, config()).unload()
    assert vars(model).keys() == before.keys()
