"""calibrate-qcfs: activations of T levels whose mean errors are gone, and the published rules beside it."""

from __future__ import annotations

import warnings

import attrs
import numpy as np
import pytest

from spir import driver, interpreter, pipeline
from spir.errors import SpirWarning
from spir.ir import Array, Module, Op
from spir.ops.add import Add
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.linear import Linear
from spir.ops.permute import Permute
from spir.ops.qcfs import Qcfs
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.passes._refit import refitted, sites
from spir.types import Reals
from tests.unit.small_networks import BIAS, conv, images, linear, network, op_of, refusal, run, shown, text_of

ONE = Array.of([1.0])


def trained(levels: int = 8, **fields: object) -> Module:
    """Three layers of QCFS; the last reads features."""
    each = [Qcfs(levels, Array.of([t])) for t in (2.0, 3.0, 4.0)]
    return network(
        ("a", conv(3, bias=Array.of([0.3, -0.2, 0.1])), "x"),
        ("b", attrs.evolve(each[0], **fields), "a"),
        ("c", conv(2, 3, kernel=1, seed=5, bias=BIAS), "b"),
        ("d", attrs.evolve(each[1], **fields), "c"),
        ("e", conv(4, 2, kernel=1, seed=6), "d"),
        ("f", attrs.evolve(each[2], **fields), "e"),
        ("g", conv(2, 4, kernel=1, seed=7), "f"),
    )


def means(module: Module, x: Reals, name: str) -> Reals:
    """Channel by channel."""
    found = np.asarray(interpreter.run(module, x, name)[name], dtype=np.float64)
    return found.mean(axis=tuple(axis for axis in range(found.ndim) if axis != 1))


def identity(levels: int, **fields: object) -> Module:
    """One activation of a value that is the input."""
    return network(("a", Linear(Array.of([[1.0]])), "x"), ("b", Qcfs(levels, ONE), "a"), shape=(1,), **fields)


def noted(module: Module, passes: str, data: Reals) -> str:
    outcome = pipeline.run(module, pipeline.parse(passes), driver.Context(data, 0))
    return "\n".join(note for entry in outcome.journal for note in entry.notes)


# what it changes


def test_clips_behind_the_input_become_qcfs_of_their_range():
    module = network(("a", conv(2), "x"), ("b", Relu(), "a"), ("c", conv(2, 2, kernel=1), "b"))
    before = run(module, "calibrate-range", images())
    after = run(before, "calibrate-qcfs{steps=3}", images())
    assert shown(after) == ["x.clip = clip x", "a = conv2d x.clip", "b = qcfs a", "c = conv2d b"]
    found = op_of(after, "b")
    assert (found.levels, found.threshold, found.signed) == (3, op_of(before, "b").hi, False)
    assert after.definitions["b"].origin.path == "net.b"


