"""PEFT's config beside an adapter's file: whose it is, and that what it says tells two adapters of one file apart."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flux2_mlx.convert.lora import read_adapter
from helpers.adapters import CONFIGS, D, changed, lora, save, save_for_demo
from helpers.cli_runner import PROMPT, done
from helpers.hub_client import using
from helpers.hub_server import HubServer
from helpers.remembered import save_remembering

from flux2_mlx.branches import AtWork
from flux2_mlx.cli import loras
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.hub import noted_listing, remove_empty, remove_files, snapshot_files
from flux2_mlx.images import read_settings
from flux2_mlx.store import adapter_hashes, adapters_with, find_adapter
from flux2_mlx.store.adapter_sources import adapter_files
from flux2_mlx.store.parts import Remote

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
PROJ = "double_blocks.0.img_attn.proj"
LORA = lora(f"diffusion_model.{PROJ}", D)
LAYER = f"transformer.{PROJ}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(path: Path, alpha: float, name: str = MODEL) -> Path:
    """An adapter in a folder with a config beside it."""
    save(path / name, LORA)
    (path / CONFIG).write_text(json.dumps({"r": 3, "lora_alpha": alpha}))
    return path / name


def at_work(path: Path) -> AtWork:
    return AtWork(read_adapter(path).load(CONFIGS, "x"))


def test_what_a_config_says_is_part_of_what_an_adapter_is(folder):
    plain = at_work(save(folder / "plain" / MODEL, LORA))
    weak, strong, neutral = (at_work(configured(folder / str(alpha), alpha)) for alpha in (4, 40, 3))
    assert {one.adapter.sha256 for one in (plain, weak, strong, neutral)} == {plain.adapter.sha256}
    assert len({plain.identity, weak.identity, strong.identity}) == 3
    assert plain.identity == neutral.identity == (plain.adapter.sha256, 1.0, None)
    assert at_work(configured(folder / "again", 40)).identity == strong.identity
    assert len(strong.adapter.config) == 16


@pytest.mark.parametrize("name", [MODEL, "pytorch_lora_weights.safetensors", "style.safetensors"])
def test_a_config_is_of_the_only_file_of_its_folder(folder, name):
    path = configured(folder / "a", 6, name)
    np.testing.assert_allclose(changed(path)[LAYER], 2 * changed(save(folder / "x.safetensors", LORA))[LAYER])


def test_a_config_beside_several_files_is_left_aside_and_that_is_said(folder):
    path = configured(folder / "a", 6, "style.safetensors")
    save(folder / "a" / "other.safetensors", LORA)
    found = read_adapter(path)
    said = f"{CONFIG} beside it is left aside, as it may be about another file of its folder"
    assert (found.config_hash, found.notes(CONFIGS, "small")) == (None, [said])
    main = read_adapter(configured(folder / "a", 6))
    assert main.config_hash
    assert not main.notes(CONFIGS, "small")


def test_a_file_of_peft_without_its_config_is_told(folder):
    said = f"there is no {CONFIG} beside it, which sets its strength; 1 is taken, as if alpha were the rank"
    path = save(folder / "a" / MODEL, LORA)
    link = folder / "x.safetensors"
    link.symlink_to(path)
    for bare in (path, link):
        found = read_adapter(bare)
        assert (*found.scales().values(), *found.notes(CONFIGS, "small")) == (1.0, said)
    alpha = {f"diffusion_model.{PROJ}.alpha": np.float32(6)}
    told = {"lora_adapter_metadata": '{"r": 3, "lora_alpha": 6}'}
    for tensors, metadata in ((LORA | alpha, None), (LORA, told)):
        found = read_adapter(save(folder / "b" / MODEL, tensors, metadata))
        assert (*found.scales().values(), *found.notes(CONFIGS, "small")) == (2.0,)


def test_a_link_has_the_config_that_its_target_has(folder):
    link = folder / "x.safetensors"
    link.symlink_to(configured(folder / "a", 6))
    assert read_adapter(link).scales() == {f"diffusion_model.{PROJ}": 2.0}
    (folder / CONFIG).write_text('{"r": 3, "lora_alpha": 12}')
    assert read_adapter(link).scales() == {f"diffusion_model.{PROJ}": 4.0}


def test_a_file_that_tells_its_strength_needs_no_config(folder):
    configured(folder, 6, "x.safetensors")
    save(folder / "x.safetensors", LORA, {"lora_alpha": "3"})
    found = read_adapter(folder / "x.safetensors")
    assert (found.scales(), found.notes(CONFIGS, "small")) == ({f"diffusion_model.{PROJ}": 1.0}, [])


def test_what_macos_notes_of_a_file_is_no_other_file(folder):
    path = configured(folder / "a", 6, "style.safetensors")
    path.with_name("._style.safetensors").write_bytes(b"Mac OS X")
    assert [*read_adapter(folder / "a").scales().values()] == [2.0]


@pytest.mark.parametrize(
    ("path", "names", "chosen"),
    [
        ("", ["x.safetensors", CONFIG], [CONFIG, "x.safetensors"]),
        (
            "a/x.safetensors",
            ["a/x.safetensors", "y.safetensors", CONFIG, f"a/{CONFIG}"],
            [f"a/{CONFIG}", "a/x.safetensors"],
        ),
        ("", [MODEL, "y.safetensors", CONFIG], [CONFIG, MODEL]),
    ],
)
def test_a_repo_gives_the_config_of_its_folder(path, names, chosen):
    assert adapter_files(Remote("me/a", path), names) == chosen


@pytest.fixture
def hub(folder):
    """A repo with a config of its only adapter, one of which it is not known, and one where it is PEFT's own."""
    data, config = save(folder / "made" / "x.safetensors", LORA).read_bytes(), b'{"r": 3, "lora_alpha": 6}'
    repos = {"me/one": {"x.safetensors": data, CONFIG: config}}
    repos["me/two"] = {"x.safetensors": data, "y.safetensors": data[:-4] + bytes(4), CONFIG: config}
    repos["me/peft"] = {"x.safetensors": data, MODEL: data[:-4] + bytes(4), CONFIG: config}
    repos["me/same"] = {"x.safetensors": data, MODEL: data, CONFIG: config}
    with HubServer(repos) as server, using(server, folder / "home"):
        yield server


