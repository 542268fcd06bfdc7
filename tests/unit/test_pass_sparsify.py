"""sparsify: settings that are given, settings that are searched for, and what neither takes."""

from __future__ import annotations

import functools

import attrs
import numpy as np
import pytest

import spir
from spir import interpreter, pipeline
from spir.costs import synapses
from spir.demo.lenet import calibration, images, lenet5
from spir.driver import Context, backend_of
from spir.ir import Array, Module
from spir.ops.encode import Encode
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.relu import Relu
from spir.passes.sparsify import Sparsify
from spir.text import parse, show
from tests.unit.small_networks import BIAS, conv, network, op_of, ops_of, refusal, run, text_of
from tests.unit.small_networks import images as noise

STEM = "canonicalize, calibrate-range, quantize, propagate-scales, derive-thresholds"
BACKENDS = ("serial", "parallel", "hw", "hw{collapse=off}")
RELUS = ("relu1", "relu2", "relu3", "relu4")


def two(passes: str, *, pool: bool = False) -> Module:
    """Two activations and a readout; between them a max-pool, perhaps."""
    pooled = [("p", MaxPool((2, 2), (2, 2)), "b")] if pool else []
    module = network(
        ("a", conv(3, bias=Array.of([0.3, -0.2, 0.1]), padding=(1, 1, 1, 1)), "x"),
        ("b", Relu(), "a"),
        *pooled,
        ("c", conv(3, 3, kernel=1, seed=5), "p" if pool else "b"),
        ("d", Relu(), "c"),
        ("e", conv(2, 3, kernel=1, seed=6, bias=BIAS), "d"),
    )
    return run(module, passes, noise(40))


def settings(module: Module) -> dict[str, tuple[int, int, str]]:
    """RoT, DRLO and reading of every thinned train."""
    trains = ((n.result, n.op) for n in module.nodes if isinstance(n.op, (Encode, NeuronStem)))
    return {name: (op.rot, op.drlo, op.drlo_mode) for name, op in trains if op.thinning is not None}


# settings that are given


@pytest.mark.parametrize("fused", ["", ", fuse-neuron"])
def test_the_trains_of_activations_are_thinned_and_that_of_the_input_where_asked(fused):
    module = two(STEM + fused)
    assert settings(module) == {}
    assert settings(run(module, "sparsify{rot=2, drlo=3}")) == dict.fromkeys(("b", "d"), (2, 3, "count"))
    more = run(module, "sparsify{drlo=3, mode=window, input=on}")
    assert settings(more) == dict.fromkeys(("x.clip.train", "b", "d"), (0, 3, "window"))


def test_thinning_and_fusing_may_change_places():
    assert run(two(STEM), "sparsify{rot=2, drlo=3}, fuse-neuron") == run(
        two(STEM), "fuse-neuron, sparsify{rot=2, drlo=3}"
    )


def test_a_second_clause_replaces_the_first_on_its_layers():
    found = run(two(STEM), "sparsify{rot=2, drlo=3, mode=window}, sparsify{rot=1, layers=d}")
    assert settings(found) == {"b": (2, 3, "window"), "d": (1, 0, "count")}


def test_the_clauses_of_a_search_tell_a_value_from_a_module_of_the_same_name():
    module = run(
        network(
            ("net.c", Relu(), "x"), ("b", conv(3), "net.c"), ("c", Relu(), "b"), ("d", conv(2, 3), "c"), shape=(2, 5, 5)
        ),
        STEM,
        noise(40, (2, 5, 5)),
    )
    both = run(module, "sparsify{rot=1, layers=net.c}")
    assert settings(both) == dict.fromkeys(("net.c", "c"), (1, 0, "count"))
    found = run(run(module, "sparsify{rot=1}"), 'sparsify{rot=3, layers="%net.c"}')
    assert settings(found) == {"net.c": (3, 0, "count"), "c": (1, 0, "count")}
    clauses = Sparsify(max_drop=1).settled(module, found)
    assert run(module, pipeline.spell(clauses)) == found


def test_the_train_behind_a_pool_of_integers_is_that_of_its_activation():
    assert settings(run(two(STEM, pool=True), "sparsify{rot=1}")) == dict.fromkeys(("p", "d"), (1, 0, "count"))


@pytest.mark.parametrize("fused", ["", ", fuse-neuron"])
def test_neurons_that_only_pass_on_what_a_maximum_leaves_stay_whole(fused):
    lowered = two(STEM.replace("derive", "lower-max-pool, derive") + fused, pool=True)
    neurons = [n.result for n in lowered.nodes if isinstance(n.op, (Encode, NeuronStem))]
    assert len(neurons) > 4
    assert settings(run(lowered, "sparsify{rot=1}")) == dict.fromkeys(("b", "d"), (1, 0, "count"))


