"""Pipeline stages: adapters follow their sites, and are saved as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multigraft import ConfigError, PeftModel, get_peft_model_state_dict
from multigraft.distributed import keep_stage
from tests.distributed import stage_jobs as jobs
from tests.distributed.plain import Net
from tests.distributed.tiny import adapted, base, batch
from tests.distributed.world import World


@pytest.mark.parametrize("is_early", [True, False], ids=["attached-before", "attached-after"])
def test_two_stages_train_as_the_whole_does_and_save_one_file(
    two: World, tmp_path: Path, is_early: bool
) -> None:
    names = ["default", "b"]
    began = adapted(base(torch.float32, num_hidden_layers=4), *names)
    began.save_pretrained(tmp_path / "saved-began")
    model, losses = jobs.alone(names)
    (_, first, layers), (found, last, others) = two.run(
        jobs.trained, names, str(tmp_path / "saved"), is_early
    )
    assert found == pytest.approx(losses, rel=1e-5)
    assert first == ["model.layers.2", "model.layers.3", "model.norm", "lm_head"]
    assert last == ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    assert layers == others == 2 * 7
    for name in names:
        expected = get_peft_model_state_dict(model, adapter_name=name)
        folder = tmp_path / "saved" / ("" if name == "default" else name)
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-4, atol=1e-5, msg=key)
    loaded = PeftModel.from_pretrained(base(torch.float32, num_hidden_layers=4), tmp_path / "saved")
    loaded.load_adapter(tmp_path / "saved" / "b", "b")
    loaded.set_adapter(names)
    with torch.no_grad():
        whole, again = (m(input_ids=batch(9)).logits for m in (model, loaded))
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)


def test_a_stage_is_read_from_files_without_the_others(two: World, tmp_path: Path) -> None:
    model = base(torch.float32, num_hidden_layers=4, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    peft = adapted(model)
    peft.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = peft(input_ids=batch(0)).logits
    *_, logits = two.run(jobs.from_files, str(tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_does_not_fit_a_stage_is_refused(two: World, tmp_path: Path) -> None:
    adapted(base(torch.float32, num_hidden_layers=4)).save_pretrained(tmp_path)
    assert all("of another shape" in message for message in two.run(jobs.refused, str(tmp_path)))


def test_stages_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`index` \(=2\) must be from 0 to 1"):
        keep_stage(Net(), 2, 2)
    with pytest.raises(ConfigError, match="has 2 blocks, too few"):
        keep_stage(Net(), 0, 3)


def test_every_module_is_in_one_stage() -> None:
    own = []
    for index in range(3):
        net = Net(blocks=5)
        absent = tuple(f"{path}." for path in keep_stage(net, index, 3))
        own.append({name for name, _ in net.named_parameters()})
        assert not any(name.startswith(absent) for name in own[-1])
    assert set.union(*own) == {name for name, _ in Net(blocks=5).named_parameters()}
    assert sum(map(len, own)) == len(set.union(*own))
