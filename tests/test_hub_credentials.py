"""Credentials in addresses and tokens: no message has them, and they stay on their host."""

import logging
import sys

import pytest
from helpers.hub_client import NEEDED, REPO, fetch, refusal
from helpers.hub_server import HubServer

CONFIG = "vae/config.json"  # no LFS file
SECRETS = ("s3cret", "hf_access", "hf_refused", "user:")


def without_secrets(message):
    assert not [secret for secret in SECRETS if secret in message], message
    return message


@pytest.mark.parametrize("event", ["unknown", "refused", "failing", "odd", "closed", "gated"])
def test_no_message_has_credentials(home, event, caplog):
    with HubServer({REPO: NEEDED}, gated=[REPO]) as hub:
        endpoint = hub.url.replace("://", "://user:s3cret@")
        options = {"endpoint": endpoint, "token": "hf_access"}
        if event == "unknown":
            options["repo"] = "org/modle"
        elif event == "refused":
            said = f"no: Bearer hf_access from {endpoint}/x?token=s3cret\r\n s3cret"
            hub.script("", lambda handler: handler.answer(403, {"X-Error-Message": said, "Content-Length": 0}, b""))
        elif event == "failing":
            hub.fail(500)
        elif event == "odd":
            hub.publish({"sha": f"{endpoint} hf_access Basic s3cret"})
        elif event == "closed":
            options["endpoint"] = "http://user:s3cret@127.0.0.1:1"
        message = without_secrets(refusal(hub, home, **options))
        assert "127.0.0.1" in message
        assert caplog.text == ""


def test_the_warning_before_the_cache_is_used_has_no_credentials(hub, filled_home, caplog):
    endpoint = "http://user:s3cret@127.0.0.1:1"
    fetch(hub, filled_home, endpoint=endpoint)
    assert "cannot reach http://127.0.0.1:1 (" in without_secrets(caplog.text)


@pytest.mark.parametrize(
    "endpoint", ["http://user:s3cret/x@host", "http://user:s3cret", "ftp://host", "host", "http://[s3cret", "http://"]
)
def test_an_endpoint_that_is_no_address(hub, home, endpoint):
    assert without_secrets(refusal(hub, home, endpoint=endpoint)).startswith("HF_ENDPOINT, or another variable")


def test_text_of_the_server_is_one_short_line(hub, home):
    said = "a  b" + "c" * 5000
    hub.script("", lambda handler: handler.answer(403, {"X-Error-Message": said, "Content-Length": 0}, b""))
    message = refusal(hub, home)
    assert "(HTTP 403: a bccc" in message
    assert len(message) < 500


def test_credentials_stay_on_the_host_that_they_are_for(hub, home):
    fetch(hub, home, endpoint=hub.url.replace("://", "://user:s3cret@"), token="hf_access")
    assert {request.token is None for request in hub.requests if request.host == "cdn"} == {True}
    hub.requests.clear()
    hub.script("", lambda handler: handler.answer(302, {"Location": hub.cdn + "/x", "Content-Length": 0}, b""))
    refusal(hub, home / "other", token="hf_access")
    assert [(request.host, request.token) for request in hub.requests] == [("hub", "hf_access"), ("cdn", None)]


@pytest.mark.parametrize("status", [503, 429])
def test_the_library_below_warns_of_nothing(hub, home, status, caplog, capsys):
    def act(handler):
        handler.answer(status, {"X-HF-Warning": "topic; message", "Content-Length": 0, "Retry-After": 100}, b"")

    hub.script(CONFIG, act)
    handlers = logging.getLogger("huggingface_hub").handlers
    before = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        assert f"answers HTTP {status}" in refusal(hub, home)
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            handler.setStream(stream)
    assert (capsys.readouterr().err, caplog.text) == ("", "")
    assert hub.fetched.count(CONFIG) == 5


@pytest.mark.parametrize("token", ["hf_s3cret\x0bx", "hf_s3cret é", "s3cret\x0cs3cret"])
def test_a_token_that_cannot_be_sent(hub, home, token):
    assert "\n" not in without_secrets(refusal(hub, home, token=token))
