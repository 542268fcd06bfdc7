"""Every installed backend, with every word that one of its options takes, against the interpreter."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spir import conformance, interpreter, options
from spir.cli import main
from spir.conformance.properties import PROPERTIES, Refused
from spir.discovery import find, names
from spir.driver import backend_of
from spir.errors import SpirError
from tests.conformance.networks import NETWORKS, example

pytestmark = pytest.mark.filterwarnings("ignore:.*the calibration data may not be what the model was trained on")


def variants() -> list[str]:
    found = []
    for name in names("backends"):
        known = options.fields(find("backends", name))
        words = [(label, word) for label, field in known.items() for word in field.metadata["one_of"]]
        found += [name, *(f"{name}{{{label}={word}}}" for label, word in words if word != known[label].default)]
    return found


BACKENDS = variants()
MAIN = [name for name in BACKENDS if "{" not in name or "collapse" in name]
OTHER = [name for name in BACKENDS if name not in MAIN]
"""Variants of the same arithmetic, on fewer examples."""
ON_INTEGERS = ("hw",)


@pytest.mark.parametrize("backend", MAIN)
@pytest.mark.parametrize("check", conformance.checks(24), ids=str)
def test_every_backend_conforms(check, backend):
    row = check.hold(backend)
    assert row.run + row.refused


@pytest.mark.parametrize("check", conformance.checks(3), ids=str)
def test_every_variant_conforms(check):
    for backend in OTHER:
        row = check.hold(backend)
        assert row.run + row.refused


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("group", PROPERTIES)
def test_networks_run_on_every_backend(group, network, backend):
    refused = network == "mixed" and backend.startswith(ON_INTEGERS)
    count = 30 if group == "batches" and backend in MAIN else 6
    try:
        PROPERTIES[group](backend_of(backend), example(network, count))
    except Refused:
        assert refused
        return
    assert not refused


def test_the_networks_are_alive():
    for name in NETWORKS:
        one = example(name)
        stored = interpreter.run(one.module, one.x, "*")
        for value, type_ in one.module.types.items():
            assert np.unique(type_.decode(stored[value])).size > 3, (name, value)
    one = example("spiking")
    assert np.unique(interpreter.run(one.module, one.x, "z")["z"]).size > 50
    one = example("residual")
    assert interpreter.run(one.module, one.x, "n2")["n2"].min() == -1


def test_a_backend_that_runs_nowhere_is_refused():
    with pytest.raises(SpirError, match=r"serial refuses a module without ops: torch sees \d+ CUDA devices") as refusal:
        conformance.check('serial{device="cuda:999"}', examples=1)
    assert "fix: device=cpu" in str(refusal.value)


def test_the_command_prints_a_table_and_an_object(capsys, monkeypatch):
    few = tuple(check for check in conformance.checks(1) if check.subject in ("relu", "neuron_stem"))
    monkeypatch.setattr("spir.conformance.suite.checks", lambda _: few)
    assert main(["check", "hw", "--examples", "1"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == list(PROPERTIES)
    assert "hw: " in text.splitlines()[-1]
    assert text.splitlines()[-1].endswith(" 0 fail (!)")
    assert main(["check", "hw", "--examples", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["backend"], found["passed"]) == ("spir-check/1", "hw", True)
    assert set(found["rows"][0]) == {"group", "kind", "subject", "run", "refused", "failed", "why", "failure"}


def test_an_unknown_backend_and_no_examples_are_usage(capsys):
    assert main(["check", "serail"]) == 3
    assert "did you mean 'serial'?" in capsys.readouterr().err
    assert main(["check", "hw", "--examples", "0"]) == 2
