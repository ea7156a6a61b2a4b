"""The native engine's README against its flags and against the tests of what it says, in both languages."""

from __future__ import annotations

import re

import pytest

from readme_parts import parse, quoted
from repository import PROJECT
from sd3.native.options import SECTIONS


@pytest.mark.parametrize(("readme", "title"), [("README.md", "Its own options"), ("README_zh.md", "自有参数")])
def test_the_table_has_the_engines_own_options(readme: str, title: str) -> None:
    section = next(section for section in parse(PROJECT / "sd3" / "native" / readme) if section.title == title)
    named = [quoted(row[0])[0] for row in section.tables[0][1:]]
    assert named == [f"--{flag.name}" for flag in SECTIONS["this engine alone"]]


# Each row of the table of differences, and the test that shows it.
SHOWN_BY = {
    "latents and text embeddings": "test_a_second_run_loads_and_computes_nothing",
    "models without T5, mixed variants, only `tokenizer.json`": "test_the_launcher_knows_what_an_engine_can_load",
    "precision of the VAE": "test_half_precision_is_taken_where_it_does_not_show",
    "flips": "test_flips_are_drawn_once_or_each_time",
    "class images of other than square shape": "test_class_images_are_cropped_anew_or_once",
    "a batch larger than the data set, the last of an epoch": "test_the_last_batch_of_an_epoch_is_partial_or_full",
    "random numbers": "test_two_ranks_draw_what_one_does_and_a_run_goes_on_with_another_number",
    "class images that are generated": "test_ranks_share_the_work",
    "a timestep density that leaves the table": "test_a_density_that_leaves_the_table_takes_its_ends",
    "`--weighting_scheme=sigma_sqrt` in fp16 and bf16": "test_an_exact_velocity_has_no_loss_with_sigma_sqrt",
    "numbers out of range, such as `--train_batch_size=0`": "test_numbers_out_of_range",
    "AdamW": "test_the_adamw_asked_for_is_taken",
    "the loss that is logged": "test_the_loss_is_logged_per_batch_or_per_step",
    "a loss or a gradient that is not finite": "test_what_is_not_finite_stops_the_run_before_it_reaches_a_checkpoint",
    "SIGTERM and Ctrl-C": "test_a_signal_ends_the_run_after_the_step_with_a_checkpoint",
    "what a resume checks": "test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered",
    "`--seed` at a resume": "test_a_resume_need_not_be_told_the_seed",
    "checkpoints later than the one resumed from": "test_what_a_run_goes_back_behind_is_set_aside",
    "two runs in one directory": "test_two_runs_in_one_directory_are_one_too_many",
    "parts that were not trained": "test_a_full_result_is_a_pipeline_of_trained_and_untouched_parts",
    "validation": "test_embeds_serve_as_well_as_the_prompt",
    "`--push_to_hub`": "test_weights_card_and_pictures_go_and_nothing_else",
    "`--cache_dir`": "test_the_base_model_is_downloaded_to_where_downloads_are_kept",
    "`--report_to` with a tracker that is not installed": "test_a_tracker_that_is_not_installed",
}


def rows(readme: str, title: str) -> list[list[str]]:
    section = next(section for section in parse(PROJECT / "sd3" / "native" / readme) if section.title == title)
    return section.tables[0][1:]


def test_each_difference_between_the_engines_has_a_test() -> None:
    differences = rows("README.md", "What it does otherwise")
    assert [row[0] for row in differences] == list(SHOWN_BY)
    tests = "".join(file.read_text(encoding="utf-8") for file in (PROJECT / "tests").glob("test_*.py"))
    assert [name for name in SHOWN_BY.values() if not re.search(rf"^def {name}\(", tests, re.M)] == []


def test_both_languages_have_the_same_differences() -> None:
    english, chinese = rows("README.md", "What it does otherwise"), rows("README_zh.md", "与官方脚本的不同")
    assert len(english) == len(chinese)
    for one, other in zip(english, chinese, strict=True):
        assert [quoted(cell) for cell in one] == [quoted(cell) for cell in other]
