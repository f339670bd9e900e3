"""What a first use prints, with a terminal and without, and what it leaves on the disk."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import VARIANT, WEIGHTS, edit_json
from helpers.cli_runner import Terminal, done, process, refusal
from helpers.hub_client import REPO, fetch_here, partial, storage, unreachable, using
from helpers.hub_server import HubServer

from flux2_mlx.cli.progress import Bars, size_text
from flux2_mlx.store.parts import WRITING

pytestmark = pytest.mark.usefixtures("models")
ARGUMENTS = ("download", REPO, "--variant", VARIANT)
PLAIN = """\
org/model is not converted yet:
  from       HUB/org/model
  licence    apache-2.0
  download   3.4 MB in 10 files, to HOME/hub/models--org--model
  converted  2.3 MB, to MODELS/org--model-bf16; later runs need only this
  stays      5.6 MB in all; --no-keep-source removes the 3.4 MB fetched now
downloading: 100% of 3.4 MB in TIME
converting: 100% of 5.6 MB in TIME
"""
RESUMED = """\
org/model is not converted yet:
  from       HUB/org/model
  licence    see that page
  download   3.4 MB in 10 files, 400.0 kB of it already there, to HOME/hub/models--org--model
  converted  2.3 MB, to MODELS/org--model-bf16; later runs need only this
  stays      2.3 MB in all, once the 3.4 MB fetched now are removed
downloading: 100% of 3.4 MB in TIME
converting: 100% of 5.6 MB in TIME
"""
BARS = """\
org/model is not converted yet:
  from       HUB/org/model
  licence    apache-2.0
  download   3.4 MB in 10 files, to HOME/hub/models--org--model
  converted  2.3 MB, to MODELS/org--model-bf16; later runs need only this
  stays      5.6 MB in all; --no-keep-source removes the 3.4 MB fetched now
downloading: 100%|BAR| 3.36M/3.36M [TIME<TIME, SPEED]
converting: 100%|BAR| 5.63M/5.63M [TIME<TIME, SPEED]
"""


@pytest.fixture
def hub(official):
    with HubServer({REPO: official}) as server:
        server.cards[REPO] = {"license": "apache-2.0"}
        yield server


def recorded(text, hub, home):
    """`text` with what differs from run to run replaced, and of each line what was there in the end."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    text = "\n".join(lines).replace(hub.url, "HUB").replace(str(home), "HOME")
    text = text.replace(str(home.parent / "models"), "MODELS")
    text = re.sub(r"\|[^|]*\|", "|BAR|", text)
    text = re.sub(r"\b\d+:\d\d\b", "TIME", text)
    return re.sub(r"[\d.]+[kMG]?B/s|\?B/s", "SPEED", text)


def test_without_a_terminal(hub, home):
    result = process(*ARGUMENTS, environment=hub.environment(home))
    assert result.returncode == 0
    assert recorded(result.stderr, hub, home) == PLAIN
    assert result.stdout == f"{home.parent}/models/org--model-bf16\n"


def test_gone_on_with_and_not_kept(hub, home, official):
    del hub.cards[REPO]
    (storage(home) / "blobs").mkdir(parents=True)
    data = (official / WEIGHTS["transformer"]).read_bytes()
    partial(hub, home, WEIGHTS["transformer"]).write_bytes(data[:400_000])
    result = process(*ARGUMENTS, "--no-keep-source", environment=hub.environment(home))
    assert recorded(result.stderr, hub, home) == RESUMED
    assert list(home.rglob("*")) == [home / "hub"]


def test_with_a_terminal(hub, home):
    command = [sys.executable, "-m", "flux2_mlx", *ARGUMENTS]
    environment = hub.environment(home)
    with (
        Terminal() as terminal,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=terminal.file) as running,
    ):
        terminal.started()
        shown = terminal.read_all()
    assert running.returncode == 0
    assert recorded(shown.decode(), hub, home) == BARS


def test_quiet(hub, home):
    result = process(*ARGUMENTS, "--quiet", environment=hub.environment(home))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", [("t2i", "red", "-W", "64", "-H", "64", "-s", "1"), ("convert",)])
def test_every_command_that_fetches_tells(command, hub, home):
    rest = ("-m", REPO) if command[0] == "t2i" else (REPO, "mine")
    with using(hub, home):
        shown = done(*command, *rest, "--variant", VARIANT, "--no-keep-source").stderr
    assert "org/model is not converted yet:\n  from " in shown
    assert ", once the 3.4 MB fetched now are removed\n" in shown
    assert not list(home.rglob("*.safetensors"))


@pytest.mark.parametrize("command", [("t2i", "a red fox", "-m"), ("download",), ("convert",)])
@pytest.mark.parametrize("source", ["klein-4b", "black-forest-labs/FLUX.2-klein-4B"])
def test_no_network(command, source, hub, home, models):
    nowhere = unreachable()
    target = ("mine",) if command == ("convert",) else ()
    with using(hub, home, endpoint=nowhere):
        message = refusal(*command, source, *target)
    assert message.startswith(f"cannot reach {nowhere} (")
    assert message.endswith("; check the connection, or give a folder")
    assert not models.exists()


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("flux2_mlx.cli.progress.time.monotonic", lambda: self.now)


