"""transformers' own models with the evaluator's protocols: ``isthmus eval hf:FOLDER``.

The folder is read by transformers' own classes, its own processor prepares pictures and prompts, its own ``generate``
answers. Nothing of isthmus is in the loop but the questions, the scoring and the controls, so a score stands for what
users of transformers have today. One sample at a time: batched answers of the library are not always the single ones.

Models that take one placeholder per visual token (LLaVA and its kin) and causal LMs answer; CLIP and SigLIP models
embed. Nothing in a folder is executed and nothing is downloaded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import torch
import transformers
from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.data.images import AnyImage, as_image, open_image
from isthmus.data.record import Image, Part, Record, Text, without_answer
from isthmus.data.text import TEMPLATES, render
from isthmus.errors import CapabilityError, CheckpointError, ConfigError, IsthmusError, nearest
from isthmus.interop.hf_tokenizer import quiet

_DECODING = {
    "max_new_tokens": "max_new_tokens",
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
}
"""Our names of decoding settings -> transformers'. The peer is greedy or searches beams; it does not draw."""

Library: TypeAlias = Any
"""A model, tokenizer, processor or output of transformers: of which class the folder says, and those that all have in
common declare too little of what is called here."""


class _Turn(TypedDict):
    """Of a conversation in the library's form."""

    role: str
    content: list[dict[str, object]]


def load_peer(folder: str | Path, *, template: str = "vicuna_v1") -> "Peer":
    """transformers' model of a folder.

    ``template`` writes the prompts of folders without a chat template of their own. Raises CheckpointError: not a
    folder of transformers, or one that the installed version cannot open.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"There is no folder of transformers at {folder}: it has no config.json.")
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type is None or "format" in config:
        raise CheckpointError(f"{folder} is not a folder of transformers; give it to isthmus eval without hf:.")
    if template not in TEMPLATES:
        raise ConfigError(f"unknown template {template!r}; {nearest(template, TEMPLATES)}")
    with _named_errors(f"transformers {transformers.__version__} cannot open {folder}"), quiet():
        if model_type in ("clip", "siglip"):
            return EmbeddingPeer(transformers.AutoModel.from_pretrained(folder), *_tools(folder), str(model_type))
        model = _generator(folder)
        tokenizer, images = _tools(folder)
        processor = None if images is None else _processor(folder, model)
        return AnsweringPeer(model, tokenizer, images, str(model_type), template, processor)


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Whatever the library raises as one line of ours: CheckpointError."""
    try:
        yield
    except IsthmusError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or ["no more is said"])[0]
        raise CheckpointError(f"{what}: {type(error).__name__}: {said[:300]}") from error


def open_class(folder: Path) -> Library:
    """transformers' model of a folder by the class that its config.json names, in float32 and eval mode.

    Raises CheckpointError when a tensor is missing there, left over or of another shape.
    """
    name = (read_json(folder / "config.json").get("architectures") or ["?"])[0]
    named: Library = getattr(transformers, name, None)
    if named is None:
        raise CheckpointError(f"{folder}: transformers {transformers.__version__} has no class {name}.")
    with quiet():  # what is wrong is in its report
        model, report = named.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {why: sorted(map(str, names)) for why, names in report.items() if names}
    if wrong:
        raise CheckpointError(f"{folder}: {name} does not take these weights as they are: {wrong}.")
    return model.eval()


