"""Damage to JSON and to bytes, one random place at a time."""

import copy
import json
import random
from typing import Any

VALUES = (
    *(None, True, False, -1, 0, 1, 2, 5, 64, 10**9, 2**31, 2**63, 10**25, 10**400, 0.5, -1.5, 1e300),
    *("", "x", "a" * 5000, "../../x", "/dev/zero", "\x1b[2J\n", "\ud800", "demo", "qint4", "bf16", "BF16", "F32"),
    *([], {}, [None], [[]], [-1], {"a": 1}, [10**25] * 3, float("nan"), float("inf")),
)


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.08:
            return {name: kept for name, kept in value.items() if name != key}
        if action < 0.12:
            return value | {f"{key}_": value[key]}
        if action < 0.2:
            return value | {key: copy.deepcopy(value[rng.choice(list(value))])}
        return value | {key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(rng, value[place]), *value[place + rng.randrange(2) :]]
    if isinstance(value, int) and rng.random() < 0.4:
        return rng.choice([value + 1, value - 1, 2 * value, -value, str(value)])
    return rng.choice(VALUES)


def scrambled(rng: random.Random, data: bytes, first: int = 0) -> bytes:
    """Bytes with one place from `first` on changed, left out, or added to."""
    place = rng.randrange(first, len(data)) if len(data) > first else len(data)
    size = rng.choice([1, 1, 2, 8, 64, 1000])
    run = data[place : place + size]
    change = {
        "bit": bytes([run[0] ^ (1 << rng.randrange(8))]) + run[1:] if run else b"",
        "noise": rng.randbytes(len(run)),
        "zeros": bytes(len(run)),
        "ones": b"\xff" * len(run),
        "removed": b"",
        "doubled": run + run,
        "added": run + rng.randbytes(size),
        "exchanged": run[::-1],
    }
    name = rng.choice(list(change))
    return data[:place] + change[name] + data[place + size :]


def cut(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([data[: rng.randrange(len(data) + 1)], data + rng.randbytes(rng.choice([1, 8, 5000])), b""])


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON file with a value changed, or its bytes."""
    action = rng.random()
    if action < 0.75:
        value = json.loads(data)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            value = mutated(rng, value)
        return json.dumps(value).encode()
    if action < 0.95:
        return rng.choice([scrambled, cut])(rng, data)
    return rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"null", b"1" * 10_000, b"[]"])


def damaged_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header before the same payload, or another length of it."""
    length = int.from_bytes(data[:8], "little")
    header, payload = data[8 : 8 + length], data[8 + length :]
    action = rng.random()
    if action < 0.1:
        stated = rng.choice([0, length - 1, length + 1, len(data), 2**40, 2**63, 2**64 - 1])
        return stated.to_bytes(8, "little") + header + payload
    if action < 0.3:
        header = scrambled(rng, header)
    elif action < 0.4 and header.count(b"data_offsets") > 1:
        names = rng.sample([name for name in json.loads(header) if name != "__metadata__"], 2)
        values = json.loads(header)
        part = rng.choice(["data_offsets", "shape", "dtype"])
        values[names[0]][part], values[names[1]][part] = values[names[1]][part], values[names[0]][part]
        header = json.dumps(values).encode()
    else:
        header = damaged_json(rng, header)
    return len(header).to_bytes(8, "little") + header + payload
