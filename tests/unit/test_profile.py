"""spir.profile: what a chip holds, read from files that are checked figure by figure."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from spir.errors import SpirError
from spir.profile import ASSUMED, HOME, Profile, profiles

TEXT = (HOME / "ideal.toml").read_text(encoding="utf-8")


def written(folder: Path, *changes: tuple[str, str], more: str = "", name: str = "mine.toml") -> str:
    """A copy of the ideal profile with lines replaced, and others in front."""
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / name
    path.write_text(more + "\n" + text, encoding="utf-8")
    return str(path)


def refused(path: str) -> list[tuple[str, str, str]]:
    """Code, message and way out of each finding."""
    with pytest.raises(SpirError) as caught:
        Profile.load(path)
    notes = [{note.label: note.text for note in d.notes} for d in caught.value.diagnostics]
    assert all(note.get("at", path) == path for note in notes)
    found = zip(caught.value.diagnostics, notes, strict=True)
    return [(d.code, d.message, note.get("fix", "")) for d, note in found]


def test_the_profiles_that_come_along():
    assert profiles() == ["darwin3", "ideal", "loihi", "speck"]
    assert [Profile.load(name).name for name in profiles()] == profiles()


@pytest.mark.parametrize("name", profiles())
def test_every_figure_of_a_profile_has_its_source(name):
    profile = Profile.load(name)
    fields = [a for a in attrs.fields(Profile) if a.name not in ("name", "source")]
    given = {a.name for a in fields if a.default is attrs.NOTHING or getattr(profile, a.name) is not None}
    assert set(profile.source) == given
    assert all(len(text) > 5 for text in profile.source.values())


def test_darwin3_is_what_the_published_facts_say_and_guesses_are_marked():
    chip = Profile.load("darwin3")
    assert (chip.weight_bits, chip.sum_bits, chip.state_bits) == (8, 16, 16)
    assert (chip.requant, chip.largest_divisor, chip.multiplier_bits) == ("divisor", 255, None)
    assert (chip.synaptic_operation_pj, chip.neuron_update_pj) == (5.47, None)
    assert chip.assumed == ("overflow", "signed_spikes", "requant", "largest_divisor")
    assert all(chip.source[name].startswith(ASSUMED) for name in chip.assumed)


def test_ideal_limits_nothing():
    chip = Profile.load("ideal")
    assert (chip.weight_bits, chip.sum_bits, chip.state_bits, chip.requant) == (64, 64, 64, "any")
    assert (chip.fan_in, chip.steps, chip.signed_spikes) == (None, None, True)


def test_a_profile_of_ones_own_is_a_path(tmp_path):
    path = written(
        tmp_path,
        ("sum_bits = 64", "sum_bits = 20"),
        ('fan_in = "none"', "fan_in = 256"),
        ('requant = "any"', 'requant = "multiplier"\nmultiplier_bits = 16\nproduct_bits = 48\nneuron_update_pj = 2'),
    )
    chip = Profile.load(path)
    assert (chip.sum_bits, chip.fan_in, chip.multiplier_bits, chip.product_bits) == (20, 256, 16, 48)
    assert chip.neuron_update_pj == 2.0
    assert isinstance(chip.neuron_update_pj, float)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        chip.sum_bits = 3
    with pytest.raises(TypeError):
        chip.source["steps"] = ""


def test_a_name_that_nobody_has_is_refused_with_the_nearest():
    assert refused("darwn3") == [("option", "there is no profile 'darwn3'", "did you mean 'darwin3'?")]
    (found,) = refused("tianjic")
    assert found[2] == "one of: darwin3, ideal, loihi, speck"
    with pytest.raises(SpirError, match=r"a path that ends in \.toml names a profile of your own"):
        Profile.load("tianjic")


def test_a_file_that_is_not_there_or_no_toml(tmp_path):
    gone = str(tmp_path / "gone.toml")
    assert refused(gone)[0][0] == "io"
    bad = tmp_path / "bad.toml"
    bad.write_text("name = = 3")
    ((code, message, _),) = refused(str(bad))
    assert code == "profile"
    assert "is no TOML" in message
    bad.write_bytes(b"\xff\xfe")
    assert refused(str(bad))[0][0] == "profile"


WRONG = {
    "weight_bits = 64": ("weight_bits = 0", "weight_bits = 0 is not a whole number within 1..64"),
    "sum_bits = 64": ("sum_bits = 65", "sum_bits = 65 is not a whole number within 2..64"),
    "state_bits = 64": ("state_bits = 16.0", "state_bits = 16.0 is not a whole number within 2..64"),
    'overflow = "error"': ('overflow = "clip"', "overflow = 'clip' is not one of saturate, wrap, error"),
    'fan_in = "none"': ("fan_in = 0", 'fan_in = 0 is not a whole number from 1 on, or "none"'),
    "signed_spikes = true": ("signed_spikes = 1", "signed_spikes = 1 is not true or false"),
    'steps = "none"': ("steps = true", 'steps = True is not a whole number from 1 on, or "none"'),
    'requant = "any"': ('requant = "mul"', "requant = 'mul' is not one of any, multiplier, divisor, shift"),
    'name = "ideal"': ('name = " "', "name = ' ' is not a text that is not empty"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_figure_of_the_wrong_kind_is_refused_with_what_is_wanted(tmp_path, line):
    new, message = WRONG[line]
    ((code, found, fix),) = refused(written(tmp_path, (line, new)))
    assert (code, found) == ("profile", message)
    assert fix.startswith("give " + line.split(" ")[0])


@pytest.mark.parametrize("energy", ["-1.0", "inf", "nan", "true", '"5 pJ"'])
def test_an_energy_is_no_negative_number(tmp_path, energy):
    ((_, message, _),) = refused(written(tmp_path, more=f"synaptic_operation_pj = {energy}"))
    assert message.endswith("is not picojoules, 0 or more")


def test_unknown_and_missing_figures_are_told_all_at_once(tmp_path):
    path = written(tmp_path, ("sum_bits = 64\n", ""), ("state_bits = 64", "state_bits = 1"), more="sumbits = 3")
    found = refused(path)
    assert {code for code, *_ in found} == {"profile"}
    assert found[0][1:] == ("there is no figure of a profile called 'sumbits'", "did you mean 'sum_bits'?")
    assert found[1][1:] == ("the profile has no sum_bits", "add sum_bits = ...")
    assert found[2][1] == "state_bits = 1 is not a whole number within 2..64"


KINDS = {
    'requant = "divisor"': "requant = 'divisor' needs largest_divisor",
    'requant = "multiplier"\nmultiplier_bits = 8': "requant = 'multiplier' needs product_bits",
    'requant = "shift"\nlargest_divisor = 8': "largest_divisor = 8 says nothing where requant = 'shift'",
    'requant = "multiplier"\nmultiplier_bits = 8\nproduct_bits = 65': "product_bits = 65 is not a whole number within",
    f'requant = "divisor"\nlargest_divisor = {2**63 - 1}': "",
}


@pytest.mark.parametrize("lines", KINDS)
def test_figures_go_with_the_kind_of_requantisation(tmp_path, lines):
    path = written(tmp_path, ('requant = "any"', lines))
    if KINDS[lines]:
        ((code, message, _),) = refused(path)
        assert code == "profile"
        assert message.startswith(KINDS[lines])
    else:
        assert Profile.load(path).largest_divisor == 2**63 - 1


def test_a_source_belongs_to_a_figure_and_is_a_text(tmp_path):
    ((_, message, fix),) = refused(written(tmp_path, ('steps = "no chip"', 'step = "no chip"')))
    assert message == "there is no figure to give a source for called 'step'"
    assert fix == "did you mean 'steps'?"
    ((_, message, _),) = refused(written(tmp_path, ('steps = "no chip"', "steps = 3")))
    assert message.endswith("is not a table of texts, one for each figure")


def test_a_profile_made_in_python_is_checked_too():
    ideal = Profile.load("ideal")
    with pytest.raises(SpirError, match="sum_bits = 1 is not a whole number"):
        attrs.evolve(ideal, sum_bits=1)
    assert attrs.evolve(ideal, sum_bits=9).sum_bits == 9