REPOS = {"me/one": (2.0, False), "me/two:x.safetensors": (1.0, True), "me/peft:x.safetensors": (1.0, True)}


@pytest.mark.parametrize("source", REPOS)
def test_whose_a_config_is_stays_whatever_of_a_repo_is_here(hub, folder, source):
    found = find(source)
    assert found == REPOS[source]
    cached = snapshot(folder, "x.safetensors")
    assert [path.name for path in cached.parent.iterdir()].count(CONFIG) == 1
    assert find(source) == found
    with using(hub, folder / "home", offline=True):
        assert find(source) == find(str(cached)) == find(str(cached.parent)) == found
        assert (adapter_hashes(cached)[1] is None) is found[1]


def find(source: str) -> tuple[float, bool]:
    """The scale of an adapter, and whether a config is left aside, as both are told before and after it is fetched."""
    with find_adapter(source) as found:
        before = found.file.scales(), found.file.is_config_aside
        (scale,) = found.fetched().scales().values()
        assert before == (found.file.scales(), found.file.is_config_aside)
        return scale, found.file.is_config_aside


def snapshot(folder: Path, name: str) -> Path:
    (path,) = (path for path in (folder / "home").rglob(name) if "snapshots" in path.parts)
    return path


def test_a_cached_file_is_found_again_with_the_config_that_it_has(hub, folder):
    for source in ("me/same", "me/same:x.safetensors"):
        find(source)
    sha256 = read_adapter(snapshot(folder, MODEL)).sha256
    found = {path.name: adapter_hashes(path) for path in adapters_with(sha256, "x", [])}
    assert found.keys() == {MODEL, "x.safetensors"}
    assert (found["x.safetensors"][1], len(found[MODEL][1])) == (None, 16)


def test_a_config_that_others_have_not_fetched_is_asked_for(hub, folder):
    find("me/one")
    path = snapshot(folder, CONFIG)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"x.safetensors comes with {CONFIG}, which sets its strength and is not"):
        find(str(path.with_name("x.safetensors")))


def test_a_config_that_the_cache_lacks_is_fetched_or_missed(hub, folder):
    find("me/same")
    cached = snapshot(folder, MODEL)
    remove_files(cached.parents[2], [cached.with_name(CONFIG)])
    for note in (cached.parents[2] / "flux2-mlx").glob("*"):
        note.unlink()
    with using(hub, folder / "home", offline=True), find_adapter("me/same") as found:
        assert found.file.notes(CONFIGS, "small")[0].startswith(f"there is no {CONFIG} beside it")
    assert find("me/same") == (2.0, False)
    assert cached.with_name(CONFIG).is_file()


def test_listings_of_the_hubs_own_library_are_read(hub, folder):
    find("me/two:x.safetensors")
    cached = snapshot(folder, "x.safetensors")
    storage, commit = cached.parents[2], cached.parent.name
    (storage / "flux2-mlx").rename(storage / "trees")
    assert find(str(cached)) == (1.0, True)
    (storage / "trees" / f"{commit}.json").write_text("[]")
    assert noted_listing(storage, commit) is None
    assert find(str(cached)) == (2.0, False)  # nobody knows of another


def test_listings_go_with_what_they_are_of(hub, folder):
    find("me/one")
    storage = snapshot(folder, CONFIG).parents[2]
    remove_empty(storage)
    assert noted_listing(storage, snapshot(folder, CONFIG).parent.name)
    remove_files(storage, [*snapshot_files(storage)])
    remove_empty(storage)
    assert [path.name for path in storage.iterdir()] == ["refs"]


def told(path: Path) -> dict:
    found = read_adapter(path)
    said = {"name": "a", "source": path.name, "sha256": found.sha256, "scale": 0.5}
    return said | ({"config": found.config_hash} if found.config_hash else {})


