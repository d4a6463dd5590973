"""tutor.formats.rows: ..."""
