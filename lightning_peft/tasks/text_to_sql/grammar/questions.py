"""Whole questions for each kind of query, for training and held out."""

from lightning_peft.tasks.text_to_sql.grammar.phrasings import Wording

# Whole questions for each kind of query. `things` and `thing` are a table's plural and singular, `where` a condition.
QUESTIONS = {
    "list": Wording(
        (
            "List the {columns} of all {things}.",
            "Show the {columns} of every {thing}.",
            "What {is} the {columns} of all {things}?",
            "Give me the {columns} of the {things}.",
            "Return the {columns} of each {thing}.",
            "Find the {columns} for all {things}.",
            "For each {thing}, give the {columns}.",
            "I need a list of the {columns} of all {things}.",
        ),
        ("Find the {columns} of all the {things}.", "I need the {columns} of every {thing}."),
    ),
    "filter": Wording(
        (
            "List the {columns} of all {things} {where}.",
            "Show the {columns} of the {things} {where}.",
            "What {is} the {columns} of {things} {where}?",
            "Give me the {columns} of every {thing} {where}.",
            "Return the {columns} for all {things} {where}.",
            "Find all {things} {where} and show their {columns}.",
            "For each {thing} {where}, display the {columns}.",
            "I want the {columns} of the {things} {where}.",
        ),
        ("Find the {columns} of {things} {where}.", "I need the {columns} of each {thing} {where}."),
    ),
    "count": Wording(
        (
            "How many {things} are there?",
            "Count the {things}.",
            "What is the number of {things}?",
            "Return the number of all {things}.",
            "Tell me how many {things} there are.",
            "Find out how many {things} exist.",
            "I need to know how many {things} there are.",
        ),
        ("Find the total number of {things}.", "How many {things} do we have?"),
    ),
    "count_filter": Wording(
        (
            "How many {things} are there {where}?",
            "Count the {things} {where}.",
            "What is the number of {things} {where}?",
            "Return the number of {things} {where}.",
            "Tell me how many {things} there are {where}.",
            "Find out how many {things} exist {where}.",
            "I want the number of all {things} {where}.",
        ),
        ("Find the number of all {things} {where}.", "I need the count of {things} {where}."),
    ),
    "aggregate": Wording(
        (
            "What is the {aggregate} {column} of all {things}?",
            "Show the {aggregate} {column} of the {things}.",
            "Give the {aggregate} {column} over all {things}.",
            "Return the {aggregate} {column} of {things}.",
            "Find the {aggregate} {column} for all {things}.",
            "Tell me the {aggregate} {column} of all {things}.",
            "Among all {things}, what is the {aggregate} {column}?",
        ),
        ("Find the {aggregate} {column} across all {things}.", "I need the {aggregate} {column} among {things}."),
    ),
    "aggregate_filter": Wording(
        (
            "What is the {aggregate} {column} of all {things} {where}?",
            "Show the {aggregate} {column} of the {things} {where}.",
            "Give the {aggregate} {column} over all {things} {where}.",
            "Return the {aggregate} {column} of {things} {where}.",
            "Find the {aggregate} {column} for all {things} {where}.",
            "Tell me the {aggregate} {column} of the {things} {where}.",
            "Among all {things} {where}, what is the {aggregate} {column}?",
        ),
        (
            "Find the {aggregate} {column} across {things} {where}.",
            "I need the {aggregate} {column} among {things} {where}.",
        ),
    ),
    "sort": Wording(
        (
            "List the {columns} of all {things} {order}.",
            "Show the {columns} of the {things} {order}.",
            "What {is} the {columns} of all {things} {order}?",
            "Return the {columns} of each {thing} {order}.",
            "Display the {columns} for all {things}, {order}.",
            "Find the {columns} for each {thing} {order}.",
            "I want the {columns} of all {things} {order}.",
        ),
        ("Find the {columns} of every {thing}, {order}.", "I need the {columns} of all the {things} {order}."),
    ),
    "distinct": Wording(
        (
            "What are the different {column} values of the {things}?",
            "List each distinct {column} of the {things}.",
            "Show all different {column} values of {things}.",
            "Return the distinct {column} values of all {things}.",
            "Which distinct {column} values occur for the {things}?",
            "Find the different {column} values for all {things}.",
            "I want each different {column} of the {things}, without repeats.",
        ),
        ("Find every distinct {column} among the {things}.", "Which different {column} values do {things} have?"),
    ),
    "count_distinct": Wording(
        (
            "How many different {column} values do the {things} have?",
            "Count the distinct {column} values of the {things}.",
            "What is the number of different {column} values of {things}?",
            "Return the number of distinct {column} values of the {things}.",
            "How many distinct {column} values are there for {things}?",
            "Find out how many different {column} values {things} have.",
            "Tell me the number of different {column} values of all {things}.",
        ),
        (
            "Find the number of distinct {column} values among {things}.",
            "How many distinct {column} values occur among {things}?",
        ),
    ),
    "top": Wording(
        (
            "What {is} the {columns} of the {thing} with the {superlative} {column}?",
            "Show the {columns} of the {thing} that has the {superlative} {column}.",
            "Which {thing} has the {superlative} {column}? Give its {columns}.",
            "Return the {columns} of the {thing} whose {column} is the {superlative}.",
            "Find the {thing} with the {superlative} {column} and show its {columns}.",
            "Tell me the {columns} of the {thing} with the {superlative} {column}.",
            "Of all {things}, which one has the {superlative} {column}? Show its {columns}.",
        ),
        (
            "Find the {columns} of the {thing} having the {superlative} {column}.",
            "For the {thing} with the {superlative} {column}, give the {columns}.",
        ),
    ),
    "top_several": Wording(
        (
            "List the {columns} of the {number} {things} with the {superlative} {column}.",
            "Show the {columns} of the {number} {things} that have the {superlative} {column}.",
            "What {is} the {columns} of the {number} {things} with the {superlative} {column}?",
            "Return the {columns} of the {number} {things} whose {column} is the {superlative}.",
            "Find the {number} {things} with the {superlative} {column} and show their {columns}.",
            "Which {number} {things} have the {superlative} {column}? Give their {columns}.",
            "I want the {columns} for the {number} {things} with the {superlative} {column}.",
        ),
        (
            "Find the {columns} of those {number} {things} with the {superlative} {column}.",
            "For the {number} {things} with the {superlative} {column}, give the {columns}.",
        ),
    ),
    "group_count": Wording(
        (
            "How many {things} are there for each {group}?",
            "For each {group}, show the number of {things}.",
            "List each {group} and the number of {things} with it.",
            "Return each {group} with its number of {things}.",
            "Find out how many {things} there are for each {group}.",
            "Count the {things} for each {group}.",
            "What is the number of {things} in each {group}?",
        ),
        ("Find the number of {things} per {group}.", "For every {group}, count the {things}."),
    ),
    "group_aggregate": Wording(
        (
            "What is the {aggregate} {column} of {things} for each {group}?",
            "For each {group}, show the {aggregate} {column} of the {things}.",
            "List each {group} and the {aggregate} {column} of its {things}.",
            "Return each {group} with the {aggregate} {column} of its {things}.",
            "Find the {aggregate} {column} for each {group} of {things}.",
            "Give the {aggregate} {column} of the {things} in each {group}.",
            "For each {group} of {things}, what is the {aggregate} {column}?",
        ),
        (
            "Find the {aggregate} {column} of {things} per {group}.",
            "For every {group}, give the {aggregate} {column} of {things}.",
        ),
    ),
    "join_list": Wording(
        (
            "List the {columns} of each {thing} and the {parent_column} of its {parent}.",
            "Show the {columns} of all {things} together with the {parent_column} of their {parent}.",
            "What {is} the {columns} of all {things} and the {parent_column} of their {parent}?",
            "Return the {columns} of each {thing} with the {parent_column} of its {parent}.",
            "For each {thing}, give its {columns} and the {parent_column} of its {parent}.",
            "Find the {columns} for each {thing} and also the {parent_column} of its {parent}.",
            "I want the {columns} of all {things}, each with the {parent_column} of its {parent}.",
        ),
        (
            "Find the {columns} of every {thing} along with its {parent}'s {parent_column}.",
            "For all {things}, give the {columns} and the {parent_column} of the {parent}.",
        ),
    ),
    "join_filter": Wording(
        (
            "List the {columns} of all {things} of {parents} {where}.",
            "Show the {columns} of the {things} that belong to {parents} {where}.",
            "What {is} the {columns} of {things} of {a_parent} {where}?",
            "Return the {columns} of each {thing} whose {parent} is one {where}.",
            "Find all {things} of {parents} {where} and show their {columns}.",
            "For each {thing} of {a_parent} {where}, give the {columns}.",
            "I want the {columns} of all {things} that belong to {a_parent} {where}.",
        ),
        (
            "Find the {columns} of every {thing} belonging to {a_parent} {where}.",
            "I need the {columns} of {things} from {parents} {where}.",
        ),
    ),
    "join_count": Wording(
        (
            "How many {things} belong to {parents} {where}?",
            "Count the {things} of {parents} {where}.",
            "What is the number of {things} of {parents} {where}?",
            "Return the number of {things} that belong to {parents} {where}.",
            "Find out how many {things} belong to {a_parent} {where}.",
            "Tell me the number of {things} of all {parents} {where}.",
            "For {parents} {where}, how many {things} are there in total?",
        ),
        (
            "Find the number of {things} belonging to {a_parent} {where}.",
            "How many {things} come from {parents} {where}?",
        ),
    ),
    "having": Wording(
        (
            "Which {group} values have {compare} {number} {things}?",
            "List each {group} with {compare} {number} {things}.",
            "Show every {group} that has {compare} {number} {things}.",
            "Return each {group} that {compare} {number} {things} have.",
            "For which {group} are there {compare} {number} {things}?",
            "Find every {group} for which there are {compare} {number} {things}.",
            "What are the {group} values with {compare} {number} {things} each?",
        ),
        (
            "Find all {group} values having {compare} {number} {things}.",
            "What {group} values are shared by {compare} {number} {things}?",
        ),
    ),
    "having_aggregate": Wording(
        (
            "Which {group} values have {things} with {an_aggregate} {column} {compare} {number}?",
            "List each {group} whose {things} have {an_aggregate} {column} {compare} {number}.",
            "For which {group} is the {aggregate} {column} of {things} {compare} {number}?",
            "Return every {group} for which the {aggregate} {column} of the {things} is {compare} {number}.",
            "Find each {group} whose {things} have {an_aggregate} {column} {compare} {number}.",
            "I want the {group} values with {an_aggregate} {column} {compare} {number} for their {things}.",
        ),
        ("Find all {group} values where the {aggregate} {column} of {things} is {compare} {number}.",),
    ),
    "most_common": Wording(
        (
            "Which {group} has the {extreme} {things}?",
            "Show the {group} with the {extreme} {things}.",
            "What is the {group} that has the {extreme} {things}?",
            "Return the {group} of the {extreme} {things}.",
            "For which {group} are there the {extreme} {things}?",
            "Find the {group} that the {extreme} {things} have.",
            "I want to know the {group} with the {extreme} {things}.",
        ),
        ("Find the {group} having the {extreme} {things}.", "Tell me which {group} the {extreme} {things} have."),
    ),
    # "that has" leaves out parents without children, as the inner join does
    "children_count": Wording(
        (
            "For each {parent} that has {things}, show its {parent_column} and their number.",
            "List the {parent_column} of each {parent} with {things} and how many {things} it has.",
            "How many {things} does each {parent} with any have? Give the {parent_column} and the number.",
            "Return the {parent_column} of each {parent} that has {things}, and its number of {things}.",
            "Find each {parent} with {things} and show its {parent_column} and its number of {things}.",
            "Count the {things} of each {parent} that has any, and show its {parent_column} first.",
            "For each {parent} with at least one {thing}, give the {parent_column} and the number of {things}.",
        ),
        (
            "Find the {parent_column} and the number of {things} of every {parent} that has any.",
            "For every {parent} having {things}, give its {parent_column} and how many there are.",
        ),
    ),
    "children_having": Wording(
        (
            "List the {parent_column} of the {parents} that have {compare} {number} {things}.",
            "Show the {parent_column} of every {parent} with {compare} {number} {things}.",
            "Which {parents} have {compare} {number} {things}? Give the {parent_column}.",
            "Return the {parent_column} of each {parent} that has {compare} {number} {things}.",
            "Find all {parents} with {compare} {number} {things} and show their {parent_column}.",
            "What is the {parent_column} of each {parent} with {compare} {number} {things}?",
            "I want the {parent_column} of all {parents} with {compare} {number} {things}.",
        ),
        ("Find the {parent_column} of all {parents} having {compare} {number} {things}.",),
    ),
    "most_children": Wording(
        (
            "What is the {parent_column} of the {parent} with the {extreme} {things}?",
            "Which {parent} has the {extreme} {things}? Give its {parent_column}.",
            "Show the {parent_column} of the {parent} that has the {extreme} {things}.",
            "Return the {parent_column} of the {parent} to which the {extreme} {things} belong.",
            "Find the {parent} with the {extreme} {things} and show its {parent_column}.",
            "Of all {parents}, which one has the {extreme} {things}? Show the {parent_column}.",
            "Tell me the {parent_column} of the {parent} with the {extreme} {things}.",
        ),
        ("Find the {parent_column} of the {parent} having the {extreme} {things}.",),
    ),
    "no_children": Wording(
        (
            "List the {columns} of {parents} that have no {thing}.",
            "Show the {columns} of the {parents} without any {things}.",
            "Which {parents} have no {things}? Give their {columns}.",
            "Return the {columns} of each {parent} that has no {things}.",
            "Find all {parents} without {a_thing} and show their {columns}.",
            "For each {parent} without any {thing}, give the {columns}.",
            "What {is} the {columns} of the {parents} to which no {thing} belongs?",
        ),
        (
            "Find the {columns} of all {parents} that do not have any {thing}.",
            "I need the {columns} of {parents} lacking {a_thing}.",
        ),
    ),
    "children_in": Wording(
        (
            "List the {columns} of {parents} that have {a_thing} {where}.",
            "Show the {columns} of the {parents} with at least one {thing} {where}.",
            "Which {parents} have {a_thing} {where}? Give their {columns}.",
            "Return the {columns} of each {parent} that has at least one {thing} {where}.",
            "Find all {parents} with {a_thing} {where} and show their {columns}.",
            "For each {parent} with at least one {thing} {where}, give the {columns}.",
            "What {is} the {columns} of the {parents} with {a_thing} {where}?",
        ),
        (
            "Find the {columns} of all {parents} having some {thing} {where}.",
            "I need the {columns} of {parents} that own {a_thing} {where}.",
        ),
    ),
    "versus_average": Wording(
        (
            "List the {columns} of {things} with {a_column} {side} the average.",
            "Show the {columns} of the {things} whose {column} is {side} the average {column}.",
            "Which {things} have {a_column} {side} the average? Give their {columns}.",
            "Return the {columns} of each {thing} whose {column} is {side} the average of all {things}.",
            "Find all {things} with {a_column} {side} the average and show their {columns}.",
            "For each {thing} with {a_column} {side} the average {column}, give the {columns}.",
            "What {is} the {columns} of the {things} whose {column} is {side} average?",
        ),
        (
            "Find the {columns} of all {things} that are {side} average in {column}.",
            "I need the {columns} of {things} where {column} is {side} the overall average.",
        ),
    ),
    "versus_group": Wording(
        (
            "List the {columns} of {things} with {a_column} {side} the {aggregate} {column} of {things} {where}.",
            "Show the {columns} of the {things} whose {column} is {side} the {aggregate} {column} of {things} {where}.",
            "Return the {columns} of all {things} with {a_column} {side} the {aggregate} {column} of {things} {where}.",
            "Which {things} have {a_column} {side} the {aggregate} {column} of {things} {where}? Give their {columns}.",
            "I want the {columns} of all {things} {side} the {aggregate} {column} of {things} {where}.",
            "What {is} the {columns} of the {things} with {a_column} {side} the {aggregate} {column} of those {where}?",
        ),
        ("Find the {columns} of all {things} where {column} is {side} the {aggregate} {column} of {things} {where}.",),
    ),
    "intersect": Wording(
        (
            "Which {group} values have both {things} {where} and {things} {other}?",
            "List each {group} that has {things} {where} and also {things} {other}.",
            "Return each {group} that has both {things} {where} and {things} {other}.",
            "Find every {group} with {things} {where} as well as {things} {other}.",
            "For which {group} are there both {things} {where} and {things} {other}?",
            "I want the {group} values that {things} {where} and {things} {other} have in common.",
        ),
        ("Find the {group} values shared by {things} {where} and {things} {other}.",),
    ),
    "except": Wording(
        (
            "Which {group} values have {things} {where} but no {things} {other}?",
            "List each {group} that has {things} {where} but not {things} {other}.",
            "Return each {group} that has {things} {where} and no {things} {other}.",
            "Find every {group} with {things} {where} but without any {things} {other}.",
            "For which {group} are there {things} {where} but no {things} {other}?",
            "I want the {group} values of {things} {where}, except those of {things} {other}.",
        ),
        ("Find the {group} values of {things} {where}, leaving out those of {things} {other}.",),
    ),
    "grandparent_filter": Wording(
        (
            "List the {columns} of {things} whose {parent} belongs to {grandparents} {where}.",
            "Show the {columns} of the {things} of {parents} of {grandparents} {where}.",
            "Return the {columns} of all {things} that belong to {parents} of {grandparents} {where}.",
            "Find all {things} of {parents} of {grandparents} {where} and show their {columns}.",
            "For each {thing} whose {parent} belongs to {a_grandparent} {where}, give the {columns}.",
            "I want the {columns} of each {thing} of {a_parent} of {a_grandparent} {where}.",
        ),
        ("Find the {columns} of every {thing} of {a_parent} belonging to {a_grandparent} {where}.",),
    ),
}
