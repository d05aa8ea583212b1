"""The same model everywhere: after every hop from a folder to a run, its checkpoint, its export and the next run; and
no other model under a run that goes on."""

import dataclasses
import json
import os
import shutil

import pytest
from oracles import torch_models
from tiny_runs import ROOT, run, tiny

from exprl_jax.config import Execution, Model
from exprl_jax.data.tokenizer import Message, load_tokenizer
from exprl_jax.kinds import KINDS
from exprl_jax.resolve import to_dict
from exprl_jax.run.workdir import Workdir
from exprl_jax.weights import run_models
from exprl_jax.weights.families import FAMILIES
from exprl_jax.weights.language_model import open_model, pin_checkpoints
from exprl_jax.weights.run_models import check_models, fingerprint, record_models

EXECUTION = Execution(scan_layers=False, compute_dtype="float32", remat="none", kv_dtype="compute")
CHAT = [Message("system", "Be brief."), Message("user", "1+1?"), Message("assistant", "2"), Message("user", "2+2?")]
ENDS = [258, 257, 256]  # the third is the padding too, as in Qwen
TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model_folder(folder, kind, monkeypatch=None):
    """A tiny model of a family whose tokenizer is the bytes, which ends at three ids and tells the date."""
    sizes = {"vocab_size": 261, "max_position_embeddings": 4096}
    shape = torch_models.FAMILIES[kind][1] | sizes
    torch_models.FAMILIES["wide"] = (torch_models.FAMILIES[kind][0], shape)
    try:
        torch_models.save(torch_models.tiny_model("wide"), folder)
    finally:
        del torch_models.FAMILIES["wide"]
    load_tokenizer("byte").save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS, "temperature": 0.6}))
    return folder


def model(weights, date="2025-02-03"):
    return Model(str(weights), EXECUTION, "float32", date)


def sampling(weights):
    """Whatever decides how a model is sampled from."""
    opened = open_model(model(weights))
    t = opened.tokenizer
    added = t._library.added_tokens_decoder
    special = {index: (token.content, token.special) for index, token in added.items()}
    chat, split = t.render(CHAT), t.render_split([Message("user", "a @X@ b")], "@X@", "Score: ")
    split = (split.head, split.suffix)
    return opened.arch, t.eos_ids, t.pad_id, t.bos_id, t.token_bytes, special, chat, split, t._generation["temperature"]


def workdir(path):
    path.mkdir(exist_ok=True)
    return Workdir(path, resumed=False)


@pytest.mark.parametrize("kind", sorted({family: name for name, (family, _) in torch_models.FAMILIES.items()}.values()))
def test_a_description_samples_as_its_model_does_in_every_family(kind, tmp_path):
    """From folder to model/ and on from there; an export is written by the same function."""
    assert {family for family, _ in torch_models.FAMILIES.values()} == set(FAMILIES)
    hops = [model_folder(tmp_path / "hub", kind)]
    first = sampling(hops[0])
    assert first[1] == (257, 258, 256) and b"03 Feb 2025" in b"".join(first[4][i] for i in first[6])
    for hop in range(2):
        opened = open_model(model(hops[-1]))
        folder = workdir(tmp_path / f"hop{hop}")
        record_models(folder, policy=opened, models=[opened])
        shutil.copyfile(hops[0] / "model.safetensors", folder.model / "model.safetensors")
        hops.append(folder.model)
        assert sampling(folder.model) == first


def test_sampling_is_the_same_after_every_hop(tmp_path):
    """Folder, its weights new ones → run → its checkpoint → a run from that → its export → a run from that."""
    hub = model_folder(tmp_path / "hub", "mistral")
    (hub / "model.safetensors").unlink()
    places, changes = [hub], {"steps": 1, "policy.date": "2025-02-03", "loss.kl_coef": 0.0}
    changes |= {"judge.model.weights": f"random:{hub}", "judge.model.date": "2025-02-03"}
    for name, start in (("one", "random:{}"), ("two", "{}"), ("three", "{}/export")):
        changes |= {"policy.weights": start.format(places[-1])}
        config = pin_checkpoints(tiny("outcome", changes), {})
        places.append(run(config, tmp_path / name))
    first = sampling(f"random:{hub}")
    for place in places[1:]:
        assert sampling(place) == sampling(place / "export") == first


