"""The hub: an adapter's files fetched into huggingface_hub's cache, and folders pushed.

huggingface_hub is imported when something is asked of the hub, and not before. What it refuses is
said in our words: which repository, what is wrong with it, and what to do.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multigraft.errors import MissingExtraError, SourceError

OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "repo_type",
    "endpoint",
    "etag_timeout",
    "headers",
    "local_dir",
    "user_agent",
)
"""What may be said about where a file comes from; the names are huggingface_hub's."""
CARD = "README.md"
NETWORK = frozenset({"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests"})
"""Packages whose errors tell of the hub or of the way there."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(repository: str, filename: str, subfolder: str = "", **options: Any) -> Path:
    """The local path of a repository's file; downloaded unless the cache has it.

    Args:
        options: those of `OPTIONS`.

    Raises:
        SourceError: there is no such repository, revision or file, or it cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = _library(f"`{repository}` is no local directory, and fetching it from the hub")
    given = {k: v for k, v in options.items() if k in OPTIONS and v is not None}
    try:
        path = hub.hf_hub_download(repository, filename, subfolder=subfolder or None, **_us(given))
    except Exception as error:  # of several libraries: the network's, the disk's, its own
        where = f"{subfolder}/{filename}" if subfolder else filename
        raise _refusal(error, repository, where, given) from error
    return Path(path)


def commit_of(path: Path) -> str | None:
    """The commit that a file of the hub's cache belongs to; None for any other file."""
    inside = next((p.name for p in path.parents if p.parent.name == "snapshots"), "")
    return inside if _COMMIT.fullmatch(inside) else None


def folders_with(repository: str, filename: str, options: Mapping[str, Any]) -> list[str]:
    """Subfolders of a repository that hold such a file; none where it cannot be listed."""
    hub = _library("listing a repository")
    if options.get("local_files_only"):
        return []
    try:
        api = hub.HfApi(endpoint=options.get("endpoint"), token=options.get("token"))
        names = api.list_repo_files(repository, revision=options.get("revision"))
    except Exception:  # it is asked to say more in an error, which must not become another one
        return []
    end = f"/{filename}"
    return sorted(name.removesuffix(end) for name in names if name.endswith(end))


