"""`data=text_to_sql`: rows.py makes the questions from grammar/, answers.py judges, execution_accuracy.py scores."""
