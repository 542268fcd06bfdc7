"""The verifier: every rule that a module may break, all violations in one error."""

from __future__ import annotations

import attrs
import pytest

from spir.conformance.examples import module_of
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops.add import Add
from spir.ops.concat import Concat
from spir.ops.conv_transpose2d import ConvTranspose2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.product import Product
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.reshape import Reshape
from spir.ops.shift import Shift
from spir.ops.sigmoid import Sigmoid
from spir.ops.softmax import Softmax
from spir.ops.tanh import Tanh
from spir.text import parse, show
from spir.types import Int, Real, Scale, Tensor
from spir.verify import verify

X = Tensor((2,), Real())
Q = Tensor((2,), Int(0, 7, Scale.of(0.5)))
INPUT = Value("x", X)
ACT = Node("r", Relu(), ("x",), X, Origin("act", "ReLU, net.py line 3"))
GOOD = Module(
    INPUT,
    (ACT, Node("s", Add(), ("x", "r"), X), Node("q", Quantize(0.5, 0, 7), ("s",), Q)),
    "q",
)


def refused(module: Module) -> str:
    with pytest.raises(SpirError) as refusal:
        verify(module)
    return str(refusal.value)


def test_a_good_module_comes_back_as_it_is():
    assert verify(GOOD) is GOOD
    assert verify(Module(INPUT, (), "x")).output == "x"


def test_a_name_defined_twice_is_refused():
    again = Module(INPUT, (ACT, attrs.evolve(ACT, operands=("r",))), "r")
    assert refused(again) == (
        "error[module]: %r is defined twice\n"
        "         op: %r = relu %r : tensor<2, real>\n"
        "       from: act (ReLU, net.py line 3)\n"
        "        fix: rename one of them"
    )
    assert refused(Module(INPUT, (attrs.evolve(ACT, result="x"),), "x")).startswith(
        "error[module]: %x is defined twice\n"
    )


def test_a_use_before_the_definition_is_refused():
    early = Module(INPUT, (Node("s", Add(), ("x", "r"), X), ACT), "s")
    assert refused(early) == (
        "error[module]: %r is used before its definition\n"
        "         op: %s = add %x, %r : tensor<2, real>\n"
        "        fix: define it above, or fix the name"
    )


def test_a_node_that_reads_itself_is_refused():
    own = Module(INPUT, (attrs.evolve(ACT, operands=("r",)),), "r")
    assert "error[module]: %r is used before its definition" in refused(own)


def test_a_recorded_type_that_is_not_the_inferred_one_is_refused():
    wide = attrs.evolve(Q, encoding=Int(0, 8, Scale.of(0.5)))
    wrong = attrs.evolve(GOOD, nodes=(*GOOD.nodes[:2], attrs.evolve(GOOD.nodes[2], type=wide)))
    assert refused(wrong) == (
        "error[type]: %q is tensor<2, int[0, 7] * 0.5>, and the module says tensor<2, int[0, 8] * 0.5>\n"
        "         op: %q = quantize %s {scale = 0.5, lo = 0, hi = 7} : tensor<2, int[0, 8] * 0.5>"
    )


def test_operands_that_the_op_refuses_are_reported_with_op_and_origin():
    module = Module(INPUT, (attrs.evolve(ACT, op=Quantize(-1.0, 0, 7)),), "r")
    assert refused(module) == (
        "error[type]: quantize: a scale is a positive finite number, not -1.0\n"
        "         op: %r = quantize %x {scale = -1.0, lo = 0, hi = 7} : tensor<2, real>\n"
        "       from: act (ReLU, net.py line 3)"
    )


def test_a_wrong_number_of_operands_is_refused():
    assert "relu takes 1 operands, not 2" in refused(Module(INPUT, (attrs.evolve(ACT, operands=("x", "x")),), "r"))
    assert "add takes two or more operands, not 1" in refused(Module(INPUT, (Node("s", Add(), ("x",), X),), "s"))


def test_an_undefined_output_is_refused():
    assert refused(Module(INPUT, (ACT,), "y")) == "error[module]: the output %y is not defined"


@pytest.mark.parametrize("name", ["", "3x", "a b", "a%", "a\n", "layer-1"])
def test_a_name_that_the_text_could_not_write_is_refused(name):
    assert f"%{name} is not a name" in refused(Module(INPUT, (attrs.evolve(ACT, result=name),), name))
    assert f"%{name} is not a name" in refused(Module(Value(name, X), (), name))


