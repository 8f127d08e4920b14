import re
import sqlite3

import pytest

from lightning_peft.tasks.text_to_sql.answers import execution_match
from lightning_peft.tasks.text_to_sql.grammar import phrasings
from lightning_peft.tasks.text_to_sql.grammar.database import Database, DatabasePair, QueryError, same_result
from lightning_peft.tasks.text_to_sql.grammar.database_schema import DOMAINS, fill, parse_schema
from lightning_peft.tasks.text_to_sql.grammar.kinds import KINDS, LEVEL_SHARES
from lightning_peft.tasks.text_to_sql.grammar.phrasings import Wording
from lightning_peft.tasks.text_to_sql.grammar.questions import QUESTIONS
from lightning_peft.tasks.text_to_sql.rows import generate_preference, generate_row, generate_rows

SCHEMA = parse_schema("singer(id, name, country, age) | album(id, title, genre, copies_sold, singer_id)")


@pytest.fixture(scope="module")
def rows():
    """Return 600 rows of several seeds and all splits."""
    asked = [(300, 0, "train"), (100, 1, "train"), (100, 0, "test"), (50, 7, "test"), (50, 0, "validation")]
    return [row for count, seed, split in asked for row in generate_rows(count, seed, split)]


@pytest.fixture
def database():
    with_rows = Database(SCHEMA, fill(SCHEMA, 0))
    yield with_rows
    with_rows.close()


def run_plainly(row, seed, sql, reverse_scans=False):
    """Return the result in a database built here, without the class under test."""
    schema = parse_schema(row["schema"])
    connection = sqlite3.connect(":memory:")
    for statement in schema.create_statements():
        connection.execute(statement)
    for table, records in fill(schema, seed).items():
        for record in records:
            columns = ", ".join(record)
            values = tuple(record.values())
            connection.execute(f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(values))})", values)
    if reverse_scans:
        connection.execute("PRAGMA reverse_unordered_selects = ON")
    result = connection.execute(sql).fetchall()
    connection.close()
    return result


def test_every_answer_has_rows_and_changes_with_the_database(rows):
    for row in rows:
        first, second = (run_plainly(row, row["seed"] + i, row["completion"]) for i in (0, 1))
        assert first and second, row
        assert (
            sorted(first, key=repr) != sorted(second, key=repr) or "ORDER BY" in row["completion"] and first != second
        )


def test_no_answer_depends_on_the_order_of_scans(rows):
    ordered = [row for row in rows if "ORDER BY" in row["completion"]]
    assert len(ordered) > 60
    for row in ordered:
        for seed in (row["seed"], row["seed"] + 1):
            forward = run_plainly(row, seed, row["completion"])
            assert forward == run_plainly(row, seed, row["completion"], reverse_scans=True), row


def test_a_query_without_its_conditions_answers_something_else(rows):
    filtered = [row for row in rows if row["completion"].count("SELECT") == 1 and " WHERE " in row["completion"]]
    assert len(filtered) > 150
    for row in filtered:
        bare = row["completion"].split(" WHERE ")[0]
        results = [[run_plainly(row, row["seed"] + i, sql) for i in (0, 1)] for sql in (row["completion"], bare)]
        assert results[0] != results[1], row


def test_rows_are_a_function_of_seed_split_and_index(rows):
    assert generate_rows(40, 0, "train") == rows[:40]
    assert generate_rows(5, 2, "train") != rows[:5]


def test_kinds_and_levels_come_in_their_shares(rows):
    assert {row["kind"] for row in rows} == set(KINDS)
    for level, share in LEVEL_SHARES.items():
        # 600 draws: a standard deviation is at most 0.02
        assert sum(row["level"] == level for row in rows) / len(rows) == pytest.approx(share, abs=0.07)


def test_prompts_hold_the_schema_and_values_of_the_answer(rows):
    for row in rows:
        schema_line, question = row["prompt"].split("\n")
        assert parse_schema(schema_line).line() == schema_line == row["schema"]
        for literal in re.findall(r"'%?([^%']+)%?'", row["completion"]):
            assert literal in question


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_domains_are_unseen(split):
    def names(of, part):
        tables = [table for tables in DOMAINS[of] for table in tables]
        return {t.name for t in tables} if part == "tables" else {c.name for t in tables for c in t.columns}

    labels = {"name", "title", "label", "code"}
    assert not names(split, "tables") & names("train", "tables")
    assert names(split, "columns") & names("train", "columns") <= labels


