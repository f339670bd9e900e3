"""`models verify`: what it finds, what it says, and what `info` remembers of it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_runner import DEMO, done, refusal, run
from helpers.damage import edit, fill, remove, resize

from flux2_mlx import verification
from flux2_mlx.checkpoint import MANIFEST, Checkpoint
from flux2_mlx.errors import CheckpointError
from flux2_mlx.verification import Report, remembered, verify
from flux2_mlx.weights import read_header

WEIGHTS = "vae/model.safetensors"
TENSOR = "encoder.conv_in.weight"


@pytest.fixture
def folder(models: Path) -> Path:
    """A converted model in the models folder, to damage."""
    return Path(shutil.copytree(DEMO, models / "demo-bf16", ignore=shutil.ignore_patterns("__*", "*.png")))


@pytest.fixture
def old(folder: Path) -> Path:
    """The same as it was converted before hashes were recorded."""
    edit("flux2.json", files=None, sha256=None)(folder)
    (folder / "tensors.json").unlink()
    return folder


def set_value(folder: Path, tensor: str, bits: int, file: str = WEIGHTS) -> None:
    """Set the last value of a BF16 tensor."""
    end = struct.unpack("<Q", (folder / file).read_bytes()[:8])[0] + 8
    for name, info in read_header(folder / file).items():
        end += info.nbytes
        if name == tensor:
            with (folder / file).open("r+b") as stream:
                stream.seek(end - 2)
                stream.write(struct.pack("<H", bits))
            return
    raise KeyError(tensor)


def problems(folder: Path) -> list[tuple[str | None, str | None, str]]:
    return [tuple(problem) for problem in verify(folder).problems]


CHANGED, INFINITE = "is not what was converted", "has values that are not finite"
NEGATIVE = "has negative values, which a variance can't have"


def test_what_is_whole(folder):
    assert done("models", "verify", str(folder), "--quiet").stdout == f"{folder}: 12 files, all good\n"
    assert verify(folder) == Report(folder, [], True, True, verify(folder).files)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_values_that_are_not_finite(bits, folder, old):
    set_value(old, TENSOR, bits)
    assert problems(old) == [(WEIGHTS, TENSOR, INFINITE)]


def test_a_negative_variance(old):
    set_value(old, "bn.running_var", 0x8000)
    assert problems(old) == []  # it is minus zero
    set_value(old, "bn.running_var", 0xBF80)
    assert problems(old) == [(WEIGHTS, "bn.running_var", NEGATIVE)]


def test_any_other_bit_names_the_tensor(folder):
    before = (folder / WEIGHTS).stat()
    set_value(folder, TENSOR, 0x7F7F)
    set_value(folder, "bn.running_mean", 0x3F80)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sorted(problems(folder)) == [(WEIGHTS, "bn.running_mean", CHANGED), (WEIGHTS, TENSOR, CHANGED)]
    set_value(folder, TENSOR, 0x7FC0)
    assert (WEIGHTS, TENSOR, INFINITE) in problems(folder)


def test_every_flipped_byte_is_found(folder):
    """One byte anywhere in any file."""
    chance = np.random.default_rng(0)
    names = list(verify(folder).files)
    assert len(names) == 12
    for name in [*names, *chance.choice(names, 9)]:
        whole = (folder / name).read_bytes()
        data = bytearray(whole)
        data[chance.integers(len(data))] ^= 1 << int(chance.integers(8))
        (folder / name).write_bytes(data)
        found = verify(folder).problems
        assert name in [problem.file for problem in found] or (name == MANIFEST and MANIFEST in str(found))
        (folder / name).write_bytes(whole)
    assert verify(folder).problems == []


def test_every_changed_value_of_the_manifest_is_found(folder):
    path = folder / MANIFEST
    whole = json.loads(path.read_text())
    for key, value in whole.items():
        for other in (None, 3, value + value if isinstance(value, str | list) else {}):
            path.write_text(json.dumps(whole | {key: other}))
            assert verify(folder).problems, key
            if key != "format_version":
                with pytest.raises(CheckpointError, match=r"flux2\.json was changed after the conversion"):
                    Checkpoint.open(folder)
    path.write_text(json.dumps(dict(reversed(whole.items())), indent=7))  # another spelling of the same
    assert verify(folder).problems == []


def test_a_manifest_from_before_it_had_a_hash(folder):
    edit(MANIFEST, sha256=None)(folder)
    assert Checkpoint.open(folder).variant.name == "demo"
    assert not verify(folder).sealed
    assert done("models", "verify", str(folder), "--quiet").stdout.splitlines() == [
        f"{folder}: flux2.json has no hash of its own, so changes in it can't be told; convert the model again to have "
        "one",
        f"{folder}: 12 files, all good",
    ]
    assert json.loads(done("models", "verify", str(folder), "--json").stdout)["folders"][0]["manifest_hash"] is False


def exchange(folder: Path) -> None:
    """Let two tensors of the same size name each other's bytes: a header that nothing else finds wrong."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    a, b = header["bn.running_mean"], header["bn.running_var"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    encoded = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (folder / WEIGHTS).write_bytes(data[:8] + encoded + data[8 + length :])


