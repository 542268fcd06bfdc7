"""The verifier: every rule that a module may break, all violations in one error."""

from __future__ import annotations

import attrs
import pytest

from spir.errors import SpirError
from spir.ir import Array, Module, Node, Origin, Value
from spir.ops.add import Add
from spir.ops.linear import Linear
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
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
