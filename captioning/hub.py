"""Exported models on the Hugging Face hub: `--model_path hf-hub:OWNER/NAME`, also `hf-hub:OWNER/NAME@REVISION`.

Only the four files of an exported folder are fetched, into the hub's cache on this machine (`HF_HOME`). The hub is
trusted with nothing: their sizes are limited, and `checkpoints.load_checkpoint` reads them as it reads anybody's.
"""

from __future__ import annotations

import re
from pathlib import Path

from captioning.checkpoints import LARGEST_JSON
from captioning.io import (
    EXPORTED_WEIGHTS,
    UserError,
    bars_off,
    first_line,
    format_bytes,
    install_command,
    log,
    sha256,
)

NAME = re.compile(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?", re.ASCII)
# By file, the most bytes that it may have. The weights come last: where they are, the download was complete.
LARGEST = {**dict.fromkeys(("config.json", "vocabulary.json", "split.json"), LARGEST_JSON), EXPORTED_WEIGHTS: 4 * 10**9}
OPTIONAL = {"split.json"}
SECONDS = 10  # to wait for the hub's answer


def fetch_model(name: str) -> Path:
    """Return the weights file of an exported model on the hub, with its other files beside it.

    Where the hub cannot be reached, the version that was fetched last is used; a commit's 40 digits as REVISION are
    looked up in the cache alone.

    Args:
        name: `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME@REVISION`; a revision is a branch, a tag or a commit.

    Raises:
        UserError: not such a name, huggingface_hub is not installed, there is no such model or revision, it is not an
            exported model, or the hub cannot be reached and the cache does not have it.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise UserError(f"--model_path {name}: expected hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION")
    repository, revision = found[1], found[2] or "main"
    try:
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError as error:
        raise UserError(f"--model_path {name}: huggingface_hub is not installed: {install_command('hub')}") from error
    if bars_off():
        disable_progress_bars()
    weights = cached(repository, revision) if re.fullmatch("[0-9a-f]{40}", revision) else None
    weights = weights or download(name, repository, revision)
    log.info(f"Model: {repository} on the hub, commit {weights.parent.name}, SHA-256 of its weights {sha256(weights)}")
    return weights


def cached(repository: str, revision: str) -> Path | None:
    """Return the weights in the cache, None where a revision was never fetched, or cannot be."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, EXPORTED_WEIGHTS, revision=revision)
    except errors.HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def download(name: str, repository: str, revision: str) -> Path:
    """Ask the hub which commit a revision is, and fetch what the cache lacks of it; return the weights."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        about = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=SECONDS)
    except Exception as error:  # of the network and the hub
        refused = advice(error)
        if not refused and (weights := cached(repository, revision)) is not None:
            log.warning(f"The hub gives no answer ({first_line(error)}): using what was fetched last")
            return weights
        refused = refused or (
            f"it cannot be had from the hub ({first_line(error)}), and the hub's cache here does not have it: rerun with a "
            "connection, or copy the model's folder from elsewhere and give its path"
        )
        raise UserError(f"--model_path {name}: {refused}") from error
    sizes = {file.rfilename: file.size or 0 for file in about.siblings or ()}
    if missing := [file for file in LARGEST if file not in sizes and file not in OPTIONAL]:
        raise UserError(f"--model_path {name}: not a model that --mode export wrote, it has no {', no '.join(missing)}")
    first, *others = files = [file for file in LARGEST if file in sizes]
    if large := [file for file in files if sizes[file] > LARGEST[file]]:
        sizes_text = f"{format_bytes(sizes[large[0]])}, more than {format_bytes(LARGEST[large[0]])}"
        raise UserError(f"--model_path {name}: not fetched, since its {large[0]} has {sizes_text}")
    if cached(repository, str(about.sha)) is None:
        log.info(f"Fetching {format_bytes(sum(sizes[file] for file in files))} from the hub")
    try:
        # By the revision, so that the cache keeps which commit it was; the others by that commit.
        folder = Path(hf_hub_download(repository, first, revision=revision)).parent
        if folder.name != about.sha:
            raise ValueError("it has changed in this moment")
        for file in others:
            hf_hub_download(repository, file, revision=folder.name)
    except Exception as error:  # of the network, the hub and the disk
        refused = advice(error) or f"could not be fetched ({first_line(error)}): rerun to go on"
        raise UserError(f"--model_path {name}: {refused}") from error
    return folder / EXPORTED_WEIGHTS


def advice(error: Exception) -> str:
    """Return what is wrong with a name, as the hub says; empty where the hub was not reached."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner decides who may have it: ask on its page on the hub, then `hf auth login`, and rerun"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private: check OWNER/NAME; for a private one `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model has no such branch, tag or commit: check what stands behind the @"
    if isinstance(error, errors.HFValidationError):
        return first_line(error)
    return ""
