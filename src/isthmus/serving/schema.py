"""The form of requests: OpenAI's fields where it has them, each number in its range.

A field that would change the answer and is not known here is an error; those that only name or count somebody are
taken and ignored.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from isthmus.serving.limits import (
    LONGEST_TEXT,
    MOST_CHOICES,
    MOST_INPUTS,
    MOST_MESSAGES,
    MOST_NEW_TOKENS,
    MOST_STOPS,
    MOST_TOP_LOGPROBS,
)

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Words = Annotated[str, StringConstraints(max_length=LONGEST_TEXT)]
Said = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_TEXT)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Url = Annotated[str, StringConstraints(min_length=1)]
Tokens = Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)]
Zero = Annotated[float, Field(ge=0, le=0, description="Only 0: a penalty is not offered.")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageUrl(Strict):
    url: Url = Field(description="A data: URL (base64), or http(s) where the server allows the host.")
    detail: Literal["auto", "low", "high"] = Field(
        "auto", description="Taken for clients' sake; nothing depends on it."
    )


class TextPart(Strict):
    type: Literal["text"]
    text: Words


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Strict):
    url: Url = Field(
        description="data:video/jpeg;base64,FRAME,FRAME,... (or png, webp): frames in order, equal in size."
    )


class VideoPart(Strict):
    """A clip as its frames, for models that read clips."""

    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MOST_INPUTS)]


class Message(Strict):
    """One turn of a conversation. Only the user's holds pictures and clips."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Words
        | Annotated[
            list[Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]],
            Field(min_length=1, max_length=MOST_INPUTS),
        ]
    )
    name: Name | None = None


class BaseRequest(Strict):
    """Fields of every request."""

    model: Name
    user: Annotated[str, StringConstraints(max_length=256)] | None = Field(
        None, description="Whose request it is: the queue is fair among users of one machine too."
    )


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Writing(BaseRequest):
    """How a text is written. Temperature 0, the default, is greedy."""

    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**20)] = Field(0, description="0: no cut.")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = 0.0
    presence_penalty: Zero | None = 0.0


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Writing):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None
    metadata: dict[str, object] | None = Field(None, description="Taken for clients' sake and not kept.")


class CompletionRequest(Writing):
    """Running text for a language model without a vision encoder."""

    prompt: Said | Annotated[list[Said], Field(min_length=1, max_length=16)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = False
    best_of: Literal[1] | None = None
    suffix: None = None


class EmbeddingRequest(BaseRequest):
    """Texts and pictures into the space in which they are compared."""

    input: Said | Annotated[list[Said | Part], Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"


class ScoreRequest(BaseRequest):
    """How well candidates fit: likelihood as the answer, probability of matching, or similarity."""

    input: Said | Parts
    candidates: Annotated[list[Said], Field(min_length=1, max_length=MOST_INPUTS)]
    measure: Literal["likelihood", "match", "similarity"] | None = Field(
        None, description="Default: the first of the three that the model can do."
    )


class ClassifyRequest(BaseRequest):
    """Zero-shot probabilities of labels for one picture."""

    input: Parts
    labels: Annotated[list[Said], Field(min_length=1, max_length=MOST_INPUTS)]
    templates: Annotated[list[Said], Field(min_length=1, max_length=MOST_INPUTS)] = Field(
        ["a photo of a {}."], description="Each with one {} where the label goes; their vectors are averaged."
    )


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """OpenAI's error form."""

    error: ErrorDetail