def test_no_wording_is_both_trained_and_held_out():
    for table in (QUESTIONS, phrasings.CONDITIONS, phrasings.ORDERS):
        trained = {phrase for wording in table.values() for phrase in wording.train}
        assert not trained & {phrase for wording in table.values() for phrase in wording.held_out}
        assert all(isinstance(wording, Wording) and wording.held_out for wording in table.values())


def as_pattern(template):
    return re.compile(re.sub(r"\\{\w+\\}", r"(.+)", re.escape(template)))


def test_no_evaluation_question_fits_a_training_template(rows):
    templates = [as_pattern(phrase) for wording in QUESTIONS.values() for phrase in wording.train]
    trained = {table.name for tables in DOMAINS["train"] for table in tables}
    for row in rows:
        question = row["prompt"].split("\n")[1]
        is_trained = any(pattern.fullmatch(question) for pattern in templates)
        assert is_trained == (row["schema"].split("(")[0] in trained), question


def test_no_prompt_is_shared_between_splits():
    prompts = {split: {row["prompt"] for row in generate_rows(150, 3, split)} for split in DOMAINS}
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split='dev': must be one of train, validation, test"):
        generate_rows(1, 0, "dev")


def test_unknown_table_and_column_are_named():
    with pytest.raises(ValueError, match="table 'users' is not in the text_to_sql vocabulary"):
        parse_schema("users(id, name)")
    with pytest.raises(ValueError, match=r"not \['shoe_size'\]"):
        parse_schema("singer(id, name, shoe_size)")


def test_some_parents_have_no_child():
    rows = fill(SCHEMA, 5)
    assert {album["singer_id"] for album in rows["album"]} < {singer["id"] for singer in rows["singer"]}


HOSTILE = {
    "endless recursion": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
    "cross join": "SELECT count(*) FROM " + ", ".join(f"album a{i}" for i in range(9)),
    "too many rows": "SELECT * FROM album a, album b, album c, album d",
    "huge value": "SELECT zeroblob(900000000)",
    "drop": "DROP TABLE singer",
    "insert": "INSERT INTO singer VALUES (99, 'x', 'y', 1)",
    "delete": "DELETE FROM singer",
    "attach": "ATTACH DATABASE '/tmp/stolen.db' AS s",
    "pragma": "PRAGMA user_version = 3",
    "two statements": "SELECT 1; DROP TABLE singer",
    "unknown column": "SELECT shoe_size FROM singer",
    "no SQL": "I do not know",
    "null character": "SELECT 1 \0",
    "lone surrogate": "SELECT '\ud800'",
    "text that is not UTF-8": "SELECT CAST(x'ff' AS TEXT)",
}


@pytest.mark.parametrize("sql", HOSTILE.values(), ids=HOSTILE)
def test_hostile_query_ends_and_leaves_the_database_alone(database, sql):
    before = database.run("SELECT * FROM singer")
    with pytest.raises(QueryError):
        database.run(sql)
    assert database.run("SELECT * FROM singer") == before


def test_results_are_compared_as_multisets_with_float_tolerance():
    assert same_result([(1, "a"), (2, "b")], [(2, "b"), (1.0 + 1e-9, "a")], ordered=False)
    assert not same_result([(1,), (1,), (2,)], [(1,), (2,), (2,)], ordered=False)
    assert not same_result([(1,)], [(1,), (1,)], ordered=False)
    assert not same_result([(1.0,)], [(1.001,)], ordered=False)
    assert not same_result([("1",)], [(1,)], ordered=False)
    assert not same_result([(1, 2)], [(2, 1)], ordered=False)


def test_ordered_results_are_compared_in_order():
    assert same_result([(1,), (2,)], [(1,), (2,)], ordered=True)
    assert not same_result([(1,), (2,)], [(2,), (1,)], ordered=True)


def test_preferences_are_right_answers_against_wrong_ones_of_the_same_rows():
    for index in range(12):
        row, plain = generate_preference(0, "train", False, index), generate_row(0, "train", index)
        with DatabasePair(parse_schema(row["schema"]), row["seed"]) as databases:
            assert execution_match(row["chosen"], row["chosen"], databases)
            assert not execution_match(row["rejected"], row["chosen"], databases)
            databases.run(row["rejected"])
        assert (row["prompt"], row["chosen"]) == (plain["prompt"], plain["completion"])
        labelled = generate_preference(0, "train", True, index)
        assert (labelled["completion"] == row["chosen"]) is labelled["label"] is (index % 2 == 0)
