"""tutor.cli.commands: ..."""
