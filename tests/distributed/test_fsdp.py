"""FSDP2: a sharded base trains, saves, merges and loads as a whole one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from multigraft import ConfigError, LoraConfig, PeftModel, get_peft_model
from multigraft.distributed import blocks_of, shard
from tests.distributed import fsdp_jobs as jobs
from tests.distributed.tiny import adapted, base, batch, loss_of
from tests.distributed.world import World

SWITCHED = [{"active": ["a"]}, {"active": ["b"]}, {"active": ["a", "b"]}, {"active": ["a"]}]
UNEVEN = [{"active": ["a", "b"], "rows": ["a", "a", "b", "__base__"]}] * 3


def assert_same(found: jobs.Result, expected: jobs.Result) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("how", "plan"),
    [
        ("before", SWITCHED),
        ("after", SWITCHED),
        ("after", UNEVEN),
        ("sharded", [{"active": ["a"]}] * 3),
        ("sharded", SWITCHED),
    ],
)
def test_a_sharded_base_trains_as_a_whole_one_does(
    two: World, tmp_path: Path, how: str, plan: list
) -> None:
    expected = jobs.alone(("a", "b"), plan, str(tmp_path / "alone"), torch.float32)
    for found, is_sharded in two.run(jobs.trained, how, ("a", "b"), plan, str(tmp_path / "two")):
        assert_same(found, expected)
        assert is_sharded == (how != "sharded")
    for name in ("a", "b"):
        files = [
            tmp_path / where / name / "adapter_model.safetensors" for where in ("alone", "two")
        ]
        whole, saved = (load_file(file) for file in files)
        assert saved.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-4, atol=1e-5)


CASES = [(method, how) for method in jobs.METHODS for how in ("before", "after")]


@pytest.mark.parametrize(("method", "how"), [c for c in CASES if c != ("head", "before")])
def test_every_kind_of_method_acts_on_a_sharded_base(two: World, method: str, how: str) -> None:
    expected = jobs.gradients(method, "alone")
    assert any(float(v.abs().max()) > 0 for k, v in expected.items() if k.startswith("gradient"))
    for found in two.run(jobs.gradients, method, how):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_a_base_that_transformers_sharded_takes_adapters(two: World, tmp_path: Path) -> None:
    whole = base(torch.float32)
    whole.save_pretrained(tmp_path)
    model = adapted(whole, "a", "b")
    loss = loss_of(model, batch(0))
    loss.backward()
    own = [p.grad for p in model.roster.parameters("a")]
    for is_in_parts, mean, gradients in two.run(jobs.of_transformers, str(tmp_path)):
        assert is_in_parts
        assert mean == pytest.approx(float(loss.detach()), rel=1e-5)
        torch.testing.assert_close(gradients, own, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_module_in_parts_is_refused(two: World) -> None:
    assert all("attach the adapter before" in text for text in two.run(jobs.copy_refused))


def test_what_ranks_saved_together_loads_in_one_process(two: World, tmp_path: Path) -> None:
    two.run(jobs.trained, "sharded", ("default",), [{"active": ["default"]}] * 2, str(tmp_path))
    alone = adapted(base(torch.float32))
    jobs.train(alone, alone, [{"active": ["default"]}] * 2, lambda rows: rows, lambda: None)
    loaded = PeftModel.from_pretrained(base(torch.float32), tmp_path)
    with torch.no_grad():
        expected, found = (m(input_ids=batch(0)).logits for m in (alone, loaded))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_mesh_of_two_dimensions_replicates_over_the_first(four: World, tmp_path: Path) -> None:
    plan = [{"active": ["a"]}, {"active": ["b"]}]
    expected = jobs.alone(("a", "b"), plan, str(tmp_path / "alone"), torch.float32)
    folder = str(tmp_path / "four")
    for found, _ in four.run(jobs.trained, "after", ("a", "b"), plan, folder, (2, 2)):
        assert_same(found, expected)


def test_whole_adapters_cost_one_all_reduce_however_many_there_are(two: World) -> None:
    for adapters in (1, 4):
        calls, sizes, adapter = two.run(jobs.collectives, "replicated", adapters)[0]
        assert calls == {"all_gather": 6, "all_reduce": 2}  # the second asks who has gradients
        assert sizes["all_reduce"] == adapter + 24
    base_alone = sizes["all_gather"]
    for adapters in (1, 4):
        calls, sizes, adapter = two.run(jobs.collectives, "sharded", adapters)[0]
        assert calls["reduce_scatter"] == 2  # one for each block
        assert sizes["all_gather"] == base_alone + 2 * adapters * adapter  # inactive ones too


def test_adapters_keep_float32_beside_a_bfloat16_base(two: World) -> None:
    alone = adapted(base(torch.bfloat16), "a")
    plan = [{"active": ["a"]}] * 2
    expected = jobs.train(alone, alone, plan, lambda rows: rows, lambda: None)
    for base_dtypes, own, losses in two.run(jobs.mixed_dtypes):
        assert base_dtypes == {"torch.bfloat16"}
        assert own == {"torch.float32"}
        assert losses == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("method", [None, "dora", "ia3", "oft", "loha", "pissa", "embeddings"])
def test_merging_into_a_sharded_base_and_out_again(two: World, method: str | None) -> None:
    for adapter, inside, outside, is_same in two.run(jobs.merged, method):
        assert adapter > 1e-4
        assert inside < min(1e-4, adapter / 20)
        assert outside == 0
        assert is_same


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = base(torch.float32, tie_word_embeddings=True)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    adapted(model).save_pretrained(folder / "adapter")
    return folder


def test_a_base_is_read_in_parts(two: World, checkpoint: Path) -> None:
    model = base(torch.float32, tie_word_embeddings=True)
    with torch.no_grad():
        expected = model(input_ids=batch(0)).logits
    total = sum(p.numel() for p in model.parameters())
    for logits, sizes, is_tied in two.run(jobs.loaded, str(checkpoint / "base"), False):
        torch.testing.assert_close(logits, expected)
        assert sum(sizes) == total / 2
        assert is_tied


def test_an_adapter_is_attached_to_a_base_that_was_read_in_parts(
    two: World, checkpoint: Path
) -> None:
    model = base(torch.float32, tie_word_embeddings=True)
    torch.manual_seed(0)
    peft = get_peft_model(model, jobs.lora(init_lora_weights=False))
    with torch.no_grad():
        expected = peft(input_ids=batch(0)).logits
    for logits, *_ in two.run(jobs.loaded, str(checkpoint / "base"), True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapters_file_loads_onto_a_base_that_was_read_in_parts(
    two: World, checkpoint: Path
) -> None:
    peft = PeftModel.from_pretrained(
        base(torch.float32, tie_word_embeddings=True), checkpoint / "adapter"
    )
    with torch.no_grad():
        expected = peft(input_ids=batch(0)).logits
    for logits, _ in two.run(jobs.attached_on_meta, str(checkpoint)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_another_model_is_refused(two: World, tmp_path: Path) -> None:
    base(torch.float32).save_pretrained(tmp_path)
    base(torch.float32, intermediate_size=64).config.save_pretrained(tmp_path)
    for message in two.run(jobs.refused, str(tmp_path)):
        assert "of another shape are `model.layers.0.mlp" in message
        assert "Nothing was changed" in message


def test_no_rank_holds_the_whole_base(two: World, tmp_path: Path) -> None:
    model = base(torch.float32, hidden_size=512, intermediate_size=4096, num_hidden_layers=12)
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    largest = max(two.run(jobs.memory, str(tmp_path)))
    assert size > 300e6
    assert largest < 0.75 * size


def test_blocks_are_found_with_and_without_transformers() -> None:
    model = base()
    assert blocks_of(model) == list(model.model.layers)
    plain = nn.Sequential(nn.Embedding(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    assert blocks_of(plain) == list(plain[1])
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert blocks_of(peft.get_base_model()) == list(model.model.layers)


def test_an_unknown_word_for_the_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match='must be "replicated" or "sharded"'):
        shard(base(), adapters="whole")
