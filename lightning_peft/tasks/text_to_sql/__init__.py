"""`data=text_to_sql`: rows.py makes the questions from grammar/, answers.py judges, task.py ties them together."""
