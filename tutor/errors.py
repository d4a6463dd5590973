"""Errors that a user can cause, each kind with its exit code. Any other exception is a bug (exit 1)."""


class TutorError(Exception):
    """An error in one line: what, with the value or file:line; `hint` is the next step, `stage` what was running."""

    code = 1
    stage: str | None = None

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class RecipeError(TutorError):
    """A wrong command or recipe: an unknown key, a wrong type, a value out of range."""

    code = 2


class DataError(TutorError):
    """Wrong rows of the user; `problems` holds one "file:line: what" a problem, up to a readable number."""

    code = 3

    def __init__(self, message: str, hint: str | None = None, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.problems = problems


class HostError(TutorError):
    """A program, GPU, memory or disk space that this machine lacks."""

    code = 4


class ArtifactError(TutorError):
    """A file that is damaged, missing, or does not belong to the others."""

    code = 5


class ServiceError(TutorError):
    """A service (llama-server, Ollama, the hub) that does not answer as expected."""

    code = 6


class LockError(TutorError):
    """Another run holds the folder."""

    code = 7


class GateError(TutorError):
    """A gate refused: the artifact exists and is not good enough."""

    code = 8