@pytest.mark.parametrize("name", ["x", "layer1.0.conv2", "_x", "output", "X9"])
def test_the_names_of_layers_are_names(name):
    module = verify(Module(INPUT, (attrs.evolve(ACT, result=name),) if name != "x" else (), name))
    assert parse(show(module)) == module


def test_all_violations_are_reported_at_once():
    broken = Module(
        Value("in put", X),
        (
            Node("a", Relu(), ("b",), X),
            Node("a", Relu(), ("in put",), X),
            Node("c", Relu(), ("in put",), Q),
        ),
        "z",
    )
    assert [line for line in refused(broken).splitlines() if line.startswith("error")] == [
        "error[module]: %in put is not a name",
        "error[module]: %b is used before its definition",
        "error[module]: %a is defined twice",
        "error[type]: %c is tensor<2, real>, and the module says tensor<2, int[0, 7] * 0.5>",
        "error[module]: the output %z is not defined",
    ]


def test_without_its_weights_a_module_is_checked_as_far_as_it_goes():
    op = Linear(Array.of([[1.0, 2.0]]))
    module = Module(INPUT, (Node("y", op, ("x",), Tensor((1,), Real())),), "y")
    assert verify(parse(show(module))) == verify(module)
    wrong = attrs.evolve(module, nodes=(attrs.evolve(module.nodes[0], type=X),))
    assert "tensor<1, real>" in refused(wrong)
    assert verify(parse(show(wrong))) == wrong
    assert "%z is used before" in refused(attrs.evolve(wrong, nodes=(attrs.evolve(wrong.nodes[0], operands=("z",)),)))


# ops that the host computes

Line = tuple[str, Op, str]
Q4 = Quantize(0.5, 0, 7)


def unchecked(source: Tensor, *lines: Line) -> Module:
    """A module of well typed lines that may break the rule of the host."""
    types, nodes = {"x": source}, []
    for result, op, operands in lines:
        read = tuple(operands.split())
        types[result] = infer(op, tuple(types[name] for name in read))
        nodes.append(Node(result, op, read, types[result], Origin("net." + result)))
    return Module(Value("x", source), tuple(nodes), lines[-1][0])


HOSTED: dict[str, tuple[Line, ...]] = {
    "no quantiser at all": (("a", Sigmoid(), "x"), ("b", Tanh(), "a"), ("c", Product(), "a b")),
    "before the first quantiser": (("a", Sigmoid(), "x"), ("c", Product(), "x a"), ("q", Q4, "c")),
    "before several quantisers": (("a", Tanh(), "x"), ("q", Q4, "a"), ("p", Q4, "x"), ("s", Add(), "q p")),
    "before a quantiser, beside another": (
        ("q", Q4, "x"),
        ("a", Sigmoid(), "x"),
        ("p", Q4, "a"),
        ("s", Add(), "q p"),
    ),
    "behind the readout": (("q", Q4, "x"), ("d", Dequantize(), "q"), ("a", Softmax(), "d")),
    "behind a readout of trains": (
        ("q", Q4, "x"),
        ("e", Encode(3), "q"),
        ("i", Integrate(), "e"),
        ("d", Dequantize(), "i"),
        ("a", Softmax(log=True), "d"),
        ("r", Relu(), "a"),
    ),
    "before and behind": (
        ("a", Tanh(), "x"),
        ("q", Q4, "a"),
        ("d", Dequantize(), "q"),
        ("b", Product(), "d a"),
    ),
    "between, unread by what is quantised": (
        ("q", Q4, "x"),
        ("d", Dequantize(), "q"),
        ("a", Sigmoid(), "d"),
        ("p", Q4, "d"),
    ),
}


@pytest.mark.parametrize("lines", HOSTED.values(), ids=HOSTED)
def test_the_host_computes_before_the_first_quantiser_and_behind_the_readout(lines):
    module = unchecked(X, *lines)
    assert verify(module) is module


