"""Chains of thought: worked cases, and that each leads to reasoning-gym's own answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp.tasks.reasoning_gym import ReasoningGymConfig
from mtp.tasks.solvers import (
    SOLVERS,
    arithmetic_is_true,
    basic_arithmetic,
    chain_sum,
    comparison_is_true,
    gcd,
    leg_counting,
    legs_are_true,
    letter_counting,
    number_sorting,
    true_steps,
)


def entry(answer: str, **metadata: object) -> dict:
    return {"question": "?", "answer": answer, "metadata": metadata}


@pytest.mark.parametrize(
    ("solver", "item", "thought"),
    [
        (chain_sum, entry("-2", expression="37 - 85 + 46"), "37-85=-48;-48+46=-2"),
        (chain_sum, entry("2", expression="5 + -3"), "5+-3=2"),
        (chain_sum, entry("7", expression="7"), "7=7"),
        (
            leg_counting,
            entry("22", animals={"cow": 3, "snake": 2, "crab": 1}),
            "3 cow*4=12;2 snake*0=0;12+0=12;1 crab*10=10;12+10=22",
        ),
        (leg_counting, entry("0", animals={"snake": 2}), "2 snake*0=0"),
        (
            letter_counting,
            entry("3", target_letter="t", span=["The", "street", "is"]),
            "The 1;street 2;is 0;1+2+0=3",
        ),
        (
            number_sorting,
            entry("", sorted_numbers=["-3.0", "1.5", "1.5"], direction="ascending"),
            "-3.0<1.5;1.5=1.5",
        ),
        (
            number_sorting,
            entry("", sorted_numbers=["2.0", "-1.0"], direction="descending"),
            "2.0>-1.0",
        ),
        (gcd, entry("21", numbers=[462, 1071]), "1071%462=147;462%147=21;147%21=0"),
        (gcd, entry("2", numbers=[8, 4, 6]), "8%4=0;6%4=2;4%2=0"),
        (basic_arithmetic, entry("-8", expression="3 * 4 - 20"), "3*4=12;12-20=-8"),
        (basic_arithmetic, entry("-17", expression="-( 2 + 30 / 2 )"), "30/2=15;2+15=17;0-17=-17"),
        # without parentheses reasoning-gym computes from left to right
        (basic_arithmetic, entry("20", expression="2 + 3 * 4"), "2+3=5;5*4=20"),
    ],
)
def test_worked_thoughts(solver, item, thought):
    assert solver(item) == thought


def test_a_thought_that_does_not_lead_to_the_answer_is_refused():
    with pytest.raises(ValueError, match="leads to 3, the gold answer is 4"):
        chain_sum(entry("4", expression="1 + 2"))


@pytest.mark.parametrize("dataset", sorted(SOLVERS))
def test_every_step_is_true_and_the_answer_follows(dataset):
    task = ReasoningGymConfig(dataset=dataset, num_test=64, num_train=64, thoughts=True).build()
    for split in ("train", "test"):
        for index in range(task.size(split)):
            example = task.example(split, index)
            steps = example.thought.split(";")
            assert "" not in steps
            if SOLVERS[dataset].is_true is not None:
                assert task.true_steps(example.thought) == (len(steps), len(steps))
            if dataset == "gcd":  # the last divisor
                assert steps[-1].split("%")[1] == f"{example.answer}=0"
            elif dataset == "number_sorting":
                in_order = [steps[0].replace(">", "<").replace("=", "<").split("<")[0]]
                in_order += [s.replace(">", "<").replace("=", "<").split("<")[1] for s in steps]
                assert str(in_order) == example.answer
            else:
                assert steps[-1].split("=")[1] == example.answer


@pytest.mark.parametrize("options", [{"allow_negation": True}, {"min_terms": 1, "max_terms": 1}])
def test_chain_sum_options(options):
    config = ReasoningGymConfig(dataset="chain_sum", options=options, num_test=32, num_train=9)
    task = config.build()
    for index in range(task.size("test")):
        true, steps = task.true_steps(task.example("test", index).thought)
        assert true == steps >= 1


def test_basic_arithmetic_without_parentheses_follows_the_gold_answer():
    options = {"allow_parentheses": False, "operators": ["+", "-", "*"]}
    config = ReasoningGymConfig(
        dataset="basic_arithmetic", options=options, num_test=64, num_train=9
    )
    assert config.build().size("test") == 64


def test_gold_answers_that_do_not_follow_from_the_question_are_refused():
    config = ReasoningGymConfig(dataset="basic_arithmetic", options={"allow_parentheses": False})
    with pytest.raises(ValueError, match="item 0 does not follow.*allow_parentheses=true"):
        config.build()


def test_false_steps_are_counted():
    assert true_steps("75+55=113;113+14=127", arithmetic_is_true) == (1, 2)
    assert true_steps("", arithmetic_is_true) == (0, 1)
    assert true_steps("1+1=2;", arithmetic_is_true) == (1, 2)


@pytest.mark.parametrize(
    ("step", "true"),
    [
        ("12/5=2", True),
        ("-7/2=-4", True),
        ("7/0=0", False),
        ("7%0=0", False),
        ("2+2=5", False),
        ("2+2", False),
        ("2 + 2=4", False),
        ("1+1+1=3", False),
        ("5=5", True),
    ],
)
def test_arithmetic_steps(step, true):
    assert arithmetic_is_true(step) is true


def test_leg_steps_know_the_animals():
    assert legs_are_true("3 cow*4=12")
    assert legs_are_true("2 praying mantis*6=12")
    assert legs_are_true("12+8=20")
    assert not legs_are_true("3 cow*6=18")
    assert not legs_are_true("3 cow*4=13")
    assert not legs_are_true("3 unicorn*4=12")


def test_comparison_steps():
    assert (
        comparison_is_true("-3.0<1.5") and comparison_is_true("2>1") and comparison_is_true("1=1.0")
    )
    assert not comparison_is_true("1<1") and not comparison_is_true("1<2<3")


@given(st.integers(), st.sampled_from("+-*"), st.integers(), st.integers(-2, 2))
def test_a_step_is_true_only_with_the_right_result(left, operator, right, error):
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    assert arithmetic_is_true(f"{left}{operator}{right}={result + error}") is (error == 0)


@settings(deadline=None)  # the first call imports reasoning-gym
@given(st.text(alphabet="0123456789+-*/%=;<>. cow", max_size=30))
def test_any_text_can_be_checked(thought):
    for solver in SOLVERS.values():
        if solver.is_true is not None:
            true, steps = true_steps(thought, solver.is_true)
            assert 0 <= true <= steps == thought.count(";") + 1