def test_as_many_steps_as_levels_change_nothing_and_need_no_data():
    module = trained(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(module, "calibrate-qcfs{steps=8}") == run(module, "calibrate-qcfs{steps=8}", images()) == module


def test_other_steps_without_data_keep_thresholds_and_warn():
    with pytest.warns(SpirWarning, match=r"E-T-NE-L.*T = 4 steps for L = 8 levels are not lossless"):
        after = run(trained(8), "calibrate-qcfs{steps=4}")
    assert [op_of(after, name) for name in "bdf"] == [Qcfs(4, Array.of([t])) for t in (2.0, 3.0, 4.0)]


def test_only_the_layers_asked_for_are_calibrated():
    after = run(trained(8), 'calibrate-qcfs{steps=2, layers="net.d"}', images())
    assert [op_of(after, name).levels for name in "bdf"] == [8, 2, 8]
    assert op_of(after, "b") == op_of(trained(8), "b")


# mean errors


@pytest.mark.parametrize("clips", [False, True], ids=["of other levels", "of clips"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_no_channel_has_a_mean_error_before_or_behind_any_activation(steps, clips):
    given, x = trained(8), images(40)
    if clips:
        zero = Array.of([0.0])
        lines = [
            (n.result, Clip(zero, n.op.threshold) if isinstance(n.op, Qcfs) else n.op, *n.operands) for n in given.nodes
        ]
        given = network(*lines)
    after = run(given, f"calibrate-qcfs{{steps={steps}}}", x)
    for before, activation in ("ab", "cd", "ef"):
        op = op_of(after, activation)
        psi = 0 if op.psi is None else op.psi.values
        np.testing.assert_allclose(means(after, x, before) + psi, means(given, x, before), atol=1e-12)
        phi = np.zeros(1) if op.phi is None else op.phi.values
        free = (means(after, x, activation) > 0) & (phi < (steps - 1) * op.threshold.values)  # a spike is at most theta
        assert free.any() or steps == 1
        wanted = means(given, x, activation)
        np.testing.assert_allclose(means(after, x, activation)[free], wanted[free], atol=1e-12)
        assert (means(after, x, activation) <= wanted + 1e-12).all()
    assert op_of(after, "b").psi is None  # nothing in front of it differs


def test_the_published_rule_leaves_a_mean_error_as_large_as_phi():
    """E[q] = 0.5 at two steps, and 0.6 in the given network."""
    x = np.array([[0.6], [0.6]])
    paper = run(identity(10), "calibrate-qcfs{steps=2, update=paper}", x)
    (phi,) = op_of(paper, "b").phi.values
    assert phi == pytest.approx(0.1 / 1.5)
    assert means(identity(10), x, "b") - means(paper, x, "b") == pytest.approx(phi)
    integrating = run(identity(10), "calibrate-qcfs{steps=2}", x)
    assert op_of(integrating, "b").phi.values == pytest.approx([0.2])
    assert means(integrating, x, "b") == pytest.approx([0.6])


def test_a_channel_that_never_spikes_keeps_phi_0_and_is_named():
    module = network(("a", Linear(Array.of(np.eye(3))), "x"), ("b", Qcfs(8, ONE), "a"), shape=(3,))
    x = np.array([[0.2, 0.9, 0.1], [0.15, 0.3, 0.2]])
    op = op_of(run(module, "calibrate-qcfs{steps=2}", x), "b")
    assert op.phi.values[[0, 2]].tolist() == [0, 0]
    assert op.phi.values[1] != 0
    told = noted(module, "calibrate-qcfs{steps=2}", x)
    assert told == "note[E-PHI-DEAD]: %b: channels 0, 2 never spike at T = 2, so phi = 0"
    assert noted(module, "calibrate-qcfs{steps=2}", 4 * x) == ""
    wide = network(("a", Linear(Array.of(np.eye(12))), "x"), ("b", Qcfs(8, ONE), "a"), shape=(12,))
    told = noted(wide, "calibrate-qcfs{steps=2}", np.full((2, 12), 0.1))
    assert "channels 0, 1, 2, 3, 4, 5, 6, 7 and 4 more never spike" in told


def test_signed_activations_get_psi_alone():
    after = run(trained(8, signed=True), "calibrate-qcfs{steps=2}", images(20))
    for name in "bdf":
        assert op_of(after, name).signed
        assert op_of(after, name).phi is None
    assert op_of(after, "d").psi is not None


def test_channels_that_mix_share_one_phi():
    layers = [("a", conv(2), "x"), ("b", Qcfs(8, ONE), "a"), ("p", Permute((1, 0, 2)), "b")]
    after = run(network(*layers, ("c", conv(2, 3, kernel=1), "p")), "calibrate-qcfs{steps=2}", images(20))
    assert op_of(after, "b").phi.values.shape == (1,)


# joint order


# weights


def planted(rng: np.random.Generator, op: Conv2d | Linear) -> Conv2d | Linear:
    """Other weights and a bias."""
    outputs = len(op.weight.values)
    return attrs.evolve(
        op, weight=Array.of(rng.standard_normal(op.weight.values.shape)), bias=Array.of(rng.standard_normal(outputs))
    )


@pytest.mark.parametrize(
    ("shape", "weight", "fields"),
    [
        ((3, 6, 7), (4, 3, 3, 2), {"padding": (1, 0, 2, 1), "stride": (2, 1)}),
        ((4, 7, 6), (6, 2, 2, 3), {"groups": 2, "dilation": (2, 1)}),
        ((5, 6, 6), (5, 1, 3, 3), {"groups": 5, "padding": (1, 1, 1, 1)}),
        ((7,), (3, 7), {}),
    ],
    ids=["strided", "grouped and dilated", "depthwise", "linear"],
)
@pytest.mark.parametrize("parts", [1, 9], ids=["in one part", "a sample a part"])
def test_a_linear_miss_is_made_up_for_whatever_the_window(shape, weight, fields, parts):
    rng = np.random.default_rng(3)
    op = (Linear if len(shape) == 1 else Conv2d)(Array.of(rng.standard_normal(weight)), **fields)
    node = network(("a", op, "x"), shape=shape).nodes[0]
    more, x = planted(rng, op), rng.standard_normal((36, *shape))
    whole = op.apply(x, real=True)
    sums = np.repeat(whole, 2, axis=0)
    sums[0::2] += more.apply(x, real=True)
    cut = [np.array(part) for part in np.split(sums, parts)]
    made = refitted(node, np.split(x, parts), cut, rectified=False)
    assert made is not None
    np.testing.assert_allclose(made.op.weight.values, op.weight.values + more.weight.values, atol=2e-3)
    np.testing.assert_allclose(made.op.bias.values, more.bias.values, atol=2e-3)
    np.testing.assert_allclose(np.concatenate(cut)[1::2], made.op.apply(x, real=True), atol=1e-12)


def test_noise_that_one_half_of_the_samples_cannot_foretell_leaves_the_weights():
    rng = np.random.default_rng(5)
    op = Linear(Array.of(rng.standard_normal((2, 30))))
    node = network(("a", op, "x"), shape=(30,)).nodes[0]
    x = rng.standard_normal((40, 30))
    sums = np.repeat(op.apply(x, real=True), 2, axis=0)
    sums[0::2] += rng.standard_normal((40, 2))
    made = refitted(node, [x], [sums.copy()], rectified=False)
    assert made is not None
    assert np.abs(made.op.weight.values - op.weight.values).max() < 0.1  # a plain fit would move them by 0.4
    means_missed = (sums[0::2] - sums[1::2]).mean(axis=0)
    np.testing.assert_allclose(made.op.bias.values, means_missed, atol=0.1)


def test_where_both_networks_stay_silent_a_rectified_sum_misses_nothing():
    """Of two inputs one drives both sums far below 0, by different amounts: that must not cost the other one."""
    op = Linear(Array.of([[1.0, -8.0]]))
    node = network(("a", op, "x"), shape=(2,)).nodes[0]
    rng = np.random.default_rng(6)
    x = np.stack([rng.uniform(0, 1, 200), rng.integers(0, 2, 200)], axis=1)
    own = op.apply(x, real=True)
    given = 1.2 * x[:, :1] - 8.0 * x[:, 1:] - 30 * x[:, 1:] * rng.uniform(0, 1, (200, 1))
    errors = []
    for rectified in (False, True):
        sums = np.empty((400, 1))
        sums[0::2], sums[1::2] = given, own
        refitted(node, [x], [sums], rectified=rectified)
        errors.append(float(((np.maximum(sums[0::2], 0) - np.maximum(sums[1::2], 0)) ** 2).sum()))
    assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("samples", [1, 2])
def test_nothing_is_fitted_where_nothing_is_missed_or_one_sample_is_all(samples):
    op = Linear(Array.of([[1.0, 2.0]]))
    node = network(("a", op, "x"), shape=(2,)).nodes[0]
    x = np.ones((samples, 2))
    sums = np.repeat(op.apply(x, real=True), 2, axis=0)
    if samples == 1:
        sums[0] += 1
    assert refitted(node, [x], [sums], rectified=False) is None


def test_refitted_weights_bring_sums_nearer_and_spare_what_nothing_was_missed_at():
    given, x = trained(8), images(60)
    kept, refit = (run(given, f"calibrate-qcfs{{steps=2, weights={w}}}", x) for w in ("keep", "refit"))
    assert op_of(refit, "a") == op_of(given, "a")
    assert all(op_of(kept, name) == op_of(given, name) for name in "aceg")
    for name in "ceg":
        assert op_of(refit, name) != op_of(given, name)
        far, near = (squares(after, given, x, name) for after in (kept, refit))
        assert near < far


def squares(module: Module, given: Module, x: Reals, name: str) -> float:
    """How far a value is from the given network's."""
    a, b = (np.asarray(interpreter.run(m, x, name)[name], dtype=np.float64) for m in (module, given))
    return float(((a - b) ** 2).sum())


def test_a_branch_that_is_added_is_made_up_for_too():
    """Behind the skip the sum of both is met, though only one branch has weights there."""
    given = network(
        ("a", conv(3), "x"),
        ("b", Qcfs(9, Array.of([2.0])), "a"),
        ("c", conv(3, 3, kernel=1, seed=4), "b"),
        ("d", Qcfs(9, Array.of([2.0])), "c"),
        ("e", conv(3, 3, kernel=1, seed=8), "d"),
        ("s", Add(), "e b"),
        ("f", Qcfs(9, Array.of([3.0])), "s"),
        ("g", conv(2, 3, kernel=1, seed=9), "f"),
    )
    assert {place: node.result for place, node in sites(given).items()} == {"a": "a", "c": "c", "s": "e", "g": "g"}
    x = images(60)
    kept, refit = (run(given, f"calibrate-qcfs{{steps=2, weights={w}}}", x) for w in ("keep", "refit"))
    assert squares(refit, given, x, "s") < squares(kept, given, x, "s")


def test_layers_that_are_not_asked_for_keep_their_weights():
    after = run(trained(8), 'calibrate-qcfs{steps=2, weights=refit, layers="net.d|net.e"}', images())
    assert [name for name in "aceg" if op_of(after, name) != op_of(trained(8), name)] == ["e"]


def test_a_sum_of_a_layer_with_itself_is_met_where_it_stands_once():
    given = network(
        ("a", conv(3), "x"),
        ("b", Qcfs(9, Array.of([2.0])), "a"),
        ("c", conv(3, 3, kernel=1, seed=4), "b"),
        ("s", Add(), "c c"),
        ("d", Qcfs(9, Array.of([3.0])), "s"),
        ("e", conv(2, 3, kernel=1, seed=9), "d"),
    )
    x = images(60)
    after = run(given, "calibrate-qcfs{steps=2, weights=refit}", x)
    psi = op_of(after, "d").psi
    shift = 0 if psi is None else psi.values
    np.testing.assert_allclose(means(after, x, "s") + shift, means(given, x, "s"), atol=1e-12)


def test_two_weighted_branches_are_fitted_one_at_its_own_result_and_a_sum_that_is_read_twice_where_it_stands():
    given = network(
        ("a", conv(3), "x"),
        ("b", Qcfs(9, Array.of([2.0])), "a"),
        ("c", conv(3, 3, kernel=1, seed=4), "b"),
        ("d", conv(3, 3, kernel=1, seed=5), "b"),
        ("s", Add(), "c d"),
        ("f", Qcfs(9, Array.of([3.0])), "s"),
        ("g", conv(3, 3, kernel=1, seed=9), "f"),
        ("h", Relu(), "g"),
        ("i", Add(), "g h"),
        ("unread", conv(3, 3, kernel=1, seed=9), "f"),
    )
    assert {p: n.result for p, n in sites(given).items()} == {
        "a": "a", "c": "c", "s": "d", "g": "g", "unread": "unread"
    }  # fmt: skip
    whole = attrs.evolve(op_of(run(identity(2), "canonicalize"), "a"), weight=Array.of([[1]]), weight_scale=ONE)
    assert sites(network(("a", whole, "x"), shape=(1,))) == {}


@pytest.mark.parametrize("gain", [Array.of([2.0]), Array.of([-2.0])], ids=["gained", "turned"])
def test_only_sums_that_a_rectifier_reads_are_fitted_as_such(gain, monkeypatch):
    seen = {}

    def watched(node, operand, sums, *, rectified):
        seen[node.result] = rectified
        return refitted(node, operand, sums, rectified=rectified)

    monkeypatch.setattr("spir.passes.calibrate_qcfs.refitted", watched)
    given = network(
        ("a", conv(3), "x"),
        ("b", Qcfs(9, Array.of([2.0])), "a"),
        ("c", conv(3, 3, kernel=1, seed=4), "b"),
        ("k", Scaling(gain), "c"),
        ("d", Qcfs(9, Array.of([2.0])), "k"),
        ("e", conv(3, 3, kernel=1, seed=5), "d"),
        ("f", Qcfs(9, Array.of([2.0]), signed=True), "e"),
        ("g", conv(2, 3, kernel=1, seed=6), "f"),
    )
    run(given, "calibrate-qcfs{steps=2, weights=refit}", images(30))
    assert seen == {"a": True, "c": gain.values[0] > 0, "e": False, "g": False}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("steps=2, order=joint, weights=refit", "order=joint fits no weights"),
        ("steps=2, weights=refit", "weights are fitted to data"),
    ],
)
def test_weights_are_fitted_one_layer_after_the_other_and_on_data(options, text):
    data = images() if "joint" in options else None
    assert text in str(refusal(trained(8), f"calibrate-qcfs{{{options}}}", data))


def test_a_layer_of_very_many_inputs_keeps_its_weights_and_is_named(monkeypatch):
    monkeypatch.setattr("spir.passes.calibrate_qcfs.WIDEST", 2)
    x = images(20)
    notes = noted(trained(8), "calibrate-qcfs{steps=2, weights=refit}", x)
    assert "%c keeps its weights: 3 inputs of an output, 2 are fitted" in notes
    after = run(trained(8), "calibrate-qcfs{steps=2, weights=refit}", x)
    assert [n for n in "aceg" if op_of(after, n) != op_of(trained(8), n)] == ["e"]


def test_errors_are_measured_against_all_that_a_calibrated_range_had_before():
    """Many values below 4 and one of 10: the clip of least error stands below 10, and the target does not."""
    x = np.array([[0.1 * i] for i in range(1, 40)] + [[10.0]])
    module = network(("a", Linear(Array.of([[1.0]])), "x"), ("b", Relu(), "a"), shape=(1,))
    ranged = run(module, "calibrate-range{method=mse, levels=4}", x)
    clip = op_of(ranged, "b")
    assert clip.hi.values < clip.reach.values == 10.0
    after = run(ranged, "calibrate-qcfs{steps=4}", x)
    wide = attrs.evolve(clip, hi=clip.reach, reach=None)
    relu = run(replaced(ranged, "b", wide), "calibrate-qcfs{steps=4}", x)
    narrow = run(replaced(ranged, "b", attrs.evolve(clip, reach=None)), "calibrate-qcfs{steps=4}", x)
    assert op_of(after, "b").threshold == clip.hi != op_of(relu, "b").threshold
    assert op_of(after, "b").phi.values > op_of(narrow, "b").phi.values


def replaced(module: Module, name: str, op: Op) -> Module:
    return attrs.evolve(module, nodes=tuple(attrs.evolve(n, op=op) if n.result == name else n for n in module.nodes))


def hand_written(module: Module, x: Reals, steps: int, batch: int, epochs: int) -> dict[str, tuple[Reals, Reals]]:
    """Algorithm 1 on `a = W x + bias; b = QCFS(a); c = V b; d = QCFS(c)`: (psi, phi) of both activations."""
    a, b, c, d = (op_of(module, name) for name in "abcd")
    state = {
        name: [np.zeros(len(op.weight.values)), np.zeros(len(op.weight.values))]
        for name, op in zip("bd", (a, c), strict=True)
    }

    def steps_of(value, levels, theta):
        return np.clip(np.floor(value * levels / theta + 0.5), 0, levels) / levels

    for _ in range(epochs):
        for start in range(0, len(x), batch):
            part = x[start : start + batch]
            ref = own = part
            for layer, op, name in ((a, b, "b"), (c, d, "d")):
                theta, (psi, phi) = op.threshold.values, state[name]
                ref, own = (v @ layer.weight.values.T + layer.bias.values for v in (ref, own))
                psi += 0.01 * ((ref - own).mean(axis=0) - psi)
                target = theta * steps_of(ref, op.levels, theta)
                made = (theta + phi) * steps_of(own + psi, steps, theta)
                phi += 0.01 * ((target - made).mean(axis=0) - phi)
                ref, own = target, (theta + phi) * steps_of(own + psi, steps, theta)
    return {name: (psi, phi) for name, (psi, phi) in state.items()}


def dense() -> Module:
    return network(
        ("a", linear(5, 4, bias=Array.of([0.5, 0.2, -0.1, 0.4, 0.9])), "x"),
        ("b", Qcfs(8, Array.of([2.0])), "a"),
        ("c", linear(3, 5, seed=9, bias=Array.of([0.5, 0.7, 0.9])), "b"),
        ("d", Qcfs(8, Array.of([2.5])), "c"),
        shape=(4,),
    )


def test_joint_order_with_the_published_rule_is_algorithm_1():
    x = images(24, (4,))
    after = run(dense(), "calibrate-qcfs{steps=2, order=joint, update=paper, batch=6, epochs=3}", x)
    for name, (psi, phi) in hand_written(dense(), x, 2, 6, 3).items():
        op = op_of(after, name)
        found = [np.zeros_like(psi) if array is None else array.values for array in (op.psi, op.phi)]
        np.testing.assert_allclose(found[0], psi, atol=1e-13)
        np.testing.assert_allclose(found[1], phi, atol=1e-13)
        assert np.abs(phi).max() > 1e-4


def test_joint_order_comes_to_the_psi_of_the_sequential_one():
    """In one batch, as often as momentum needs to forget where it began."""
    x = images(30, (4,))
    slow = run(dense(), "calibrate-qcfs{steps=2, order=joint, batch=30, epochs=900}", x)
    quick = run(dense(), "calibrate-qcfs{steps=2}", x)
    spread = means(dense(), x, "c").std()
    for op in (slow, quick):
        error = means(op, x, "c") + op_of(op, "d").psi.values - means(dense(), x, "c")
        assert np.abs(error).max() < 0.02 * spread
    np.testing.assert_allclose(means(slow, x, "b"), means(dense(), x, "b"), atol=0.02)


# determinism


@pytest.mark.parametrize("options", ["", ", order=joint, batch=8", ", update=paper"])
def test_results_do_not_depend_on_how_the_data_are_cut(monkeypatch, options):
    passes, x = f"calibrate-qcfs{{steps=2{options}}}", images(21)
    whole, again = run(trained(), passes, x), run(trained(), passes, x)
    assert whole == again
    monkeypatch.setattr(driver, "CHUNK_BYTES", 1)
    cut = run(trained(), passes, x)
    for name in "bdf":
        for field in ("psi", "phi"):
            a, b = (getattr(op_of(m, name), field) for m in (whole, cut))
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                np.testing.assert_allclose(a.values, b.values, atol=1e-12)


# refusals


def test_all_relus_without_a_range_are_refused_at_once():
    module = network(("a", conv(2), "x"), ("b", Relu(), "a"), ("c", conv(2, 2, kernel=1), "b"), ("d", Relu(), "c"))
    assert text_of(refusal(module, "calibrate-qcfs", images())) == (
        "error[type]: %b has no range to divide into 4 levels\n"
        "       from: net.b (net.py line 7)\n"
        "       pass: calibrate-qcfs\n"
        "        fix: run calibrate-range before, over the same layers\n"
        "error[type]: %d has no range to divide into 4 levels\n"
        "       from: net.d (net.py line 7)\n"
        "       pass: calibrate-qcfs\n"
        "        fix: run calibrate-range before, over the same layers"
    )


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        ("calibrate-qcfs", "error[data]: calibrate-qcfs needs calibration data"),
        ("calibrate-qcfs{epochs=2}", "error[option]: calibrate-qcfs: order=sequential takes no batch or epochs"),
        ("calibrate-qcfs{batch=2}", "error[option]: calibrate-qcfs: order=sequential takes no batch or epochs"),
        ("calibrate-qcfs{steps=0}", "error[option]: calibrate-qcfs{steps} = 0 is outside 1..65536"),
    ],
)
def test_what_it_cannot_do_it_says(passes, text):
    module = run(network(("a", conv(2), "x"), ("b", Relu(), "a")), "calibrate-range", images())
    assert text in str(refusal(module, passes))


