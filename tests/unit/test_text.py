"""Module text: what prints, and what each mistake in a text is answered with."""

from __future__ import annotations

import numpy as np
import pytest

from spir.errors import SpirError
from spir.ir import Array, Module, Node, Origin, Value, infer
from spir.ops.conv2d import Conv2d
from spir.ops.encode import Encode
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.text import caret, parse, show
from spir.types import Int, Real, Scale, Tensor

WEIGHT, STEP = Array.of(np.arange(-4, 4).reshape(2, 1, 2, 2)), Array.of([0.5, 0.25])
MUL, ADD = Array.of([3, 5]), Array.of([8])
WEIGHTS = {"c.weight": WEIGHT, "c.weight_scale": STEP, "n.mul": MUL, "n.add": ADD}


def chain(*steps: tuple[str, object, Origin]) -> Module:
    module = Module(Value("x", Tensor((1, 3, 3), Real())), (), "x")
    for name, op, origin in steps:
        node = Node(name, op, (module.output,), infer(op, (module.types[module.output],)), origin)  # type: ignore[arg-type]
        module = Module(module.input, (*module.nodes, node), name)
    return module


NETWORK = chain(
    ("q", Quantize(0.1, 0, 255), Origin()),
    ("s", Encode(8), Origin("conv1")),
    ("c", Conv2d(WEIGHT, STEP, padding=(1, 0, 0, 0)), Origin("conv1", 'Conv2d, "net".py line 4', ("quantize",))),
    ("n", NeuronStem(4, MUL, ADD, 16, 0.5), Origin("relu1")),
    ("m", GlobalAvgPool(6, keepdim=True), Origin()),
)
SCALE = Scale.of([0.1]) * Scale.of([0.5, 0.25])
TEXT = f"""\
module {{
  input %x : tensor<1x3x3, real>
  %q = quantize %x {{scale = 0.1, lo = 0, hi = 255}} : tensor<1x3x3, int[0, 255] * 0.1>
  %s = encode %q {{steps = 8}} : tensor<1x3x3, spikes[8, bits, 0..255] * 0.1>  from "conv1"
  %c = conv2d %s {{weight = @c.weight#{WEIGHT.digest}, weight_scale = @c.weight_scale#{STEP.digest}, \
padding = [1, 0, 0, 0]}} : tensor<2x3x2, current[8, bits, -2550..1530, frame -10..6] * [2 #{SCALE.digest}]>\
  from "conv1" "Conv2d, \\"net\\".py line 4"
  %n = neuron_stem %c {{bits = 4, mul = @n.mul#{MUL.digest}, add = @n.add#{ADD.digest}, div = 16, scale = 0.5}} \
: tensor<2x3x2, spikes[4, bits, 0..15] * 0.5>  from "relu1"
  %m = global_avg_pool %n {{positions = 6, keepdim = on}} : \
tensor<2x1x1, current[4, bits, 0..90, frame 0..6] * 1/12>
  output %m
}}
"""
HEAD = "module {\n  input %x : tensor<3x4x4, real>\n"


def body(*lines: str, output: str = "%y") -> str:
    return HEAD + "".join(f"  {line}\n" for line in lines) + f"  output {output}\n}}\n"


def test_a_module_prints_ops_fields_types_and_origins():
    assert str(NETWORK) == show(NETWORK) == TEXT


def test_a_module_reads_back_with_and_without_its_weights():
    assert parse(TEXT, WEIGHTS) == NETWORK
    assert parse(TEXT) == NETWORK
    assert show(parse(TEXT)) == TEXT


def test_origins_read_back():
    found = parse(TEXT).definitions["c"].origin
    assert (found.path, found.place) == ("conv1", 'Conv2d, "net".py line 4')


def test_a_module_read_without_its_weights_refuses_to_give_them():
    with pytest.raises(SpirError) as refusal:
        parse(TEXT).arrays()["c.weight"].values  # noqa: B018 - the property raises
    assert str(refusal.value) == (
        f"error[weights]: the array #{WEIGHT.digest} is not here\n        fix: read the module with weights="
    )


