"""Model: a net that sees Batches and a processor that sees Records, with the methods that a user calls.

    model = isthmus.load("runs/demo/llava")
    model.answer("photo.png", "how many red cubes?")

``load`` (opening.py) is the one door from a folder to a model. A model has ``capabilities``; asking for one it lacks
raises and names it, so the same class serves CLIP, a bare language model and LLaVA.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Generic, Literal, NotRequired, Protocol, Self, TypedDict, cast, overload

import torch
from PIL import Image as PilImage
from torch import Tensor

from isthmus import adapter_folder, checkpoint
from isthmus.adapter_folder import Base, OfBase
from isthmus.batch import Tokens
from isthmus.config import plain
from isthmus.data.attention import Attention
from isthmus.data.collate import collate
from isthmus.data.images import AnyImage, as_image
from isthmus.data.interleave import STYLES
from isthmus.data.messages import Message, conversation, part_of
from isthmus.data.processor import Processor, tokenizer_files
from isthmus.data.reading import (
    listed_texts,
    must_be_records,
    scored,
    words,
)
from isthmus.data.record import Example, Image, Part, Record, Text, without_answer
from isthmus.data.shared import shared_beginning
from isthmus.data.text import TEMPLATES, render
from isthmus.data.video import as_visual
from isthmus.errors import CapabilityError, ConfigError
from isthmus.language import Decoding
from isthmus.load_report import LoadReport
from isthmus.nn.losses import similarity
from isthmus.streaming import pieces
from isthmus.systems import SYSTEMS, system
from isthmus.systems.base import OfNet, System
from isthmus.together import together
from isthmus.tracing import attention_of, check_gaps, gap_of
from isthmus.user_code import is_user_code
from isthmus.version import __version__

FORMAT = "isthmus-1"


class FolderConfig(TypedDict):
    """What a model folder's config.json says; ``borrowed`` as in :mod:`isthmus.borrowed`."""

    format: str
    isthmus: str
    kind: str
    config: dict[str, object]
    prompts: NotRequired[dict[str, str]]
    forbidden: NotRequired[list[int]]
    base: NotRequired[OfBase]
    borrowed: NotRequired[dict[str, dict[str, str]]]


class _Classifies(Protocol):
    """A net whose logits are of pictures and texts that it has embedded."""

    def logits(self, images: Tensor, texts: Tensor) -> Tensor: ...


