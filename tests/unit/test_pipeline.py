"""Pipeline text reads back as itself, mistakes are shown with a caret, and the journal says what ran."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import ClassVar

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spir import batches, driver, interpreter, measure, pipeline, probes
from spir.contracts import Bounded, Calibrated, Exact
from spir.discovery import find, names
from spir.errors import SpirError, error
from spir.ir import Array, Module, Node, Origin, Value, infer
from spir.ops.conv2d import Conv2d
from spir.ops.quantize import Quantize as QuantizeOp
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.options import build, fields, option
from spir.pipeline import parse, resolve, spell
from spir.rewriting import Pass
from spir.store import from_bytes
from spir.text import parse as parse_module
from spir.types import Current, Int, Real, Scale, Spikes, Tensor
from spir.verify import verify

# --- text in, passes out ------------------------------------------------------------------------------------------


def values_of(attribute, hint) -> st.SearchStrategy:
    """Every kind of value that an option takes."""
    meta, kinds = attribute.metadata, []
    if meta["one_of"]:
        return st.sampled_from(meta["one_of"])
    if "bool" in hint:
        kinds.append(st.booleans())
    if "int" in hint:
        kinds.append(st.integers(meta["ge"], meta["le"]))
    if "float" in hint:
        kinds.append(st.floats(meta["ge"], meta["le"]))
    if "str" in hint:
        kinds.append(st.text(max_size=12) | st.sampled_from(["on", "none", "3", "layer3.*", 'a"b\\', "# no comment"]))
    if "None" in hint:
        kinds.append(st.none())
    return st.one_of(kinds)


@st.composite
def any_pass(draw) -> Pass:
    owner = find("passes", draw(st.sampled_from(names("passes"))))
    hints = {a.name: str(a.type) for a in attrs.fields(owner)}
    known = fields(owner)
    chosen = draw(st.sets(st.sampled_from(sorted(known))))
    return build(owner, {name: draw(values_of(known[name], hints[name])) for name in sorted(chosen)})


@given(st.lists(any_pass(), max_size=4), st.booleans())
def test_a_printed_pipeline_parses_to_the_same_passes(steps, every):
    text = spell(steps, every=every)
    assert parse(text) == tuple(steps)
    assert spell(parse(text), every=every) == text


def passes_or_error(text: str) -> tuple[Pass, ...] | SpirError:
    try:
        return parse(text)
    except SpirError as refusal:
        return refusal


@given(st.text(st.sampled_from('abz-_@{}=,"\\#\n .019e"٣on'), max_size=30) | st.text(max_size=12))
def test_only_a_spir_error_comes_out_of_any_text(text):
    found = passes_or_error(text)
    if isinstance(found, tuple):
        assert resolve(spell(found)) == found
    else:
        assert found.code in ("pipeline", "name", "option")
        assert "at: line " in str(found)


def test_comments_newlines_and_a_trailing_comma_change_nothing():
    text = """
        fold-bn,                 # exact up to rounding
        quantize {               # of all layers
            bits = 4, weights=none,
        },
    """
    assert parse(text) == parse("fold-bn, quantize{bits=4}")


def test_no_passes_is_a_pipeline():
    assert parse("") == parse(" # nothing\n") == ()


@pytest.mark.parametrize(
    ("written", "value"),
    [("layer3.*", "layer3.*"), ("# no comment", "# no comment"), ("a|b", "a|b"), ('\\"\\\\', '"\\'), ("\\u00e9", "é")],
)
def test_a_string_reads_as_json_does(written, value):
    assert parse(f'fold-bn{{layers="{written}"}}')[0].layers == value


def test_a_word_may_hold_dots_and_hyphens():
    assert parse("fold-bn{layers=layer1.0.conv-2}")[0].layers == "layer1.0.conv-2"


def test_none_is_the_value_that_is_not_there():
    assert parse("quantize{weights=none}")[0].weights is None
    assert parse('fold-bn{layers="none"}')[0].layers == "none"


def test_on_and_off_are_truth_values():
    (_, values, _), *_ = pipeline.settings("a{b=on, c=off, d=true, e=false}")
    assert values == {"b": True, "c": False, "d": True, "e": False}


@pytest.mark.parametrize(("written", "value"), [("8", 8), ("-3", -3), ("0.5", 0.5), ("1e2", 100.0), ("1e-07", 1e-7)])
def test_a_number_keeps_its_kind(written, value):
    (_, values, _), *_ = pipeline.settings(f"a{{b={written}}}")
    assert (values["b"], type(values["b"])) == (value, type(value))


def test_a_recipe_expands_to_its_passes_in_place():
    stem = "canonicalize, fold-bn, calibrate-range, quantize{bits=4}, propagate-scales, derive-thresholds, fuse-neuron"
    assert spell(parse("@stem{bits=4}")) == stem
    assert spell(parse("fold-bn, @stem{bits=4}, fold-bn")) == f"fold-bn, {stem}, fold-bn"


def test_an_option_of_a_recipe_that_is_left_out_drops_its_clause():
    recipe = find("recipes", "stem")
    assert build(recipe, {}).pipeline() == (
        "canonicalize, fold-bn, calibrate-range, quantize{bits=8}, propagate-scales, derive-thresholds{neuron=stem}, "
        "fuse-neuron"
    )
    full = {"bits": 4, "weights": 6, "range": "percentile", "percentile": 99.5, "join": "rescale"}
    assert build(recipe, full).pipeline() == (
        "canonicalize, fold-bn, calibrate-range{method=percentile, percentile=99.5}, quantize{bits=4, weights=6}, "
        "propagate-scales{join=rescale}, derive-thresholds{neuron=stem}, fuse-neuron"
    )


def test_a_list_of_texts_and_passes_is_a_pipeline():
    fold, quantize = parse("fold-bn, quantize{bits=4}")
    assert resolve(["fold-bn", quantize, "@stem"]) == (fold, quantize, *parse("@stem"))
    assert resolve(iter([fold])) == (fold,)


# --- mistakes in the text -----------------------------------------------------------------------------------------

MISTAKES = {
    "quantize{bits=8} fold-bn": """\
