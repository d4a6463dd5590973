"""Answers of Ollama's API: the fields that are used, with their types.

In: parsed JSON of the server. Out: strict models; a field of another type, NaN and null are errors that name the field.
Ollama leaves out fields that are empty or zero: these have defaults. Unknown fields are ignored.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A number of tokens, bytes or nanoseconds, which Go keeps in 64 bits."""


class Reply(BaseModel):
    """An answer whose fields have exactly the declared types."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class VersionReply(Reply):
    """GET /api/version."""

    version: str = Field(max_length=100)


class Details(Reply):
    """What /api/show returns of a model's file."""

    family: str = ""
    quantization_level: str = ""


class ShowReply(Reply):
    """POST /api/show."""

    template: str = ""
    system: str = ""
    parameters: str = ""
    modelfile: str = ""
    capabilities: list[str] = []
    details: Details = Details()
    model_info: dict[str, Any] = {}


class TagReply(Reply):
    """A model in GET /api/tags."""

    model: str = Field(min_length=1)
    digest: str = Field(min_length=1)
    size: Count
    modified_at: datetime | None = Field(None, strict=False)

    @property
    def tag(self) -> "Tag":
        """The name with the values that are shown of it."""
        try:
            modified = self.modified_at.astimezone(UTC).isoformat() if self.modified_at else ""
        except (OverflowError, ValueError):  # the year 1 or 9999, in another time zone
            modified = ""
        return Tag(self.model, self.digest, modified, self.size)


@dataclass(frozen=True)
class Tag:
    """A name of a model on the server; two tags with one digest are one model."""

    name: str
    digest: str
    modified: str  # UTC, ISO 8601
    size: int  # bytes


class TagsReply(Reply):
    """GET /api/tags."""

    models: list[TagReply]


class LoadedModel(Reply):
    """A model in GET /api/ps."""

    model: str = Field(min_length=1)
    size: Count = 0
    size_vram: Count = 0


class LoadedReply(Reply):
    """GET /api/ps."""

    models: list[LoadedModel]


class DebugInfo(Reply):
    """The prompt that the undocumented field `_debug_render_only` requests."""

    rendered_template: str


class RenderReply(Reply):
    """POST /api/generate or /api/chat with `_debug_render_only`."""

    debug_info: DebugInfo | None = Field(None, alias="_debug_info")


class CreateEvent(Reply):
    """An event of POST /api/create."""

    status: str = ""
    completed: Count = 0
    total: Count = 0


class Candidate(Reply):
    """A token that could stand in a place of an answer."""

    token: str
    logprob: float


class TokenLogprob(Candidate):
    """A token of an answer, with the most probable tokens of its place."""

    top_logprobs: list[Candidate] | None = None


class ChatMessage(Reply):
    """The text of an event of an answer; `thinking` is the part of a thought that llama.cpp has found in it."""

    content: str = ""
    thinking: str = ""


class Event(Reply):
    """An event of an answer; the last one has `done`, its reason and the counts."""

    logprobs: list[TokenLogprob] | None = None
    done: bool = False
    done_reason: str = ""
    prompt_eval_count: Count = 0
    eval_count: Count = 0
    eval_duration: Count = 0


class ChatEvent(Event):
    """An event of POST /api/chat."""

    message: ChatMessage = ChatMessage()


class CompletionEvent(Event):
    """An event of POST /api/generate."""

    response: str = ""
