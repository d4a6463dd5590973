"""cli/commands/data.py: data check. tests/stages/data covers the options of lint and of the compiler."""

from support.files import write_rows


def test_wrong_rows_are_listed_with_file_and_line(tutor, tmp_path):
    write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "a", "response": "b"}, {"instruction": "c"}, {"response": "d"}]
    )
    done = tutor("data", "check", tmp_path / "rows.jsonl")
    assert done.returncode == 3
    assert [line.split(" ")[2] for line in done.stderr.splitlines()[1:]] == [
        f"{tmp_path}/rows.jsonl:2:",
        f"{tmp_path}/rows.jsonl:3:",
    ]