def test_a_module_read_with_its_weights_has_known_scales():
    assert parse(TEXT, WEIGHTS).types["c"].known
    assert not parse(TEXT).types["c"].known


def test_comments_and_blanks_mean_nothing():
    lines = TEXT.splitlines()
    noisy = "// a network\n\n" + "  // one more: %z = module {\n".join(f"   {line} // said\n" for line in lines)
    assert parse(noisy, WEIGHTS) == NETWORK
    assert parse(TEXT.replace(" ", "\n").replace('"Conv2d,\n\\"net\\".py\nline\n4"', '""'), WEIGHTS) == NETWORK


def test_a_module_may_have_no_ops_at_all():
    module = Module(Value("x", Tensor((3,), Int(-1, 1, Scale.of(3)))), (), "x")
    assert show(module) == "module {\n  input %x : tensor<3, int[-1, 1] * 3.0>\n  output %x\n}\n"
    assert parse(show(module)) == module


@pytest.mark.parametrize("scale", ["0.5", "5e-1", "1/2", "0.50", "2/4"])
def test_a_scale_may_be_written_in_several_ways(scale):
    assert parse(body(output="%x").replace("real", f"int[0, 1] * {scale}")).input.type.encoding.scale == Scale.of(0.5)


def test_a_float_of_numpy_prints_as_a_number():
    module = chain(("q", Quantize(np.float64(0.1), 0, 1), Origin()))
    assert "{scale = 0.1, lo = 0, hi = 1}" in show(module)
    assert parse(show(module)) == module


@pytest.mark.parametrize("word", ["two words", "on", "3", 'a"b\\'])
def test_a_string_that_is_no_word_is_quoted(word):
    x = Tensor((2,), Int(0, 1, Scale(2, "0" * 16)))  # of unknown scale, so that nothing is inferred
    module = Module(Value("x", x), (Node("y", Encode(2, word), ("x",), x),), "y")
    assert parse(show(module)) == module