error[pipeline]: did not expect 'fold-bn'
         at: line 1
             quantize{bits=8} fold-bn
                              ^""",
    "fold-bn,\nquantize{bits}": """\
error[pipeline]: did not expect '}'
         at: line 2
             quantize{bits}
                          ^
        fix: expected '='""",
    "quantize{bits=8": """\
error[pipeline]: did not expect the end of the text
         at: line 1
             quantize{bits=8
                            ^
        fix: expected ',' or '}'""",
    "fold-bn ; quantize": """\
error[pipeline]: did not expect ';'
         at: line 1
             fold-bn ; quantize
                     ^
        fix: expected ',' or '{'""",
    "fold-bn, quantise{bits=8}": """\
error[name]: there is no pass 'quantise'
         at: line 1
             fold-bn, quantise{bits=8}
                      ^
        fix: did you mean 'quantize'?""",
    "quantize{bit=8}": """\
error[option]: there is no option of quantize called 'bit'
         at: line 1
             quantize{bit=8}
             ^
        fix: did you mean 'bits'?""",
    "fold-bn,\n  quantize{bits=17}": """\
error[option]: quantize{bits} = 17 is outside 2..16
         at: line 2
               quantize{bits=17}
               ^
        fix: bits of activations, and of weights unless `weights` says otherwise; take one of 2..16""",
    "quantize{bits=on}": """\
error[option]: quantize{bits} takes int, not on
         at: line 1
             quantize{bits=on}
             ^
        fix: bits of activations, and of weights unless `weights` says otherwise""",
    "quantize{bits=8, bits=8}": """\
error[option]: quantize is given bits twice
         at: line 1
             quantize{bits=8, bits=8}
                              ^""",
    "calibrate-range{method=mean}": """\
error[option]: there is no value of calibrate-range{method} called 'mean'
         at: line 1
             calibrate-range{method=mean}
             ^
        fix: one of: max, mse, percentile""",
    "@stm": """\
error[name]: there is no recipe 'stm'
         at: line 1
             @stm
             ^
        fix: did you mean 'stem'?""",
    "fold-bn, @stem{bits=1}": """\
error[option]: stem{bits} = 1 is outside 2..16
         at: line 1
             fold-bn, @stem{bits=1}
                      ^
        fix: bits of activations and weights; also the frames of a train; take one of 2..16""",
    'fold-bn{layers="\\q"}': """\
error[pipeline]: a string that does not read: invalid \\escape
         at: line 1
             fold-bn{layers="\\q"}
                            ^
        fix: write strings as JSON does: \\\\ is a backslash""",
    "quantize{bits=1e999}": """\
error[pipeline]: a number beyond all options
         at: line 1
             quantize{bits=1e999}
                           ^
        fix: a smaller number""",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_shown_with_its_place_and_the_way_out(text):
    with pytest.raises(SpirError) as caught:
        parse(text)
    assert str(caught.value)[: len(MISTAKES[text])] == MISTAKES[text]


@pytest.mark.parametrize("text", ['fold-bn{layers="a\tb"}', "quantize{bits=" + "9" * 5000 + "}"])
def test_what_json_and_int_refuse_is_refused_with_its_place(text):
    with pytest.raises(SpirError) as caught:
        parse(text)
    assert caught.value.code == "pipeline"
    assert "at: line 1" in str(caught.value)


def test_all_mistakes_of_one_pass_are_shown_at_once():
    with pytest.raises(SpirError) as caught:
        parse("quantize{bits=1, weights=1, colour=red}")
    assert len(caught.value.diagnostics) == 3


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (3, "a pipeline is text, or a list of texts and passes, not int"),
        (parse("fold-bn")[0], "a pipeline is text, or a list of texts and passes, not FoldBn"),
        ([3], "a pipeline holds texts and passes, not int"),
        (["fold-bn", None], "a pipeline holds texts and passes, not NoneType"),
    ],
)
def test_what_is_no_pipeline_is_refused(passes, message):
    with pytest.raises(SpirError) as caught:
        resolve(passes)
    assert str(caught.value) == f"error[usage]: {message}"


# --- running ------------------------------------------------------------------------------------------------------


def network(*scales: float, type_: Tensor | None = None) -> Module:
    """x times each of the scales in turn; the results are called a, b, ..."""
    source = Value("x", type_ or Tensor((2, 3), Real()))
    nodes, types, name = [], {"x": source.type}, "x"
    for result, factor in zip("abcdef", scales, strict=False):
        op = Scaling(Array.of([factor]))
        types[result] = infer(op, (types[name],))
        nodes.append(Node(result, op, (name,), types[result]))
        name = result
    return verify(Module(source, tuple(nodes), name))


def context(data=None, seed=0) -> driver.Context:
    return driver.Context(data, seed)


@attrs.frozen
class Shift(Pass):
    """scale{factor} -> scale{factor + by}, under any promise."""

    name: ClassVar[str] = "shift"
    by: float = option(0.0, "what is added to each factor")
    promise: str = option("exact", "which contract", one_of=("exact", "tight", "measured", "calibrated"))

    def contract(self):
        return {"exact": Exact(), "tight": Bounded(0.01), "measured": Bounded(), "calibrated": Calibrated()}[
            self.promise
        ]

    def rewrite(self, node, rewriter):
        op = Scaling(Array.of(node.op.factor.values + (int(self.by) if node.op.factor.integral else self.by)))
        return rewriter.emit(op, *map(rewriter.now, node.operands), name=node.result, origin=node.origin)


def broken(step: Pass, module: Module, *, data=None, seed=0) -> SpirError:
    with pytest.raises(SpirError) as caught:
        pipeline.run(module, (step,), context(data, seed))
    return caught.value


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """Where reproducers go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_the_journal_holds_each_pass_with_all_its_options_its_contract_and_its_probes():
    outcome = pipeline.run(network(2.0, 4.0), (Shift(layers="a"), Shift(by=0.001, promise="tight")), context())
    first, second = outcome.journal
    assert first.step == "shift{layers=a, by=0.0, promise=exact}"
    assert (first.contract, first.largest, first.relative) == ("exact", 0.0, 0.0)
    assert first.checked == "7 probes (2 corners, 2 range ends, 2 random, 1 out of range)"
    assert first.before == first.after == {"scale": 2}
    assert second.contract == "bounded(0.01 relative)"
    assert second.value == "b"
    assert second.relative == pytest.approx(2.001 * 4.001 / 8 - 1)
    assert second.seconds > 0
    assert [stage.name for stage in outcome.stages] == ["shift", "shift"]
    assert outcome.stages[-1].module is outcome.module


def test_the_journal_counts_ops_before_and_after():
    steps = parse("canonicalize")
    (entry,) = pipeline.run(network(1.0, 2.0), steps, context()).journal
    assert (entry.before, entry.after) == ({"scale": 2}, {"scale": 1})


def test_an_exact_pass_that_changes_a_value_by_one_is_caught():
    integers = network(1, 1, type_=Tensor((2,), Int(-100, 100, Scale.of(0.5))))
    refusal = broken(Shift(by=1.0, layers="a"), integers)
    assert refusal.code == "contract"
    text = str(refusal)
    assert text.startswith("error[contract]: shift promises exact, and %b changed by 50 of 50\n")
    assert "checked: 6 probes" in text
    assert "pass: shift{layers=a, by=1.0}" in text
    assert "fix: this is a bug of the pass: the reproducer shows it" in text


@attrs.frozen
class OffByOne(Pass):
    """scale -> scale, then a quantiser that rounds the other way: one code off at ties alone."""

    name: ClassVar[str] = "off-by-one"

    def contract(self):
        return Exact()

    def rewrite(self, node, rewriter):
        if not isinstance(node.op, QuantizeOp):
            return None
        nearly = rewriter.emit(
            Scaling(Array.of([1 - 1e-12])), node.operands[0], name=rewriter.fresh("nearly"), origin=node.origin
        )
        return rewriter.emit(node.op, nearly, name=node.result, origin=node.origin)


def test_a_tie_that_goes_the_other_way_is_caught():
    x = Value("x", Tensor((4, 4), Real()))
    op = QuantizeOp(0.25, 0, 255)
    module = verify(Module(x, (Node("q", op, ("x",), infer(op, (x.type,))),), "q"))
    refusal = broken(OffByOne(), module, data=np.linspace(0, 9.9, 64).reshape(4, 4, 4))
    assert refusal.code == "contract"
    assert "%q changed by 0.25 of " in str(refusal)


@pytest.mark.parametrize("by", [0.02, -0.02])
def test_a_bounded_pass_beyond_its_bound_is_caught(by):
    refusal = broken(Shift(by=by, promise="tight"), network(1.0))
    assert "shift promises bounded(0.01 relative), and %a changed by " in str(refusal)


@pytest.mark.parametrize("promise", ["tight", "measured", "calibrated"])
def test_a_change_within_the_promise_is_measured(promise):
    (entry,) = pipeline.run(network(1.0), (Shift(by=0.005, promise=promise),), context()).journal
    assert entry.relative == pytest.approx(0.005)


@attrs.frozen
class Renamed(Pass):
    """scale{factor} -> scale{2 factor} under a new name."""

    name: ClassVar[str] = "renamed"

    def contract(self):
        return Exact()

    def rewrite(self, node, rewriter):
        op = Scaling(Array.of(node.op.factor.values * 2))
        return rewriter.emit(op, node.operands[0], name=rewriter.fresh("fresh"), origin=node.origin)


def test_an_output_that_changes_under_a_new_name_is_caught():
    assert "%a changed by " in str(broken(Renamed(), network(1.0)))


@attrs.frozen
class Flattened(Pass):
    """The output in another shape, under its old name."""

    name: ClassVar[str] = "flattened"

    def contract(self):
        return Exact()

    def rewrite(self, node, rewriter):
        return rewriter.emit(find("ops", "flatten")(), node.operands[0], name=node.result, origin=node.origin)


def test_a_kept_name_of_another_shape_is_caught():
    assert "%a changed by inf of " in str(broken(Flattened(), network(1.0)))


@attrs.frozen
class IllTyped(Pass):
    """The same nodes, with types that nobody inferred."""

    name: ClassVar[str] = "ill-typed"

    def contract(self):
        return Exact()

    def run(self, module, context):
        wrong = Tensor((9,), Real())
        return attrs.evolve(module, nodes=tuple(attrs.evolve(n, type=wrong) for n in module.nodes))


def test_an_ill_typed_module_is_caught():
    refusal = broken(IllTyped(), network(1.0))
    assert refusal.code == "type"
    assert "%a is tensor<2x3, real>, and the module says tensor<9, real>" in str(refusal)
    assert "pass: ill-typed" in str(refusal)


def test_types_are_verified_even_where_contracts_are_not_checked():
    with pytest.raises(SpirError, match="the module says"):
        pipeline.run(network(1.0), (IllTyped(),), context(), checked=False)


def test_contracts_that_are_not_checked_let_a_broken_pass_through():
    outcome = pipeline.run(network(1.0), (Shift(by=5.0),), context(), checked=False)
    (entry,) = outcome.journal
    assert (entry.checked, entry.largest, entry.relative, entry.value) == ("not checked", None, None, "")


# --- on data ------------------------------------------------------------------------------------------------------

INNER = "off-by-one, where no probe looks: only a sample that lies on a tie of the inner quantiser shows it"


def inner_quantiser() -> Module:
    """x * 1, then codes in steps of 0.25: probes know the ties of quantisers that read the input alone."""
    x = Value("x", Tensor((2, 3), Real()))
    scaling, op = Scaling(Array.of([1.0])), QuantizeOp(0.25, -8, 7)
    nodes = (Node("a", scaling, ("x",), x.type), Node("q", op, ("a",), infer(op, (x.type,))))
    return verify(Module(x, nodes, "q"))


def samples_with_a_tie() -> np.ndarray:
    """The seventh of eight samples holds one tie."""
    data = np.random.default_rng(0).uniform(-1, 1, (8, 2, 3))
    data[6, 1, 2] = 0.375
    return data


def test_a_sample_on_which_a_promise_fails_is_found_on_data_and_on_no_probe():
    (entry,) = driver.opt(inner_quantiser(), [OffByOne()], data=samples_with_a_tie()).journal
    assert entry.largest == 0, INNER
    with pytest.raises(SpirError) as caught:
        driver.opt(inner_quantiser(), [OffByOne()], data=samples_with_a_tie(), check="data")
    text = str(caught.value)
    assert text.startswith("error[contract]: off-by-one promises exact, and %q changed by 0.25 of 1")
    assert "checked: 8 calibration samples" in text
    command = reproducer_of(caught.value).read_text().splitlines()[0]
    assert command.endswith(" --check data --data THE_SAME")


def test_the_journal_says_that_data_was_checked_and_what_changed_there():
    data = np.full((6, 2, 3), 1.0)
    data[5] = 4.0
    seen: list[str] = []
    steps = [Shift(by=0.005, promise="tight"), Shift(by=0.0625, promise="calibrated")]
    first, second = driver.opt(network(2.0), steps, data=data, check="data", progress=seen.append).journal
    assert first.checked == (
        "11 probes (2 corners, 2 range ends, 2 random, 1 out of range, 4 calibration) and 6 calibration samples"
    )
    assert first.relative == pytest.approx(0.0025)
    assert second.checked == "6 calibration samples"
    assert (second.value, second.largest, second.mean) == ("a", 0.25, 0.0625 * 1.5)
    assert seen == ["shift", "shift: 6 of 6 calibration samples"] * 2


@pytest.mark.parametrize("limit", ["PROBE_BYTES", "DATA_BYTES", "GROUP_BYTES", "MEMORY_BYTES"])
def test_the_journal_does_not_depend_on_what_memory_holds(monkeypatch, limit):
    data = np.random.default_rng(0).uniform(-1, 1, (9, 2, 3))
    steps = (Shift(by=0.5, promise="measured"), Shift(by=0.25, promise="calibrated"), Shift())

    def journal() -> list[pipeline.Entry]:
        found = driver.opt(network(2.0, 4.0, 8.0), steps, data=data, check="data").journal
        return [attrs.evolve(e, seconds=0.0, mean=round(e.mean, 12)) for e in found]

    whole = journal()
    monkeypatch.setattr(measure, limit, 1)
    assert journal() == whole


def test_probes_run_in_batches_that_fit_and_a_module_runs_once_where_it_is_remembered(monkeypatch):
    ran: list[tuple[str, int]] = []
    walk = interpreter.walk

    def watched(module, x, keep="*"):
        ran.append((str(module.nodes[0].op.factor.values[0]), len(x)))
        return walk(module, x, keep)

    monkeypatch.setattr("spir.interpreter.walk", watched)
    module, steps = network(1.0), (Shift(by=1.0, promise="measured"), Shift(by=1.0, promise="measured"))
    pipeline.run(module, steps, context())
    assert ran == [("1.0", 7), ("2.0", 7), ("3.0", 7)]
    ran.clear()
    monkeypatch.setattr(measure, "PROBE_BYTES", 3 * batches.bytes_per_sample(module))
    pipeline.run(module, steps[:1], context())
    assert ran == [("1.0", 3), ("2.0", 3)] * 2 + [("1.0", 1), ("2.0", 1)]
    ran.clear()
    monkeypatch.setattr(measure, "MEMORY_BYTES", 0)
    pipeline.run(module, steps, context())
    assert [factor for factor, _ in ran] == ["1.0", "2.0"] * 3 + ["2.0", "3.0"] * 3


# --- notes --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Telling(Pass):
    """Nothing, and says what it cost."""

    name: ClassVar[str] = "telling"
    times: int = option(1, "how many notes")

    def contract(self):
        return Exact()

    def run(self, module, context):
        for index in range(self.times):
            context.note(f"%{module.output}: {index} neurons")
        return module


def test_the_journal_keeps_the_notes_of_each_pass():
    journal = pipeline.run(network(1.0), (Telling(times=2), Shift(), Telling()), context()).journal
    assert [entry.notes for entry in journal] == [("%a: 0 neurons", "%a: 1 neurons"), (), ("%a: 0 neurons",)]


def test_an_entry_needs_neither_mean_nor_notes():
    given = ("s", "exact", "1 probes", 0.0, 0.0, "v", {}, {}, 1.0)
    assert (pipeline.Entry(*given).mean, pipeline.Entry(*given).notes) == (None, ())


# --- the reproducer -----------------------------------------------------------------------------------------------


def reproducer_of(refusal: SpirError) -> Path:
    (path,) = {n.text for d in refusal.diagnostics for n in d.notes if n.label == "reproducer"}
    return Path(path)


def test_a_reproducer_is_the_module_before_the_pass_and_fails_in_the_same_way(scratch):
    module = network(1.0, 3.0)
    refusal = broken(Shift(by=0.5, layers="b|it's"), module, seed=3)
    path = reproducer_of(refusal)
    assert path.is_relative_to(scratch)
    weights = path.with_suffix(".safetensors")
    read = parse_module(path.read_text(), from_bytes(weights.read_bytes(), weights))
    assert read == module
    command = shlex.split(path.read_text().splitlines()[0].removeprefix("// "))
    passes = 'shift{layers="b|it\'s", by=0.5, promise=exact}'
    assert command == ["spir", "opt", "THIS", "--passes", passes, "--seed", "3"]
    again = broken(Shift(by=0.5, layers="b|it's"), read, seed=3)
    assert str(again) == str(refusal)


def test_the_pipeline_of_a_reproducer_starts_at_the_pass_that_failed():
    @attrs.frozen
    class Refusing(Pass):
        name: ClassVar[str] = "refusing"

        def contract(self):
            return Exact()

        def run(self, module, context):
            raise error("unsupported", "never")

    with pytest.raises(SpirError) as caught:
        pipeline.run(network(1.0, 2.0), (*parse("canonicalize"), Refusing(), *parse("fold-bn")), context())
    path = reproducer_of(caught.value)
    assert '--passes \'refusing{layers="*"}, fold-bn{layers="*"}\'' in path.read_text()
    assert "scale %x " not in path.read_text().split("%b")[0], "canonicalize has dropped the first scale already"


def test_the_passes_named_in_a_reproducer_fail_on_it_again(scratch):
    module = network(1.0)
    steps = parse("canonicalize, derive-thresholds")
    with pytest.raises(SpirError) as caught:
        pipeline.run(module, steps, context())
    path = reproducer_of(caught.value)
    rest = path.read_text().splitlines()[0].split("'")[1]
    with pytest.raises(SpirError) as again:
        driver.opt(parse_module(path.read_text(), module.arrays()), rest)
    assert str(again.value) == str(caught.value)


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_error(tmp_path, monkeypatch):
    (tmp_path / "full").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    text = str(broken(Shift(by=1.0), network(1.0)))
    assert "shift promises exact" in text
    assert "reproducer: could not be written" in text


# --- probes -------------------------------------------------------------------------------------------------------


def test_probes_of_reals_hold_corners_ends_ties_random_and_calibration_samples():
    data = np.random.default_rng(0).uniform(-2, 3, (9, 2, 3))
    made = probes.make(network(1.0), data, (0.25, 0.5), seed=0)
    assert str(made) == ("13 probes (2 corners, 2 range ends, 2 random, 1 out of range, 2 ties, 4 calibration)")
    zero, mixed, low, high, *_ = made.x
    assert not zero.any()
    assert set(np.unique(mixed)) == {data.min(), data.max()}
    assert (low == data.min()).all()
    assert (high == data.max()).all()
    quarter, half = made.x[7], made.x[8]
    assert (quarter / 0.25 % 1 == 0.5).all()
    assert (half / 0.5 % 1 == 0.5).all()
    np.testing.assert_array_equal(made.x[9:], data[:4])
    wide = np.resize(data, (9, 400))
    beyond = probes.make(network(1.0, type_=Tensor((400,), Real())), wide, (), seed=0).x[6]
    assert beyond.max() > data.max()
    assert beyond.min() < data.min()


def test_probes_follow_the_seed():
    a, b, c = (probes.make(network(1.0), None, (), seed).x for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a[4:] != c[4:]).any()


def test_input_scales_are_those_of_the_quantisers_of_the_input():
    x = Value("x", Tensor((2,), Real()))
    ops = (("q", QuantizeOp(0.25, -8, 7), "x"), ("r", Relu(), "x"), ("s", QuantizeOp(0.5, 0, 7), "r"))
    nodes = tuple(Node(n, op, (o,), infer(op, (x.type,))) for n, op, o in ops)
    assert probes.input_scales(Module(x, nodes, "s")) == (0.25,)


CARRIERS = [
    Int(-3, 9, Scale.of(0.5)),
    Int(4, 6, Scale.of(0.5)),
    Spikes(4, "bits", 0, 15, Scale.of(1.0)),
    Spikes(4, "bits", 2, 9, Scale.of(1.0)),
    Spikes(4, "bits", -8, 7, Scale.of(1.0)),
    Spikes(5, "rate", -5, 5, Scale.of(1.0)),
    Spikes(5, "suffix", -3, 5, Scale.of(1.0)),
    Current(3, "bits", -70, 70, -10, 10, Scale.of(1.0)),
    Current(3, "rate", -30, 30, -10, 10, Scale.of(1.0)),
    Current(4, "direct", -40, 40, -10, 10, Scale.of(1.0)),
]


@pytest.mark.parametrize("encoding", CARRIERS, ids=str)
def test_probes_of_an_integer_input_reach_both_ends_and_are_legal(encoding):
    type_ = Tensor((3, 40), encoding)
    made = probes.make(Module(Value("x", type_), (), "x"), None, (), seed=0)
    values = type_.integers(type_.read(made.x))
    assert values.shape == (len(made), 3, 40)
    assert (values.min(), values.max()) == (encoding.lo, encoding.hi)
    assert len(np.unique(values)) > 2
    if getattr(encoding, "code", "") == "direct":
        assert (made.x == made.x[:1]).all()
    if getattr(encoding, "code", "") == "suffix":
        assert ((np.sign(values) * np.abs(made.x).cumsum(axis=0) == 0) | (made.x == np.sign(values))).all()


def test_calibration_samples_of_integers_are_probes_too():
    data = np.arange(12).reshape(2, 6) - 6
    made = probes.make(Module(Value("x", Tensor((6,), Int(-8, 7, Scale.of(1.0)))), (), "x"), data, (), seed=0)
    np.testing.assert_array_equal(made.x[-2:], data)


def test_passes_on_a_network_of_integers_are_checked():
    text = "module { input %x : tensor<3, int[-8, 7] * 0.5> %y = relu %x : tensor<3, int[0, 7] * 0.5> output %y }"
    (entry,) = driver.opt(parse_module(text, {}), "canonicalize").journal
    assert entry.checked == "6 probes (2 corners, 2 range ends, 2 random)"


# --- layers -------------------------------------------------------------------------------------------------------


def test_a_pass_acts_on_the_layers_that_its_pattern_selects_and_on_no_others():
    x = Value("x", Tensor((1, 4, 4), Real()))
    rng = np.random.default_rng(0)
    nodes, type_, name = [], x.type, "x"
    for path in ("layer2.0.conv", "layer3.0.conv", "layer3.1.conv"):
        op = Conv2d(Array.of(rng.normal(size=(1, 1, 1, 1))))
        result = path.replace("layer", "l").replace(".", "_")
        nodes.append(Node(result, op, (name,), infer(op, (type_,)), Origin(path, "Conv2d")))
        name = result
    module = verify(Module(x, tuple(nodes), name))
    outcome = pipeline.run(module, parse('quantize{layers="layer3.*"}'), context())
    assert [n.op.weight_scale is not None for n in outcome.module.nodes] == [False, True, True]
    either = pipeline.run(module, parse('quantize{layers="layer3.1.*|l2_0_conv"}'), context())
    assert [n.op.weight_scale is not None for n in either.module.nodes] == [True, False, True]


def test_the_journal_is_plain_data():
    outcome = pipeline.run(network(2.0), (Shift(),), context())
    assert json.loads(json.dumps([attrs.asdict(e) for e in outcome.journal]))[0]["contract"] == "exact"


def test_a_percentile_asks_for_the_percentile_method():
    (step,) = [p for p in resolve("@stem{percentile=99.5}") if p.name == "calibrate-range"]
    assert (step.method, step.percentile) == ("percentile", 99.5)
