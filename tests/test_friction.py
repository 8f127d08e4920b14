"""Hindrances of new users, each with the test that keeps it closed."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CLOSED = {
    # the demo and its folder
    "scoring is silent for minutes": "commands/test_after_training.py::test_long_parts_tell_how_far_they_are",
    "messages twice, advertising, GPU and TPU lines": "commands/test_terminal.py::test_training_has_one_bar_that_nothing_tears",
    "the run folder does not hold what the README says": "commands/test_after_training.py::test_run_folder_holds_what_the_design_says",
    "base_model_name_or_path is a word of ours": "commands/test_continued_adapters.py::test_adapter_names_a_base_that_others_load_and_is_readable",
    "files that colleagues cannot read": "commands/test_after_training.py::test_files_may_be_read_by_whom_the_umask_says",
    "an adapter without a card": "commands/test_continued_adapters.py::test_card_says_where_an_adapter_comes_from",
    # the README, command by command
    "no install without make": "test_wheel.py::test_wheel_outside_the_repository_trains_two_steps",
    "an answer longer than the context is no line": "commands/test_bad_input.py::test_train_names_what_is_wrong",
    "another length on resume changes the rate unsaid": "runs/test_folder.py::test_other_length_says_that_the_learning_rate_follows_another_curve",
    "train -m ends without a table": "commands/test_sweep.py::test_sweep_trains_every_trial_in_its_own_folder",
    "the receipt of a merge is nowhere": "commands/test_after_training.py::test_merge_leaves_its_receipt_as_a_file_and_says_it_once",
    "bars of libraries between our lines": "checkpoint/test_merged.py::test_no_bar_of_a_library_is_drawn_where_a_model_is_written",
    "--help hides what a choice sets": "commands/test_words.py::test_help_of_a_choice_says_what_it_sets",
    "submit without a cluster is a traceback": "cluster/test_batch_scripts.py::test_missing_slurm_is_one_line_and_leaves_nothing",
    "runs and jobs called hf and lora": "test_configs.py::test_run_is_named_by_method_and_model",
    "cluster=local is in no help": "commands/test_words.py::test_help_is_a_page_of_80_columns_with_docstrings",
    "commands of the docs that do not run": "test_docs_run.py::test_command_runs",
    "the first example cannot be dry-run on a laptop": "commands/test_dry_run.py::test_run_for_a_gpu_is_checked_without_one",
    "a dry run prints a row a layer": "adapters/test_targets.py::test_table_has_a_row_per_kind_of_layer_and_the_totals",
    "Python blocks that do not run": "test_docs.py::test_python_runs",
    # its looks
    "the loss is not shown in a terminal": "commands/test_terminal.py::test_training_has_one_bar_that_nothing_tears",
    "a pipe gets control characters": "commands/test_terminal.py::test_a_pipe_gets_plain_lines",
    "1.151e+04": "test_readable.py::test_number_has_separators_and_no_false_digits",
    "Ctrl-C saves nothing and says failed": "runs/test_folder.py::test_ctrl_c_saves_and_the_run_goes_on",
    "a preview in a log file has no marks": "data/test_samples.py::test_preview_highlights_what_is_trained",
    "exit and /help are questions to the model": "commands/test_after_training.py::test_chat_ends_as_chats_do",
    "sweep --help shows verb: ???": "commands/test_words.py::test_help_is_a_page_of_80_columns_with_docstrings",
    "adapter.layers=[0] is no text": "commands/test_habits.py::test_what_cannot_be_mistaken_is_taken_as_meant",
    "keys without a word of explanation": "commands/test_words.py::test_every_option_has_a_docstring",
    "--help | head is a traceback": "commands/test_habits.py::test_pages_may_be_cut_off_by_their_reader",
    "tables wider than 80 columns": "cluster/test_sweep_object.py::test_table_fits_80_columns_and_cuts_no_number_short",
    "a heat map that hides a third key": "cluster/test_sweep_object.py::test_heat_map_says_what_a_third_key_was_folded_into",
    "no picture of one swept key, no curves": "report/test_report.py::test_every_swept_key_and_number_is_shown",
    "HTML that cannot be sorted": "report/test_report.py::test_a_browser_sorts_the_table",
    "W&B charts without prefixes, three of them constant": "training/test_wandb_run.py::test_charts_have_prefixes_and_none_is_constant",
    # tasks
    "CSV is hidden behind data=jsonl": "commands/test_words.py::test_everyday_word_means_what_it_says",
    "a table by semicolons": "data/test_files.py::test_table_with_another_separator_is_told_so",
    "prompts and completions of turns are refused": "data/test_public_rows.py::test_prompt_of_turns_may_have_a_text_as_its_answer",
    "tool roles are refused": "data/test_rows.py::test_tools_column_is_a_list_or_json",
    "columns of system, history and tools are dropped": "data/test_rows.py::test_turn_of_weight_zero_is_context_and_a_float_scales_its_loss",
    "the best of a sweep has to be typed": "commands/test_sweep.py::test_sweep_trains_every_trial_in_its_own_folder",
    "an adapter of PEFT has to be described again": "commands/test_continued_adapters.py::test_adapter_of_peft_is_continued_by_its_folder_alone",
    "the base of a PEFT folder has to be typed": "commands/test_continued_adapters.py::test_base_of_a_peft_folder_is_read_from_it",
    "the trained system prompt is lost in the export": "serving/test_ollama.py::test_chat_template_brings_the_trained_system_prompt",
    "lines of JSON are taken for prompts": "commands/test_after_training.py::test_generate_answers_rows_of_json",
    "no Modelfile, no GGUF": "serving/test_ollama.py::test_modelfile_brings_the_trained_prompt_and_stops",
    "output=model.gguf makes a folder": "commands/test_habits.py::test_merge_into_the_name_of_a_file_is_refused",
    "no push, no card of a merged model": "commands/test_continued_adapters.py::test_push_without_a_hub_says_what_sends_the_folder",
    "a callback of the working folder is a traceback": "commands/test_own_parts.py::test_callback_of_the_working_folder_is_found",
    "+key=value is accepted and dropped": "commands/test_bad_input.py::test_train_names_what_is_wrong",
    "option files of one's own": "commands/test_own_parts.py::test_conf_dir_is_the_folder_of_ones_own_options",
    "nine imports, and no loss in a notebook": "examples/test_notebook.py::test_notebook_shows_what_it_does",
    # conventions
    "no config file of one's own": "commands/test_words.py::test_own_file_gives_groups_and_keys_and_later_words_win",
    "model=org/name, rank=16, data=rows.csv": "commands/test_words.py::test_everyday_word_means_what_it_says",
    "lr, epochs, lora_alpha": "commands/test_words.py::test_word_of_another_tool_is_answered_with_ours",
    "rank=-1, logger=null: tracebacks": "commands/test_habits.py::test_wrong_value_says_what_would_be_right",
    "no way to print the composed config": "commands/test_own_file.py::test_config_says_what_set_each_value",
    "--version, completion": "commands/test_completion_in_shells.py::test_words_and_files_are_completed_as_they_are_typed",
    "two sweep systems": "runs/test_folder.py::test_two_sweeps_do_not_share_a_folder",
    "whole files of other tools": "commands/test_files_of_other_tools.py::test_every_key_of_another_tool_s_file_is_named_at_once",
    "no JSON schema for editors": "commands/test_own_file.py::test_schema_describes_a_file",
    "SFT only": "objectives/test_preference.py",
}  # fmt: skip
"""Hindrance -> the test that would fail if it did again."""


@pytest.mark.parametrize("hindrance", CLOSED)
def test_what_hindered_is_held_by_a_test(hindrance):
    file, _, name = CLOSED[hindrance].partition("::")
    assert not name or name in names_of_tests(file)


def names_of_tests(file: str) -> list[str]:
    """Return the functions of a file of tests, sorted."""
    tree = ast.parse((TESTS / file).read_text())
    return sorted(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
