"""Publishing to the hub. Off unless called, a dry run unless told otherwise, private always, and no
folder in which a secret is found."""
from __future__ import annotations

import os
from pathlib import Path

from stentor.card.check import check_model_card
from stentor.card.facts import Facts
from stentor.files import ParameterError
from stentor.secrets import secret_kinds, secret_values

# What a model folder is made of.
UPLOADED = {".safetensors", ".json", ".md", ".txt", ".model", ".vocab", ".py", ".jinja", ".png",
            ".gguf", ".onnx", ".onnx_data", ".tflite"}           # the last four: of 08's exports


def publish(run_dir, repo_id: str, *, of: str = "final", dry_run: bool = True,
            allow: tuple[str, ...] = (), endpoint: str | None = None) -> list[str]:
    """Upload a model of this run (`of`: as in write_model_card) to the private hub repository
    `repo_id`; with dry_run only say what would be uploaded.

    Returns the lines to show: every file with its size, what is left out, what is wrong. The token
    comes from `find_token`. Raises ParameterError, before any upload, for a number in the card
    with no file (see check_model_card for `allow`), for anything that looks like a secret, for a
    missing token, and for a repository that is public already.
    """
    folder = Path(run_dir) / Facts(run_dir, of).model
    files, left_out = upload_plan(folder)
    token = find_token()
    problems = [f"the model card: {problem}"
                for problem in check_model_card(run_dir, of=of, allow=allow)]
    problems += [f"a secret would be uploaded: {found}."
                 for found in find_secrets(files, (token,) if token else ())]
    total = sum(path.stat().st_size for path in files)
    lines = [f"{'would be uploaded' if dry_run else 'uploading'} to {repo_id} (private): "
             f"{len(files)} files, {total:,} bytes"]
    lines += [f"  {path.relative_to(folder).as_posix()}  {path.stat().st_size:,}" for path in files]
    lines += [f"  left out: {name}" for name in left_out]
    if dry_run:
        wrong = [f"wrong: {problem}" for problem in problems]
        return [*lines, *wrong, "nothing was uploaded: a dry run"]
    if not token:
        problems.append("there is no token: add HF_TOKEN to Kaggle's secrets or to the "
                        "environment.")
    if problems:
        raise ParameterError(problems)
    return [*lines, f"done: {upload(folder, files, repo_id, token, endpoint)}"]


def upload(folder: Path, files: list[Path], repo_id: str, token: str, endpoint: str | None) -> str:
    """Upload these files of the folder to a private repository; the commit's address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    api = HfApi(token=token, endpoint=endpoint)
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        private = api.repo_info(repo_id).private
        if private:
            added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path)
                     for path in files]
            commit = api.create_commit(
                repo_id, added, commit_message="Model and card, uploaded by stentor.publish")
    except Exception as error:        # huggingface_hub's own, and those of its HTTP library
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ParameterError([
            f"{repo_id} could not be uploaded ({reason}); check that internet is on (Kaggle: "
            "Settings, Internet), that the token may write, and HF_HUB_OFFLINE."]) from error
    if not private:
        raise ParameterError([f"{repo_id} exists and is public: upload to a private one, look at "
                              "it, then make it public."])
    return commit.commit_url


def upload_plan(folder) -> tuple[list[Path], list[str]]:
    """(files to upload, what is left out and why): plain visible files of the kinds that a model
    folder is made of."""
    folder, files, left_out = Path(folder), [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            left_out.append(f"{name}: a link")
        elif path.is_file():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if hidden or path.suffix not in UPLOADED:
                left_out.append(f"{name}: " + ("hidden" if hidden else "no part of a model folder"))
            else:
                files.append(path)
    return files, left_out


def find_secrets(files, values: tuple[str, ...] = ()) -> list[str]:
    """"<file>: <kind of secret>" for everything in `files` that looks like a secret or holds one
    of `values`.

    Bytes are searched, weights included. Also looked for: `secret_values` of the environment. No
    value is ever returned.
    """
    known = {"the token itself": values}
    for name, value in secret_values().items():
        if len(value) >= 12:
            known[f"the value of ${name}"] = (value,)
    found = []
    for path in files:
        content = Path(path).read_bytes()
        found += [f"{path.name}: {kind}" for kind in secret_kinds(content)]
        found += [f"{path.name}: {kind}" for kind, texts in known.items()
                  if any(text.encode() in content for text in texts)]
    return found


def find_token() -> str | None:
    """The hub token from Kaggle's secrets (label HF_TOKEN) or the environment variable HF_TOKEN;
    None without either."""
    try:
        from kaggle_secrets import UserSecretsClient
        return UserSecretsClient().get_secret("HF_TOKEN")
    except Exception:                                 # not on Kaggle, or no such secret: many kinds
        return os.environ.get("HF_TOKEN") or None
