"""Saved networks: read back whole, refused when anything is wrong, and never lost by a failing save."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from pathlib import Path

import attrs
import numpy as np
import pytest
from torch import nn

import spir
from spir import artifact, store
from spir.errors import SpirError
from spir.ir import Array

X = np.random.default_rng(0).normal(size=(6, 1, 4, 4)).astype(np.float32)
NAMES = ("manifest.json", "module.spir", "weights.safetensors", "journal.json")


def network(bits: int) -> spir.Compiled:
    rng = np.random.default_rng(bits)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    for parameter in net.parameters():
        parameter.data.copy_(parameter.data.new_tensor(rng.normal(size=parameter.shape)))
    return spir.compile(net, f"@stem{{bits={bits}}}", data=X, backend="hw{collapse=off}")


@pytest.fixture(scope="module")
def snn() -> spir.Compiled:
    return network(4)


@pytest.fixture(scope="module")
def other() -> spir.Compiled:
    return network(6)


@pytest.fixture
def saved(snn, tmp_path) -> Path:
    snn.save(tmp_path / "net")
    return tmp_path / "net"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(path: Path) -> SpirError:
    with pytest.raises(SpirError) as caught:
        spir.load(path)
    return caught.value


def loaded(path: Path) -> tuple[spir.Module | None, str]:
    """The module, or the code of the refusal."""
    try:
        return spir.load(path).module, ""
    except SpirError as refusal:
        return None, refusal.code


def amend(folder: Path, **changed) -> None:
    """The manifest with other entries; those that are ... are left out."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changed
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