MISTAKES = {
    "a-missing-colon": (
        body("%y = relu %x tensor<3x4x4, real>"),
        """\
error[syntax]: did not expect 'tensor<3x4x4'
         at: line 3
               %y = relu %x tensor<3x4x4, real>
                            ^
        fix: expected ',' or ':' or '{'""",
    ),
    "a-missing-operand": (
        body("%y = relu : tensor<3x4x4, real>"),
        """\
error[syntax]: did not expect ':'
         at: line 3
               %y = relu : tensor<3x4x4, real>
                         ^
        fix: expected value""",
    ),
    "an-unknown-encoding": (
        body("%y = relu %x : tensor<3x4x4, rea>"),
        """\
error[syntax]: did not expect 'rea>'
         at: line 3
               %y = relu %x : tensor<3x4x4, rea>
                                            ^
        fix: expected 'current' or 'int' or 'real' or 'spikes'""",
    ),
    "no-output": (
        HEAD + "}\n",
        """\
error[syntax]: did not expect '}'
         at: line 3
             }
             ^
        fix: expected 'output' or value""",
    ),
    "the-end-comes-early": (
        HEAD,
        """\
error[syntax]: did not expect the end of the text
         at: line 2
               input %x : tensor<3x4x4, real>
                                             ^
        fix: expected 'output' or value""",
    ),
    "nothing-at-all": (
        "",
        (
            "error[syntax]: did not expect the end of the text\n         at: line 1\n             \n             ^\n"
            "        fix: expected 'module'"
        ),
    ),
    "a-string-that-does-not-read": (
        body('%y = relu %x : tensor<3x4x4, real>  from "\\q"'),
        """\
error[syntax]: a string that does not read: invalid \\escape
         at: line 3
               %y = relu %x : tensor<3x4x4, real>  from "\\q"
                                                        ^
        fix: write strings as JSON does: \\\\ is a backslash""",
    ),
    "an-unknown-op": (
        body("%y = rely %x : tensor<3x4x4, real>"),
        """\
error[name]: there is no op 'rely'
         at: line 3
               %y = rely %x : tensor<3x4x4, real>
                    ^
        fix: did you mean 'relu'?""",
    ),
    "an-unknown-field": (
        body("%y = quantize %x {scal = 0.5, lo = 0, hi = 1} : tensor<3x4x4, int[0, 1] * 0.5>"),
        """\
error[module]: there is no field of quantize called 'scal'
         at: line 3
               %y = quantize %x {scal = 0.5, lo = 0, hi = 1} : tensor<3x4x4, int[0, 1] * 0.5>
                                 ^
        fix: did you mean 'scale'?""",
    ),
    "a-field-where-there-is-none": (
        body("%y = relu %x {lo = 0} : tensor<3x4x4, real>"),
        """\
error[module]: there is no field of relu called 'lo'
         at: line 3
               %y = relu %x {lo = 0} : tensor<3x4x4, real>
                             ^""",
    ),
    "a-missing-field": (
        body("%y = quantize %x {scale = 0.5} : tensor<3x4x4, int[0, 1] * 0.5>"),
        """\
error[module]: quantize needs lo and hi
         at: line 3
               %y = quantize %x {scale = 0.5} : tensor<3x4x4, int[0, 1] * 0.5>
                    ^""",
    ),
    "a-field-given-twice": (
        body("%y = quantize %x {lo = 0, lo = 1} : tensor<3x4x4, int[0, 1] * 0.5>"),
        """\
error[module]: quantize is given lo twice
         at: line 3
               %y = quantize %x {lo = 0, lo = 1} : tensor<3x4x4, int[0, 1] * 0.5>
                                         ^""",
    ),
    "a-word-for-a-number": (
        body("%y = quantize %x {lo = low} : tensor<3x4x4, int[0, 1] * 0.5>"),
        """\
error[module]: quantize.lo takes int, not str
         at: line 3
               %y = quantize %x {lo = low} : tensor<3x4x4, int[0, 1] * 0.5>
                                 ^""",
    ),
    "a-fraction-for-an-integer": (
        body("%y = quantize %x {lo = 0.5} : tensor<3x4x4, int[0, 1] * 0.5>"),
        """\
error[module]: quantize.lo takes int, not float
         at: line 3
               %y = quantize %x {lo = 0.5} : tensor<3x4x4, int[0, 1] * 0.5>
                                 ^""",
    ),
    "a-number-for-a-switch": (
        body("%y = global_avg_pool %x {positions = 16, keepdim = 1} : tensor<3, real>"),
        """\
error[module]: global_avg_pool.keepdim takes bool, not int
         at: line 3
               %y = global_avg_pool %x {positions = 16, keepdim = 1} : tensor<3, real>
                                                        ^""",
    ),
    "a-number-for-an-array": (
        body("%y = linear %x {weight = 3} : tensor<3, real>"),
        """\
error[module]: linear.weight takes Array, not int
         at: line 3
               %y = linear %x {weight = 3} : tensor<3, real>
                               ^""",
    ),
    "too-few-entries": (
        body("%y = avg_pool %x {kernel = [2, 2], stride = [2]} : tensor<3x2x2, real>"),
        """\
error[module]: avg_pool.stride takes 2 integers, not 1
         at: line 3
               %y = avg_pool %x {kernel = [2, 2], stride = [2]} : tensor<3x2x2, real>
                                                  ^""",
    ),
    "a-number-beyond-float64": (
        body("%y = quantize %x {scale = 1e999} : tensor<3x4x4, int[0, 1] * 0.5>"),
        """\
error[module]: quantize.scale = 1e999 is no finite float64
         at: line 3
               %y = quantize %x {scale = 1e999} : tensor<3x4x4, int[0, 1] * 0.5>
                                 ^""",
    ),
    "a-wrong-type": (
        body("%y = quantize %x {scale = 0.5, lo = 0, hi = 1} : tensor<3x4x4, int[0, 2] * 0.5>"),
        """\
error[type]: %y is tensor<3x4x4, int[0, 1] * 0.5>, and the text says tensor<3x4x4, int[0, 2] * 0.5>
         at: line 3
               %y = quantize %x {scale = 0.5, lo = 0, hi = 1} : tensor<3x4x4, int[0, 2] * 0.5>
                                                                ^""",
    ),
    "operands-that-the-op-refuses": (
        body('%y = dequantize %x : tensor<3x4x4, real>  from "stub" "net.py line 2"'),
        """\
error[type]: dequantize: works on integers, not real
         at: line 3
               %y = dequantize %x : tensor<3x4x4, real>  from "stub" "net.py line 2"
                    ^
       from: stub (net.py line 2)
        fix: integrate a train first""",
    ),
    "use-before-definition": (
        body("%y = add %x, %z : tensor<3x4x4, real>", "%z = relu %x : tensor<3x4x4, real>"),
        """\
error[module]: there is no value called '%z'
         at: line 3
               %y = add %x, %z : tensor<3x4x4, real>
                            ^
        fix: one of: %x""",
    ),
    "a-misspelled-value": (
        body("%conv1 = relu %x : tensor<3x4x4, real>", "%y = relu %conv : tensor<3x4x4, real>"),
        """\
error[module]: there is no value called '%conv'
         at: line 4
               %y = relu %conv : tensor<3x4x4, real>
                         ^
        fix: did you mean '%conv1'?""",
    ),
    "a-duplicate-name": (
        body("%y = relu %x : tensor<3x4x4, real>", "%y = relu %x : tensor<3x4x4, real>"),
        """\
error[module]: %y is defined twice
         at: line 4
               %y = relu %x : tensor<3x4x4, real>
               ^
        fix: rename one of them""",
    ),
    "the-input-defined-again": (
        body("%x = relu %x : tensor<3x4x4, real>"),
        """\
error[module]: %x is defined twice
         at: line 3
               %x = relu %x : tensor<3x4x4, real>
               ^
        fix: rename one of them""",
    ),
    "an-undefined-output": (
        body("%y = relu %x : tensor<3x4x4, real>", output="%z"),
        """\
error[module]: there is no value called '%z'
         at: line 4
               output %z
                      ^
        fix: one of: %x, %y""",
    ),
    "a-scale-by-zero": (
        body(output="%x").replace("real", "int[0, 1] * 1/0"),
        """\
error[type]: a scale is a positive finite number, not 1/0
         at: line 2
               input %x : tensor<3x4x4, int[0, 1] * 1/0>
                          ^""",
    ),
    "a-negative-scale": (
        body(output="%x").replace("real", "int[0, 1] * -0.5"),
        """\
error[syntax]: did not expect '-0.5>'
         at: line 2
               input %x : tensor<3x4x4, int[0, 1] * -0.5>
                                                    ^
        fix: expected '[' or number""",
    ),
    "an-infinite-scale": (
        body(output="%x").replace("real", "int[0, 1] * 1e999"),
        """\
error[type]: a scale is a positive finite number, not inf
         at: line 2
               input %x : tensor<3x4x4, int[0, 1] * 1e999>
                          ^""",
    ),
    "a-scale-of-one-channel": (
        body(output="%x").replace("real", "int[0, 1] * [1 #0123456789abcdef]"),
        """\
error[type]: a scale per channel has two or more channels, not 1
         at: line 2
               input %x : tensor<3x4x4, int[0, 1] * [1 #0123456789abcdef]>
                          ^""",
    ),
    "a-scale-of-other-channels": (
        body(output="%x").replace("real", "int[0, 1] * [4 #0123456789abcdef]"),
        """\
error[type]: scales of 4 channels on 3 channels
         at: line 2
               input %x : tensor<3x4x4, int[0, 1] * [4 #0123456789abcdef]>
                          ^""",
    ),
    "an-empty-range": (
        body(output="%x").replace("real", "int[1, 0] * 0.5"),
        """\
error[type]: an empty range 1..0
         at: line 2
               input %x : tensor<3x4x4, int[1, 0] * 0.5>
                          ^""",
    ),
    "no-frames": (
        body(output="%x").replace("real", "spikes[0, bits, 0..0] * 0.5"),
        """\
error[type]: a train has one or more frames, not 0
         at: line 2
               input %x : tensor<3x4x4, spikes[0, bits, 0..0] * 0.5>
                          ^""",
    ),
    "an-unknown-code": (
        body(output="%x").replace("real", "spikes[2, bit, 0..1] * 0.5"),
        """\
error[type]: there is no code of frames called 'bit'
         at: line 2
               input %x : tensor<3x4x4, spikes[2, bit, 0..1] * 0.5>
                          ^
        fix: did you mean 'bits'?""",
    ),
    "a-dimension-of-zero": (
        body(output="%x").replace("3x4x4", "3x0x4"),
        """\
error[type]: a tensor has one or more positive dimensions, not [3, 0, 4]
         at: line 2
               input %x : tensor<3x0x4, real>
                          ^""",
    ),
}


