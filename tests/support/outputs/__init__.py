"""Rows, prompts, records and folders in the form in which the stages write them."""