def forge(folder: Path, name: str, content: bytes) -> None:
    """Another file, with a manifest that vouches for it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- there and back -----------------------------------------------------------------------------------------------


def test_a_network_reads_back_as_it_was(snn, saved):
    read = spir.load(saved)
    assert read.module == snn.module
    assert str(read.module) == str(snn.module)
    assert read.journal == snn.journal
    assert read.source == snn.source
    assert read.backend == snn.backend
    assert read.stages == ()
    np.testing.assert_array_equal(read(X), snn(X))


@pytest.mark.parametrize("backend", ["serial", "parallel", "hw", "hw{collapse=off}"])
def test_a_network_gives_the_same_bits_on_every_backend(snn, saved, backend):
    read = spir.load(saved, backend=backend)
    assert read.backend.name == backend.partition("{")[0]
    np.testing.assert_array_equal(read(X), snn(X))


def test_an_artifact_is_four_files(saved):
    assert sorted(contents(saved)) == sorted(NAMES)
    manifest = json.loads((saved / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("spir-artifact", 1)
    assert manifest["backend"] == "hw{collapse=off}"
    assert "module {" in (saved / "module.spir").read_text()


def test_saving_twice_writes_the_same_bytes(snn, saved, tmp_path):
    snn.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_what_is_read_saves_as_the_same_bytes(saved, tmp_path):
    spir.load(saved).save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_integers_are_stored_in_the_smallest_type_that_holds_them(saved):
    assert (saved / "weights.safetensors").stat().st_size < 8 * 34 + 4000
    read = store.from_bytes((saved / "weights.safetensors").read_bytes(), saved)
    assert all(a.data is not None and a.data.dtype.itemsize == 8 for a in read.values())


@pytest.mark.parametrize("value", [-(2**63), -129, -128, 127, 128, 32768, 2**31, 2**63 - 1])
def test_every_integer_reads_back(value, tmp_path):
    array = Array.of(np.array([value, 0]))
    assert store.from_bytes(store.to_bytes({"a": array}), tmp_path)["a"] == array


def test_empty_and_real_arrays_read_back(tmp_path):
    arrays = {"e": Array.of(np.zeros((0, 3), np.int64)), "r": Array.of([0.1, -1e300]), "s": Array.of(np.float64(2))}
    assert store.from_bytes(store.to_bytes(arrays), tmp_path) == arrays


def test_parents_are_made_and_an_empty_folder_is_taken(snn, tmp_path):
    snn.save(tmp_path / "a" / "b" / "net")
    (tmp_path / "empty").mkdir()
    snn.save(str(tmp_path / "empty"))
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b" / "net")


def test_an_older_artifact_is_replaced(other, saved, tmp_path):
    other.save(saved)
    assert spir.load(saved).module == other.module
    assert os.listdir(tmp_path) == ["net"]  # noqa: PTH208 - hidden files count


def test_saving_through_a_link_replaces_the_folder_behind_it(other, saved, tmp_path):
    (tmp_path / "link").symlink_to(saved, target_is_directory=True)
    other.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert spir.load(saved).module == other.module
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "net"]


# --- what is refused on reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, name, share):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * share)])
    refusal = refused(saved)
    assert refusal.code == "artifact"
    assert f"{saved / name} is damaged" in str(refusal)
    assert "fix: save the network again" in str(refusal)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("place", [0, 0.3, 0.7, -1])
def test_a_file_with_one_altered_byte_is_refused(saved, name, place):
    content = bytearray((saved / name).read_bytes())
    content[int(len(content) * place) if 0 < place < 1 else place] ^= 1
    (saved / name).write_bytes(content)
    assert str(refused(saved)) == (
        f"error[artifact]: {saved / name} is damaged: its checksum differs\n        fix: save the network again"
    )


def test_no_altered_byte_of_the_manifest_lets_another_network_through(snn, saved):
    content = (saved / "manifest.json").read_bytes()
    for place in range(0, len(content), 7):
        altered = bytearray(content)
        altered[place] ^= 1
        (saved / "manifest.json").write_bytes(altered)
        module, code = loaded(saved)
        assert module == snn.module or code in ("artifact", "name", "option", "pipeline", "usage"), place


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    assert str(refused(saved)).startswith(f"error[io]: {saved / name} cannot be read: No such file or directory\n")


def test_a_folder_in_the_place_of_a_file_is_refused(saved):
    (saved / "journal.json").unlink()
    (saved / "journal.json").mkdir()
    assert str(refused(saved)).startswith(f"error[io]: {saved / 'journal.json'} cannot be read: Is a directory\n")


def test_what_is_no_artifact_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    assert str(refused(tmp_path / "nothing")).startswith(f"error[io]: {tmp_path / 'nothing'} is not there\n")
    for path in (tmp_path / "file", tmp_path / "empty"):
        assert str(refused(path)) == (
            f"error[artifact]: {path} is no artifact: there is no manifest.json\n"
            "        fix: give a folder that save() wrote"
        )


@pytest.mark.parametrize(
    ("version", "fix"),
    [(2, "update SPIR"), (10**30, "update SPIR"), (0, "save the network again"), ("1", "save the network again")],
)
def test_another_version_is_refused_with_what_to_do(saved, version, fix):
    amend(saved, version=version)
    assert str(refused(saved)) == (
        f"error[artifact]: {saved} has format version {version}, and this SPIR reads 1\n        fix: {fix}"
    )


WRONG = {
    "format": [..., 3, "other"],
    "version": [..., [], 2],
    "backend": [..., 3, "nothing", "hw{", "hw{collapse=maybe}"],
    "source": [..., [], "x"],
    "sha256": [..., [], {}, dict.fromkeys(NAMES), dict.fromkeys(NAMES, "00")],
}
MISTAKES = [(key, value) for key, values in WRONG.items() for value in values]


def test_any_two_mistakes_in_the_manifest_are_refused(saved):
    good = (saved / "manifest.json").read_text()
    for pair in itertools.combinations_with_replacement(MISTAKES, 2):
        amend(saved, **dict(pair))
        assert refused(saved).code in ("artifact", "name", "option", "pipeline", "usage"), pair
        (saved / "manifest.json").write_text(good)
    spir.load(saved)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"a"', "{}", "{", "\x00", "[" * 100_000, '{"format": NaN}'])
def test_a_manifest_that_is_none_is_refused(saved, text):
    (saved / "manifest.json").write_text(text)
    assert refused(saved).code == "artifact"


def entry(**changed) -> dict:
    good = {
        "step": "s",
        "contract": "exact",
        "checked": "1 probes",
        "largest": 2.0,
        "relative": 0.5,
        "value": "v",
        "before": {},
        "after": {},
        "seconds": 1,
    }
    return {k: v for k, v in (good | changed).items() if v is not ...}


JOURNALS = [
    b"",
    b"{",
    b"null",
    b"3",
    b"[3]",
    b"[null]",
    b"[[]]",
    b'["step"]',
    b"\xff\xfe",
    b"[" * 100_000,
    *(
        json.dumps([entry(**changed)]).encode()
        for changed in (
            {"step": ...},
            {"seconds": ...},
            {"extra": 1},
            {"step": 3},
            {"contract": None},
            {"checked": []},
            {"largest": "1"},
            {"relative": {}},
            {"value": 0},
            {"before": []},
            {"after": "x"},
            {"seconds": None},
        )
    ),
]


@pytest.mark.parametrize("content", JOURNALS, ids=lambda c: repr(c[:20]))
def test_a_journal_that_is_none_is_refused(saved, content):
    forge(saved, "journal.json", content)
    assert str(refused(saved)) == (
        f"error[artifact]: {saved / 'journal.json'} is no journal\n        fix: save the network again"
    )


def test_a_journal_of_good_entries_is_read_and_shown(saved):
    forge(saved, "journal.json", json.dumps([entry()]).encode())
    assert "exact; checked on 1 probes: %v changed most, by 2, 0.5 of its range" in str(spir.load(saved).report(X))


def test_an_altered_weight_is_refused_even_with_a_checksum_that_fits(saved):
    arrays = store.from_bytes((saved / "weights.safetensors").read_bytes(), saved)
    name = next(n for n in arrays if n.endswith(".weight"))
    values = arrays[name].values.copy()
    values.flat[0] += 1
    forge(saved, "weights.safetensors", store.to_bytes(arrays | {name: Array.of(values)}))
    refusal = refused(saved)
    assert refusal.code == "weights"
    assert f"the array @{name} has digest #" in str(refusal)


def test_a_missing_weight_is_refused(saved):
    arrays = store.from_bytes((saved / "weights.safetensors").read_bytes(), saved)
    name = next(n for n in arrays if n.endswith(".weight"))
    forge(saved, "weights.safetensors", store.to_bytes({k: v for k, v in arrays.items() if k != name}))
    text = str(refused(saved))
    assert f"error[weights]: there is no array @{name} in the weights" in text


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"PK\x03\x04", b"\xff" * 9])
def test_weights_that_are_no_safetensors_are_refused(saved, content):
    forge(saved, "weights.safetensors", content)
    assert f"{saved / 'weights.safetensors'} is no safetensors file" in str(refused(saved))


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"\xff\xfe", "artifact"), (b"module {", "syntax"), (b"", "syntax"), (b"module { output %x }", "syntax")],
)
def test_text_that_is_no_module_is_refused_with_its_file(saved, content, code):
    forge(saved, "module.spir", content)
    refusal = refused(saved)
    assert refusal.code == code
    assert "at: " in str(refusal)


def test_a_module_of_other_types_is_refused(saved):
    text = (saved / "module.spir").read_text()
    forge(saved, "module.spir", text.replace("bits, 0..15]", "bits, 0..14]").encode())
    assert refused(saved).code == "type"


# --- what is refused on writing -----------------------------------------------------------------------------------


def refused_save(snn: spir.Compiled, path: Path) -> str:
    with pytest.raises(SpirError) as caught:
        snn.save(path)
    return str(caught.value)


def test_a_folder_of_other_files_is_refused_and_untouched(snn, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".hidden").write_text("data")
    before = contents(tmp_path)
    assert refused_save(snn, tmp_path / "mine") == (
        f"error[artifact]: {tmp_path / 'mine'} holds files that are no artifact, and nothing there will be "
        "overwritten\n        fix: choose an empty or new folder"
    )
    assert contents(tmp_path) == before


def test_a_file_that_lies_beside_an_artifact_is_not_lost(other, saved):
    (saved / "results.npz").write_text("data")
    before = contents(saved)
    assert refused_save(other, saved) == (
        f"error[artifact]: {saved} holds results.npz beside an artifact, and nothing there will be overwritten\n"
        "        fix: move that away, or choose another folder"
    )
    assert contents(saved) == before


def test_a_newer_artifact_is_not_overwritten(other, saved):
    amend(saved, version=2)
    before = contents(saved)
    assert "nothing there will be overwritten" in refused_save(other, saved)
    assert contents(saved) == before


def test_a_file_in_the_way_is_refused_and_untouched(snn, tmp_path):
    (tmp_path / "net").write_text("data")
    assert refused_save(snn, tmp_path / "net") == (
        f"error[artifact]: {tmp_path / 'net'} is a file, and an artifact is a folder\n        fix: choose another name"
    )
    assert (tmp_path / "net").read_text() == "data"


def test_a_parent_that_is_a_file_is_refused(snn, tmp_path):
    (tmp_path / "file").write_text("data")
    text = refused_save(snn, tmp_path / "file" / "net")
    assert text.startswith(f"error[io]: {tmp_path / 'file' / 'net'} cannot be written: ")


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("count", range(4))
@pytest.mark.parametrize("cause", [full, KeyboardInterrupt])
def test_a_save_that_fails_at_any_file_leaves_the_older_artifact(other, saved, tmp_path, monkeypatch, count, cause):
    before, real, seen = contents(tmp_path), store.write_aside, []

    def failing(path, content):
        seen.append(path)
        if len(seen) > count:
            monkeypatch.setattr("os.fdopen", full if cause is full else interrupt)
        real(path, content)

    monkeypatch.setattr(store, "write_aside", failing)
    with pytest.raises((SpirError, KeyboardInterrupt)) as caught:
        other.save(saved)
    monkeypatch.undo()
    assert len(seen) == count + 1
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    if cause is full:
        assert "cannot be written: No space left on device\n        fix: choose another place" in str(caught.value)


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("cause", [full, interrupt])
def test_a_rename_that_fails_leaves_the_older_artifact(other, saved, tmp_path, monkeypatch, failing, cause):
    before, real, seen = contents(tmp_path), Path.rename, []

    def rename(self, target):
        seen.append(self)
        return cause() if len(seen) == failing + 1 else real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((SpirError, KeyboardInterrupt)):
        other.save(saved)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_an_older_artifact_survives_even_where_it_cannot_be_put_back(other, saved, tmp_path, monkeypatch):
    before, real, seen = contents(saved), Path.rename, []

    def rename(self, target):
        seen.append(self)
        return full() if len(seen) > 1 else real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert "No space left on device" in refused_save(other, saved)
    monkeypatch.undo()
    (kept,) = tmp_path.iterdir()
    assert contents(kept) == before


def test_a_folder_that_nobody_may_write_to_is_refused(snn, tmp_path, monkeypatch):
    def denied(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    assert refused_save(snn, tmp_path / "net") == (
        f"error[io]: {tmp_path / 'net'} cannot be written: Permission denied\n        fix: choose another place"
    )
    assert not list(tmp_path.iterdir())


def test_a_single_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    store.write_aside(path, b"old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SpirError, match="cannot be written: No space left"):
        store.write_aside(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_artifact_is_equal_to_itself(snn):
    saved = artifact.Artifact(snn.module, snn.journal, "serial", dict(snn.source))
    assert saved == attrs.evolve(saved)
