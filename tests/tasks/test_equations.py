"""Equations in English sentences: worked by hand, most of them lines of gsm_symbolic's thoughts."""

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mtp.tasks.equations import commuted, equations

TRUE, FALSE = [True], [False]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # units after numbers, before and after the operator
        ("First find the time to peel: 1200 clam / 12 clam/minute = 100 minutes", TRUE),
        ("48 batches * 16 minutes/batch = 768 minutes", TRUE),
        ("There are 39 girls x 4 boys/girl = 156 boys in the yard.", TRUE),
        ("31 pounds/day/goblin * 35 goblins = 1085 pounds/day", TRUE),
        ("3 skeins per vest + 18 skeins per poncho + 11 skeins per cardigan = 32 skeins.", TRUE),
        ("The rest is 174 total students - 42 bake - 17 volleyball - 34 hike = 81", TRUE),
        ("Two 30-minute shows and 8 * 30-minute shows = 240", TRUE),
        ("Each serving has 36 oz/6 = 6 oz", TRUE),
        ("I can only eat 825/275 of a serving = 3 of a serving", TRUE),
        # the expression is what directly precedes the sign
        ("John is penpals with 14-9=5 people", TRUE),
        ("20% of the 100 student class are players so that's 0.2*100 = 20 students", TRUE),
        ("There are 100 students and 20 are players so that leaves 100-20 = 80 students", TRUE),
        ("Michael wrote 3/4 of the assignment which is 68 pages x 3/4 = 51 pages.", TRUE),
        ("they need to collect 125 - 64 signatures. 125 - 64 = 61 signatures", TRUE),
        ("golf balls:80 * 0.75=60", TRUE),
        # currency and commas
        ("So he makes 17640*€0.40=€7056.0 every week", TRUE),
        ("The brokerage fee is $400,000 x 8/100 = $32,000.", TRUE),
        ("Her cleats cost €46 / 2 = $23.", TRUE),
        ("John spends 9 board games * $10 = $90 on board games.", TRUE),
        # signs of multiplication and division
        ("   • He has 2 times as many kiwi, so 67 × 2 = 134 kiwi", TRUE),
        ("   - 92 plants × £3 per plant = £276", TRUE),
        ("Michael can harvest his coconuts 12 ÷ 6 = 2 times per year", TRUE),
        ("To walk 12 blocks it takes her 12÷2/3=18 minutes.", TRUE),
        ("60/10/2 = 3", TRUE),
        # fractions, percentages, half, of
        ("14 blocks per 42 minutes, or 14/42 = 1/3 blocks per minute.", TRUE),
        ("she walks at 2 times the rate of speed, or 2 * 1/3 = 2/3 blocks per minute.", TRUE),
        ("half * 36 bees = 18 wasps", TRUE),
        ("rolling two in a row is 50% * 50% = 25%.", TRUE),
        ("380 puppies / 1520 puppies * 100% = 25%", TRUE),
        ("The algebra questions comprise 100% - 50% = 50% of the quiz.", TRUE),
        ("20% of 60 = 12 apples and 1/3 of $60 = $20", [True, True]),
        # parentheses
        ("The room's perimeter is 2(76+35) = 222", TRUE),
        ("Warm water mile = 10+2(21)=52.0 minutes", TRUE),
        ("The room is 35 meters * (1 meters / 1 meters) = 35 meters.", TRUE),
        ("12 ÷ (2/3) = 18 and 12 / (8/2) = 3", [True, True]),
        ("2 * (3 + (4 - 6)) = 2", TRUE),
        ("which (with 48 letters) is a total of 48 * 3 = 144 letters.", TRUE),
        # expressions that are read in part only are not counted
        ("√16 + 1 = 17", []),
        ("20% of the 60 + 5 = 65", []),
        ("a third of 30 + 5 = 35", []),
        ("twice 5 + 3 = 8", []),
        ("it is 5 times 3 + 2 = 5", []),
        ("3 1/2 + 1 = 1.5", []),
        ("13/2 = 6 1/2 hours", []),
        ("5 feet 6 inches + 2 inches = 5 feet 8 inches", []),
        ("for a total of 3 + 4 = 7 apples", TRUE),
        ("There are 20 x 0.5 = 10.0 liters of water from the 20 liters lemon drink.", TRUE),
        # chains and variables: only what can be read is counted
        ("She has 74 + 39 + 31 + T = 144 + T = 241 toys for her brother.", []),
        ("Thus, T = 241 - 144 = 97 bouncy balls came in the tube.", TRUE),
        ("9*2 = 18 = 20-2", TRUE),
        ("2*9 = 20 - 2 = 18", [True, True]),
        ("We know that y = x + 60, and y + x = 176.", []),
        ("Substituting, we get 2x+60=176", []),
        ("leaving x=58. This means John has 58 meters of fence left over.", []),
        ("Cold water mile = 21 minutes", []),
        ("Michael receives 52=52 emails that don't require a response", []),
        ("Elizabeth is 29 years old.", []),
        # floating point
        ("he had 23.833333333333332 - 7 = 16.833333333333332 hours of TV left.", TRUE),
        # false ones, some of them the dataset's own
        ("William has 13*0.5=6 tubes of purple paint", FALSE),
        ("She needs 78 / 12 = 6 pans to bake all of the muffins.", FALSE),
        ("William has €76.10 - €26.10 = €49 left.", FALSE),
        ("There are 39 girls x 4 boys/girl = 157 boys in the yard.", FALSE),
        ("20% of 60 = 1200", FALSE),
        ("5 + 3 = 8 = 9", [True]),
        ("5 + 3 = 8 - 1", FALSE),
        # damaged ones, which must not count as true
        ("She needs 150 / = 10 pans", []),
        ("She needs 150 15 = 10 pans", []),
        ("12 + = 5 5", []),
        ("10 * 15 = = 150", []),
        ("5 + 3 = 8 * T", []),
        ("T - 5 + 3 = -2", []),
        ("3 * apples + 4 = 4", []),
        ("7 / 0 = 0", []),
        ("7 / (3 - 3) = 0", []),
        ("5 + 3 = 8th", []),
        ("1,2345 + 1 = 2", []),
        ("1.2.3 + 1 = 2", []),
        ("(5 + 3 = 8", []),
        ("2^(3 + 1) = 4", []),
    ],
)
def test_lines_worked_by_hand(line, expected):
    assert equations(line) == expected


