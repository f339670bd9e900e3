"""Seeded sets of odd listings and odd answers of a hub: success or one line, and nothing outside the repo's folder."""

import json
import random

import huggingface_hub
import pytest
from helpers.hub_client import NEEDED, SHARD, blob, fetch, files_in, listing, pointer, storage

from flux2_mlx.errors import DownloadError
from flux2_mlx.store.parts import WHOLE, WRITING

CONFIG = "vae/config.json"  # no LFS file
VALUES = (None, True, -1, 0, 5, 10**25, 1.5, "", "x", "../../x", "/x", "a" * 40, "a" * 64, [], {}, [None], "\x1b[0m\n")


def mutated(rng, value):
    """A copy of some JSON with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        action = rng.random()
        if action < 0.1:
            return {name: kept for name, kept in value.items() if name != key}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(rng, value[place]), *value[place + rng.randrange(2) :]]
    return rng.choice(VALUES)


def outcome(hub, home, **options):
    """Whether a fetch succeeds; if not, it says why on one short line."""
    try:
        fetch(hub, home, **options)
    except DownloadError as error:
        message = str(error)
    else:
        return "success"
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return "refused"


@pytest.fixture(autouse=True)
def one_client(monkeypatch):
    """A new one takes longer than a fetch: it reads all certificates."""
    monkeypatch.setattr(huggingface_hub, "close_session", lambda: None)
    yield
    monkeypatch.undo()
    huggingface_hub.close_session()


def test_a_hundred_odd_listings(hub, filled_home, canary):
    rng, right, kept = random.Random(10), listing(hub), files_in(canary)
    outcomes = []
    for _ in range(100):
        info = right
        for _ in range(rng.randrange(1, 4)):
            info = mutated(rng, info)
        text = json.dumps(info).encode()
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]
        hub.publish(text)
        outcomes.append(outcome(hub, filled_home, folders=WRITING if rng.random() < 0.3 else WHOLE))
        assert {path.name for path in filled_home.iterdir()} == {"hub"}
        assert {path.name for path in (filled_home / "hub").iterdir()} == {"models--org--model"}
    assert files_in(canary) == kept
    assert set(outcomes) == {"success", "refused"}


def odd_answer(rng, name, right):
    """A script that answers a GET for a file with something that may be wrong, and ends."""
    status = rng.choice([200] * 20 + [204, 206, 206, 301, 302, 304, 307, 400, 404, 410, 416, 418, 500, 503, 599])
    data = rng.choice(
        [*[right] * 6, right[:-1], right[: len(right) // 2], right + b"x", right * 50, b"", b"?" * len(right)]
    )
    length = rng.choice([len(data)] * 12 + ["", "", "-1", "x", 10**30, len(data) + 5, 0])
    fields = [f"Content-Length: {length}"] if length != "" else []
    fields += rng.sample(
        [
            "Content-Range: bytes 5-9/10",
            "Content-Range: bytes x",
            f"Content-Range: bytes 0-{len(data)}/*",
            "Content-Encoding: gzip",
            "Transfer-Encoding: chunked",
            "Location: /org/model",
            "Location: file:///etc/passwd",
            "Location: http://[::",
            "Location: //",
            "X-Error-Code: GatedRepo",
            "X-Error-Code: \x1b[2J",
            "X-Error-Message: " + "m" * 3000,
            "ETag: ../../x",
            "Set-Cookie: a=b",
            "no header",
        ],
        rng.randrange(3),
    )
    first = rng.choice([f"HTTP/1.1 {status} OK"] * 9 + ["HTTP/9.9 abc", "\0\0\0", "HTTP/1.0 200 OK"])
    text = "\r\n".join([first, *fields, "", ""]).encode() + data
    return lambda handler: handler.wfile.write(text)


def test_a_hundred_odd_answers(hub, filled_home, canary):
    rng, kept = random.Random(11), files_in(canary)
    outcomes = []
    for _ in range(100):
        name = rng.choice([CONFIG, SHARD, "tokenizer/tokenizer.json"])
        blob(hub, filled_home, name).unlink(missing_ok=True)
        hub.script(name, odd_answer(rng, name, NEEDED[name]))
        outcomes.append(outcome(hub, filled_home))
        if pointer(hub, filled_home, name).exists():
            assert pointer(hub, filled_home, name).read_bytes() == NEEDED[name]
        hub.heal()
        assert sum(map(len, files_in(storage(filled_home) / "blobs").values())) < 1_000_000
    assert files_in(canary) == kept
    assert files_in(fetch(hub, filled_home)) == NEEDED
    assert min(map(outcomes.count, ("success", "refused"))) > 5
