"""Parts of a run in words: the same in each process, as resumed runs are compared by them."""

from sparse_train import Criterion, Cubic, Wanda
from sparse_train.arguments import describe


class _Scaled(Criterion):  # no dataclass
    def __init__(self, power=2):
        self.power = power

    def scores(self, weight_OI, stats):
        return weight_OI.abs() ** self.power


def test_dataclasses_say_what_is_not_as_by_default():  # so that a new argument changes no words of earlier runs
    assert describe(Wanda()) == "Wanda()"
    assert describe(Cubic(0.5)) == "Cubic(final_sparsity=0.5)"
    assert describe(Cubic(0.5, ramp=0.5)) == "Cubic(final_sparsity=0.5, ramp=0.5)"


def test_other_classes_are_told_apart_by_what_they_hold_and_not_by_where():
    assert describe(_Scaled()) == describe(_Scaled()) == "_Scaled(power=2)"
    assert describe(_Scaled(3)) == "_Scaled(power=3)"