@pytest.mark.parametrize("clause", ["rot=2", "drlo=2", "rot=1, drlo=3, mode=window", "drlo=3, mode=position"])
@pytest.mark.parametrize("form", [STEM, f"{STEM}, fuse-neuron"])
def test_every_backend_steps_and_merges_as_the_interpreter_does(form, clause):
    module = run(two(form, pool=True), f"sparsify{{{clause}, input=on}}")
    reference = interpreter.run(module, noise(5), "*")
    for backend in BACKENDS:
        found = backend_of(backend).prepare(module).run(noise(5), "*")
        for name, stored in reference.items():
            np.testing.assert_array_equal(found[name], stored, f"{backend} {name}")


def test_text_says_what_is_thinned_and_reads_back():
    module = run(two(STEM), "sparsify{rot=2, drlo=3, mode=window}, fuse-neuron")
    assert "rot = 2, drlo = 3, drlo_mode = window}" in show(module)
    assert parse(show(module), module.arrays()) == module


def test_a_reading_of_drlo_is_named_as_a_reconstruction_and_rot_is_not():
    context = Context(None, 0)
    pipeline.run(two(STEM), pipeline.parse("sparsify{rot=2}"), context)
    assert context.notes == []
    pipeline.run(two(STEM), pipeline.parse("sparsify{drlo=2, mode=window}"), context)
    assert context.notes == ["note[W-RECON]: DRLO, reading window, is a reconstruction"]


# what it does not take


@pytest.mark.parametrize("labels", [(0, 3, 10), (-1, 2, 9)])
def test_labels_that_no_class_has_are_refused_before_a_search(labels):
    with pytest.raises(spir.errors.SpirError) as caught:
        spir.compile(lenet(), SMALL, data=(images()[0][:3], np.array(labels)), check="off")
    told = f"sparsify: labels are {labels[0]}..{labels[-1]}, and the network tells 10 classes apart"
    assert told in str(caught.value)
    assert caught.value.code == "data"


@pytest.mark.parametrize(
    ("clause", "text"),
    [
        ("", ("sparsify is told neither rot nor drlo", "rot=1, drlo=4, or max_drop=0.3")),
        ("rot=1, max_drop=1", ("sparsify: max_drop searches for rot and drlo", "give one or the other")),
        ("rot=1, images=3", ("sparsify: images is for max_drop", "leave images out")),
        ("rot=1, mode=window", ("sparsify: mode=window is a reading of drlo", "drlo=4, or no mode")),
    ],
)
def test_options_without_effect_are_refused(clause, text):
    found = text_of(refusal(two(STEM), f"sparsify{{{clause}}}")).split("\n")
    assert [line.strip() for line in found if "pass: " not in line] == [f"error[option]: {text[0]}", f"fix: {text[1]}"]


@pytest.mark.parametrize("clause", ["max_drop=-1", "rot=-1", "images=0", "mode=first"])
def test_values_beyond_an_option_are_refused(clause):
    with pytest.raises(spir.errors.SpirError, match="option"):
        pipeline.parse(f"sparsify{{{clause}}}")


@pytest.mark.parametrize("turn", [0, 3])
def test_a_search_says_how_many_labels_the_network_had_right(turn):
    x, y = images()
    made = spir.compile(lenet(), SMALL, data=(x[:20], (y[:20] + turn) % 10), check="off")
    _, note, few, *_ = made.journal[0].notes
    assert few == "one sample is 5 points, more than the budget: other samples may lose far more"
    wrong = "no better than chance, so that the budget holds nothing: are the labels right?"
    assert note == ("100.00 % of the labels before" if not turn else f"0.00 % of the labels before; {wrong}")


def test_settings_beyond_the_bits_are_refused_for_every_layer_at_once():
    found = text_of(refusal(two(STEM), "sparsify{rot=8}"))
    assert found.count("error[type]: rot = 8 of 8 bits") == 2
    assert "op: %b = encode : tensor<3x5x4, spikes[8, bits, 0..255]" in found
    assert "from: net.b (net.py line 7)" in found


def test_a_network_without_such_trains_is_told_which_method_has_them():
    rates = "canonicalize, calibrate-range, quantize, propagate-scales, derive-thresholds{neuron=parallel}"
    found = text_of(refusal(two(rates), "sparsify{rot=1}"))
    assert "finds no bit-coded trains" in found
    assert "as @stem" in found


def test_layers_without_an_activation_are_told_which_there_are():
    found = text_of(refusal(two(STEM), 'sparsify{rot=1, layers="x.clip.train"}'))
    assert "selects no train that an activation emits" in found
    assert "fix: layers: b, d" in found


@pytest.mark.parametrize(
    ("before", "text"),
    [
        ("", "sparsify needs calibration data"),
        ("sparsify{rot=1}, ", "every selected train is thin already"),
    ],
)
def test_a_search_needs_data_and_something_to_choose(before, text):
    found = text_of(refusal(two(STEM), f"{before}sparsify{{max_drop=1}}", noise(4) if before else None))
    assert text in found