class Model(Generic[OfNet]):
    """A net with its processor. Build one with :func:`load`, or from parts in Python.

    Args:
        net: one of the classes of :mod:`isthmus.models`, or of a user's own.
        processor: turns Records into Examples for this net; carries the tokenizer and the image transform.
        prompts: the prompts of tasks by name, for example ``{"caption": "Describe the picture."}``.
        forbidden: token ids that must never be generated, such as another format's image placeholder.
        kind: what such a net can do and how it is opened again; left out, the one of the net's ``KIND``.
    """

    def __init__(
        self,
        net: OfNet,
        processor: Processor,
        *,
        prompts: Mapping[str, str] | None = None,
        forbidden: Sequence[int] = (),
        kind: System[OfNet] | None = None,
    ) -> None:
        self.net = net.eval()
        self.processor = processor
        self.forbidden = tuple(forbidden)
        self.prompts = dict(prompts or {})
        self.system = kind if kind is not None else cast("System[OfNet]", system(net.KIND))
        self.kind = self.system.kind
        self.report: LoadReport | None = None  # of a model that was opened
        self.base: Base | None = None  # of a model that carries adapters

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What this model can do."""
        return self.system.capabilities(self.net)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        self.net.to(device)
        return self

    def cast(self, dtype: torch.dtype) -> Self:
        """The weights to ``dtype``; what must not be cast (BLIP-2's Q-Former, rotary frequencies) stays in float32."""
        self.net.cast(dtype)
        return self

    def need(self, capability: str) -> None:
        """Raises CapabilityError, naming what the model can do, unless it can do this."""
        if capability not in self.capabilities:
            can = ", ".join(self.capabilities) or "serve as a part of other models"
            raise CapabilityError(f"This {self.kind} model cannot {capability}; it can: {can}.")

    # Text out: captions, answers, conversations

    def caption(self, image: AnyImage, **decoding: object) -> str:
        """A caption of one picture or clip, with the prompt that the model was trained with: ``prompts["caption"]``,
        which of a foreign LLaVA is "Provide a brief description of the given image."; else the picture alone."""
        self.need("caption")
        parts: list[Part] = [replace(as_visual(image), role="user" if "caption" in self.prompts else "text")]
        if "caption" in self.prompts:
            parts.append(Text(self.prompts["caption"], role="user"))
        return self.generate([Record(id="caption", parts=tuple(parts))], **decoding)[0]

    def answer(self, image: AnyImage | Sequence[AnyImage] | None, question: str, **decoding: object) -> str:
        """The answer to a question about one picture or clip, several, or (bare LM) none.

        A path to a folder of frames or to a video file is a clip.
        """
        self.need("answer")
        parts = (*(as_visual(i) for i in _listed(image)), Text(question, role="user"))
        return self.generate([Record(id="answer", parts=parts)], **decoding)[0]

    def chat(self, messages: Sequence[Message], **decoding: object) -> str:
        """The assistant's next turn of a conversation in the messages form (roles system, user, assistant)."""
        self.need("chat")
        return self.generate([conversation(messages)], **decoding)[0]

    def stream(
        self,
        prompt: Record | Sequence[Message] = (),
        *,
        asked: Record | Sequence[Message] | None = None,
        **decoding: object,
    ) -> Iterator[str]:
        """What :meth:`chat` answers to messages, or :meth:`generate` to a Record, piece by piece while it is written:
        complete characters, which together are the answer. ``asked`` is the former name of ``prompt``."""
        prompt = prompt if asked is None else asked
        self.need("generate" if isinstance(prompt, Record) else "chat")
        record = prompt if isinstance(prompt, Record) else conversation(prompt)
        batch = collate([self.processor.prompt(record)]).to(self.device)
        return pieces(self.net.eval(), self.processor.tokenizer, batch, self.ended(Decoding.of(decoding)))

    @overload
    def generate(
        self, records: Sequence[Record], *, batch_size: int = 64, return_attention: Literal[True], **decoding: object
    ) -> list[Attention]: ...
    @overload
    def generate(self, records: Sequence[Record], **options: object) -> list[str]: ...
    def generate(  # type: ignore[reportInconsistentOverload]  # a batch_size among options that are unpacked
        self, records: Sequence[Record], *, batch_size: int = 64, return_attention: bool = False, **decoding: object
    ) -> list[str] | list[Attention]:
        """One text per record (its last turn must be the user's). ``decoding``: fields of Decoding.

        With ``return_attention`` each is an Attention, as :meth:`attend` gives them.
        """
        if return_attention:
            return self.attend(records, batch_size=batch_size, **decoding)
        self.need("generate")
        must_be_records(records, "generate")
        found = self._continue([self.processor.prompt(record) for record in records], batch_size, decoding)
        return [self.processor.tokenizer.decode(ids).strip() for ids in found]

    def _continue(
        self, examples: Sequence[Example], batch_size: int, decoding: Mapping[str, object]
    ) -> list[list[int]]:
        """The new tokens of each example; what several begin with is read once."""
        settings = self.ended(Decoding.of(decoding))
        with self._inference():
            return together(self.net, examples, settings, batch_size=batch_size, device=self.device)

    def attend(self, records: Sequence[Record], *, batch_size: int = 64, **decoding: object) -> list[Attention]:
        """One text per record, with a map per new token, layer and picture of what the model attended to."""
        self.need("attend")
        must_be_records(records, "attend")
        prompts = [self.processor.prompt(record) for record in records]
        answers = self._continue(prompts, batch_size, decoding)
        with self._inference():
            return [attention_of(self, prompt, ids) for prompt, ids in zip(prompts, answers, strict=True)]

    def gaps(self, records: Sequence[Record], *, batch_size: int = 64, **decoding: object) -> list[float]:
        """For each record the smallest distance (in logits) of the two best tokens at any step of its answer: where it
        is tiny, a sum taken in another order may answer otherwise. Plain greedy decoding only (ConfigError), and no
        encoder-decoder (CapabilityError)."""
        must_be_records(records, "gaps")
        settings = self.ended(Decoding.of(decoding))
        check_gaps(self, settings)
        prompts = [self.processor.prompt(without_answer(record)) for record in records]
        answers = self._continue(prompts, batch_size, decoding)
        with self._inference():
            return [gap_of(self, prompt, ids, settings) for prompt, ids in zip(prompts, answers, strict=True)]

    def answer_records(self, records: Sequence[Record], **decoding: object) -> list[str]:
        """Answers to question records: what evaluation needs of a model. A trailing assistant turn is cut off."""
        self.need("answer")
        must_be_records(records, "answer_records")
        return self.generate([without_answer(r) for r in records], **decoding)

    def provenance(self, records: Iterable[Record], decoding: Mapping[str, object]) -> dict[str, object]:
        """What a score's manifest keeps of the model beside its weights: image transform, the processor's settings
        (BLIP-2's words for questions and captions among them), and of a model that writes template, decoding in full
        and the prompts of ``records`` as the model reads them."""
        settings, template = self.processor.to_dict(), self.processor.template
        facts: dict[str, object] = {"image": settings.pop("image", None), "processor": settings}
        if "generate" not in self.capabilities:
            return facts
        if template in TEMPLATES:
            prompts = [str(render(record, template, prompt=True)) for record in records]
        else:
            uncut = self.processor.uncut()  # a prompt that is too long is the answer's trouble, not the manifest's
            prompts = [words(uncut.prompt(record), self.processor.tokenizer) for record in records]
        if template is not None:
            facts["template"] = template
        if template in STYLES:
            facts["style"] = asdict(STYLES[template])
        return facts | {"prompts": prompts, "decoding": asdict(Decoding.of(decoding))}

    def score(self, parts: Sequence[Part | AnyImage | str], candidates: Sequence[str]) -> list[float]:
        """Log-likelihood (natural log, summed over tokens) of each candidate as the answer to ``parts``.

        A str is the path of a picture or clip where there is one of that name, else what the user says. Raises
        DataError for a candidate that does not fit after the prompt.
        """
        self.need("score")
        candidates = listed_texts(candidates, "candidates")
        prompt = tuple(part_of(p) for p in ([parts] if isinstance(parts, str) else parts))
        texts = [p for p in prompt if isinstance(p, Text)]
        running = bool(texts) and all(t.role == "text" for t in texts)  # no turns: the candidate runs on
        records = [
            Record(
                id=f"candidate {i}",
                parts=(*prompt, Text(f" {c}" if running else c, role="text" if running else "assistant", learn=True)),
            )
            for i, c in enumerate(candidates)
        ]
        examples = [scored(self.processor, r, c) for r, c in zip(records, candidates, strict=True)]
        beginning = shared_beginning(examples) if self.net.shares_beginning else None
        with self._inference():
            if beginning is not None:
                first, endings, labels = beginning
                batch = collate([first]).to(self.device)
                found = self.net.score_endings(
                    batch, [e.to(self.device) for e in endings], [w.to(self.device) for w in labels]
                )
                return [float(x) for x in found]
            return [float(x) for x in self.net.score(collate(examples).to(self.device))]

    def ended(self, decoding: Decoding) -> Decoding:
        """The decoding with this model's end of answer among the stops, and its other special tokens forbidden."""
        tokenizer = self.processor.tokenizer
        ends = {tokenizer.eos_id}
        if self.processor.template == "plain":
            ends.add(tokenizer.encode("\n")[-1])  # ends a caption, not </s>; SentencePiece has a "▁" before it
        ends.update(self.processor.stop_ids)
        special = {*tokenizer.begin_ids, tokenizer.pad_id, *self.forbidden, *self.processor.forbidden_ids} - ends
        return replace(
            decoding,
            stop_ids=(*decoding.stop_ids, *sorted(ends)),
            forbidden_ids=(*decoding.forbidden_ids, *sorted(i for i in special if i is not None)),
        )

    # Vectors out: embeddings, similarity, zero-shot

    def embed_images(self, images: Sequence[AnyImage], *, batch_size: int = 128) -> Tensor:
        """(N, D) vectors in the joint space, of unit length when the model compares by the cosine. BLIP-2 gives one
        vector per query, (N, Q, D): a picture is as similar to a text as the best of them."""
        self.need("embed_images")
        return self._over_images(images, lambda pixels: self._compared(self.net.embed_images(pixels)), batch_size)

    def vision_features(self, images: Sequence[AnyImage], *, batch_size: int = 128) -> Tensor:
        """(N, D) pooled features of the encoder alone: for a linear probe, and for finding similar examples."""
        self.need("vision_features")
        return self._over_images(images, self.net.pooled_features, batch_size)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """(M, D) vectors in the joint space, of unit length when the model compares by the cosine."""
        self.need("embed_texts")
        texts = listed_texts(texts, "texts")
        rows = []
        with self._inference():
            for start in range(0, len(texts), batch_size):
                tokens = self._text_tokens(list(texts[start : start + batch_size]))
                rows.append(self._compared(self.net.embed_texts(tokens)))
        return torch.cat(rows)

    def _text_tokens(self, texts: Sequence[str]) -> Tokens:
        """Texts alone as the processor's one text stream."""
        (tokens,) = collate([self.processor.text_example(text) for text in texts]).to(self.device).text.values()
        return tokens

    def match(self, image: AnyImage, text: str) -> float:
        """Probability that the text belongs to the picture, by looking at both together (BLIP-2's ITM head)."""
        self.need("match")
        return float(self._matched([image], [text], torch.zeros(1, 2, dtype=torch.long), 1).softmax(-1)[0, 1])

    def match_logits(
        self, images: Sequence[AnyImage], texts: Sequence[str], pairs: Tensor, *, batch_size: int = 256
    ) -> Tensor:
        """(n,) logit of "they belong together" for ``pairs`` (n, 2) of numbers of pictures and texts: what retrieval
        reranks by. Every picture is encoded once."""
        self.need("match")
        return self._matched(images, texts, pairs, batch_size)[:, 1]

    def _matched(self, images: Sequence[AnyImage], texts: Sequence[str], pairs: Tensor, batch_size: int) -> Tensor:
        vision = self._over_images(images, self.net.normed, 128)
        rows = []
        with self._inference():
            for chunk in pairs.split(batch_size):
                tokens = self._text_tokens([texts[int(j)] for j in chunk[:, 1]])
                rows.append(self.net.match_logits(vision[chunk[:, 0]].to(self.device), tokens).float().cpu())
        return torch.cat(rows) if rows else torch.zeros(0, 2)

    def similarity(self, images: Sequence[AnyImage], texts: Sequence[str]) -> Tensor:
        """(N, M) similarity of every picture with every text, of the kind the model was trained with (cosine)."""
        self.need("similarity")
        texts = listed_texts(texts, "texts")
        return similarity(self.embed_images(images), self.embed_texts(texts), self.net.compared_by())

    def _compared(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float().cpu()
        return torch.nn.functional.normalize(vectors, dim=-1) if self.net.compared_by() == "cosine" else vectors

    def classify(
        self, image: AnyImage, labels: Sequence[str], *, templates: Sequence[str] = ("a photo of a {}.",)
    ) -> dict[str, float]:
        """Zero-shot probabilities over ``labels``, likeliest first (prompt ensemble: mean of unit vectors); those
        that read alike are one, with a warning.

        Raises ConfigError for a template without exactly one ``{}``, where the label goes."""
        self.need("classify")
        from isthmus.data.sources.files import merged_names
        from isthmus.evaluation.zero_shot import check_templates

        labels, templates = listed_texts(labels, "labels"), listed_texts(templates, "templates")
        labels = list(dict.fromkeys(merged_names(labels, "class")))
        check_templates(templates)
        classes = torch.stack(
            [self.embed_texts([t.replace("{}", label) for t in templates]).mean(0) for label in labels]
        )
        with self._inference():
            logits = cast(_Classifies, self.net).logits(
                self.embed_images([image]).to(self.device), classes.to(self.device)
            )[0]
        return dict(sorted(zip(labels, logits.softmax(-1).tolist(), strict=True), key=lambda pair: -pair[1]))

    def _over_images(self, images: Sequence[AnyImage], function: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
        transform = self.processor.image
        if transform is None:
            raise CapabilityError("This model has no image transform, so it cannot read pictures.")
        images = [images] if isinstance(images, str | Path | PilImage.Image | Image) else images
        if len(images) == 0:
            raise ConfigError("no images: give a list of at least one.")
        rows = []
        with self._inference():
            for start in range(0, len(images), batch_size):
                chunk = [transform(as_image(i)) for i in images[start : start + batch_size]]
                if len({pixels.shape for pixels in chunk}) == 1 and chunk[0].ndim == 3:
                    rows.append(function(torch.stack(chunk).to(self.device)).float().cpu())
                    continue
                for pixels in chunk:  # of unlike shapes, or clips, which count as the mean of their frames
                    frames = pixels if pixels.ndim == 4 else pixels[None]
                    rows.append(function(frames.to(self.device)).float().mean(0, keepdim=True).cpu())
        return torch.cat(rows)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        self.net.eval()
        with torch.inference_mode():
            yield

    # Folders

    def save(
        self, folder: str | Path, *, extra: Mapping[str, checkpoint.Content] | None = None, replace: bool = False
    ) -> Path:
        """Write one model folder: config, safetensors, tokenizer, processor, manifest. Never over another one. Raises
        ConfigError for a system of a user's own that was not found by its file's name: none could open it again."""
        if self.system.name not in SYSTEMS and not is_user_code(self.system.name):
            raise ConfigError(
                f"{type(self.system).__name__} does not say in which file it is, so the model could not be opened "
                "again: take isthmus.systems.system(isthmus.user_code.pin('path/file.py:MySystem'))."
            )
        weights, of_base = adapter_folder.weights(self.net, self.base, Path(folder))
        config: FolderConfig = {
            "format": FORMAT,
            "isthmus": __version__,
            "kind": self.system.name,
            "config": plain(self.net.config),
            "prompts": self.prompts,
            "forbidden": list(self.forbidden),
        }
        if of_base is not None:
            config["base"] = of_base
        files: dict[str, checkpoint.Content] = {
            "config.json": config,
            "processor.json": self.processor.to_dict(),
            **weights,
            **tokenizer_files(self.processor),
            **(extra or {}),
        }
        checkpoint.write_folder(folder, files, replace=replace)
        return Path(folder)


def _listed(image: AnyImage | Sequence[AnyImage] | None) -> Sequence[AnyImage]:
    if image is None:
        return ()
    return tuple(image) if isinstance(image, list | tuple) else (cast(AnyImage, image),)
