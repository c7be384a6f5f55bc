"""Sources on real data sets that nobody here made. Skipped, with a message, where they are absent."""

from collections import Counter
from itertools import islice

import pytest

from isthmus.data.images import ImageTransform
from isthmus.data.loader import Loader
from isthmus.data.processor import ContrastiveProcessor, SpliceProcessor
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Image
from isthmus.data.sources import open_source
from isthmus.data.text import render
from isthmus.errors import IsthmusWarning
from tests.data.helpers import byte_level
from tests.narrow import there

pytestmark = pytest.mark.data
EASY = {"kind": "webdataset", "shards": "easy_vqa/dev-*.tar", "fields": {"questions": "qa"}}
TOKENIZER = byte_level()
SPLICE = SpliceProcessor(TOKENIZER, ImageTransform.clip(32), num_tokens=4, max_length=1024)


def first_batch(source, processor):
    quarantine = Quarantine()
    loader = Loader(source, processor, batch_size=8, group=False, shuffle=False, quarantine=quarantine, prefetch=0)
    _, (batch,) = next(loader.steps())
    assert not quarantine.failures
    assert len(batch) == batch.num_visuals == 8
    return batch


def test_easy_vqa_in_both_forms(real_data):
    talks = open_source(EASY, data_root=real_data)
    single = open_source({**EASY, "turns": "single"}, data_root=real_data)
    assert (len(talks), len(single)) == (400, 3888)
    first = str(render(talks[0], "vicuna_bare"))
    assert first.startswith("USER: <image>\nwhat color is the circle? ASSISTANT: blue</s>USER: ")
    assert single[7].meta["answers"] == ("no",)
    majority = Counter(single[n].meta["answers"] for n in range(len(single))).most_common(1)[0][1]
    assert round(100 * majority / len(single), 1) == 37.2
    assert there(first_batch(single, SPLICE).visuals[0].pixels).shape == (8, 1, 3, 32, 32)


def test_llava_json_with_pictures_in_a_tar(real_data):
    source = open_source(
        {"kind": "llava", "file": "easy_vqa/llava_train_first600.json", "images": "easy_vqa/train-*.tar"},
        data_root=real_data,
    )
    assert len(source) == 600
    first_batch(source, SPLICE)


def test_emoji_with_names_and_keywords(real_data):
    plain = {"kind": "webdataset", "shards": "emoji/dev-{noto,openmoji,twemoji}-000.tar"}
    side = {"file": "emoji/metadata.jsonl", "key": "key", "fields": ["caption", "keywords"]}
    with pytest.warns(IsthmusWarning, match="keys .* name 3 or fewer samples each"):  # an emoji in three styles
        source = open_source({**plain, "captions": side}, data_root=real_data)
    assert len(source) == len(open_source(plain, data_root=real_data)) == 168 + 168 + 167
    texts = source[0].texts[0].text
    assert isinstance(texts, tuple)
    assert texts[0] == open_source(plain, data_root=real_data)[0].texts[0].text
    first_batch(source, ContrastiveProcessor(TOKENIZER, ImageTransform.clip(32)))


def test_cifar_class_names(real_data):
    source = open_source(
        {
            "kind": "webdataset",
            "shards": "cifar10/dev-000.tar",
            "classes": "cifar10/classes.txt",
            "templates": ["a photo of a {}"],
        },
        data_root=real_data,
    )
    assert Counter(source[n].meta["class"] for n in range(len(source))) == dict.fromkeys(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"], 50
    )
    assert "train-bird-" in source[2].id
    assert source[2].texts[0].text == "a photo of a bird"
    first_batch(source, ContrastiveProcessor(TOKENIZER, ImageTransform.clip(32)))


def test_nlvr_sentences(real_data):
    source = open_source(
        {
            "kind": "webdataset",
            "shards": "nlvr/dev-000.tar",
            "suffix": "true or false?",
            "fields": {"question": "sentence", "answer": "label"},
        },
        data_root=real_data,
    )
    assert len(source) == 5934
    assert {source[n].meta["answers"] for n in range(0, 5934, 50)} == {("true",), ("false",)}
    first_batch(source, SPLICE)


def test_coco_photographs(real_data):
    source = open_source(
        {"kind": "coco", "file": "coco_mini/captions_dev.json", "image_folder": "coco_mini/images"}, data_root=real_data
    )
    assert len(source) == 21
    assert all(len(source[n].texts[0].text) == 5 for n in range(21))
    batch = first_batch(source, ContrastiveProcessor(TOKENIZER, ImageTransform.clip(32)))
    assert len(set(batch.keys)) == 8
    llava = open_source(
        {"kind": "llava", "file": "coco_mini/llava_captions_dev.json", "image_folder": "coco_mini/images"},
        data_root=real_data,
    )
    assert len(llava) == 105
    first_batch(llava, SPLICE)
    assert len({next(p for p in llava[n].parts if isinstance(p, Image)).content_key() for n in range(8)}) == 2


def test_published_conversations_without_their_pictures(real_data):
    spec = {"kind": "llava", "file": "formats/llava/coco2014_val_gpt4_qa_30x3_conversations.json", "pictures": "first"}
    source = open_source(spec, data_root=real_data)
    assert len(source) == 90
    prompts = [str(render(source[n], "vicuna_v1", prompt=True)) for n in range(90)]
    assert all(p.count("<image>\n") == 1 and p.endswith(" ASSISTANT:") for p in prompts)
    quarantine = Quarantine(threshold=1.0)
    loader = Loader(source, SPLICE, batch_size=30, quarantine=quarantine, prefetch=0)
    assert list(islice(loader.epoch(), 5)) == []
    assert quarantine.reasons() == {"missing image": 90}
