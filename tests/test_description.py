"""Parts of a run in words: the same in each process, as resumed runs are compared by them."""

from sparse_train import Criterion, Cubic, Wanda
from sparse_train.arguments import describe


class _Scaled(Criterion):  # no dataclass
    def __init__(self, power=2):
        self.power = power

    def scores(self, weight_OI, stats):
        return weight_OI.abs() ** self.power


def test_dataclasses_say_their_arguments():
    assert describe(Wanda()) == "Wanda()"
    assert describe(Cubic(0.5)) == "Cubic(final_sparsity=0.5, init_sparsity=0.0, ramp=1.0)"


def test_other_classes_are_told_apart_by_what_they_hold_and_not_by_where():
    assert describe(_Scaled()) == describe(_Scaled()) == "_Scaled(power=2)"
    assert describe(_Scaled(3)) == "_Scaled(power=3)"