def _generator(folder: Path) -> Library:
    if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
        return transformers.AutoModelForImageTextToText.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _tools(folder: Path) -> tuple[Library, Library]:
    """The tokenizer and the image processor (or none) of the folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not any((folder / f).is_file() for f in ("preprocessor_config.json", "processor_config.json")):
        return tokenizer, None
    return tokenizer, transformers.AutoImageProcessor.from_pretrained(folder)


def _processor(folder: Path, model: Library) -> Library:
    """The folder's own processor, with what old folders leave to the model's configuration (the library's advice)."""
    processor: Library = transformers.AutoProcessor.from_pretrained(folder)
    if getattr(processor, "patch_size", 0) is None:
        vision = model.config.vision_config
        processor.patch_size = vision.patch_size
        processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int("clip" in vision.model_type)
    return processor


class Peer:
    """What both kinds share: the name, and what a manifest keeps of them."""

    prompts: Mapping[str, str] = {}
    capabilities: tuple[str, ...]

    def __init__(self, model: Library, tokenizer: Library, images: Library, model_type: str) -> None:
        self.model, self.tokenizer, self.images = model.eval(), tokenizer, images
        self.kind = f"hf {model_type}"

    def pixels(self, pictures: Sequence[AnyImage]) -> Tensor:
        """(N, 3, H, W) by the folder's own image processor, with tiles (N, F, 3, H, W)."""
        return self.pixel_inputs(pictures)["pixel_values"]

    def pixel_inputs(self, pictures: Sequence[AnyImage]) -> dict[str, Tensor]:
        """All that the folder's own image processor makes of them. Raises CapabilityError when it has none."""
        if self.images is None:
            raise CapabilityError(f"This {self.kind} model has no image processor: it reads only text.")
        opened = [open_image(as_image(p).source, deep="clip") for p in pictures]
        return dict(self.images(images=opened, return_tensors="pt"))

    def provenance(self, records: Iterable[Record], decoding: Mapping[str, object]) -> dict[str, object]:
        described = None if self.images is None else self.images.to_dict()
        return {"peer": f"transformers {transformers.__version__}", "image": described}


class EmbeddingPeer(Peer):
    """CLIP and SigLIP: unit vectors of pictures and texts."""

    capabilities = ("embed_images", "embed_texts", "vision_features")

    @torch.inference_mode()
    def embed_images(self, images: Sequence[AnyImage]) -> Tensor:
        return _unit(self.model.get_image_features(pixel_values=self.pixels(images)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        padding = "max_length" if "siglip" in self.kind else True  # SigLIP was trained on padded texts only
        found = self.tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
        return _unit(self.model.get_text_features(**found))

    @torch.inference_mode()
    def vision_features(self, images: Sequence[AnyImage]) -> Tensor:
        return self.model.vision_model(pixel_values=self.pixels(images)).pooler_output


def _unit(features: Library) -> Tensor:
    vectors = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


class AnsweringPeer(Peer):
    """Models that write: each record becomes a prompt in the folder's chat template, or else in ``template``."""

    capabilities = ("answer",)

    def __init__(
        self,
        model: Library,
        tokenizer: Library,
        images: Library,
        model_type: str,
        template: str,
        processor: Library = None,
    ) -> None:
        super().__init__(model, tokenizer, images, model_type)
        self.template, self.processor = template, processor

    def answer_records(self, records: Sequence[Record], **decoding: object) -> list[str]:
        """One answer per record, one at a time. Raises ConfigError for decoding settings it does not have."""
        settings = self._settings(decoding)
        answers = []
        for record in records:
            with _named_errors(f"{record.id}: transformers fails at this sample"):
                answers.append(self._answer(without_answer(record), settings))
        return answers

    @torch.inference_mode()
    def score(self, parts: Sequence[Part], candidates: Sequence[str]) -> list[float]:
        """Log-likelihood of each candidate as the answer: of the tokens that it adds to the prompt."""
        with _named_errors("transformers fails at this prompt"):
            inputs = self._inputs(Record(id="scored", parts=tuple(parts)))
        start = inputs["input_ids"].shape[1]
        scores = []
        for candidate in candidates:
            added = self.tokenizer(f" {candidate}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([inputs["input_ids"], added], dim=1)
            logits = self.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            log_probs = logits[0, start - 1 : -1].float().log_softmax(dim=-1)
            scores.append(float(log_probs.gather(1, added[0][:, None]).sum()))
        return scores

    def provenance(self, records: Iterable[Record], decoding: Mapping[str, object]) -> dict[str, object]:
        facts = super().provenance(records, decoding)
        prompts = [self._prompt(without_answer(r)) for r in records]
        return facts | {"template": self._own_template() or self.template, "prompts": prompts}

    def _settings(self, decoding: Mapping[str, object]) -> dict[str, object]:
        settings: dict[str, object] = {"max_new_tokens": 128}
        for name, value in decoding.items():
            if name not in _DECODING:
                raise ConfigError(f"hf: has no decoding setting {name!r}; {nearest(name, _DECODING)}")
            settings[_DECODING[name]] = value
        return settings

    @torch.inference_mode()
    def _answer(self, record: Record, settings: Mapping[str, object]) -> str:
        inputs = self._inputs(record)
        pad = self.tokenizer.pad_token_id
        tokens = self.model.generate(
            **inputs, do_sample=False, pad_token_id=self.tokenizer.eos_token_id if pad is None else pad, **settings
        )
        return self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _inputs(self, record: Record) -> dict[str, Tensor]:
        """What the library's own processor (of a bare LM its tokenizer) makes of the record."""
        if record.images and self.processor is None:
            raise CapabilityError(f"This {self.kind} model has no image processor: it reads only text.")
        own, tool = self._own_template(), self.processor or self.tokenizer
        if own is not None:
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            return dict(tool.apply_chat_template(self._messages(record), chat_template=own, return_tensors="pt", **how))
        if self.processor is None:
            return dict(self.tokenizer(self._prompt(record), return_tensors="pt"))
        pictures = [open_image(image.source) for image in record.images] or None
        return dict(self.processor(text=self._prompt(record), images=pictures, return_tensors="pt"))

    def _prompt(self, record: Record) -> str:
        own = self._own_template()
        if own is None:
            return str(render(record, self.template, prompt=True)).replace("</s>", self.tokenizer.eos_token or "")
        tool, messages = self.processor or self.tokenizer, self._messages(record)
        return tool.apply_chat_template(messages, chat_template=own, add_generation_prompt=True, tokenize=False)

    def _messages(self, record: Record) -> Sequence[Mapping[str, object]]:
        """The library's form: parts where a processor reads, one text a turn where only a tokenizer does."""
        messages: list[_Turn] = []
        for part in record.parts:
            role = "user" if part.role == "text" else part.role
            if isinstance(part, Image):
                piece: dict[str, object] = {"type": "image", "image": open_image(part.source)}
            else:
                piece = {"type": "text", "text": _first(part)}
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"].append(piece)
            else:
                messages.append({"role": role, "content": [piece]})
        if self.processor is None:
            return [{**m, "content": "".join(str(piece["text"]) for piece in m["content"])} for m in messages]
        return messages

    def _own_template(self) -> str | None:
        return getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)


def _first(part: Text) -> str:
    return part.text if isinstance(part.text, str) else part.text[0]