# settings that are searched for

SEARCH = "sparsify{max_drop=2, images=50}"
SMALL = "sparsify{max_drop=0, images=20, layers=relu4}"


@functools.cache
def lenet() -> Module:
    return spir.compile(lenet5(), "@stem", data=calibration(), check="off").module


@functools.cache
def searched(clause: str = SEARCH, *, labelled: bool = True) -> pipeline.Outcome:
    x, y = images()
    data = [(x[:50], y[:50])] if labelled else x[:50]
    return spir.driver.opt(lenet(), clause, data=data, check="off")


def operations(module: Module) -> float:
    """Synaptic operations of the activations' trains on 10 images."""
    x, paths = images()[0][:10], synapses(module)
    trains = interpreter.run(module, x, "|".join(RELUS))
    return sum(float((np.abs(trains[name]).sum(axis=(0, 1)) * paths[name]).sum()) for name in RELUS)


def test_a_search_finds_the_same_again_and_its_text_makes_the_same_without_searching():
    found = searched(SMALL)
    assert set(settings(found.module)) == {"relu4"}
    x, y = images()
    again = spir.driver.opt(lenet(), SMALL, data=[(x[:20], y[:20]), (x[20:50], y[20:50])], check="off")
    assert again.module == found.module
    text = pipeline.spell(found.passes)
    assert "max_drop" not in text
    assert spir.driver.opt(lenet(), text, check="off").module == found.module
    (entry,) = found.journal
    assert f"without searching: {text}" in entry.notes
    assert "max_drop=0" in entry.step
    assert "0.00 points of top-1 accuracy lost on 20 samples" in entry.notes[0]
    assert any("W-RECON" in note for note in entry.notes) == any(drlo for _, drlo, _ in settings(found.module).values())


def test_a_search_keeps_its_budget_and_beats_every_uniform_setting():
    y = images()[1]
    found = searched().module
    limit = (answers(lenet()) == y[:50]).sum() - 1  # 2 points of 50
    assert (answers(found) == y[:50]).sum() >= limit
    least = operations(found)
    assert least < 0.6 * operations(lenet())
    assert spir.driver.opt(lenet(), pipeline.spell(searched().passes), check="off").module == found
    for rot in range(5):
        for drlo in (0, 4, 3, 2):
            if rot or drlo:
                uniform = spir.driver.opt(lenet(), f"sparsify{{rot={rot}, drlo={drlo}}}", check="off").module
                kept = (answers(uniform) == y[:50]).sum() >= limit
                assert not kept or least <= operations(uniform)


def answers(module: Module) -> np.ndarray:
    stored = backend_of("parallel").prepare(module).run(images()[0][:50])
    return module.types[module.output].decode(stored[module.output]).argmax(axis=1)


def test_without_labels_the_budget_is_one_of_agreement():
    found = searched(SMALL, labelled=False)
    assert "top-1 agreement with the network before lost on 20 samples" in found.journal[0].notes[0]
    plain = Context(None, 0)
    first = [
        np.concatenate([p[m.output] for p in plain.evaluate(m, images()[0][:20], "")]) for m in (lenet(), found.module)
    ]
    assert (first[0].argmax(axis=1) == first[1].argmax(axis=1)).all()


def test_trains_that_are_thin_already_keep_their_settings():
    found = searched('sparsify{rot=3, layers=relu1}, sparsify{max_drop=0, images=20, layers="relu1|relu4"}')
    assert settings(found.module)["relu1"] == (3, 0, "count")
    assert spir.driver.opt(lenet(), pipeline.spell(found.passes)).module == found.module


def test_a_compiled_network_prints_the_pipeline_that_was_found():
    x, y = images()
    made = spir.compile(lenet(), "sparsify{max_drop=0, layers=relu4}", data=[(x[:9], y[:9])], check="off")
    assert "max_drop=none" in made.source["passes"]
    assert spir.compile(lenet(), made.source["passes"]).module == made.module


def test_labels_are_classes_one_a_sample_in_every_batch():
    x, y = images()
    seen: list[np.ndarray | None] = []

    @attrs.frozen
    class Look(spir.rewriting.Pass):
        name = "look"

        def contract(self):
            return spir.contracts.Exact()

        def run(self, module, context):
            seen.append(context.labels)
            return module

    batches = [(x[:3], y[:3]), (x[3:5], y[3:5])]
    odd = [(x[:3], y[:3]), x[3:5]]
    for data in ((x[:5], y[:5]), batches, odd, x[:5], [(x[:5], y[:4])], [(x[:5], y[:5].astype(float))]):
        spir.compile(lenet(), [Look()], data=data, check="off")
    assert [found.tolist() for found in seen[:2] if found is not None] == [y[:5].tolist()] * 2
    assert seen[2:] == [None] * 4
    assert [len(list(ops_of(lenet(), NeuronStem))), op_of(lenet(), "relu1").rot] == [4, 0]
