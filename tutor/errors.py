"""What a user can cause, each kind with its exit code. Anything else that is raised is a bug (exit 1)."""


class TutorError(Exception):
    """A fault with one clear line: what, which value or file:line; `hint` says what to do next."""

    code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class RecipeError(TutorError):
    """Usage or recipe: an unknown key, a wrong type, a value out of range."""

    code = 2


class DataError(TutorError):
    """The user's rows; `problems` holds one "file:line: what" each, as many as are worth showing."""

    code = 3

    def __init__(self, message: str, hint: str | None = None, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.problems = problems


class HostError(TutorError):
    """This machine: a program, GPU, memory or disk that is missing."""

    code = 4


class ArtifactError(TutorError):
    """A file that is damaged, or does not belong to the others."""

    code = 5


class ServiceError(TutorError):
    """A service (llama-server, Ollama, the hub) that does not answer as it must."""

    code = 6


class LockError(TutorError):
    """Another run holds the folder."""

    code = 7


class GateError(TutorError):
    """A gate said no: the artifact exists and is not good enough."""

    code = 8