# --- Another model under a run.


def edit(path, old, new):
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert content.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    os.utime(path, ns=times)


def flip(path, position):
    content, times = bytearray(path.read_bytes()), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content[position] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)


CHANGES = {
    "one bit of the weights": lambda folder: flip(folder / "model.safetensors", -1),
    "the weights' header": lambda folder: edit(folder / "model.safetensors", b'"pt"', b'"np"'),
    "the template": lambda folder: edit(folder / "chat_template.jinja", b"%d %b", b"%b %d"),
    "an end token": lambda folder: edit(folder / "generation_config.json", b"258", b"259"),
    "a number of the config": lambda folder: edit(folder / "config.json", b"1e-05", b"1e-06"),
    "the vocabulary": lambda folder: edit(folder / "tokenizer.json", b'"ByteLevel"', b'"bytelevel"'),
    "a file more": lambda folder: (folder / "added_tokens.json").write_text("{}"),
    "a file less": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_folder_changes_its_fingerprint_whatever_sizes_and_times_say(change, tmp_path):
    folder = model_folder(tmp_path / "hub", "llama")
    files = open_model(model(folder)).source
    before = fingerprint(files.files)
    (folder / "README.md").write_text("what nobody reads")
    assert fingerprint(files.files) == before
    CHANGES[change](folder)
    assert fingerprint(files.files) != before


def test_of_a_large_file_the_start_and_a_piece_of_every_part_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(run_models, "_WHOLE", 1000)
    monkeypatch.setattr(run_models, "_START", 500)
    monkeypatch.setattr(run_models, "_EVERY", 100)
    monkeypatch.setattr(run_models, "_PIECE", 10)
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(2345))
    before, seen = fingerprint([path]), []
    for position in range(2345):
        flip(path, position)
        seen.append(fingerprint([path]) != before)
        flip(path, position)
    expected = [p < 500 or (p - 500) % 100 < 10 or p >= 2335 for p in range(2345)]
    assert seen == expected


def test_a_run_that_goes_on_refuses_another_model_and_one_that_has_not_begun_takes_it(tmp_path):
    hub, other = (model_folder(tmp_path / name, "llama") for name in ("hub", "other"))
    folder = workdir(tmp_path / "run")
    check_models(folder, [open_model(model(hub)), open_model(model("random:qwen3"))])
    assert list(json.loads((folder.path / "models.json").read_text())) == [str(hub)]
    flip(hub / "model.safetensors", -1)
    check_models(folder, [open_model(model(hub))])  # no step has been taken yet
    folder.metrics.write_text('{"step": 1}\n')
    check_models(folder, [open_model(model(hub)), open_model(model(other))])  # opened for the first time
    for changed in (other, hub):
        flip(changed / "model.safetensors", -1)
        with pytest.raises(
            ValueError, match=f"model {changed} is not what the run began with.*put the earlier"
        ) as caught:
            check_models(folder, [open_model(model(hub)), open_model(model(other))])
        assert "\n" not in str(caught.value)
        flip(changed / "model.safetensors", -1)
    check_models(folder, [open_model(model(hub)), open_model(model(other))])


@pytest.mark.parametrize("replaced", ["policy", "judge", "reference"])
def test_a_folder_replaced_under_a_run_is_noticed_when_it_goes_on(replaced, tmp_path):
    folders = {name: model_folder(tmp_path / name, "llama") for name in ("policy", "judge", "reference")}
    changes = {
        "policy.weights": str(folders["policy"]),
        "reference.weights": str(folders["reference"]),
        "judge.model.weights": str(folders["judge"]),
        "loss.kl_coef": 0.1,
        "steps": 1,
    }
    run(tiny("outcome", changes), tmp_path / "run")
    flip(folders[replaced] / "model.safetensors", -1)
    with pytest.raises(ValueError, match=f"model {folders[replaced]} is not what the run began with"):
        run(tiny("outcome", changes | {"steps": 2}), tmp_path / "run")
    flip(folders[replaced] / "model.safetensors", -1)
    run(tiny("outcome", changes | {"steps": 2}), tmp_path / "run")