def test_lines_come_now_and_then_with_speed_and_time_left(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Bars(False) as bars:
        for second in range(101):
            clock.now = float(second)
            bars.show("download", 2 * 10**9 + second * 10**8, 12 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "downloading: 25% of 12.0 GB, 100.0 MB/s, 1:30 left"
    assert lines[1] == "downloading: 33% of 12.0 GB, 100.0 MB/s, 1:20 left"
    assert lines[-1] == "downloading: 100% of 12.0 GB in 1:40"
    assert len(lines) == 10


def test_lines_of_steps(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Bars(False) as bars:
        for step in range(1, 5):
            clock.now += 6
            bars.show("denoising", step, 4)
        bars.show("decoding", 1, 1)
    assert capsys.readouterr().err.splitlines() == [
        "denoising: 75%, 3/4, 0:06 left",
        "denoising: 100%, 4/4",
        "decoding: 100%, 1/1",
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (10**6, "1.0 MB"), (113e9, "113.0 GB")]
)
def test_sizes(nbytes, text):
    assert size_text(int(nbytes)) == text


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_what_was_there_before_stays(hub, home):
    with using(hub, home):
        fetch_here(REPO, WRITING)
        before = names(home)
        result = done(*ARGUMENTS, "--no-keep-source")
    told = f"a download of {REPO} was there before and stays; `flux2-mlx models rm {REPO} --only source` removes it\n"
    assert result.stderr.endswith(told)
    assert names(home) == before
    assert any(name.endswith("text_encoder/model.safetensors") for name in before)


def test_a_download_that_nothing_is_made_of_stays(hub, home):
    """Fewer bits come from the converted model, and a model that is there is not made again."""
    with using(hub, home):
        done(*ARGUMENTS)
        before = names(home)
        for arguments in (("-q", "qint8"), ()):
            assert "was there before and stays" in done(*ARGUMENTS, *arguments, "--no-keep-source").stderr
            assert done(*ARGUMENTS, *arguments, "--no-keep-source", "--quiet").stderr == ""
    assert names(home) == before


def test_a_warning_names_the_file_in_the_cache_only(home, official, tmp_path, caplog):
    odd = Path(shutil.copytree(official, tmp_path / "odd"))
    edit_json(odd / "vae" / "config.json", lr_warmup="x")
    with HubServer({REPO: odd}) as server, using(server, home):
        done(*ARGUMENTS, "--no-keep-source")
    (told,) = (record.getMessage() for record in caplog.records if "lr_warmup" in record.getMessage())
    assert str(home) in told


def test_what_another_revision_refers_to_stays(hub, home, official, tmp_path):
    """Two commits of a repo that share all but one file: each conversion removes what no other snapshot has."""
    later = shutil.copytree(official, tmp_path / "later")
    (later / "tokenizer/merges.txt").write_text("a b")
    with using(hub, home):
        older = fetch_here(REPO)
    link = older / WEIGHTS["vae"]
    (older / WEIGHTS["transformer"]).resolve().unlink()  # which the later one will bring
    with HubServer({REPO: later}) as second, using(second, home):
        done(*ARGUMENTS, "--no-keep-source")
        assert (older / WEIGHTS["transformer"]).is_file()
        assert link.is_file()
        snapshot = storage(home) / "snapshots" / second.repos[REPO].commit
        assert not (snapshot / WEIGHTS["transformer"]).exists()
        assert not (snapshot / "tokenizer/merges.txt").exists()


def test_the_branch_goes_back_to_what_it_was(hub, home, official, tmp_path):
    later = shutil.copytree(official, tmp_path / "later")
    for path in [path for path in later.rglob("*") if path.suffix in (".json", ".safetensors", ".jinja")]:
        if path.suffix == ".json" and path.name != "tokenizer.json":
            path.write_bytes(path.read_bytes() + b"\n")
    with using(hub, home):
        older = fetch_here(REPO)
    with HubServer({REPO: later}) as second, using(second, home):
        done(*ARGUMENTS, "--no-keep-source")
    assert (storage(home) / "refs/main").read_text() == older.name
    with using(hub, home, offline=True):
        assert fetch_here(REPO) == older


def test_two_models_in_one_cache(official, home, tmp_path):
    with HubServer({REPO: official, "org/other": official}) as both, using(both, home):
        fetch_here("org/other")
        (home / "hub/models--org--model").mkdir()
        (home / "hub/models--org--model/mine.txt").write_text("precious")
        (home / "hub/datasets--a--b").mkdir()
        before = names(home)
        done(*ARGUMENTS, "--no-keep-source")
    assert names(home) == before
    assert (home / "hub/datasets--a--b").is_dir()


def test_what_another_process_has_fetched_meanwhile_stays(hub, home, monkeypatch):
    import flux2_mlx.hub

    real = flux2_mlx.hub.repo.download

    def raced(url, headers, blob, part, target, report):
        if target.name == hub.repos[REPO].etag(WEIGHTS["vae"]):
            target.write_bytes(hub.repos[REPO].files[WEIGHTS["vae"]])
        return real(url, headers, blob, part, target, report)

    monkeypatch.setattr(flux2_mlx.hub.repo, "download", raced)
    with using(hub, home):
        done(*ARGUMENTS, "--no-keep-source")
    assert [path.name for path in home.rglob("*.safetensors")] == [Path(WEIGHTS["vae"]).name]


def test_links_are_not_followed(hub, home, tmp_path):
    """A link in the place of a file of the snapshot leads to something that is not the cache's."""
    with using(hub, home):
        precious = tmp_path / "precious"
        done(*ARGUMENTS)
        snapshot = storage(home) / "snapshots" / hub.repos[REPO].commit
        (snapshot / "vae/config.json").unlink()
        precious.write_bytes(hub.repos[REPO].files["vae/config.json"])
        (snapshot / "vae/config.json").symlink_to(precious)
        shutil.rmtree(home.parent / "models")
        done(*ARGUMENTS, "--no-keep-source")
    assert precious.is_file()
    assert (snapshot / WEIGHTS["vae"]).is_file()
