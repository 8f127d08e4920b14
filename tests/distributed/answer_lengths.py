"""A metric that every answer counts in."""


def characters(rows, answers):
    assert all(row["completion"] for row in rows)
    return sum((place + 1) * len(answer) for place, answer in enumerate(answers))
