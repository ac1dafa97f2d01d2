"""Plans that fit and plans that do not: each a sentence, before any process computes."""

import pytest

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.parallel import Plan


def test_data_takes_what_the_others_leave():
    assert Plan(expert=2, context=2).sizes(16) == {"data": 4, "expert": 2, "context": 2}
    assert Plan(data=3).sizes(3) == {"data": 3, "expert": 1, "context": 1}


@pytest.mark.parametrize(
    ("plan", "num_processes", "words"),
    [
        ({"data": 2, "expert": 4, "context": 2}, 8, "16 processes and the job has 8"),
        ({"data": 2}, 4, "parallel.data=4"),
        ({"expert": 3}, 4, "needs parallel.data 1 x expert 3"),
        ({"expert": 3}, 3, "does not divide the model's 4 experts; set one of 2, 4"),
        ({"kind": "hsdp", "shard": 3}, 4, "parallel.shard 3 does not divide"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, num_processes, words):
    with pytest.raises(ValueError, match=words):
        Plan(**plan).refuse(KimiLinearConfig.tiny(), num_processes)


def test_experts_need_a_mixture():
    with pytest.raises(ValueError, match="no mixture of experts"):
        Plan(expert=2).refuse(KimiLinearConfig.tiny(num_experts=0), 2)


@pytest.mark.parametrize("wrong", [{"data": 0}, {"expert": -1}, {"kind": "tp"}, {"shard": 2}, {"context": 1.5}])
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(ValueError, match="parallel."):
        Plan(**wrong)