def test_each_line_and_each_clause_is_read_by_itself():
    text = "On Monday 3 * 4 = 12 eggs, on Tuesday 12 - 5 = 7; so 7 + 1 = 9.\nIn all 2 + 2 = 4"
    assert equations(text) == [True, True, False, True]


@given(
    st.integers(0, 999),
    st.integers(1, 99),
    st.sampled_from("+-*x×"),
    st.integers(-3, 3),
    st.sampled_from(["", "$", "€"]),
    st.sampled_from(["", " eggs", " pages/day", " boxes per week"]),
)
def test_an_equation_is_true_if_its_result_is_right(a, b, sign, off, currency, unit):
    result = {"+": a + b, "-": a - b}.get(sign, a * b) + off
    shown = f"-{currency}{-result}" if result < 0 else f"{currency}{result}"
    line = f"She sells {currency}{a}{unit} {sign} {b} = {shown}{unit} in all."
    assert equations(line) == [off == 0]


def nested(inner):
    """Two smaller expressions, in parentheses if they are not numbers, and an operator."""

    def joined(parts):
        (left, of_left), operator, (right, of_right) = parts
        if operator == "/" and of_right == 0:
            return left, of_left
        value = {
            "+": lambda: of_left + of_right,
            "-": lambda: of_left - of_right,
            "*": lambda: of_left * of_right,
            "/": lambda: of_left / of_right,
        }[operator.strip()]()
        shown = [part if part.isdigit() else f"({part})" for part in (left, right)]
        return operator.join(shown), value

    signs = st.sampled_from(["+", "-", "*", "/", " + ", " - ", " * ", " / "])
    return st.tuples(inner, signs, inner).map(joined)


numbers = st.integers(1, 60).map(lambda n: (str(n), Fraction(n)))


@given(st.recursive(numbers, nested, max_leaves=6), st.integers(0, 2))
def test_parentheses_are_read_first(expression, off):
    shown, value = expression
    assume(not shown.isdigit() and value >= 0)
    result = value + off
    written = f"{result.numerator}/{result.denominator}" if result.denominator > 1 else str(result)
    assert equations(f"{shown} = {written}") == [off == 0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("24/(2*3) = 4", TRUE),
        ("24/(2*3) = 5", FALSE),
        ("10/(5) = 3", FALSE),
        ("6/(1/2) = 12", TRUE),
        ("100/(100%-20%) = 125", TRUE),
        ("$400,000*3=$1,200,000", TRUE),
        ("$400,000*3=$1,200,001", FALSE),
        ("10 * $1,500,000 = $15,000,009", FALSE),
        ("$400,000.50*3 = $1,200,002.50", FALSE),
        ("1,000,000 + 1 = 1,000,000", FALSE),
        ("71.5/3 = 23.833333333333332", TRUE),
        ("23.833333333333332*3=71.5", TRUE),
        ("10/3=3.33", FALSE),
    ],
)
def test_quotients_and_large_results(line, expected):
    assert equations(line) == expected


@given(st.text(alphabet="0123456789+-*/x=($% .,|abT÷\n", max_size=40))
def test_any_text_can_be_read(text):
    assert all(isinstance(found, bool) for found in equations(text))


def test_operands_of_sums_and_products_are_exchanged():
    pairs = {
        "He has 5 * 6 = 30 friends.": "He has 6 * 5 = 30 friends.",
        "10 boxes * $20 = $200": "$20 * 10 boxes = $200",
        "2 x 3=6, then 6 + 4 = 10.": "3 x 2=6, then 4 + 6 = 10.",
        "24 / 4 = 6": "24 / 4 = 6",
        "2 + 3 * 4 = 14": "2 + 3 * 4 = 14",
        "9 - 2 * 3 = 3": "9 - 2 * 3 = 3",
        "Mike = 12": "Mike = 12",
    }
    assert {text: commuted(text) for text in pairs} == pairs
