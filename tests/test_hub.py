"""Files from the hub, through huggingface_hub's own code: a local server and a cache on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from multigraft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from multigraft.errors import SourceError
from tests.hub_stand_in import StandIn, running, turn_to

pytest.importorskip("huggingface_hub")
CONFIG = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
X = torch.eye(4)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


def saved(folder: Path, name: str = "default", seed: int = 1) -> Tensor:
    """Writes an adapter, and gives what the model with it gives."""
    model = base()
    torch.manual_seed(seed)
    model = get_peft_model(model, CONFIG, name)
    model.save_pretrained(folder)
    return model(X).detach()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with running() as hub:
        turn_to(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "made"


def asked(hub: StandIn) -> list[str]:
    """The files that were downloaded since the last look."""
    found = [p.rpartition("/")[2] for verb, p in hub.requests if verb == "GET" and "/resolve/" in p]
    hub.requests.clear()
    return found


def test_an_adapter_comes_from_the_hub_as_from_its_folder(hub: StandIn, folder: Path):
    expected = saved(folder)
    hub.add("me/poems", folder)
    model = PeftModel.from_pretrained(base(), "me/poems")
    assert torch.equal(model(X), expected)
    assert asked(hub) == ["adapter_config.json", "adapter_model.safetensors"]
    assert any("multigraft" in agent for agent in hub.agents)
    second = get_peft_model(base(), CONFIG)
    second.load_adapter("me/poems", "second")
    second.set_adapter("second")
    assert torch.equal(second(X), expected)
    assert load_peft_weights("me/poems").keys() == load_peft_weights(folder).keys()
    assert asked(hub) == []


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: StandIn, folder: Path):
    first = saved(folder, seed=1)
    repository = hub.add("me/poems", folder)
    old = repository.refs["main"]
    second = saved(folder, seed=2)
    hub.add("me/poems", folder, "next")
    assert not torch.equal(first, second)
    for revision, expected in [("main", first), (old, first), ("next", second), (None, first)]:
        model = PeftModel.from_pretrained(base(), "me/poems", revision=revision)
        assert torch.equal(model(X), expected), revision


def test_config_and_weights_are_of_one_commit_though_the_branch_moves_on(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    first = saved(folder, seed=1)
    repository = hub.add("me/poems", folder)
    read = PeftConfig.from_dict

    def meanwhile(values: dict) -> PeftConfig:
        repository.commit({"adapter_model.safetensors": b"of another rank"})
        return read(values)

    monkeypatch.setattr(PeftConfig, "from_dict", meanwhile)
    assert torch.equal(PeftModel.from_pretrained(base(), "me/poems")(X), first)


def test_an_adapter_in_a_subfolder_is_named_or_found(hub: StandIn, folder: Path):
    expected = saved(folder, "dates")
    hub.add("me/many", folder)
    given = PeftModel.from_pretrained(base(), "me/many", subfolder="dates")
    named = PeftModel.from_pretrained(base(), "me/many", adapter_name="dates")
    alone = PeftModel.from_pretrained(base(), "me/many")
    for model in (given, named, alone):
        assert torch.equal(model(X), expected)
    saved(folder, "times")
    hub.add("me/many", folder)
    with pytest.raises(SourceError, match=r"There are some in dates, times \(pass subfolder=\)"):
        PeftModel.from_pretrained(base(), "me/many")


def test_what_is_in_the_cache_needs_no_network(hub: StandIn, folder: Path, monkeypatch):
    from huggingface_hub import constants

    expected = saved(folder, "dates")
    hub.add("me/poems", folder)
    PeftModel.from_pretrained(base(), "me/poems", adapter_name="dates")
    hub.requests.clear()
    model = PeftModel.from_pretrained(
        base(), "me/poems", adapter_name="dates", local_files_only=True
    )
    assert torch.equal(model(X), expected)
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = PeftModel.from_pretrained(base(), "me/poems", adapter_name="dates")
    assert torch.equal(offline(X), expected)
    assert hub.requests == []


def test_it_is_fetched_again_when_that_is_asked_for(hub: StandIn, folder: Path):
    saved(folder)
    hub.add("me/poems", folder)
    PeftModel.from_pretrained(base(), "me/poems")
    asked(hub)
    PeftModel.from_pretrained(base(), "me/poems", force_download=True)
    assert asked(hub) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_cache_of_ones_own(hub: StandIn, folder: Path, tmp_path: Path):
    saved(folder)
    hub.add("me/poems", folder)
    PeftModel.from_pretrained(base(), "me/poems", cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "models--me--poems" / "refs" / "main").is_file()
    assert not (tmp_path / "cache" / "models--me--poems").exists()


def test_a_cache_as_others_left_it_is_read(folder: Path, tmp_path: Path, monkeypatch):
    """Laid out by hand, as huggingface_hub documents it; there is no server."""
    with running() as gone:
        turn_to(gone, tmp_path / "cache", monkeypatch)
    expected = saved(folder)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--me--poems"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, name in enumerate(["adapter_config.json", "adapter_model.safetensors"]):
        blob = repository / "blobs" / f"{number:040}"
        blob.write_bytes((folder / name).read_bytes())
        (repository / "snapshots" / commit / name).symlink_to(f"../../blobs/{blob.name}")
    options = {"local_files_only": True}
    for revision in ("main", commit, None):
        model = PeftModel.from_pretrained(base(), "me/poems", revision=revision, **options)
        assert torch.equal(model(X), expected)
    snapshot = repository / "snapshots" / commit
    assert torch.equal(PeftModel.from_pretrained(base(), snapshot)(X), expected)


def test_a_snapshot_whose_blobs_all_repositories_share_is_read(folder: Path, tmp_path: Path):
    expected = saved(folder)
    repository = tmp_path / "cache" / "models--me--poems"
    snapshot = repository / "snapshots" / ("0" * 40)
    shared = tmp_path / "cache" / "blobs" / "ab"
    for path in (snapshot, repository / "blobs", shared):
        path.mkdir(parents=True)
    for name in ["adapter_config.json", "adapter_model.safetensors"]:
        (shared / name).write_bytes((folder / name).read_bytes())
        (repository / "blobs" / name).symlink_to(f"../../blobs/ab/{name}")
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert torch.equal(PeftModel.from_pretrained(base(), snapshot)(X), expected)


def test_a_repository_that_is_not_there_is_said_to_be_missing(hub: StandIn):
    with pytest.raises(SourceError, match=r"no local directory and no repository of this name"):
        PeftModel.from_pretrained(base(), "me/nowhere")
    with pytest.raises(ValueError, match=r"`me/nowhere`: the hub gives no adapter_config\.json"):
        PeftConfig.from_pretrained("me/nowhere")


def test_a_private_repository_opens_to_its_token(hub: StandIn, folder: Path):
    expected = saved(folder)
    hub.add("me/secret", folder).is_private = True
    with pytest.raises(SourceError, match="for a private one, log in"):
        PeftModel.from_pretrained(base(), "me/secret", token="hf_wrong")
    model = PeftModel.from_pretrained(base(), "me/secret", token=hub.token)
    assert torch.equal(model(X), expected)


def test_a_gated_repository_says_so(hub: StandIn, folder: Path):
    saved(folder)
    hub.add("me/gated", folder).is_gated = True
    with pytest.raises(SourceError, match=r"is gated\. Ask for access at its page"):
        PeftModel.from_pretrained(base(), "me/gated")


def test_an_unknown_revision_is_named(hub: StandIn, folder: Path):
    saved(folder)
    hub.add("me/poems", folder)
    with pytest.raises(SourceError, match=r"no `revision` \(='nxt'\).*a branch, a tag"):
        PeftModel.from_pretrained(base(), "me/poems", revision="nxt")


def test_a_file_that_the_repository_lacks_is_named(hub: StandIn, folder: Path):
    saved(folder)
    (folder / "adapter_model.safetensors").unlink()
    hub.add("me/empty", folder)
    with pytest.raises(SourceError, match=r"no adapter_model\.safetensors.*has no such file"):
        PeftModel.from_pretrained(base(), "me/empty")


def test_a_pickle_is_found_and_refused(hub: StandIn, folder: Path):
    saved(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    hub.add("me/old", folder)
    with pytest.raises(RuntimeError, match="is a pickle, which can run code"):
        PeftModel.from_pretrained(base(), "me/old")


def test_without_a_network_what_is_not_cached_is_said_to_be_so(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    saved(folder)
    hub.add("me/poems", folder)
    with pytest.raises(SourceError, match=r"not in the cache .*`local_files_only` \(=True\)"):
        PeftModel.from_pretrained(base(), "me/poems", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"not in the cache .*HF_HUB_OFFLINE is set"):
        PeftModel.from_pretrained(base(), "me/poems")
    assert hub.requests == []


def test_a_hub_out_of_reach_is_said_to_be_so(folder: Path, tmp_path: Path, monkeypatch):
    import huggingface_hub.file_download as downloading

    with running() as gone:
        turn_to(gone, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(downloading, "_DEFAULT_RETRY_ON_EXCEPTIONS", (), raising=False)
    with pytest.raises(SourceError, match=r"the hub cannot be reached\. Check the con") as caught:
        PeftModel.from_pretrained(base(), "me/poems", etag_timeout=0.1)
    assert caught.value.is_cut_off


def test_a_name_that_no_repository_can_have_is_refused_by_its_rule(hub: StandIn):
    with pytest.raises(SourceError, match=r"Required are a directory, or `owner/name`"):
        PeftConfig.from_pretrained("three/parts/here")
    assert hub.requests == []


def test_a_local_directory_is_never_asked_of_the_hub(hub: StandIn, folder: Path):
    saved(folder)
    PeftModel.from_pretrained(base(), folder, revision="main", token="hf_any")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"holds no adapter_model\.safetensors"):
        PeftModel.from_pretrained(base(), folder)
    assert hub.requests == []
