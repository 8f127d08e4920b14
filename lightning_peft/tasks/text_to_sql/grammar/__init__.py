"""The grammar behind `data=text_to_sql`: schemas, their rows, questions and SQL."""