def push(
    repository: str,
    fill: Callable[[Path], None],
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload what ``fill`` writes into an empty folder, as one commit; the repository is made.

    The repository's own card, if it has one, lies in the folder before.

    Args:
        repository: ``owner/name``, or a name alone for one's own.
        private: whether a repository that is made is private.
        revision: a branch, which is made as well.
        create_pr: propose the commit rather than make it.

    Returns:
        huggingface_hub's `CommitInfo`, a string: the commit's address.

    Raises:
        SourceError: the hub refuses, or cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = _library(f"pushing to `{repository}`")
    api = hub.HfApi(token=token, **_us({}))
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            _take_card(hub, name, Path(folder), token=token, revision=revision)
            fill(Path(folder))
            return api.create_commit(
                name,
                _additions(hub, Path(folder)),
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
    except Exception as error:
        reason = _why_not_pushed(error)
        if reason is None:  # of what fills the folder, and nothing that the hub said
            raise
        raise SourceError(f"`{repository}` cannot be pushed to: {reason.rstrip('.')}.") from error


class Pushable:
    """What can be pushed to the hub: mixed in by models and configs."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: Sequence[str] | str | None = None,
        **saving: Any,
    ) -> Any:
        """Upload the files of `save_pretrained` as one commit; the repository is made if need be.

        Args:
            repo_id: ``owner/name``, or a name alone for one's own.
            private: whether a repository that is made is private.
            token: who pushes; whoever is logged in by default.
            revision: a branch, which is made if need be.
            create_pr: propose the commit rather than make it.
            max_shard_size: has no effect: an adapter is one file.
            tags: further tags of the model card.
            saving: options of `save_pretrained`.

        Returns:
            huggingface_hub's `CommitInfo`, a string: the commit's address.

        Raises:
            SourceError: the hub refuses, or cannot be reached.
        """
        more = [tags] if isinstance(tags, str) else list(tags or ())
        return push(
            repo_id,
            lambda folder: self._fill(folder, more, saving),
            commit_message=commit_message or f"Upload {self._noun}",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    _noun = "model"

    def _fill(self, folder: Path, tags: list[str], saving: Mapping[str, Any]) -> None:
        """Write what is pushed."""
        raise NotImplementedError(f"{type(self).__name__} must define `_fill`")


def _library(need: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingExtraError(
            f"{need} needs huggingface_hub: pip install 'multigraft[train]'."
        ) from error
    return huggingface_hub


def _us(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, and who asks."""
    from multigraft import __version__

    return {"library_name": "multigraft", "library_version": __version__, **options}


def _take_card(hub: Any, repository: str, folder: Path, **where: Any) -> None:
    try:
        hub.hf_hub_download(repository, CARD, local_dir=folder, **where)
    except (hub.errors.EntryNotFoundError, hub.errors.RevisionNotFoundError):
        return  # it has none yet


def _refusal(
    error: Exception, repository: str, where: str, options: Mapping[str, Any]
) -> SourceError:
    """What huggingface_hub says of a file, in our words."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    say = next((_REASONS[kind] for kind in kinds if kind in _REASONS), None)
    reason = _first_line(error) if say is None else say(repository, where, options)
    found = SourceError(f"`{repository}`: the hub gives no {where}: {reason}")
    found.lacks_file = "EntryNotFoundError" in kinds
    found.is_cut_off = "LocalEntryNotFoundError" in kinds and not _is_offline(options)
    return found


def _is_offline(options: Mapping[str, Any]) -> bool:
    from huggingface_hub import constants

    return bool(options.get("local_files_only") or constants.HF_HUB_OFFLINE)


def _gated(repository: str, where: str, options: Mapping[str, Any]) -> str:
    return (
        "the repository is gated. Ask for access at its page, then log in with `hf auth login` or "
        "pass token=."
    )


def _unknown(repository: str, where: str, options: Mapping[str, Any]) -> str:
    return (
        "there is no local directory and no repository of this name that may be read. Check the "
        "spelling; for a private one, log in with `hf auth login` or pass token=."
    )


def _no_revision(repository: str, where: str, options: Mapping[str, Any]) -> str:
    revision = options.get("revision")
    return (
        f"the repository has no `revision` (={revision!r}). Give a branch, a tag or a whole "
        'commit hash; "main" is the default.'
    )


def _not_cached(repository: str, where: str, options: Mapping[str, Any]) -> str:
    from huggingface_hub import constants

    cache = options.get("cache_dir") or constants.HF_HUB_CACHE
    revision = options.get("revision") or "main"
    if options.get("local_files_only"):
        why = "`local_files_only` (=True) forbids fetching it. Leave it out, once"
    elif constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set. Unset it, once"
    else:
        why = "the hub cannot be reached. Check the connection"
    return f"`{revision}` of it is not in the cache ({cache}), and {why}."


def _no_file(repository: str, where: str, options: Mapping[str, Any]) -> str:
    inside = folders_with(repository, where.rpartition("/")[2], options)
    more = f" There are some in {', '.join(inside)} (pass subfolder=)." if inside else ""
    return f"the repository has no such file.{more}"


def _no_name(repository: str, where: str, options: Mapping[str, Any]) -> str:
    return (
        "there is no such local directory, and the hub has no repositories of such names. "
        "Required are a directory, or `owner/name`."
    )


_REASONS: dict[str, Callable[[str, str, Mapping[str, Any]], str]] = {
    "GatedRepoError": _gated,
    "RepositoryNotFoundError": _unknown,
    "RevisionNotFoundError": _no_revision,
    "LocalEntryNotFoundError": _not_cached,
    "EntryNotFoundError": _no_file,
    "HFValidationError": _no_name,
}
"""What is wrong, by huggingface_hub's class of error or the nearest of its bases."""


def _additions(hub: Any, folder: Path) -> list[Any]:
    """Every file of a folder as a commit takes it, less what fetching the card noted there."""
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
        for name, path in paths.items()
        if not name.startswith(".cache/")
    ]


def _why_not_pushed(error: Exception) -> str | None:
    """What the hub, its library or the network says; None for an error of anything else."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set. Unset it"
    if "HFValidationError" in kinds or "HfUriError" in kinds:
        return f"it is no name of a repository ({_first_line(error)})"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return f"{_first_line(error)}. Log in with `hf auth login`, or pass a token= that may write"
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    is_known = type(error) is ValueError or packages & NETWORK  # that: a card with wrong metadata
    return _first_line(error) if is_known else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__
