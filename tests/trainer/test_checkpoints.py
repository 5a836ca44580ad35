"""Checkpoints: what lies beside them, what their manifest and state may not say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.trainer.resume_cases import names, save, train
from tests.trainer.trainer_tools import one_thread, rows_without_times, write_jsonl  # noqa: F401

from rlhf_kernels.trainer import checkpoint, loop, resume
from rlhf_kernels.trainer.config import UserError


def test_only_the_trainers_own_are_deleted_or_continued(tmp_path):
    save(tmp_path, 1)
    for name in (
        "checkpoint-00000001-mine",
        "checkpoint-best",
        "checkpoint-2",
        "checkpoint-0000003a",
    ):
        shutil.copytree(tmp_path / "checkpoint-00000001", tmp_path / name)
    (tmp_path / "checkpoint-00000090.tar").write_text("x")
    (tmp_path / "checkpoint-00000091").write_text("x")
    (tmp_path / "checkpoint-00000092").mkdir()
    (tmp_path / "checkpoint-00000093").symlink_to(tmp_path / "checkpoint-00000001")
    (tmp_path / "checkpoint-00000094").symlink_to(tmp_path / "nowhere")
    other = tmp_path / "checkpoint-00000095"
    other.mkdir()
    (other / "manifest.json").write_text('{"format": "another/1"}')
    draft = tmp_path / ".checkpoint-00000007"
    draft.mkdir()
    (draft / "learner.safetensors").write_text("")
    foreign = tmp_path / ".checkpoint-00000008"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    before = set(names(tmp_path)) - {draft.name, "checkpoint-00000001"}
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "checkpoint-00000001"]
    for step in (2, 3, 100_000_000):
        save(tmp_path, step, keep=2)
    found = [p.name for p in checkpoint.checkpoints(tmp_path)]
    assert found == ["checkpoint-00000003", "checkpoint-100000000"]
    assert set(names(tmp_path)) == before | set(found)
    assert checkpoint.newest(tmp_path).name == "checkpoint-100000000"


@pytest.mark.parametrize("kind", ["file", "link", "folder", "damaged"])
def test_what_is_in_the_way_gets_another_name(tmp_path, kind):
    path = tmp_path / "checkpoint-00000005"
    if kind == "file":
        path.write_text("x")
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        path.mkdir()
        (path / "notes").write_text("x")
    else:
        (save(tmp_path, 5) / "state.json").write_text("{}")
    (tmp_path / ".checkpoint-00000005").write_text("a draft's name")
    assert save(tmp_path, 5) == path and checkpoint.load(path, "sft")
    assert {f"{path.name}.aside-1", ".checkpoint-00000005.aside-1"} <= set(names(tmp_path))
    # A whole one stays as it is.
    content = (path / "learner.safetensors").read_bytes()
    save(tmp_path, 5)
    assert (path / "learner.safetensors").read_bytes() == content


def resealed(path: Path, change) -> None:
    """Changes a manifest, with a seal that fits."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["seal"]
    change(manifest)
    file.write_text(json.dumps(manifest | {"seal": checkpoint._seal(manifest)}))


def rename_file(name: str):
    def change(manifest):
        manifest["files"][name] = manifest["files"].pop("learner.safetensors")

    return change


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_files_elsewhere_are_refused(tmp_path, name):
    path = save(tmp_path, 1)
    resealed(path, rename_file(name))
    with pytest.raises(checkpoint.CheckpointError, match="names of files in this folder"):
        checkpoint.load(path, "sft")


def test_links_and_names_of_a_state_are_refused(tmp_path):
    path = save(tmp_path, 1)
    outside = tmp_path / "outside"
    (path / "learner.safetensors").rename(outside)
    (path / "learner.safetensors").symlink_to(outside)
    with pytest.raises(checkpoint.CheckpointError, match=r"learner\.safetensors: missing, or not"):
        checkpoint.load(path, "sft")
    path = save(tmp_path, 2)
    state = json.loads((path / "state.json").read_text())
    state["../../learner"] = state.pop("learner")
    rewrite_state(path, state)
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.json: no states"):
        checkpoint.load(path, "sft")


def rewrite_state(path: Path, state) -> None:
    """Another state.json, with a manifest that fits."""
    (path / "state.json").write_text(json.dumps(state))
    entry = {"bytes": (path / "state.json").stat().st_size}
    entry["sha256"] = checkpoint._digest(path / "state.json")
    resealed(path, lambda manifest: manifest["files"].update({"state.json": entry}))


def mutations(tree, path=()):
    """Every entry of a JSON tree, and what may stand in its place; the deletion is `...`."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        for other in (..., None, "x", -1, 1.5, True, [], {}, {"tensor": "nowhere"}, [[1]]):
            yield (*path, key), other
        if isinstance(value, dict | list):
            # One of many equal ones (a generator's 624 numbers) stands for the others.
            yield from mutations(value[:3] if isinstance(value, list) else value, (*path, key))


def mutated(tree, path, value):
    copy = json.loads(json.dumps(tree))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copy


def test_every_entry_of_manifest_and_state_may_be_wrong(tmp_path, capsys, monkeypatch):
    """A whole checkpoint of a run, every entry in turn deleted or of another kind."""
    held = {}
    monkeypatch.setattr(loop, "Loop", type("Kept", (loop.Loop,), {}))
    real = loop.Loop.begin

    def begin(self):
        held["trainer"] = self.trainer
        real(self)

    monkeypatch.setattr("rlhf_kernels.trainer.loop.Loop.begin", begin)
    monkeypatch.setattr("rlhf_kernels.trainer.run.Loop", loop.Loop)
    assert train(tmp_path, "--total_steps 2 --save_steps 2") == 0
    path, trainer = checkpoint.newest(tmp_path), held["trainer"]
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["seal"]
    refused = 0
    for place, value in mutations(manifest):
        changed = mutated(manifest, place, value)
        seal = checkpoint._seal(changed)
        (path / "manifest.json").write_text(json.dumps(changed | {"seal": seal}))
        if changed != manifest:
            with pytest.raises(checkpoint.CheckpointError):
                checkpoint.load(path, "sft")
            refused += 1
        assert checkpoint.newest(tmp_path) in (path, None)
    assert refused > 60
    (path / "manifest.json").write_text(json.dumps(manifest | {"seal": checkpoint._seal(manifest)}))
    state = json.loads((path / "state.json").read_text())
    whole, refused = checkpoint.load(path, "sft"), 0
    # The files are whole: only what is said of them changes.
    tensors = {n: checkpoint.load_file(path / f"{n}.safetensors") for n in state}
    monkeypatch.setattr(checkpoint, "_verified", lambda _: manifest)
    monkeypatch.setattr(checkpoint, "load_file", lambda file: tensors[file.stem])
    for place, value in mutations(state):
        (path / "state.json").write_text(json.dumps(mutated(state, place, value)))
        try:
            states = checkpoint.load(path, "sft")
            resume.check_same(path, states.get("run"), whole["run"], changed=False, say=print)
            resume.put(path, states, trainer, new_data=())
        except UserError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > 300
    resume.put(path, whole, trainer, new_data=())


def test_states_of_other_forms_are_refused(tmp_path):
    path = save(tmp_path, 1)
    save_file({"other": torch.zeros(2)}, path / "learner.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=r"learner\.safetensors: expected"):
        checkpoint.load(path, "sft")