@pytest.mark.parametrize(("text", "answer"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_with_its_line_and_the_way_out(text, answer):
    for weights in (None, {}):
        with pytest.raises(SpirError) as refusal:
            parse(text, weights)
        assert str(refusal.value) == answer


def test_a_number_without_end_is_refused():
    for text in (
        body(output="%x").replace("real", f"int[0, {'9' * 5000}] * 0.5"),
        body(output="%x").replace("3x4x4", "9" * 5000),
        body(output="%x").replace("real", f"int[0, 1] * {'9' * 5000}/7"),
        body(f"%y = quantize %x {{lo = {'9' * 5000}}} : tensor<3, real>"),
    ):
        with pytest.raises(SpirError, match=r"error\[syntax\]: a number of 5000 digits, and 1000 are the most"):
            parse(text)


def test_a_missing_weight_is_named():
    with pytest.raises(SpirError) as refusal:
        parse(TEXT, {name: array for name, array in WEIGHTS.items() if name != "n.add"})
    lines = str(refusal.value).splitlines()
    assert lines[0] == "error[weights]: there is no array @n.add in the weights"
    assert lines[1] == "         at: line 6"
    assert lines[2][lines[3].index("^") :].startswith(f"add = @n.add#{ADD.digest}")
    assert lines[4] == "        fix: give the weights of this module"


def test_an_altered_weight_is_named():
    altered = Array.of([8 + 1])
    with pytest.raises(SpirError) as refusal:
        parse(TEXT, WEIGHTS | {"n.add": altered})
    lines = str(refusal.value).splitlines()
    assert lines[0] == (
        f"error[weights]: the array @n.add has digest #{altered.digest}, and the text was written for #{ADD.digest}"
    )
    assert lines[1] == "         at: line 6"
    assert lines[-1] == "        fix: give the weights that were saved with this text"


def test_the_caret_stays_under_its_column_in_a_long_line():
    line = "x" * 300 + "!" + "y" * 300
    where, shown, mark = caret(["first", line, "last"], 2, 301).split("\n")
    assert where == "line 2"
    assert shown[mark.index("^")] == "!"
    assert len(shown) <= 110


@pytest.mark.parametrize("end", ["\u2028", "\x0b", "\x00", "}", "\n \x0b"])
def test_what_follows_the_module_is_refused_where_it_stands(end):
    text = body(output="%x") + "\n" + end
    with pytest.raises(SpirError) as refusal:
        parse(text)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "error[syntax]: did not expect " + repr(end.strip(" \n"))
    assert lines[1] == f"         at: line {6 + end.count(chr(10))}"
    assert str(refusal.value).endswith("        fix: expected the end of the text")


def test_a_strange_line_separator_does_not_move_the_place():
    text = "// \u2028 \x0b \r a comment\n" + body("%y = rely %x : tensor<3x4x4, real>")
    with pytest.raises(SpirError) as refusal:
        parse(text)
    assert "at: line 4\n               %y = rely %x" in str(refusal.value)


def test_a_divisor_far_below_0_is_refused():
    text = """module {
  input %x : tensor<2, int[0, 7] * 0.5>
  %y = requant %x {mul = @y.mul#MUL, add = @y.add#ADD,
    div = -1000000000000000000000000000000, lo = 0, hi = 7, scale = 1.0} :
    tensor<2, int[0, 7] * 1.0>
  output %y
}"""
    arrays = {"y.mul": Array.of([1]), "y.add": Array.of([0])}
    text = text.replace("MUL", arrays["y.mul"].digest).replace("ADD", arrays["y.add"].digest)
    with pytest.raises(SpirError):
        parse(text, arrays)