def test_a_network_without_activations_is_refused():
    refused = text_of(refusal(network(("a", conv(2), "x")), "calibrate-qcfs", images()))
    assert "calibrate-qcfs finds no activations of reals with a range" in refused
    assert "fix: run calibrate-range before, over the same layers" in refused


# what it keeps


def test_shifts_that_are_there_stay_where_nothing_is_to_be_corrected():
    module = trained(8, psi=ONE, phi=Array.of([0.5]))
    with warnings.catch_warnings(action="ignore"):
        bare = run(module, "calibrate-qcfs{steps=16}")
    data = images()
    fitted = op_of(run(module, "calibrate-qcfs{steps=4096}", data), "b")
    np.testing.assert_array_equal(op_of(bare, "b").psi.values, 1.0)
    np.testing.assert_array_equal(op_of(bare, "b").phi.values, 0.5)
    np.testing.assert_allclose(fitted.psi.values, 1.0, atol=1e-12)
    np.testing.assert_allclose(fitted.phi.values, 0.5, atol=0.05)


def test_without_data_no_channel_is_called_silent():
    with warnings.catch_warnings(action="ignore"):
        assert "E-PHI-DEAD" not in noted(trained(8), "calibrate-qcfs{steps=4}", None)


@pytest.mark.parametrize("ends", [(-1.0, 3.0), (-2.0, 0.0), (0.5, 3.0)])
def test_a_range_beside_zero_is_refused(ends):
    clip = Clip(*(Array.of([end]) for end in ends))
    found = refusal(network(("a", conv(2), "x"), ("b", clip, "a")), "calibrate-qcfs", images())
    assert "run calibrate-range before" in str(found)


def test_thresholds_of_channels_that_mix_are_refused_by_the_pass_that_would_fold_them():
    each = Qcfs(8, Array.of([1.0, 2.0, 3.0]))
    module = network(
        ("a", conv(3), "x"), ("b", each, "a"), ("c", Permute((1, 0, 2)), "b"), ("d", conv(2, 3, kernel=1), "c")
    )
    assert len(op_of(run(module, "calibrate-qcfs{steps=4}", images()), "b").threshold.values) == 3
