from decimal import Decimal

import pytest

from lightning_peft.tasks.cmudict import edit_distance, exact_match, phoneme_error_rate
from lightning_peft.tasks.final_number import final_number, final_number_match
from lightning_peft.tasks.text_to_sql.answers import execution_match, extract_sql
from lightning_peft.tasks.text_to_sql.grammar.database import DatabasePair
from lightning_peft.tasks.text_to_sql.grammar.database_schema import parse_schema
from lightning_peft.tasks.text_to_sql.rows import generate_rows

SQL = "SELECT name FROM singer WHERE age > 30"
ANSWERS = {
    "bare": SQL,
    "semicolon": f"{SQL};",
    "fence": f"Here is the query:\n```sql\n{SQL};\n```\nIt selects all names.",
    "fence without language": f"```\n{SQL}\n```",
    "fence never closed": f"Sure!\n```sql\n{SQL}",
    "second fence is the SQL": f"```text\nsinger(id, name)\n```\n```sql\n{SQL}\n```",
    "prose before": f"Sure, to select the names you can use this query: {SQL};",
    "select as a word before": f"We have to select names with age above 30.\n{SQL}",
    "label": f"SQL: {SQL}",
    "blank line and prose after": f"{SQL}\n\nThis query returns names.",
    "prose on the next line": f"{SQL}\nThis query selects the name of every singer from the table.",
    "second statement": f"{SQL}; SELECT 2",
    "inline code": f"Use `{SQL}` for that.",
    "end of turn": f"{SQL}<|im_end|>\nmore",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_sql_is_extracted(answer):
    assert extract_sql(answer) == SQL


def test_sql_over_several_lines_is_kept():
    sql = "SELECT name,\n  age\nFROM singer\nWHERE age > 30 AND (\n  country = 'Peru'\n)\nORDER BY\n  age DESC\nLIMIT 3"
    assert extract_sql(f"{sql}\nThe query lists names.") == sql


def test_semicolon_in_a_string_does_not_end_the_statement():
    sql = "SELECT name FROM singer WHERE name = 'a;b'"
    assert extract_sql(f"{sql}; done") == sql


def test_common_table_expression_is_a_statement():
    sql = "WITH old AS (SELECT * FROM singer WHERE age > 60) SELECT count(*) FROM old"
    assert extract_sql(f"With this query it works:\n{sql};") == sql


def test_lower_case_sql_is_extracted():
    assert extract_sql("select name from singer;") == "select name from singer"


@pytest.mark.parametrize("answer", ["", "I do not know.", "```sql\n```", "DROP TABLE singer"])
def test_answer_without_select_has_no_sql(answer):
    assert extract_sql(answer) == ""


@pytest.fixture
def databases():
    with DatabasePair(parse_schema("singer(id, name, country, age) | album(id, title, singer_id)"), 0) as pair:
        yield pair


@pytest.mark.parametrize(
    ("answer", "matches"),
    [
        ("SELECT avg(age) FROM singer", True),
        ("select sum(s.age) * 1.0 / count(*) as mean from singer as s", True),
        ("SELECT max(age) FROM singer", False),
        ("SELECT avg(age), 1 FROM singer", False),
        ("SELECT avg(height) FROM singer", False),
        ("", False),
        ("DROP TABLE singer", False),
    ],
)
def test_execution_match_goes_by_the_result(databases, answer, matches):
    assert execution_match(answer, "SELECT avg(age) FROM singer", databases) is matches


def test_constant_answer_does_not_match(databases):
    gold = "SELECT avg(age) FROM singer"
    (((value,),), _) = databases.run(gold)
    assert not execution_match(f"SELECT {value}", gold, databases)


def test_order_counts_only_where_the_gold_is_ordered(databases):
    by_id, by_age = "SELECT name FROM singer", "SELECT name FROM singer ORDER BY age"
    assert execution_match(by_age, by_id, databases)
    assert not execution_match(by_id, by_age, databases)


def test_gold_matches_itself_and_the_next_gold_does_not():
    rows = generate_rows(60, 4, "test")
    for row, other in zip(rows, rows[1:], strict=False):
        with DatabasePair(parse_schema(row["schema"]), row["seed"]) as pair:
            assert execution_match(row["completion"], row["completion"], pair)
            assert not execution_match(other["completion"], row["completion"], pair)


def test_exact_match_ignores_white_space_only():
    assert exact_match(" S P  EH1\n", "S P EH1")
    assert not exact_match("S P EH0", "S P EH1")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("abc", "", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance


def test_phoneme_error_rate_is_edits_over_reference_phonemes():
    golds = ["K AE1 T", "D AO1 G", "S P EH1 L"]
    answers = ["K AE1 T", "D AA1 G Z", "P EH1 L"]  # 0; a substitution and an insertion; a deletion
    assert phoneme_error_rate(answers, golds) == pytest.approx(3 / 10)
    assert phoneme_error_rate(["", "", ""], golds) == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("so 12\n#### 1,234", "1234"),
        ("#### $18.00.", "18"),
        ("#### -3", "-3"),
        ("#### 5\n#### 6", "5"),
        ("She has 3 eggs, so the answer is 18 dollars.", "18"),
        ("about 2.50", "2.5"),
        ("rate is 5-3", "3"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no idea", "####", "1 + 1\n#### two"])
def test_text_without_final_number(text):
    assert final_number(text) is None


def test_final_numbers_match_by_value():
    assert final_number_match("it is $1,000.00", "x\n#### 1000")
    assert not final_number_match("#### 999", "#### 1000")
    assert not final_number_match("none", "#### 1000")