def test_a_model_that_nothing_uses_may_go(tmp_path):
    """A run on verifiers alone neither opens its judge nor minds what becomes of it."""
    judge = tmp_path / "judge"
    changes = {"judge.model.weights": str(judge), "steps": 1, "log.rollouts": 0}
    changes |= {f"routes.{kind}": "verifier" for kind in KINDS}
    run(tiny("outcome", changes), tmp_path / "run")
    model_folder(judge, "llama")
    run(tiny("outcome", changes | {"steps": 2}), tmp_path / "run")


# --- Checkpoints that a config names.


def training_run(folder, *steps, config=None):
    """What a workdir looks like from outside."""
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir()
    recorded = to_dict(tiny("outcome")) if config is None else config
    (folder / "config.json").write_text(recorded if isinstance(recorded, str) else json.dumps(recorded))
    return str(folder)


def pinned(weights, recorded=None):
    """What `judge.model.weights` becomes."""
    before = {} if recorded is None else {"judge": {"model": {"weights": recorded}}}
    return pin_checkpoints(tiny("outcome", {"judge.model.weights": weights}), before).judge.model.weights


def test_a_workdir_is_pinned_to_its_newest_checkpoint_or_to_the_recorded_one(tmp_path):
    weights = training_run(tmp_path / "a", 3, 9, 10)
    assert pinned(weights) == f"{weights}/checkpoints/10"
    assert pinned(weights, f"{weights}/checkpoints/3") == f"{weights}/checkpoints/3"
    assert pinned(f"{weights}/checkpoints/9", f"{weights}/checkpoints/3") == f"{weights}/checkpoints/9"
    other = training_run(tmp_path / "b", 1)
    assert pinned(weights, f"{other}/checkpoints/1") == f"{weights}/checkpoints/10"
    assert pinned("random:llama", f"{weights}/checkpoints/3") == "random:llama"


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: training_run(folder),
        lambda folder: training_run(folder, config="{"),
        lambda folder: training_run(folder, 1, config={"task": "rl", "policy": {}, "lora": {"rank": 0}}),
        lambda folder: training_run(folder, 1, config={"task": "rl", "policy": 5}),
        lambda folder: training_run(folder, 1, config={"task": "rl", "policy": {}, "lora": {"rank": 4}}),
        lambda folder: training_run(folder, 1) + "/checkpoints/7",
    ],
    ids=["no checkpoint", "damaged config", "another version", "nonsense", "adapters", "no such step"],
)
def test_a_model_that_cannot_be_opened_is_only_missed_where_it_is_used(make, tmp_path):
    weights = make(tmp_path / "a")
    assert pinned(weights).startswith(weights)
    with pytest.raises(ValueError, match=str(tmp_path / "a")) as caught:
        open_model(model(pinned(weights)))
    assert "\n" not in str(caught.value)


def test_a_run_whose_unused_model_comes_or_goes_can_go_on(tmp_path):
    weights = training_run(tmp_path / "a")
    assert pinned(weights) == weights
    shutil.rmtree(weights)
    training_run(tmp_path / "a", 4)
    assert pinned(weights, weights) == weights  # else the config would no longer be that of the run
    shutil.rmtree(weights)
    assert pinned(weights, f"{weights}/checkpoints/4") == f"{weights}/checkpoints/4"


def test_one_date_for_all_models_of_the_committed_configs():
    config = tiny("outcome")
    assert {config.policy.date, config.reference.date, config.judge.model.date} == {"2026-01-01"}
    told = dataclasses.replace(config.policy, weights="byte")
    assert told.date == "2026-01-01" and (ROOT / "configs/base.py").read_text().count("2026-01-01") == 1
