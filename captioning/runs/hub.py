"""Exported models on the Hugging Face hub: `--model_path hf-hub:OWNER/NAME`, also `hf-hub:OWNER/NAME@REVISION`.

Only an exported folder's files are fetched, within limits of size; `load_checkpoint` reads them as anybody's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from captioning.io import EXPORTED_WEIGHTS, UserError, first_line, format_bytes, install_command, log, sha256
from captioning.runs.forms import GRAPHS, LARGEST_GRAPH, LARGEST_JSON

NAME = re.compile(r"hf-hub:(?!.*(?:--|\.\.))([\w.-]+/[\w.-]+)(?:@([\w.-]+))?", re.ASCII)
# The most bytes that each file may have.
LARGEST = {**dict.fromkeys(("config.json", "vocabulary.json", "split.json"), LARGEST_JSON), EXPORTED_WEIGHTS: 4 * 10**9}
LARGEST |= dict.fromkeys(GRAPHS, LARGEST_GRAPH)
ADVICE = {  # by huggingface_hub's errors
    "GatedRepoError": "its owner decides who may have it: ask on its page on the hub, then `hf auth login`, and rerun",
    "RepositoryNotFoundError": "the hub has no such model, or it is private: check OWNER/NAME, or `hf auth login`",
    "RevisionNotFoundError": "the model has no such branch, tag or commit: check what stands behind the @",
}


def fetch_model(name: str) -> Path:
    """Return the weights file of an exported model on the hub, with its other files beside it.

    Raises UserError: not such a name, no huggingface_hub, no such model or revision, not exported, or not to be had.
    """
    if (found := NAME.fullmatch(name)) is None:
        raise UserError(f"--model_path {name}: expected hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION")
    try:
        from huggingface_hub import errors, snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError as error:
        raise UserError(f"--model_path {name}: huggingface_hub is not installed: {install_command('hub')}") from error
    disable_progress_bars()  # an exported model is small, and the dry run would have a bar too
    wanted: dict[str, Any] = {"repo_id": found[1], "revision": found[2] or "main", "allow_patterns": [*LARGEST]}
    problem: Any = None
    try:
        files = snapshot_download(**wanted, dry_run=True)
    except Exception as error:  # of the network and the hub
        problem = error.__cause__ if isinstance(error, errors.DryRunError) else error
        log.warning("The hub does not give it: looking for what was fetched last")
    else:
        sizes = {file.filename: file.file_size or 0 for file in files}
        wrong = [f"it has no {file}" for file in LARGEST if file not in sizes and file != "split.json"]
        wrong += [f"its {file} has {format_bytes(size)}" for file, size in sizes.items() if size > LARGEST[file]]
        if wrong:
            raise UserError(f"--model_path {name}: not a model that --mode export wrote, {', '.join(wrong)}")
        if any(file.will_download for file in files):
            log.info(f"Fetching {format_bytes(sum(sizes.values()))} from the hub")
    try:
        model = Path(snapshot_download(**wanted, local_files_only=problem is not None)) / EXPORTED_WEIGHTS
        log.info(f"Model: {found[1]} on the hub, commit {model.parent.name}, SHA-256 of its weights {sha256(model)}")
    except Exception as error:  # of the network, the hub and the disk
        cause = problem or error
        advice = ADVICE.get(type(cause).__name__, "rerun with a connection, or copy the model's folder here")
        raise UserError(f"--model_path {name}: not to be had ({first_line(cause)}): {advice}") from error
    return model
