"""Model: a net that sees Batches and a processor that sees Records, behind the words a user knows.

    model = isthmus.load("runs/demo/llava")
    model.answer("photo.png", "how many red cubes?")

``load`` is the one door from a folder to a model. A model has ``capabilities``; asking for one it lacks raises and
names it, so the same class serves CLIP, a bare language model and LLaVA.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import isthmus
from isthmus import checkpoint
from isthmus.config import plain
from isthmus.data.clip_tokenizer import load_tokenizer
from isthmus.data.collate import collate
from isthmus.data.images import AnyImage, as_image
from isthmus.data.messages import Message, parts_of
from isthmus.data.processor import ContrastiveProcessor, Processor, processor_from_dict
from isthmus.data.record import Image, Part, Record, Text, without_answer
from isthmus.errors import CapabilityError, CheckpointError, DataError, nearest
from isthmus.language import Decoding
from isthmus.models import MODELS, model_class
from isthmus.nn.losses import similarity

FORMAT = "isthmus-1"
_CAPABILITIES = {
    "clip": ("embed_images", "embed_texts", "similarity", "classify"),
    "lm": ("generate", "answer", "chat", "score"),
    "llava": ("generate", "caption", "answer", "chat", "score"),
}


class Model:
    """A net with its processor. Build one with :func:`load`, or from parts in Python.

    Args:
        net: one of the classes of :mod:`isthmus.models`.
        processor: turns Records into Examples for this net; carries the tokenizer and the image transform.
        prompts: the texts behind task names, for example ``{"caption": "Describe the picture."}``.
        forbidden: token ids that must never be generated, such as another format's image placeholder.
    """

    def __init__(
        self, net: Any, processor: Processor, *, prompts: Mapping[str, str] | None = None, forbidden: Sequence[int] = ()
    ) -> None:
        self.net = net.eval()
        self.processor = processor
        self.forbidden = tuple(forbidden)
        self.prompts = dict(prompts or {})
        self.kind: str = net.KIND

    @property
    def capabilities(self) -> tuple[str, ...]:
        return _CAPABILITIES[self.kind]

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: str | torch.device) -> "Model":
        self.net.to(device)
        return self

    def _need(self, capability: str) -> None:
        if capability not in self.capabilities:
            raise CapabilityError(f"A {self.kind} model cannot {capability}; it can: {', '.join(self.capabilities)}.")

    # Text out: captions, answers, conversations

    def caption(self, image: AnyImage, **decoding: Any) -> str:
        """A caption of one picture, asked for in the words the model was trained with."""
        self._need("caption")
        parts: list[Part] = [as_image(image)]
        if "caption" in self.prompts:
            parts.append(Text(self.prompts["caption"], role="user"))
        return self.generate([Record(id="caption", parts=tuple(parts))], **decoding)[0]

    def answer(self, image: AnyImage | Sequence[AnyImage] | None, question: str, **decoding: Any) -> str:
        """The answer to a question about one picture, several, or (bare LM) none."""
        self._need("answer")
        parts = (*(as_image(i) for i in _listed(image)), Text(question, role="user"))
        return self.generate([Record(id="answer", parts=parts)], **decoding)[0]

    def chat(self, messages: Sequence[Message], **decoding: Any) -> str:
        """The assistant's next turn of a conversation in the messages form (roles system, user, assistant)."""
        self._need("chat")
        if not messages or messages[-1].get("role") != "user":
            raise DataError(
                "a conversation must end with a question of the user's; the last message is "
                + (f"the {messages[-1].get('role')}'s." if messages else "missing.")
            )
        return self.generate([Record(id="chat", parts=tuple(parts_of(messages)))], **decoding)[0]

    def generate(self, records: Sequence[Record], *, batch_size: int = 64, **decoding: Any) -> list[str]:
        """One text per record (its last turn must be the user's). ``decoding``: fields of Decoding."""
        self._need("generate")
        settings = self._ended(Decoding(**decoding))
        examples = [self.processor.prompt(record) for record in records]
        answers = [""] * len(examples)
        order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
        with self._inference():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = collate([examples[i] for i in rows]).to(self.device)
                for i, ids in zip(rows, self.net.generate(batch, settings), strict=True):
                    answers[i] = self.processor.tokenizer.decode(ids).strip()
        return answers

    def answer_records(self, records: Sequence[Record], **decoding: Any) -> list[str]:
        """Answers to question records: what evaluation asks of a model. A trailing assistant turn is cut off."""
        return self.generate([without_answer(r) for r in records], **decoding)

    def score(self, parts: Sequence[Part | AnyImage | str], candidates: Sequence[str]) -> list[float]:
        """Log-likelihood (natural log, summed over tokens) of each candidate as the answer to ``parts``."""
        self._need("score")
        prompt = tuple(
            p
            if isinstance(p, Text | Image)
            else Text(p, role="user")
            if isinstance(p, str) and not Path(p).is_file()
            else as_image(p)
            for p in parts
        )
        records = [
            Record(id=f"candidate {i}", parts=(*prompt, Text(c, role="assistant", learn=True)))
            for i, c in enumerate(candidates)
        ]
        examples = [self.processor.example(r, draw=0) for r in records]
        with self._inference():
            return [float(x) for x in self.net.score(collate(examples).to(self.device))]

    def _ended(self, decoding: Decoding) -> Decoding:
        """The decoding with this model's end of answer among the stops, and its other special tokens forbidden."""
        tokenizer = self.processor.tokenizer
        ends = {tokenizer.eos_id}
        if getattr(self.processor, "template", "") == "plain":
            ends.update(tokenizer.encode("\n"))  # the template ends a caption with a newline, not with </s>
        special = {tokenizer.bos_id, tokenizer.pad_id, *self.forbidden} - ends
        return replace(
            decoding,
            stop_ids=(*decoding.stop_ids, *sorted(ends)),
            forbidden_ids=(*decoding.forbidden_ids, *sorted(i for i in special if i is not None)),
        )

    # Vectors out: embeddings, similarity, zero-shot

    def embed_images(self, images: Sequence[AnyImage], *, batch_size: int = 128) -> Tensor:
        """(N, D) vectors in the joint space, of unit length when the model compares by the cosine."""
        self._need("embed_images")
        return self._over_images(images, lambda pixels: self._compared(self.net.embed_images(pixels)), batch_size)

    def vision_features(self, images: Sequence[AnyImage], *, batch_size: int = 128) -> Tensor:
        """(N, D) pooled features before the projection, for a linear probe (clip.md section 10)."""
        self._need("embed_images")
        return self._over_images(images, lambda pixels: self.net.vision(pixels).pooled, batch_size)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """(M, D) vectors in the joint space, of unit length when the model compares by the cosine."""
        self._need("embed_texts")
        assert isinstance(self.processor, ContrastiveProcessor)
        rows = []
        with self._inference():
            for start in range(0, len(texts), batch_size):
                examples = [self.processor.text_example(t) for t in texts[start : start + batch_size]]
                batch = collate(examples).to(self.device)
                rows.append(self._compared(self.net.embed_texts(batch.text["text"])))
        return torch.cat(rows) if rows else torch.zeros(0, self.net.config.embed_dim)

    def similarity(self, images: Sequence[AnyImage], texts: Sequence[str]) -> Tensor:
        """(N, M) similarity of every picture with every text, of the kind the model was trained with (cosine)."""
        self._need("similarity")
        return similarity(self.embed_images(images), self.embed_texts(texts), self.net.config.similarity)

    def _compared(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float().cpu()
        return torch.nn.functional.normalize(vectors, dim=-1) if self.net.config.similarity == "cosine" else vectors

    def classify(
        self, image: AnyImage, labels: Sequence[str], *, templates: Sequence[str] = ("a photo of a {}.",)
    ) -> dict[str, float]:
        """Zero-shot probabilities over ``labels``, likeliest first (prompt ensemble: mean of unit vectors)."""
        self._need("classify")
        classes = torch.stack([self.embed_texts([t.format(label) for t in templates]).mean(0) for label in labels])
        with self._inference():
            logits = self.net.logits(self.embed_images([image]).to(self.device), classes.to(self.device))[0]
        ranked = sorted(zip(labels, logits.softmax(-1).tolist(), strict=True), key=lambda pair: -pair[1])
        return dict(ranked)

    def _over_images(self, images: Sequence[AnyImage], function: Any, batch_size: int) -> Tensor:
        transform = self.processor.image
        if transform is None:
            raise CapabilityError("This model has no image transform, so it cannot read pictures.")
        rows = []
        with self._inference():
            for start in range(0, len(images), batch_size):
                chunk = [transform(as_image(i)) for i in images[start : start + batch_size]]
                rows.append(function(torch.stack(chunk).to(self.device)).float().cpu())
        return torch.cat(rows) if rows else torch.zeros(0)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        self.net.eval()
        with torch.inference_mode():
            yield

    # Folders

    def save(self, folder: str | Path, *, extra: Mapping[str, Any] | None = None, replace: bool = False) -> Path:
        """Write one model folder: config, safetensors, tokenizer, processor, manifest. Never over another one."""
        config = {
            "format": FORMAT,
            "isthmus": isthmus.__version__,
            "kind": self.kind,
            "config": plain(self.net.config),
            "prompts": self.prompts,
            "forbidden": list(self.forbidden),
        }
        files: dict[str, Any] = {
            "config.json": config,
            "processor.json": self.processor.to_dict(),
            "model.safetensors": checkpoint.state_tensors(self.net),
            **self.processor.tokenizer.files(),
            **(extra or {}),
        }
        checkpoint.write_folder(folder, files, replace=replace)
        return Path(folder)


def load(path: str | Path, *, device: str = "cpu") -> Model:
    """Open a model: a run folder, a model folder of ours, or a transformers folder (CLIP, SigLIP, LLaVA, causal LM).

    Detection is by content, never by name. Loading is strict and verifies the manifest of our own folders.
    Raises CheckpointError: nothing there, damaged, unknown format, or a weight missing or left over.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(_nothing_here(Path(path)))
    config = checkpoint.read_json(folder / "config.json")
    if "format" not in config:
        from isthmus.interop.folders import load_foreign

        net, processor, forbidden = load_foreign(folder, config)
        return Model(net, processor, forbidden=forbidden).to(device)
    if config["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {config['format']!r}; this version reads {FORMAT!r}.")
    files = checkpoint.read_folder(folder)
    kind = config.get("kind")
    if kind not in MODELS:
        raise CheckpointError(f"{folder}: unknown kind of model {kind!r}; known: {', '.join(MODELS)}.")
    cls = model_class(kind)
    net = cls.from_config(config["config"])
    checkpoint.load_into(net, checkpoint.load_tensors(files["model.safetensors"]), where=folder)
    tokenizer = load_tokenizer(folder)
    described = checkpoint.read_json(files["processor.json"])
    return Model(
        net,
        processor_from_dict(described, tokenizer),
        prompts=config.get("prompts"),
        forbidden=config.get("forbidden", ()),
    ).to(device)


def _listed(image: AnyImage | Sequence[AnyImage] | None) -> Sequence[AnyImage]:
    if image is None:
        return ()
    return tuple(image) if isinstance(image, list | tuple) else (cast(AnyImage, image),)


def _nothing_here(path: Path) -> str:
    if not path.exists():
        beside = [str(f) for f in path.parent.glob("*") if f.is_dir()] if path.parent.is_dir() else []
        near = nearest(str(path), beside) if beside else ""
        return f"There is no model at {path}: no such file or folder" + (f"; {near}" if "did you" in near else ".")
    if path.is_dir():
        if (path / "run.json").is_file():
            return (
                f"The run in {path} is not finished, so it has no model yet: run `isthmus train` with the same "
                "recipe and --out again and it goes on where it stopped."
            )
        found = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
        return f"{path} is not a model folder: it has no config.json (found: {found})."
    return f"{path} is a file; a model is a folder with config.json and safetensors in it."