def config(**changes: object) -> bytes:
    """The transformer's with these changes."""
    return json.dumps(json.loads((DEMO / "transformer/config.json").read_bytes()) | changes).encode()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (remove(WEIGHTS), f"{WEIGHTS}: is missing"),
    "missing tokenizer": (remove("tokenizer"), "tokenizer/tokenizer.json: is missing"),
    "changed config": (fill("transformer/config.json", config(rope_theta=1999)), f"transformer/config.json: {CHANGED}"),
    "changed template": (fill("tokenizer/chat_template.jinja", b"{{ x }}"), f"chat_template.jinja: {CHANGED}"),
    "one more file": (
        lambda folder: shutil.copy(folder / WEIGHTS, folder / "vae/model-2.safetensors"),
        "vae/model-2.safetensors: was not there after the conversion",
    ),
    "another file": (
        lambda folder: shutil.copy(folder / "transformer/model.safetensors", folder / WEIGHTS),
        "/vae is damaged, convert the model again: missing encoder.conv_in.weight",
    ),
    "cut short": (resize(WEIGHTS, -1), f"{WEIGHTS}: has 1990517 bytes where its header says 1990518"),
    "no header": (fill(WEIGHTS, b"x" * 99), f"{WEIGHTS}: is not a safetensors file"),
    "exchanged": (exchange, f"{WEIGHTS}: bn.running_mean {CHANGED}"),
    "a folder": (lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()], "Is a directory"),
    "a FIFO": (lambda f: [(f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)], "it is a named pipe; give a file"),
    "a link to nothing": (lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("x")], "No such file"),
    "hashes changed": (fill("tensors.json", b"{}"), f"tensors.json: {CHANGED}"),
    "hashes garbage": (fill("tensors.json", b'{"vae/model.safetensors": 7}'), f"tensors.json: {CHANGED}"),
    "manifest garbage": (fill("flux2.json", b"{"), "flux2.json is not JSON"),
    "record garbage": (edit("flux2.json", files=[1]), "flux2.json: is damaged: it does not say which files there are"),
    "record elsewhere": (edit("flux2.json", files={"../x": {"bytes": 1, "sha256": ""}}), "flux2.json: is damaged"),
    "record of nothing": (edit("flux2.json", files={WEIGHTS: {}}), "flux2.json: is damaged"),
    "record of the root": (edit("flux2.json", files={"/etc/passwd": {"bytes": 1, "sha256": ""}}), "is damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_and_named(case, folder):
    damage, expected = DAMAGES[case]
    damage(folder)
    result = run("models", "verify", str(folder), "--quiet")
    assert (result.exit_code, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert all(line.startswith(f"{folder}: ") for line in lines)
    assert len(lines) <= 4
    assert any(expected in line for line in lines), result.stdout
    assert "all good" not in result.stdout


def test_json(folder):
    set_value(folder, TENSOR, 0x7FC0)
    result = run("models", "verify", str(folder), "--quiet", "--json")
    assert result.exit_code == 1
    found = [{"file": WEIGHTS, "tensor": TENSOR, "problem": what} for what in (INFINITE, CHANGED)]
    row = {"folder": str(folder), "good": False, "hashes": True, "manifest_hash": True}
    row |= {"remembered": False, "problems": found}
    assert json.loads(result.stdout) == {"good": False, "folders": [row]}


def test_without_hashes_all_else_is_checked(old):
    lines = done("models", "verify", str(old), "--quiet").stdout.splitlines()
    assert lines == [
        f"{old}: no hashes were recorded, so other values can't be told; convert the model again to have them",
        f"{old}: 11 files, nothing bad found",
    ]
    assert verdict(old).endswith(", without hashes to compare with")
    remove("tokenizer")(old)
    result = run("models", "verify", str(old), "--quiet")
    assert result.exit_code == 1
    assert "is incomplete: there is no" in result.stdout


def test_memory_is_bounded_and_all_bytes_are_counted(folder, monkeypatch):
    monkeypatch.setattr(verification, "_CHUNK", 1000)
    set_value(folder, TENSOR, 0x7FC0)
    counts = []
    report = verify(folder, lambda *done: counts.append(done))
    assert [problem.tensor for problem in report.problems] == [TENSOR, TENSOR]
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "flux2.json")
    assert counts[-1] == (total, total)
    assert max(b[0] - a[0] for a, b in pairwise(counts)) <= 1000


def test_a_disk_that_can_not_be_read(folder, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verification, "_read_tensor", fails)
    assert {problem.what for problem in verify(folder).problems} == {"[Errno 5] Input/output error"}


def test_names(folder, models):
    other = Path(shutil.copytree(folder, models / "org--tune-bf16"))
    edit("flux2.json", variant="klein-9b", source={"name": "Org/Tune"})(other)
    damaged = Path(shutil.copytree(folder, models / "klein-4b-qint8"))
    fill("flux2.json", b"{")(damaged)

    def verified(*arguments: str) -> list[str]:
        result = json.loads(run("models", "verify", *arguments, "--json", "--quiet").stdout)
        return [Path(row["folder"]).name for row in result["folders"]]

    assert verified("demo-bf16") == ["demo-bf16"]
    assert verified(str(folder)) == ["demo-bf16"]
    assert verified("org--tune-bf16") == ["org--tune-bf16"]
    assert verified("org/tune") == ["org--tune-bf16"]
    for name in ("klein-9b", "black-forest-labs/FLUX.2-klein-9B"):  # what it was made from is another model
        assert "there is no converted model" in refusal("models", "verify", name)
    edit("flux2.json", variant="klein-9b", source={"name": "black-forest-labs/flux.2-Klein-9B"})(other)
    assert verified("klein-9b") == ["org--tune-bf16"]
    assert verified("klein-4b") == ["klein-4b-qint8"]
    assert verified("demo") == ["demo"]
    message = refusal("models", "verify", "dev")
    names = "demo, demo-bf16, klein-4b-qint8, org--tune-bf16"
    assert message == f"there is no converted model 'dev' in {models}; choose one of {names}, or a folder"
    assert refusal("models", "verify", "klein-4b", "--models-dir", "none").endswith(
        " 'klein-4b' in none; choose one of demo, or a folder"
    )
    assert refusal("models", "verify", "klein-4b-qint") == (
        "there is no model or folder 'klein-4b-qint'; did you mean klein-4b-qint8, klein-4b or klein-9b?"
    )
    Path("mine").mkdir()
    assert refusal("models", "verify", "mine").startswith("mine is no model folder in the diffusers layout: ")
    with pytest.raises(CheckpointError, match="is not an MLX checkpoint"):
        verify(Path("mine"))


def test_the_built_in_model_is_whole_and_stays_as_it_is():
    before = sorted(DEMO.rglob("*"))
    assert done("models", "verify", "demo", "--quiet").stdout == f"{DEMO}: 12 files, all good\n"
    assert sorted(DEMO.rglob("*")) == before


def verdict(folder: Path) -> str:
    (line,) = [x for x in done("info", str(folder)).stdout.splitlines() if x.startswith(f"{folder}: ")]
    return line.removeprefix(f"{folder}: ")


def test_info_tells_what_was_verified_and_has_changed_since(folder):
    assert verdict(folder) == "not verified"
    assert json.loads(done("info", str(folder), "--json").stdout)["verified"] == {str(folder): None}
    done("models", "verify", str(folder))
    assert verdict(folder).startswith("verified at 20")
    (values,) = json.loads(done("info", str(folder), "--json").stdout)["verified"].values()
    assert values == {"time": verdict(folder).removeprefix("verified at "), "changed": [], "hashed": True}
    set_value(folder, TENSOR, 0x7F7F)
    os.utime(folder / WEIGHTS, ns=(1, 1))
    shutil.copy(folder / WEIGHTS, folder / "vae/more.safetensors")
    changed = "vae/model.safetensors, vae/more.safetensors"
    assert verdict(folder) == f"changed since it was verified at {values['time']}: {changed}"
    assert run("models", "verify", str(folder)).exit_code == 1
    assert verdict(folder) == "not verified"  # what was found damaged is not remembered as good


def test_a_time_that_was_set_back_is_seen(folder):
    done("models", "verify", str(folder))
    before = (folder / WEIGHTS).stat()
    set_value(folder, TENSOR, 0x7F7F)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verdict(folder).startswith("changed since it was verified at 2")


@pytest.mark.parametrize("note", [b"", b"{}", b"[]", b'{"time": 3, "states": {}}', b'{"time": "today", "states": []}'])
def test_a_note_that_is_none(note, folder):
    (folder / "verified.json").write_bytes(note)
    assert remembered(folder) is None
    assert verdict(folder) == "not verified"


def test_a_folder_that_can_not_be_written_is_verified_all_the_same(folder, monkeypatch):
    def fails(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", fails)
    output = done("models", "verify", str(folder), "--quiet").stdout
    assert output == f"{folder}: 12 files, all good; this can't be noted in the folder\n"
    assert json.loads(done("models", "verify", str(folder), "--json").stdout)["folders"][0]["remembered"] is False
    assert not [path for path in folder.iterdir() if "verified" in path.name]


def test_names_from_files_do_not_reach_the_terminal_raw(folder):
    edit("flux2.json", files={"vae/\x1b[2J": {"bytes": 1, "sha256": ""}})(folder)
    result = run("models", "verify", str(folder), "--quiet")
    assert r"vae/\x1b[2J: is missing" in result.stdout
    assert "\x1b" not in result.stdout
