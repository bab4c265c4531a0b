"""An OpenAI-compatible server over a saved folder: transformers' own, `transformers serve`.

/v1/completions and /v1/chat/completions. It needs fastapi, uvicorn and openai
(pip install "transformers[serving]"). The folder's code runs there (trust_remote_code), so only
folders whose code is our own tokenizer file are served.
"""
from __future__ import annotations

import contextlib
import importlib.util
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import tokenmonster_hf

from stentor.files import ParameterError
from stentor.process import own_environment, stop

NEEDED = ("fastapi", "uvicorn", "openai")


def serving_problems(folder) -> list[str]:
    """A sentence for each reason why a folder cannot be served safely here, else []."""
    folder, problems = Path(folder), []
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        problems.append(f"serving needs {', '.join(missing)}: pip install "
                        "\"transformers[serving]\".")
    if not (folder / "config.json").is_file():
        return [*problems, f"{folder} has no config.json: name a saved model folder."]
    ours = Path(tokenmonster_hf.__file__).read_bytes()
    strange = [path.name for path in sorted(folder.rglob("*.py"))
               if path.name != "tokenmonster_hf.py" or path.read_bytes() != ours]
    for file in ("config.json", "tokenizer_config.json"):
        path = folder / file
        code = json.loads(path.read_text()).get("auto_map") if path.is_file() else None
        # as our tokenizer's save_pretrained writes it; "repo--file.Class" would fetch another's code
        named = str(code).replace("'tokenmonster_hf.TokenMonsterTokenizer'", "")
        if code and ("--" in named or "." in named or file == "config.json"):
            strange.append(f"{file}'s auto_map")
    if strange:
        problems.append(f"{folder} brings code that is not this suite's tokenmonster_hf.py "
                        f"({strange[0]}), and a server would run it: save the folder again with "
                        "su.save_model_folder.")
    return problems


def serve_command(folder, port: int = 8000) -> list[str]:
    """`transformers serve` of one folder, for this machine alone (127.0.0.1).

    The folder stands in the command, so that no request can make the server load another.
    """
    code = ["--trust-remote-code"] if (Path(folder) / "tokenmonster_hf.py").exists() else []
    return [sys.executable, "-m", "transformers.cli.transformers", "serve",
            str(Path(folder).resolve()), *code, "--host", "127.0.0.1", "--port", str(port)]


def serving_commands(folder, port: int = 8000, gguf=None) -> dict[str, str]:
    """Shell commands of other servers with the same addresses, none of which was run here.

    vLLM and SGLang need a GPU. gguf: a file of 08 that is not fed ids, for llama.cpp; None: without.
    """
    path = shlex.quote(str(folder))
    commands = {"vLLM": f"vllm serve {path} --trust-remote-code --port {port}",
                "SGLang": "python -m sglang.launch_server --model-path "
                          f"{path} --trust-remote-code --port {port}"}
    if gguf:
        commands["llama.cpp"] = f"llama-server -m {shlex.quote(str(gguf))} --port {port}"
    return commands


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextlib.contextmanager
def serving(folder, port: int | None = None, patience: float = 180):
    """The base URL of a server over a folder, as long as the block lasts.

    patience: seconds it may take to start. Raises ParameterError with serving_problems, or with the
    last lines of a server that does not come up.
    """
    if problems := serving_problems(folder):
        raise ParameterError(problems)
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as cache:      # /v1/models lists the hub's cache, and fails
        env = own_environment(HF_HUB_OFFLINE="1", HF_HUB_CACHE=cache)      # where there is none
        log = open(Path(cache) / "server.log", "w+", encoding="utf-8")
        process = subprocess.Popen(serve_command(folder, port), env=env, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if not _is_up(process, url, patience):
                log.seek(0)
                said = " ".join(log.read().split())[-400:]
                raise ParameterError([f"the server of {folder} did not start within {patience:g} "
                                      f"s: {said}."])
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                stop(process, 10)
            log.close()


def _is_up(process, url: str, patience: float) -> bool:
    end = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    return False


def ask_server(url: str, path: str, **body) -> dict:
    """The JSON answer to a POST of `body` at url + path, such as "/v1/completions"."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())
