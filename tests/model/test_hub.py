"""A model that the hub gives to some accounts only: one line that names HF_TOKEN, from the libraries' own errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from command_line import CommandLine

GATED, PRIVATE = "makers/gated", "makers/private"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: anybody may look up a gated model, but its files want a token."""

    def do_GET(self) -> None:
        """Answers a GET, and a HEAD as well."""
        looked_up = self.path.startswith(f"/api/models/{GATED}") and "tree" not in self.path
        body = json.dumps({"id": GATED, "gated": "manual", "siblings": []} if looked_up else {"error": "no"}).encode()
        self.send_response(200 if looked_up else 401)
        if not looked_up:
            self.send_header("X-Error-Code", "GatedRepo" if GATED in self.path else "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_words: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Returns the address of a hub on this machine, which the libraries then ask."""
    import huggingface_hub

    from peft_study.model.load import hub_options

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    hub_options.cache_clear()
    yield address
    server.shutdown()
    hub_options.cache_clear()


def refused(cli: CommandLine, model: str) -> str:
    return cli("finetune", "--model_name_or_path", model, "--dataset_name", "skills", "--use_lora").error()


def test_a_gated_model_names_the_token_and_the_page(
    cli: CommandLine, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused(cli, GATED)
    assert line == (
        f"error: {GATED}: is gated on the hub, and no HF_TOKEN is set; "
        f"accept its terms at {hub}/{GATED}, then set HF_TOKEN to your token"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    assert "the account of this HF_TOKEN has no access" in refused(cli, GATED)


def test_a_private_model_names_the_token(cli: CommandLine, hub: str) -> None:
    line = refused(cli, PRIVATE)
    assert "none on the hub that can be read without HF_TOKEN" in line
    assert "set HF_TOKEN" in line