@pytest.mark.parametrize(
    ("op", "operands", "shown"),
    [
        (Sigmoid(), "d", "sigmoid %d"),
        (Tanh(), "d", "tanh %d"),
        (Softmax(), "d", "softmax %d"),
        (Product(), "d d", "product %d, %d"),
        (Product(), "x d", "product %x, %d"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_the_host_does_not_compute_between_quantisers(op, operands, shown):
    module = unchecked(X, ("q", Q4, "x"), ("d", Dequantize(), "q"), ("a", op, operands), ("p", Q4, "a"))
    assert refused(module) == (
        f"error[module]: %a = {op.name} is for the host, and %p makes integers of it\n"
        f"         op: %a = {shown} : tensor<2, real>\n"
        "       from: net.a\n"
        "        fix: leave it before the first quantiser, or behind the readout"
    )


def test_a_transposed_convolution_is_for_the_host_too():
    op = ConvTranspose2d(Array.of([[[[1.0]]]]))
    lines = (("q", Q4, "x"), ("d", Dequantize(), "q"), ("a", op, "d"))
    image = Tensor((1, 2, 2), Real())
    assert verify(unchecked(image, *lines))
    assert "%a = conv_transpose2d is for the host, and %p makes integers" in refused(
        unchecked(image, *lines, ("p", Q4, "a"))
    )


@pytest.mark.parametrize(
    "way",
    [
        (("b", Relu(), "a"),),
        (("b", Reshape((2, 1)), "a"), ("c", Flatten(), "b")),
        (("b", Concat(), "x a"),),
        (("b", Add(), "a x"), ("c", Shift(Array.of([1.0])), "b"), ("e", Tanh(), "c")),
    ],
    ids=["relu", "reshaped", "beside others", "several"],
)
def test_the_host_rule_looks_through_what_lies_between(way):
    module = unchecked(X, ("q", Q4, "x"), ("d", Dequantize(), "q"), ("a", Sigmoid(), "d"), *way, ("p", Q4, way[-1][0]))
    assert refused(module) == (
        "error[module]: %a = sigmoid is for the host, and %p makes integers of it\n"
        "         op: %a = sigmoid %d : tensor<2, real>\n"
        "       from: net.a\n"
        "        fix: leave it before the first quantiser, or behind the readout"
    )


@pytest.mark.parametrize(
    "way",
    [
        (("b", Flatten(), "d"), ("c", Shift(Array.of([1.0])), "b")),
        (("b", Add(), "x d"), ("c", Relu(), "b")),
        (("b", Concat(), "x d"), ("c", Reshape((2, 2)), "b")),
    ],
    ids=["moved", "added", "beside others"],
)
def test_what_was_made_of_integers_stays_so_through_other_ops(way):
    lines = (("q", Q4, "x"), ("d", Dequantize(), "q"), *way, ("a", Sigmoid(), "c"))
    assert verify(unchecked(X, *lines))
    assert "%a = sigmoid is for the host, and %p makes integers of it" in refused(unchecked(X, *lines, ("p", Q4, "a")))


def test_behind_an_input_of_integers_no_host_op_is_quantised():
    lines = (("d", Dequantize(), "x"), ("a", Sigmoid(), "d"))
    assert verify(unchecked(Q, *lines))
    assert "%a = sigmoid is for the host" in refused(unchecked(Q, *lines, ("p", Q4, "a")))


def test_each_quantiser_behind_the_host_is_refused_once_and_what_reads_it_is_not():
    lines = (("q", Q4, "x"), ("d", Dequantize(), "q"), ("a", Sigmoid(), "d"), ("b", Tanh(), "d"))
    module = unchecked(X, *lines, ("p", Q4, "a"), ("r", Q4, "b"), ("e", Encode(3), "p"), ("i", Integrate(), "e"))
    assert [line for line in refused(module).splitlines() if line.startswith("error")] == [
        "error[module]: %a = sigmoid is for the host, and %p makes integers of it",
        "error[module]: %b = tanh is for the host, and %r makes integers of it",
    ]


def test_a_module_read_from_text_obeys_the_host_rule():
    module = unchecked(X, ("q", Q4, "x"), ("d", Dequantize(), "q"), ("a", Sigmoid(), "d"), ("p", Q4, "a"))
    assert refused(parse(show(module))) == refused(module)
    with pytest.raises(SpirError, match="is for the host"):
        module_of(X, ("q", Q4, "x"), ("d", Dequantize(), "q"), ("a", Sigmoid(), "d"), ("p", Q4, "a"))
