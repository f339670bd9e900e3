"""What a download, a conversion or a run has in use stays on the disk until it is done."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.checkpoints import VARIANT, convert
from helpers.cli_runner import done, error_line, run
from helpers.hub_client import REPO, fetch_here, storage, using
from helpers.hub_server import HubServer

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import InputError
from flux2_mlx.files import Claim
from flux2_mlx.store import convert_model, find_checkpoint

pytestmark = pytest.mark.usefixtures("models")
IN_USE = "{} is in use by a download, conversion or run; try again later"


@pytest.fixture
def hub(official, home):
    with HubServer({REPO: official}) as server, using(server, home):
        yield server


def removal(*names: str) -> str:
    """The one line of a `models rm` that must fail."""
    result = run("models", "rm", *names, "--leftovers", "--yes", "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    return error_line(result.stderr)


def test_a_source_stays_while_it_is_fetched_and_converted(hub, home, models):
    messages = {}

    def ask(done: int, total: int, phase: str) -> None:
        if phase not in messages:
            messages[phase] = removal(REPO)

    folder = find_checkpoint(REPO, variant=VARIANT, progress=ask)
    assert messages == dict.fromkeys(("download", "convert"), IN_USE.format(storage(home)))
    Checkpoint.open(folder)
    done("models", "rm", REPO, "--yes")
    assert not folder.exists()
    assert not storage(home).exists()


def test_so_do_its_small_files(hub, home, models):
    fetch_here(REPO, check=lambda outline, download: (removal(REPO), download)[1])


def test_nothing_is_removed_where_one_thing_is_in_use(hub, home, models):
    folder = find_checkpoint(REPO, variant=VARIANT)
    with Claim(storage(home)):
        assert removal(REPO) == IN_USE.format(storage(home))
    assert folder.exists()


def test_a_cached_folder_stays_while_it_is_converted(hub, home, models, tmp_path, monkeypatch):
    snapshot = fetch_here(REPO)
    asked = []
    monkeypatch.chdir(snapshot)
    convert_model("./", tmp_path / "mine", variant=VARIANT, progress=lambda *_: asked or asked.append(removal(REPO)))
    assert asked == [IN_USE.format(storage(home))]


def test_a_checkpoint_stays_while_it_is_converted(official, models, hub):
    models.mkdir(exist_ok=True)
    base, asked = convert(official, models / "base"), []
    convert_model(base, models / "less", quant="qint8", progress=lambda *_: asked or asked.append(removal("base")))
    assert asked == [IN_USE.format(base)]


def test_a_checkpoint_stays_while_a_pipeline_has_it(official, models, hub):
    models.mkdir(exist_ok=True)
    base = convert(official, models / "base")
    pipe = Flux2Pipeline.from_pretrained(base)
    assert removal("base") == IN_USE.format(base)
    del pipe
    done("models", "rm", "base", "--yes")
    assert not base.exists()


def test_a_download_that_another_uses_is_kept(hub, home, models, caplog):
    claims = []
    find_checkpoint(
        REPO, variant=VARIANT, keep_source=False, announce=lambda use: claims.append(Claim(use.downloads[0].storage))
    )
    assert caplog.messages == [f"the download stays: {IN_USE.format(storage(home))}"]
    assert len(list(storage(home).rglob("*.safetensors"))) == 3


def test_a_claim_ends_with_its_process(tmp_path):
    code = "import sys; from pathlib import Path; from flux2_mlx.files import Claim\n"
    code += "claim = Claim(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError):
            Claim(tmp_path, alone=True)
        process.kill()
    Claim(tmp_path, alone=True).close()


def test_who_waited_for_a_removal_gets_a_new_folder(tmp_path):
    folder = tmp_path / "folder"
    with ThreadPoolExecutor() as threads, Claim(folder, make=True) as first:
        first.close()
        with Claim(folder, alone=True):
            waiting = threads.submit(Claim, folder, make=True)
            folder.rmdir()
        with waiting.result(60):
            assert folder.is_dir()
            with pytest.raises(InputError):
                Claim(folder, alone=True)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Claim(Path(tmp_path / "none"))
