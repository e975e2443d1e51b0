"""Where a checkpoint's files come from: a folder, a repository on the Hugging Face hub, or peers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Protocol

from compute.errors import CheckpointError, ModelNotFound
from net.errors import NetError, StorageError

HUB_ANSWER_S: Final = 4.0  # a hub that has not answered by then is taken for one that cannot be reached
_REFUSES_FOR_NOW: Final = frozenset({429, 500, 502, 503, 504})


class Source(Protocol):
    """Where a checkpoint's files come from."""

    @property
    def label(self) -> str:
        """What people call it: a folder's path, a repository's name."""

    @property
    def is_local(self) -> bool:
        """Whether ``find`` never fetches anything."""

    def find(self, name: str) -> Path | None:
        """The local path of a file that may not exist, fetched now if need be.

        Raises:
            CheckpointError: It cannot be found out.
        """


class FolderSource:
    """Files of one folder. A file may be a symbolic link, as in the cache of Hugging Face."""

    def __init__(self, folder: Path) -> None:
        """Take a folder that exists.

        Raises:
            CheckpointError: It does not.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
        self._folder = folder

    @property
    def label(self) -> str:
        """The folder's path."""
        return str(self._folder)

    @property
    def is_local(self) -> bool:
        """See :class:`Source`."""
        return True

    def find(self, name: str) -> Path | None:
        """See :class:`Source`."""
        path = self._folder / name
        return path if path.is_file() else None


class HubSource:
    """Files of a repository on the Hugging Face hub, each fetched on first need into the usual cache.

    The first file fixes the commit: a push between two files cannot mix two versions.
    """

    def __init__(self, repository: str, revision: str | None = None) -> None:
        """Name a repository and, if wanted, a branch, tag or commit."""
        self._repository = repository
        self._revision = revision
        self._found: dict[str, Path] = {}
        self._reachable: bool | None = None  # not known yet

    @property
    def label(self) -> str:
        """The repository's name."""
        return self._repository

    @property
    def is_local(self) -> bool:
        """See :class:`Source`."""
        return False

    def find(self, name: str) -> Path | None:
        """See :class:`Source`."""
        if name in self._found:
            return self._found[name]
        try:
            import huggingface_hub
            from huggingface_hub import errors
        except ImportError as exc:
            raise CheckpointError(
                f"{self._repository}: huggingface_hub is not installed; "
                "run 'pip install huggingface_hub', or give the folder of a checkpoint"
            ) from exc
        if self._reachable is None:
            self._reachable = self._ask(name)
        try:
            path = Path(
                huggingface_hub.hf_hub_download(
                    self._repository, name, revision=self._revision, local_files_only=not self._reachable
                )
            )
        except errors.LocalEntryNotFoundError as exc:  # a subclass of EntryNotFoundError that means "offline"
            raise CheckpointError(
                f"{self._repository}: {name} is not in the local cache and the hub cannot be reached; "
                "check the connection and HF_HUB_OFFLINE"
            ) from exc
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as exc:
            raise CheckpointError(
                f"{self._repository}: access is restricted; "
                "ask for it on huggingface.co and log in with 'hf auth login'"
            ) from exc
        except errors.RepositoryNotFoundError as exc:
            raise ModelNotFound(
                f"{self._repository}: no such model on the Hugging Face hub; check the name, or log in if it is private"
            ) from exc
        except errors.RevisionNotFoundError as exc:
            raise CheckpointError(
                f"{self._repository}: no revision {self._revision!r}; name a branch, tag or commit that exists"
            ) from exc
        except (OSError, errors.HFValidationError) as exc:  # OSError is the base of the hub's HTTP errors
            cause = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            raise CheckpointError(
                f"{self._repository}: {name} cannot be fetched ({cause[:160]}); "
                "check connection and disk, then try again"
            ) from exc
        if re.fullmatch(r"[0-9a-f]{40}", path.parent.name):  # .../snapshots/<commit>/<name>
            self._revision = path.parent.name
        self._found[name] = path
        return path

    def _ask(self, name: str) -> bool:
        """Whether the hub answers soon; what it says about the file does not matter here.

        Asked before the first download, because that one tries again for half a minute where nobody answers. In a
        thread, because looking up the hub's address has no time limit of its own.
        """
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

        answers: list[bool] = []

        def ask() -> None:
            try:
                url = hf_hub_url(self._repository, name, revision=self._revision)
                get_hf_file_metadata(url, timeout=HUB_ANSWER_S)
            except errors.HfHubHTTPError as error:
                answers.append(error.response.status_code not in _REFUSES_FOR_NOW)
            except errors.HFValidationError:
                answers.append(True)  # said again, as an error, by what comes next
            except Exception:  # noqa: BLE001  what the HTTP library calls "no answer" changes with its versions
                answers.append(False)
            else:
                answers.append(True)

        thread = threading.Thread(target=ask, name="raceme-hub", daemon=True)
        thread.start()
        thread.join(HUB_ANSWER_S)
        return answers == [True]


class PeerSource:
    """Files that peers hold, each fetched on first need. Not to be asked from an event loop, which would wait for
    itself.
    """

    def __init__(self, label: str, names: Collection[str], get: Callable[[str], Path]) -> None:
        """Name the files that there are.

        Args:
            label: What people call it.
            names: Of all files.
            get: Where one of them lies, fetched first if need be; raises ``NetError`` if it cannot be had.
        """
        self._label = label
        self._names = frozenset(names)
        self._get = get
        self._found: dict[str, Path] = {}

    @property
    def label(self) -> str:
        """See :class:`Source`."""
        return self._label

    @property
    def is_local(self) -> bool:
        """See :class:`Source`."""
        return False

    def find(self, name: str) -> Path | None:
        """See :class:`Source`."""
        if name in self._found or name not in self._names:
            return self._found.get(name)
        try:
            path = self._get(name)
        except StorageError as exc:
            raise CheckpointError(f"{self._label}: {exc}") from exc
        except NetError as exc:
            raise CheckpointError(f"{self._label}: {exc}; try again later, or get the whole checkpoint") from exc
        self._found[name] = path
        return path