def test_an_image_remembers_the_config(folder):
    file = save_for_demo(folder / "a" / MODEL)
    (folder / "a" / CONFIG).write_text('{"r": 3, "lora_alpha": 6}')
    small = ("-m", "demo", "-W", "16", "-H", "16", "-s", "1", "--seed", "7")
    done("t2i", PROMPT, *small, "-o", "a.png", "--lora", file)
    assert read_settings(Path("a.png"))["adapters"][0]["config"] == read_adapter(file).config_hash


def test_an_image_finds_the_weights_with_the_config_that_it_was_made_with(folder):
    image, models = folder / "x.png", folder / "models"
    own = configured(models / "loras" / "zebra", 4)
    wanted = told(own)
    configured(folder / "near", 40)
    shutil.copyfile(own, folder / MODEL)  # without a config
    (found,) = loras.remembered([wanted], image, models)
    assert (Path(found.source), found.scale) == (own, 0.5)
    (plain,) = loras.remembered([told(folder / MODEL)], image, models)
    assert Path(plain.source) == folder / MODEL
    (own.parent / CONFIG).unlink()
    with pytest.raises(InputError, match=rf"are in .*{MODEL}, but {image} was made with another {CONFIG}"):
        loras.remembered([wanted], image, models)
    configured(folder, 4)
    own.unlink()
    with pytest.raises(InputError, match=rf"was made with no {CONFIG} of effect beside them"):
        loras.remembered([told(save(folder / "plain" / MODEL, LORA))], image, models)


def test_weights_given_with_another_config_are_told(folder, caplog):
    wanted = told(configured(folder / "a", 4))
    given = configured(folder / "b", 40)
    (found,) = loras.remembered([wanted], folder / "x.png", None, [loras.Lora(str(given))])
    assert (found.source, found.scale) == (str(given), 0.5)
    said = f"{given} has another {CONFIG}, or none, than when {folder / 'x.png'} was made, so the new one will differ"
    assert caplog.messages == [said]
    caplog.clear()
    for source in (folder / "a" / MODEL, folder / "a"):
        (found,) = loras.remembered([wanted], folder / "x.png", None, [loras.Lora(str(source))])
        assert found.scale == 0.5
    assert not caplog.messages


def test_a_home_folder_of_nobody_is_told(folder):
    with pytest.raises(InputError, match="can't tell whose home folder"), find_adapter("~no-such-user/x.safetensors"):
        pass


def test_given_weights_are_paired_by_their_configs(folder, caplog):
    weak, strong = (configured(folder / str(alpha), alpha) for alpha in (4, 40))
    images = [told(weak) | {"scale": 0.9}, told(strong) | {"scale": -0.3}]
    for given in ((weak, strong), (strong, weak)):
        found = loras.remembered(images, folder / "x.png", None, [loras.Lora(str(path.parent)) for path in given])
        assert [(one.source, one.scale) for one in found] == [(str(weak.parent), 0.9), (str(strong.parent), -0.3)]
    assert not caplog.messages
    other = configured(folder / "6", 6)
    found = loras.remembered(images, folder / "x.png", None, [loras.Lora(str(path)) for path in (other, weak)])
    assert [one.source for one in found] == [str(weak), str(other)]
    assert len(caplog.messages) == 1


def test_an_image_of_another_config_is_no_image_of_this_one(folder, caplog):
    file = save_for_demo(folder / "a" / MODEL)
    small = ("t2i", PROMPT, "-m", "demo", "-W", "16", "-H", "16", "-s", "1", "--seed", "7", "-o", "a.png")
    done(*small, "--lora", file)
    done(*small, "--lora", file, "--skip-existing")
    assert "was made with another set of adapters" not in caplog.text
    settings = read_settings(Path("a.png"))
    settings["adapters"][0]["config"] = "0" * 16
    save_remembering("a.png", settings)
    done(*small, "--lora", file, "--skip-existing")
    assert "was made with another set of adapters" in caplog.text


def test_models_with_different_configs_folded_in_are_told_apart(folder):
    file = save_for_demo(folder / "a" / MODEL)
    sources = []
    for alpha in (3, 6):
        (folder / "a" / CONFIG).write_text(json.dumps({"r": 3, "lora_alpha": alpha}))
        done("convert", "demo", f"made-{alpha}", "--lora", file, "--quiet")
        sources.append(json.loads((folder / f"made-{alpha}" / "flux2.json").read_text())["source"])
    (plain,), (strong,) = (source["adapters"] for source in sources)
    assert plain == {"source": MODEL, "sha256": read_adapter(file).sha256, "scale": 1.0}
    assert strong == plain | {"config": read_adapter(file).config_hash}
    assert sources[0]["fingerprint"] != sources[1]["fingerprint"]


def test_a_config_that_is_left_aside_is_told_where_an_adapter_is_folded_in(folder, caplog):
    configured(folder / "a", 6, "other.safetensors")
    file = save_for_demo(folder / "a" / "style.safetensors")
    done("convert", "demo", "made", "--lora", file)
    assert f"style.safetensors: {CONFIG} beside it is left aside" in caplog.text
